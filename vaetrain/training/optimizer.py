"""AdamW, its learning rate as a function of images seen, and the moving average of weights."""

from __future__ import annotations

import copy
import math
from typing import Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vaetrain.config import Config, OptimConfig
from vaetrain.objective.config import beta_at

M = TypeVar("M", bound=nn.Module)


def learning_rate_at(config: OptimConfig, images_seen: int, total_images: int) -> float:
    """Learning rate of the step that ends at `images_seen` of `total_images`: linear warm-up, then cosine or flat.

    A pure function of images, so that it survives a resume and a change of batch size or process count.
    """
    warmup_images = config.warmup_within(total_images)
    if images_seen < warmup_images:
        return config.lr * images_seen / warmup_images
    if config.schedule == "constant":
        return config.lr
    progress = (images_seen - warmup_images) / max(1, total_images - warmup_images)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.final_lr_fraction + (1 - config.final_lr_fraction) * cosine)


def unfinished_warmups(config: Config, total_images: int) -> list[str]:
    """For each warm-up that does not end within a training of so many images, a sentence with both numbers and the remedy."""
    found = []
    warmup_images = config.optim.warmup_within(total_images)
    if warmup_images >= total_images:
        found.append(
            f"training is over after {total_images:,} images and the learning rate warms up for {warmup_images:,} "
            f"(--optim.warmup-images): it ends at {learning_rate_at(config.optim, total_images, total_images):.3g} of "
            f"{config.optim.lr:g}; --optim.warmup-fraction 0.05 fits any length"
        )
    objective = config.objective
    rising = {"constant": 0, "warmup": objective.beta_warmup_images, "cyclical": objective.beta_cycle_images // 2}
    if (ramp := rising[objective.beta_schedule]) >= total_images:
        option = "--objective.beta-warmup-images"
        if objective.beta_schedule == "cyclical":
            option = "half of --objective.beta-cycle-images"
        found.append(
            f"training is over after {total_images:,} images and β rises for {ramp:,} ({option}): it ends at "
            f"{beta_at(objective, total_images):.3g} of {objective.beta:g}"
        )
    return found


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW (CPU and CUDA); weight decay only on matrices and kernels."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


class ExponentialMovingAverage(Generic[M]):
    """A copy of the model whose weights follow the trained ones; what validation, samples and exports use.

    The half-life is counted in images, so that it means the same at any batch size, and is kept below a twentieth of
    the images seen, so that the random initial weights are forgotten (Karras et al. 2022, `ema_rampup_ratio`).
    """

    def __init__(self, model: M, half_life_images: int) -> None:
        self.module: M = copy.deepcopy(model).requires_grad_(False).eval()
        self.half_life_images = half_life_images

    @torch.no_grad()
    def update(
        self, model: nn.Module, batch_size: int, images_seen: int, skipped: Float[Tensor, ""] | None = None
    ) -> None:
        """Follow `model` after a step on `batch_size` images; where `skipped` is 1 (on the device) nothing moves."""
        half_life = min(self.half_life_images, images_seen / 20)
        share = 1 - 0.5 ** (batch_size / max(half_life, 1e-8))
        weight = share if skipped is None else (1 - skipped) * share
        averaged: list[Tensor] = list(self.module.parameters())
        current: list[Tensor] = list(model.parameters())
        # Not _foreach_lerp_: given a weight on the device it would wait for the device to read it.
        difference = list(torch._foreach_sub(current, averaged))
        torch._foreach_mul_(difference, weight)
        torch._foreach_add_(averaged, difference)
