"""What is minimised: the weight of the rate and its schedule, without importing torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class PerceptualConfig:
    """LPIPS between image and reconstruction, added to the loss (docs/objective.md). Nothing is downloaded."""

    weight: float = 0.0
    """Nats per image for an LPIPS of 1, which is a mean over positions: latent-diffusion's weight w is w · dimensions / b here. 0:
    no such term, and neither file is read."""

    net: Literal["alex", "vgg"] = "vgg"
    """Backbone: `vgg` is what first stages are trained with, and takes images of 16 pixels or more; `alex` 31."""

    backbone: Path | None = None
    """torchvision's ImageNet weights of the backbone (.pth, or the same tensors as .safetensors)."""

    heads: Path | None = None
    """The weights of its five layers, version 0.1 of the LPIPS authors (.pth, or the same tensors as .safetensors)."""

    resize: int | None = None
    """Side in pixels to which both images are enlarged, bilinearly, before they are compared: for small ones. None: as they are."""

    def __post_init__(self) -> None:
        """Refuse weights and sizes that mean nothing."""
        if self.weight < 0:
            raise ValueError(f"--objective.perceptual.weight is {self.weight}; it must not be negative")
        if self.resize is not None and self.resize < 1:
            raise ValueError(f"--objective.perceptual.resize is {self.resize}; give a size in pixels, or None")


@dataclass(frozen=True)
class ObjectiveConfig:
    """The training loss: distortion + β · rate + further terms, in nats per image (docs/objective.md)."""

    beta: float = 1.0
    """Weight of the rate. 1 is the ELBO; above it trades reconstruction for a latent closer to the prior (Higgins et al. 2017)."""

    beta_schedule: Literal["constant", "warmup", "cyclical"] = "constant"
    """How β gets there: at once, linearly from 0 (Sønderby et al. 2016), or in repeated ramps (Fu et al. 2019)."""

    beta_warmup_images: int = 0
    """Images over which β rises from 0 (warmup)."""

    beta_cycle_images: int = 0
    """Images of one cycle, the first half of which rises from 0 and the second stays at β (cyclical)."""

    free_bits: float = 0.0
    """Rate in nats per latent dimension and image below which lowering it earns nothing (Kingma et al. 2016)."""

    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)

    def __post_init__(self) -> None:
        """Refuse weights and schedules that mean nothing."""
        if self.beta < 0:
            raise ValueError(f"--objective.beta is {self.beta}; it must not be negative")
        if self.free_bits < 0:
            raise ValueError(f"--objective.free-bits is {self.free_bits}; it must not be negative")
        if self.beta_schedule == "warmup" and self.beta_warmup_images < 1:
            raise ValueError("--objective.beta-schedule warmup needs --objective.beta-warmup-images of at least 1")
        if self.beta_schedule == "cyclical" and self.beta_cycle_images < 2:
            raise ValueError("--objective.beta-schedule cyclical needs --objective.beta-cycle-images of at least 2")


def beta_at(config: ObjectiveConfig, images_seen: int) -> float:
    """β after `images_seen` images: a pure function, the same after a resume and for any number of processes."""
    match config.beta_schedule:
        case "constant":
            return config.beta
        case "warmup":
            return config.beta * min(1.0, images_seen / config.beta_warmup_images)
        case "cyclical":
            return config.beta * min(1.0, 2 * (images_seen % config.beta_cycle_images) / config.beta_cycle_images)
