"""The moving average of the weights."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


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
        pairs = zip(self.module.parameters(), model.parameters(), strict=True)
        trained = [(mean, weight) for mean, weight in pairs if weight.requires_grad]  # frozen ones keep their bits
        averaged: list[Tensor] = [mean for mean, _ in trained]
        current: list[Tensor] = [weight for _, weight in trained]
        # Not _foreach_lerp_: given a weight on the device it would wait for the device to read it.
        difference = list(torch._foreach_sub(current, averaged))
        torch._foreach_mul_(difference, weight)
        torch._foreach_add_(averaged, difference)
