"""What is minimised: the weight of the rate and its schedule, without importing torch."""

from __future__ import annotations

import math
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
class AdversarialConfig:
    """A discriminator that learns to tell reconstructions from images, and what it thinks added to the loss (docs/objective.md)."""

    weight: float = 0.0
    """With `adaptive` the share of the reconstruction's gradient (distortion and perceptual term) that the adversarial one is given
    at the decoder's last layer; without, nats per image for a logit of 1. 0: no discriminator at all."""

    adaptive: bool = True
    """Multiply the weight by |reconstruction's gradient| / |adversarial gradient| at the decoder's last layer, over all processes
    and a moving mean over the steps before (Esser et al. 2021)."""

    loss: Literal["hinge", "non-saturating"] = "hinge"
    """hinge: max(0, 1 ∓ logit) for the discriminator, −logit for the decoder. non-saturating: softplus of ∓logit, and of −logit."""

    layers: int = 3
    """Strided convolutions of the PatchGAN discriminator: 2 sees patches of 34 pixels, 3 of 70 (Isola et al. 2017)."""

    channels: int = 64
    """Channels of its first layer; each next has twice as many, up to 8 times."""

    norm: Literal["group", "spectral"] = "group"
    """group: GroupNorm. spectral: weights divided by their largest singular value (Miyato et al. 2018). Never of a batch."""

    start_fraction: float = 0.5
    """Fraction of training after which the decoder sees the discriminator."""

    start_images: int | None = None
    """The same in images, in place of `start_fraction`. None: that."""

    lead_fraction: float = 0.05
    """Fraction of training, before the start, in which the discriminator learns and the decoder does not see it yet."""

    ramp_fraction: float = 0.05
    """Fraction of training, after the start, over which the weight rises from 0: reconstructions do not jump."""

    lr: float | None = None
    """The discriminator's peak learning rate, on the same schedule as the model's. None: the model's."""

    lecam: float = 0.0
    """Weight of LeCam regularisation, which keeps logits near the other side's running mean (Tseng et al. 2021); 0.001 is usual."""

    r1: float = 0.0
    """γ of the penalty γ/2 · |gradient of the mean logit by the pixels of real images|² (Mescheder et al. 2018). It costs a second
    backward pass of the discriminator."""

    augment: tuple[Literal["colour", "translation", "cutout"], ...] = ()
    """What is done to image and reconstruction alike before the discriminator sees them, with gradients: for small sets, which it
    would memorise (Zhao et al. 2020, "Differentiable Augmentation")."""

    def __post_init__(self) -> None:
        """Refuse weights, shapes and times that mean nothing."""
        name = "--objective.adversarial"
        for option in ("weight", "lecam", "r1"):
            if not 0 <= getattr(self, option) < math.inf:
                raise ValueError(f"{name}.{option} is {getattr(self, option)}; it must not be negative")
        for option in ("layers", "channels"):
            if getattr(self, option) < 1:
                raise ValueError(f"{name}.{option} is {getattr(self, option)}; it must be at least 1")
        for option in ("start_fraction", "lead_fraction", "ramp_fraction"):
            if not 0 <= getattr(self, option) <= 1:
                raise ValueError(
                    f"{name}.{option.replace('_', '-')} is {getattr(self, option)}; give a fraction in [0, 1]"
                )
        if self.start_images is not None and self.start_images < 0:
            raise ValueError(f"{name}.start-images is {self.start_images}; give a number of images, or None")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ValueError(f"{name}.lr is {self.lr}; give a positive number, or None for the model's")

    def check_images(self, image_size: int) -> None:
        """Raise ValueError unless the discriminator can see images of this size."""
        smallest = 3 * 2**self.layers
        if self.weight and image_size < smallest:
            raise ValueError(
                f"--objective.adversarial.layers {self.layers} needs images of at least {smallest} pixels, and these have "
                f"{image_size}; give fewer layers"
            )

    @property
    def shape(self) -> dict[str, str]:
        """What the discriminator's weights fit, by option."""
        return {"layers": str(self.layers), "channels": str(self.channels), "norm": self.norm}


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
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)

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


def adversarial_weight_at(config: AdversarialConfig, images_seen: int, total_images: int) -> float | None:
    """The weight, without its adaptive factor, after `images_seen` of `total_images`; a pure function, as β is.

    0 while the discriminator alone learns, None before it does, and where there is none.
    """
    start = config.start_fraction * total_images if config.start_images is None else config.start_images
    if config.weight == 0 or images_seen < start - config.lead_fraction * total_images:
        return None
    ramp = config.ramp_fraction * total_images
    risen = min(1.0, (images_seen - start) / ramp) if ramp else float(images_seen >= start)
    return config.weight * max(0.0, risen)
