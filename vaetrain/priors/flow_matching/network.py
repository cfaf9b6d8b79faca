"""The networks that flow matching trains: velocities of latents, given the time and a class.

    latent (c, h, w)   LatentTransformer: patches as tokens, DiT (Peebles & Xie 2023), adaLN-Zero
    latent (d,)        LatentMLP: residual blocks with the same conditioning (Li et al. 2024, arXiv 2406.11838)

Both begin as the velocity 0: what opens each block and the last layer start at zero.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor, nn

from vaetrain.priors.flow_matching.config import NetworkConfig

TIME_FEATURES = 256
TIME_SCALE = 1000.0
"""Times in [0, 1] are spread so that the highest frequency tells a thousandth."""


class Conditioning(nn.Module):
    """(time, class) → (b, width). Class `num_classes` stands for none."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(num_classes + 1, width)
        nn.init.normal_(self.label.weight, std=0.02)

    def forward(self, t: Float[Tensor, " b"], labels: Int64[Tensor, " b"]) -> Float[Tensor, "b width"]:
        """Sum of both embeddings, through SiLU."""
        exponents = torch.arange(TIME_FEATURES // 2, device=t.device) / (TIME_FEATURES // 2)
        angles = TIME_SCALE * t[:, None] * torch.exp(-math.log(10_000) * exponents)
        return F.silu(self.time(torch.cat([angles.cos(), angles.sin()], dim=1)) + self.label(labels))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """The normalised features (b, …, width), scaled and shifted by the condition (b, width)."""
    places = (len(x), *(1 for _ in x.shape[1:-1]), x.shape[-1])
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale.view(places)) + shift.view(places)


def zero_linear(in_features: int, out_features: int) -> nn.Linear:
    """A linear layer whose output is 0 at first."""
    layer = nn.Linear(in_features, out_features)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class TransformerBlock(nn.Module):
    """Attention over the tokens, then a layer of each token alone; both opened by the condition (adaLN-Zero)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)
        self.modulation = zero_linear(width, 6 * width)

    def forward(self, x: Float[Tensor, "b n width"], condition: Float[Tensor, "b width"]) -> Float[Tensor, "b n width"]:
        """Tokens in and out."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(condition).chunk(6, dim=1)
        q, k, v = rearrange(self.qkv(modulated(x, shift, scale)), "b n (k h d) -> k b h n d", k=3, h=self.heads)
        attended = rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")
        x = x + gate[:, None] * self.dropout(self.out(attended))
        return x + mlp_gate[:, None] * self.mlp(modulated(x, mlp_shift, mlp_scale))


class LatentTransformer(nn.Module):
    """Velocity of a spatial latent."""

    def __init__(self, config: NetworkConfig, latent_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        channels, *sides = latent_shape
        self.patch_size = config.patch_size
        rows, columns = (side // config.patch_size for side in sides)
        patch = channels * config.patch_size**2
        self.patches = nn.Linear(patch, config.width)
        self.register_buffer("positions", sincos_positions(rows, columns, config.width), persistent=False)
        self.condition = Conditioning(config.width, num_classes)
        blocks = (TransformerBlock(config.width, config.heads, config.dropout) for _ in range(config.depth))
        self.blocks = nn.ModuleList(blocks)
        self.modulation = zero_linear(config.width, 2 * config.width)
        self.out = zero_linear(config.width, patch)

    def forward(
        self, z: Float[Tensor, "b c h w"], t: Float[Tensor, " b"], labels: Int64[Tensor, " b"]
    ) -> Float[Tensor, "b c h w"]:
        """At z, at time t."""
        p = self.patch_size
        x = self.patches(rearrange(z, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)) + self.positions
        condition = self.condition(t, labels)
        for block in self.blocks:
            x = block(x, condition)
        x = self.out(modulated(x, *self.modulation(condition).chunk(2, dim=1)))
        return rearrange(x, "b (h w) (c p q) -> b c (h p) (w q)", p=p, q=p, h=z.shape[2] // p)


def sincos_positions(rows: int, columns: int, width: int) -> Float[Tensor, "n width"]:
    """Sines and cosines of row and column at width/4 frequencies each (MAE, DiT)."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(width // 4) / (width // 4))
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = torch.cat([place.reshape(-1, 1) * frequencies for place in (row, column)], dim=1)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class MLPBlock(nn.Module):
    """Two layers beside the identity, opened by the condition."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Dropout(dropout), nn.Linear(width, width))
        self.modulation = zero_linear(width, 3 * width)

    def forward(self, x: Float[Tensor, "b width"], condition: Float[Tensor, "b width"]) -> Float[Tensor, "b width"]:
        """Features in and out."""
        shift, scale, gate = self.modulation(condition).chunk(3, dim=1)
        return x + gate * self.mlp(modulated(x, shift, scale))


class LatentMLP(nn.Module):
    """Velocity of a latent vector."""

    def __init__(self, config: NetworkConfig, latent_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        (dims,) = latent_shape
        self.first = nn.Linear(dims, config.width)
        self.condition = Conditioning(config.width, num_classes)
        self.blocks = nn.ModuleList(MLPBlock(config.width, config.dropout) for _ in range(config.depth))
        self.modulation = zero_linear(config.width, 2 * config.width)
        self.out = zero_linear(config.width, dims)

    def forward(
        self, z: Float[Tensor, "b d"], t: Float[Tensor, " b"], labels: Int64[Tensor, " b"]
    ) -> Float[Tensor, "b d"]:
        """At z, at time t."""
        x, condition = self.first(z), self.condition(t, labels)
        for block in self.blocks:
            x = block(x, condition)
        velocity: Tensor = self.out(modulated(x, *self.modulation(condition).chunk(2, dim=1)))
        return velocity


def build_network(config: NetworkConfig, latent_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """The network for latents of this shape; raises ValueError where its patches do not fit."""
    config.check_latent(latent_shape)
    kind = LatentMLP if len(latent_shape) == 1 else LatentTransformer
    return kind(config, latent_shape, num_classes)
