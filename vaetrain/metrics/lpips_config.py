"""Which network LPIPS compares images with, and where its weights are, without importing torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from vaetrain.objective.config import PerceptualConfig

HEADS_URL = "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1"


class Backbone(NamedTuple):
    """A torchvision classifier as LPIPS uses it."""

    name: str
    """Its builder in torchvision.models."""
    ends: tuple[int, ...]
    """Where in `features` the five layers end, each after a ReLU."""
    channels: tuple[int, ...]
    """Channels of the five layers."""
    url: str
    """The weights torchvision publishes, its IMAGENET1K_V1."""
    min_size: int
    """Side in pixels of the smallest image of which the last layer leaves a position."""


BACKBONES = {
    "alex": Backbone(
        "alexnet", (2, 5, 8, 10, 12), (64, 192, 384, 256, 256),
        "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", min_size=31,
    ),
    "vgg": Backbone(
        "vgg16", (4, 9, 16, 23, 30), (64, 128, 256, 512, 512),
        "https://download.pytorch.org/models/vgg16-397923af.pth", min_size=16,
    ),
}  # fmt: skip


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


def how_to_get_weights(net: str, options: str = "--lpips") -> str:
    """The two files that LPIPS needs, and where they go."""
    return (
        f"LPIPS through {net} needs two files, anywhere on this machine: {BACKBONES[net].url} as {options}.backbone FILE "
        f"and {HEADS_URL}/{net}.pth (the package lpips contains it) as {options}.heads FILE."
    )


def require_file(path: Path | None, option: str, remedy: str) -> Path:
    """The path, if it is given and a file; else ValueError or FileNotFoundError, with the remedy."""
    if path is None:
        raise ValueError(f"{option} is not given. {remedy}")
    if not path.is_file():
        raise FileNotFoundError(f"{option} {path} is no file. {remedy}")
    return path


PERCEPTUAL = "--objective.perceptual"


def check_perceptual(config: PerceptualConfig, image_size: int) -> None:
    """Refuse a perceptual term, where there is one, without its files or for images that do not fit it.

    Raises FileNotFoundError or ValueError.
    """
    if not config.weight:
        return
    remedy = how_to_get_weights(config.net, PERCEPTUAL)
    for name in ("backbone", "heads"):
        require_file(getattr(config, name), f"{PERCEPTUAL}.{name}", remedy)
    if config.resize is not None and config.resize < image_size:
        raise ValueError(
            f"{PERCEPTUAL}.resize is {config.resize}, less than the images' {image_size} pixels; it enlarges small images. "
            "Leave it out"
        )
    min_size = BACKBONES[config.net].min_size
    if (config.resize or image_size) < min_size:
        raise ValueError(
            f"{PERCEPTUAL}.net {config.net} takes images of at least {min_size} pixels a side and these have {image_size}; "
            f"pass {PERCEPTUAL}.resize {max(64, min_size)}"
        )
