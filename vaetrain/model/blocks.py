"""The building blocks of the convolutional encoder and decoder; all map (b, c, h, w) to (b, c', h', w')."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def as_they_are(x: Tensor) -> AbstractContextManager[object]:
    """Inside, activations like `x` keep their dtype.

    On CUDA autocast makes them float32 around every norm and upsampling, which moves and keeps twice the bytes.
    """
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


class GroupNorm(nn.GroupNorm):
    """GroupNorm with groups of about 16 channels; it never mixes images, so a batch may be cut anywhere.

    In and out in the dtype of the activations; the kernels sum in float32.
    """

    def __init__(self, channels: int, num_groups: int | None = None, eps: float = 1e-5) -> None:
        if num_groups is None:
            num_groups = max(1, channels // 16)
            while channels % num_groups:
                num_groups -= 1
        super().__init__(num_groups, channels, eps)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Normalise each image's groups."""
        with as_they_are(x):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def run_block(block: nn.Module, x: Float[Tensor, "b c h w"], *, recompute: bool) -> Float[Tensor, "b d h2 w2"]:
    """Apply a block; if `recompute`, with its input alone kept for the backward pass, which computes it once more.

    (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost".) Gradients are the same to the bit wherever kernels are
    deterministic.
    """
    # Blocks draw nothing at random, so that no generator's state is to be kept.
    return checkpoint(block, x, use_reentrant=False, preserve_rng_state=False) if recompute else block(x)


class Blocks(nn.ModuleList):
    """Blocks one after the other, each of a level; those of `checkpoint_levels` are computed once more in the backward pass."""

    def __init__(self, checkpoint_levels: Collection[int]) -> None:
        super().__init__()
        self._checkpoint_levels = frozenset(checkpoint_levels)
        self._is_checkpointed: list[bool] = []

    def add(self, block: nn.Module, level: int) -> None:
        """Append a block of this level."""
        self.append(block)
        self._is_checkpointed.append(level in self._checkpoint_levels)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        """Apply all blocks."""
        for block, is_checkpointed in zip(self, self._is_checkpointed, strict=True):
            x = run_block(block, x, recompute=is_checkpointed)
        return x


Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


def zero_init(layer: Layer) -> Layer:
    """Start a residual branch at zero, so that a deep network begins as the identity (Zhang et al. 2019, Fixup)."""
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class ResBlock(nn.Module):
    """x + f(x), f = (norm, SiLU, 3×3 convolution) twice; a 1×1 convolution on the skip where the width changes."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(out_channels)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        """Apply the block; resolution is kept."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.skip(x) + h


class Attention(nn.Module):
    """Self-attention over all positions with heads of about 64 channels, added to its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.num_heads = max(1, channels // 64)
        while channels % self.num_heads:
            self.num_heads -= 1
        self.norm = GroupNorm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Apply the block; cost grows with (h·w)²."""
        q, k, v = rearrange(self.qkv(self.norm(x)), "b (three n d) h w -> three b n (h w) d", three=3, n=self.num_heads)
        attended = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(rearrange(attended, "b n (h w) d -> b (n d) h w", h=x.shape[2]))


class Downsample(nn.Conv2d):
    """Half the resolution by a strided 3×3 convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, stride=2, padding=1)


class Upsample(nn.Module):
    """Twice the resolution: nearest neighbour, then a 3×3 convolution (no checkerboard, Odena et al. 2016)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        """Apply the block."""
        with as_they_are(x):
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x)
