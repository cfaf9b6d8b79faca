"""A latent as bytes: what a sample's KEY.safetensors holds, and the rows that readers keep in memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float32, UInt8
from safetensors.torch import save
from torch import Tensor

from vaetrain.latents.manifest import LatentDtype

DTYPES: dict[LatentDtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FLIP = "_flip"

Parts = Mapping[str, Float32[Tensor, "b *latent"]]
"""mean, logvar, mean_flip and logvar_flip, or those of them that there are."""


@dataclass(frozen=True)
class LatentRecord:
    """What a stored latent is made of: its parts one after the other, all of one shape and dtype."""

    shape: tuple[int, ...]
    dtype: LatentDtype
    variational: bool
    flipped: bool

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """Names, in the order in which safetensors writes them."""
        names = ["mean", *(["logvar"] if self.variational else [])]
        return tuple(sorted([*names, *(name + FLIP for name in names if self.flipped)]))

    @property
    def part_bytes(self) -> int:
        """Size of a part."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def num_bytes(self) -> int:
        """Size of a row: that of all parts."""
        return len(self.parts) * self.part_bytes

    @cached_property
    def header(self) -> bytes:
        """What precedes the parts in a file of safetensors; the same for every sample."""
        empty = save({name: torch.zeros(self.shape, dtype=DTYPES[self.dtype]) for name in self.parts})
        return empty[: -self.num_bytes]

    def rounded(self, parts: Parts) -> dict[str, Float32[Tensor, "b *latent"]]:
        """The values that are stored, as float32."""
        return {name: parts[name].to(DTYPES[self.dtype]).float() for name in self.parts}

    def pack(self, parts: Parts) -> UInt8[Tensor, "b row"]:
        """Rows of some images."""
        rows = [parts[name].to(DTYPES[self.dtype]).contiguous().flatten(1).view(torch.uint8) for name in self.parts]
        return torch.cat(rows, dim=1)

    def unpack(self, rows: UInt8[Tensor, "b row"]) -> dict[str, Float32[Tensor, "b *latent"]]:
        """Parts of some rows, on their device."""
        whole = rows.view(DTYPES[self.dtype]).view(len(rows), len(self.parts), *self.shape)
        return {name: whole[:, number].float() for number, name in enumerate(self.parts)}
