"""Encoder and decoder of latent diffusion's autoencoder (Rombach et al. 2022, kl-f8), which diffusers calls AutoencoderKL.

That network parameter for parameter, and its parameters' names: tests/test_autoencoder_kl.py holds it against the library's.
Unlike `ConvEncoder` it halves the resolution with padding on the right and below alone, changes the width inside residual
blocks, has one head of attention at the lowest resolution, whatever that is, and groups of a thirty-second of the channels.
"""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from vaetrain.model.blocks import GroupNorm, Upsample, run_block, zero_init
from vaetrain.model.config import NUM_GROUPS, ModelConfig


class Norm(GroupNorm):
    """Of 32 groups."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, NUM_GROUPS, eps=1e-6)


class ResnetBlock(nn.Module):
    """x + f(x), f = (norm, SiLU, 3×3 convolution) twice; a 1×1 convolution on the skip where the width changes."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = Norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = Norm(out_channels)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.conv_shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        """Apply the block; resolution is kept."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


class MidAttention(nn.Module):
    """Self-attention of one head over all positions, added to its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.group_norm = Norm(channels)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([zero_init(nn.Linear(channels, channels))])

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Apply the block; cost grows with (h·w)²."""
        h = rearrange(self.group_norm(x), "b c h w -> b 1 (h w) c")
        attended = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + rearrange(self.to_out[0](attended), "b 1 (h w) c -> b c h w", h=x.shape[2])


class Downsample(nn.Module):
    """Half the resolution by a strided 3×3 convolution that sees one row below and one column to the right of the image."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        """Apply the block."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    """Residual blocks of one width, and what halves or doubles the resolution for the next level, if there is one."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, *, recompute: bool) -> None:
        super().__init__()
        widths = [in_channels, *[out_channels] * num_blocks]
        self.resnets = nn.ModuleList(ResnetBlock(*pair) for pair in pairwise(widths))
        self.downsamplers, self.upsamplers = nn.ModuleList(), nn.ModuleList()
        self._recompute = recompute

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        """Apply all blocks."""
        for block in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = run_block(block, x, recompute=self._recompute)
        return x


class MidBlock(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(self, channels: int, *, recompute: bool) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([MidAttention(channels)])
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels), ResnetBlock(channels, channels)])
        self._recompute = recompute

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Apply all blocks."""
        for block in (self.resnets[0], self.attentions[0], self.resnets[1]):
            x = run_block(block, x, recompute=self._recompute)
        return x


class KLEncoder(nn.Module):
    """(b, c, h, w) → mean and log-variance, each of `latent_channels`, at 1/`downsample_factor` of the resolution."""

    def __init__(self, config: ModelConfig, num_moments: int) -> None:
        super().__init__()
        channels = [config.base_channels * mult for mult in config.channel_mult]
        lowest = len(channels) - 1
        outputs = num_moments * config.latent_channels
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for level, width in enumerate(channels):
            block = Level(
                channels[max(0, level - 1)], width, config.num_res_blocks, recompute=level in config.checkpoint_levels
            )
            if level < lowest:
                block.downsamplers.append(Downsample(width))
            self.down_blocks.append(block)
        self.mid_block = MidBlock(channels[-1], recompute=lowest in config.checkpoint_levels)
        self.conv_norm_out = Norm(channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], outputs, 3, padding=1)
        self.quant_conv = nn.Conv2d(outputs, outputs, 1) if config.quant_conv else nn.Identity()

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b m h2 w2"]:
        """Moments of the posterior, stacked on dimension 1."""
        h = self.conv_in(x)
        for block in self.down_blocks:
            h = block(h)
        h = self.mid_block(h)
        return self.quant_conv(self.conv_out(F.silu(self.conv_norm_out(h))))


class KLDecoder(nn.Module):
    """Latent → (b, c·k, h, w), the likelihood's parameters; the encoder mirrored, with one more block per level."""

    def __init__(self, config: ModelConfig, params_per_channel: int) -> None:
        super().__init__()
        channels = [config.base_channels * mult for mult in config.channel_mult]
        lowest = len(channels) - 1
        latent = config.latent_channels
        self.post_quant_conv = nn.Conv2d(latent, latent, 1) if config.quant_conv else nn.Identity()
        self.conv_in = nn.Conv2d(latent, channels[-1], 3, padding=1)
        self.mid_block = MidBlock(channels[-1], recompute=lowest in config.checkpoint_levels)
        self.up_blocks = nn.ModuleList()
        for level in reversed(range(len(channels))):
            width = channels[level]
            block = Level(
                channels[min(lowest, level + 1)], width, config.num_res_blocks + 1,
                recompute=level in config.checkpoint_levels,
            )  # fmt: skip
            if level > 0:
                block.upsamplers.append(Upsample(width, width))
            self.up_blocks.append(block)
        self.conv_norm_out = Norm(channels[0])
        self.conv_out = nn.Conv2d(channels[0], config.in_channels * params_per_channel, 3, padding=1)

    @property
    def last_layer(self) -> Tensor:
        """Weight of the last convolution."""
        return self.conv_out.weight

    def features(self, z: Float[Tensor, "b l h w"]) -> Float[Tensor, "b d h2 w2"]:
        """Input of the last convolution."""
        h = self.mid_block(self.conv_in(self.post_quant_conv(z)))
        for block in self.up_blocks:
            h = block(h)
        return F.silu(self.conv_norm_out(h))

    def head(self, features: Float[Tensor, "b d h2 w2"]) -> Float[Tensor, "b ck h2 w2"]:
        """Parameters of p(x|z) from the input of the last convolution."""
        params: Tensor = self.conv_out(features)
        return params

    def forward(self, z: Float[Tensor, "b l h w"]) -> Float[Tensor, "b ck h2 w2"]:
        """Parameters of p(x|z)."""
        return self.head(self.features(z))
