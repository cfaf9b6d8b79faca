"""The curves that every run has: which metrics stand on one chart, under which names; figures and reports draw them from here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vaetrain.runs.record import points

NEGATED = "−"
"""Before the name of a metric: drawn with the other sign."""

MIN_FOR_CLIPPING = 10
"""Values; the range of fewer holds all of them."""


@dataclass(frozen=True)
class Curve:
    """A chart over training: which metrics, under which names."""

    title: str
    y: str
    lines: tuple[tuple[str, str], ...]
    """(label, metric)."""

    log_y: bool = False


LOSS = Curve("Loss", "nats per image",
             (("training: distortion + β · rate", "train/loss"), ("validation: −ELBO", f"{NEGATED}val/elbo_nats")))  # fmt: skip
DISTORTION = Curve("Distortion, −log p(x|z)", "nats per image",
                   (("training", "train/distortion_nats"), ("validation", "val/distortion_nats")))  # fmt: skip
RATE = Curve("Rate, KL(q(z|x) ‖ p(z))", "nats per image",
             (("training", "train/rate_nats"), ("validation", "val/rate_nats")))  # fmt: skip


def line_of(metrics: Sequence[dict[str, Any]], metric: str, x: str = "epoch") -> tuple[tuple[float, float], ...]:
    """(x, value) of the records that name the metric; NaN where it was not finite."""
    sign = -1 if metric.startswith(NEGATED) else 1
    return tuple((place, sign * value) for place, value in points(metrics, x, metric.removeprefix(NEGATED)))


def without_outliers(values: Sequence[float]) -> list[float]:
    """The values without the first, enormous ones (over twice the rest, the rest being 97%), which would flatten the rest."""
    if len(values) <= MIN_FOR_CLIPPING:
        return list(values)
    lower = sorted(values)[: max(2, math.ceil(0.97 * len(values)))]
    return lower if max(values) > 2 * max(map(abs, lower)) else list(values)
