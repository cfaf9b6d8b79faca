"""Short trainings at rates that the range test left open: where the range test ends in guesses, these decide.

A range test shows how far a few steps at each rate bring the loss, and how high a rate a training survives. Where the rate that
trains best lies between the two depends on the model: at the upper end on cats, a factor of five below it on MNIST
(docs/scaling.md). So each candidate, a factor of two apart, trains for a few hundred steps with the real warm-up and cosine, on
the same images with the same noise, and the lowest loss in the end wins.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from accelerate import Accelerator

from vaetrain.config import Config
from vaetrain.data.reader import Reader
from vaetrain.scaling.lr_range import LrRange
from vaetrain.scaling.trial import trial

LOW_FALL = 0.9
"""The lowest candidate is where the range test's loss has done this share of its fall."""

FACTOR = 2.0
"""Between candidates."""

LAST = 0.1
"""Share of the steps, at the end, over which the loss is averaged."""

WARMUP = 0.5
"""Most of a trial that its warm-up may take; cutting it shorter than training's favours low rates."""


@dataclass(frozen=True)
class LrTrial:
    """One short training."""

    lr: float
    final: tuple[float, ...]
    """Losses of its last steps, nats per image; empty when one was not finite."""

    @property
    def loss(self) -> float:
        """Their mean; infinite for a training that broke."""
        return statistics.fmean(self.final) if self.final else math.inf


@dataclass(frozen=True)
class LrTrials:
    """All of them, the rates ascending."""

    trials: tuple[LrTrial, ...]

    @property
    def best(self) -> LrTrial:
        """The lowest loss."""
        return min(self.trials, key=lambda each: each.loss)

    @property
    def suggestion(self) -> float:
        """The best rate, or between it and its neighbours the vertex of the parabola through the three, over log lr."""
        at = self.trials.index(self.best)
        if at in (0, len(self.trials) - 1):
            return self.best.lr
        below, above = self.trials[at - 1].loss, self.trials[at + 1].loss
        if not math.isfinite(below + above):
            return self.best.lr
        curvature = below - 2 * self.best.loss + above
        shift = 0.0 if curvature <= 0 else 0.5 * (below - above) / curvature
        return self.best.lr * FACTOR**shift

    @property
    def interval(self) -> tuple[float, float]:
        """The lowest and the highest rate whose loss is not clearly above the best: within two errors of their difference."""
        near = [each.lr for each in self.trials if each is self.best or not self._clearly_worse(each)]
        return min(*near, self.suggestion), max(*near, self.suggestion)

    def _clearly_worse(self, other: LrTrial) -> bool:
        if len(other.final) < 2:
            return True
        # Step by step, for the same images and noise: most of what varies is in both.
        differences = [theirs - ours for theirs, ours in zip(other.final, self.best.final, strict=True)]
        error = statistics.stdev(differences) / math.sqrt(len(differences))
        return statistics.fmean(differences) > 2 * error


def candidates(found: LrRange) -> list[float]:
    """Rates a factor of two apart, from most of the fall to one above the highest lowest point of any seed."""
    low = statistics.geometric_mean(curve.rate_at(LOW_FALL) for curve in found.curves)
    high = max(curve.rate_at(1.0) for curve in found.curves)
    count = 2 + max(1, round(math.log(high / low, FACTOR)))
    return [low * FACTOR**number for number in range(count)]


def lr_trials(
    config: Config, rates: Sequence[float], num_steps: int, accelerator: Accelerator, reader: Reader
) -> LrTrials:
    """Train with each rate for `num_steps` steps; a collective."""
    batch = config.train.global_batch_size
    warmup_steps = min(config.optim.warmup_images / batch, WARMUP * num_steps)
    num_last = max(2, round(LAST * num_steps))
    found = []
    for lr in rates:
        losses: list[float] = []
        with trial(config, accelerator, reader) as training:
            for step in range(num_steps):
                warmed = min(1.0, (step + 1) / max(1.0, warmup_steps))
                cosine = 0.5 * (1 + math.cos(math.pi * max(0.0, step - warmup_steps) / (num_steps - warmup_steps)))
                losses.append(training.step(lr * warmed * cosine).loss)
                if not math.isfinite(losses[-1]):
                    break
        whole = len(losses) == num_steps and math.isfinite(losses[-1])
        found.append(LrTrial(lr, tuple(losses[-num_last:]) if whole else ()))
        if accelerator.is_main_process:
            print(f"{num_steps} steps with learning rate {lr:.3g}: loss {found[-1].loss:,.5g} nats", flush=True)
    return LrTrials(tuple(found))
