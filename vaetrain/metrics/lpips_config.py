"""Which network LPIPS compares images with, and where its weights are, without importing torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class LpipsConfig:
    """LPIPS between images and their reconstructions; measured when both weight files are given. Nothing is downloaded."""

    net: Literal["alex", "vgg"] = "alex"
    """Backbone. `alex` is what papers report unless they say otherwise and takes images of 31 pixels or more; `vgg` takes 16
    or more and costs twenty times as much. Their numbers do not compare."""

    backbone: Path | None = None
    """torchvision's ImageNet weights of the backbone (.pth, or the same tensors as .safetensors)."""

    heads: Path | None = None
    """The weights of its five layers, version 0.1 of the LPIPS authors (.pth, or the same tensors as .safetensors)."""

    batch_size: int = 64
    """Pairs of images compared at a time, per process; memory and speed only."""

    def __post_init__(self) -> None:
        """One file alone gives no distance."""
        if (self.backbone is None) != (self.heads is None):
            given, missing = ("backbone", "heads") if self.heads is None else ("heads", "backbone")
            raise ValueError(f"--lpips.{given} is given without --lpips.{missing}; LPIPS needs both files, or neither")
        if self.batch_size < 1:
            raise ValueError(f"--lpips.batch-size is {self.batch_size}; it must be at least 1")
