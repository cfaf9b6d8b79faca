"""The convolutional encoder and decoder in overlapping tiles, for images that are too large for the device as a whole.

Every layer is applied to all tiles before the next one is. A tile overlaps its neighbours by what the layer's convolution sees, and
norms take their statistics from the whole map. So the result is that of the whole image everywhere, up to rounding, and there are
no seams; to encode tiles by themselves and blend them, as is common, gives each a normalisation of its own.
The device holds a tile at a time. Maps between layers stay where the image is, such as in the memory of the host.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from vaetrain.model.blocks import Downsample, GroupNorm, ResBlock, Upsample
from vaetrain.upload import upload

MARGIN = 2
"""Cells by which tiles overlap: a 3×3 convolution sees one, and an even number keeps strides of 2 in step."""

Layer = Callable[[Tensor], Tensor]


class TiledLayers:
    """Layers applied tile by tile to a map (b, c, h, w), which changes its size with `tile`, the side of a tile in its cells."""

    def __init__(self, x: Float[Tensor, "b c h w"], tile: int, device: torch.device) -> None:
        """Tiles are computed on `device`; `x` and the results stay on the device of `x`."""
        self.x = x
        self._tile = tile
        self._device = device

    def convolve(self, layer: Layer, *, norm: GroupNorm | None = None, up: int = 1, down: int = 1) -> None:
        """Replace x by layer(x), of `up` times or one `down`-th its size; after normalisation and SiLU if there is a `norm`."""
        self.x = self._convolved(layer, norm, up, down)
        self._tile = self._tile * up // down

    def apply(self, block: nn.Module) -> None:
        """Replace x by block(x); attention, which sees everything, has no tiles."""
        if isinstance(block, Downsample):
            self.convolve(block, down=2)
        elif isinstance(block, Upsample):
            self.convolve(block, up=2)
        else:
            assert isinstance(block, ResBlock), f"{type(block).__name__} cannot be applied in tiles"
            before = self.x
            skip = before if isinstance(block.skip, nn.Identity) else self._convolved(block.skip, None, 1, 1)
            self.convolve(block.conv1, norm=block.norm1)
            self.convolve(block.conv2, norm=block.norm2)
            self.x += skip

    def _convolved(self, layer: Layer, norm: GroupNorm | None, up: int, down: int) -> Float[Tensor, "b d h2 w2"]:
        normalised = self._normalisation(norm) if norm else None
        height, width = self.x.shape[2:]
        out: Tensor | None = None
        for top in range(0, height, self._tile):
            for left in range(0, width, self._tile):
                first = max(0, top - MARGIN), max(0, left - MARGIN)
                part = self._cut(first[0], top + self._tile + MARGIN, first[1], left + self._tile + MARGIN)
                result = layer(part if normalised is None else F.silu(normalised(part)))
                if out is None:
                    size = len(result), result.shape[1], height * up // down, width * up // down
                    out = torch.empty(size, dtype=result.dtype, device=self.x.device)
                row, column = top * up // down, left * up // down
                place = out[..., row : row + self._tile * up // down, column : column + self._tile * up // down]
                from_row, from_column = row - first[0] * up // down, column - first[1] * up // down
                place.copy_(
                    result[..., from_row : from_row + place.shape[2], from_column : from_column + place.shape[3]]
                )
        assert out is not None
        return out

    def _normalisation(self, norm: GroupNorm) -> Layer:
        """The norm with the statistics of the whole map, as a factor and a shift for each image and channel."""
        b, c, height, width = self.x.shape
        sums = torch.zeros(2, b, norm.num_groups, dtype=torch.float64, device=self._device)
        for top in range(0, height, self._tile):
            for left in range(0, width, self._tile):
                part = self._cut(top, top + self._tile, left, left + self._tile)
                groups = rearrange(part, "b (g c) h w -> b g (c h w)", g=norm.num_groups).double()
                sums += torch.stack([groups.sum(2), groups.square().sum(2)])
        mean, mean_square = sums / (c // norm.num_groups * height * width)
        std = (mean_square - mean.square()).clamp(min=0).add(norm.eps).sqrt()
        mean, std = (each.repeat_interleave(c // norm.num_groups, dim=1) for each in (mean, std))
        factor = norm.weight / std
        shift = norm.bias - mean * factor
        factor, shift = (each.to(self.x.dtype)[:, :, None, None] for each in (factor, shift))
        return lambda part: part * factor + shift

    def _cut(self, top: int, bottom: int, left: int, right: int) -> Float[Tensor, "b c th tw"]:
        part = self.x[..., top:bottom, left:right].contiguous(memory_format=torch.channels_last)
        return upload(part, self._device)
