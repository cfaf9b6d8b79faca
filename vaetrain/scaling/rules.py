"""How optimizer settings follow the batch size; derived in docs/scaling.md. Without importing torch."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

from vaetrain.config import OptimConfig

RuleName = Literal["sqrt", "linear", "none"]


def scaled(optim: OptimConfig, ratio: float, rule: RuleName) -> OptimConfig:
    """The settings for a batch `ratio` times as large. What is counted in images (warm-up, EMA half-life) stays.

    sqrt: Adam's (Malladi et al. 2022, "On the SDEs and Scaling Rules for Adaptive Gradient Algorithms", Definition 5.3): lr √κ,
    1 − β κ for both β, ε / √κ. linear: SGD's (Goyal et al. 2017, Sec. 2.1): lr κ and nothing else. none: nothing.
    Raises ValueError where β would leave [0, 1): the rule ends there.
    """
    if rule == "none" or ratio == 1:
        return optim
    if rule == "linear":
        return replace(optim, lr=optim.lr * ratio)
    beta1, beta2 = 1 - ratio * (1 - optim.beta1), 1 - ratio * (1 - optim.beta2)
    if beta1 < 0 or beta2 < 0:
        raise ValueError(
            f"a batch {ratio:g} times as large would take --optim.beta1 to {beta1:.3g} and --optim.beta2 to {beta2:.3g}: the "
            f"square-root rule ends at {largest_ratio(optim):g} times"
        )
    root = math.sqrt(ratio)
    return replace(optim, lr=optim.lr * root, beta1=beta1, beta2=beta2, eps=optim.eps / root)


def largest_ratio(optim: OptimConfig) -> float:
    """How much larger a batch the square-root rule reaches, before a β falls below 0."""
    return 1 / max(1 - optim.beta1, 1 - optim.beta2)
