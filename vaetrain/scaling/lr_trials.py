"""Short trainings at rates that the range test left open: where the range test ends in guesses, these decide.

A range test shows how far a few steps at each rate bring the loss, and how high a rate a training survives. Where the rate that
trains best lies between the two depends on the model: at the upper end on cats, a factor of five below it on MNIST
(docs/scaling.md). So each candidate, a factor of two apart, trains for a few hundred steps with the real warm-up and cosine, on
the same images with the same noise, and the lowest rate wins whose loss in the end is as good as the lowest.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from accelerate import Accelerator

from vaetrain.config import Config
from vaetrain.data.readers.reader import Reader
from vaetrain.scaling.lr_range import LrRange
from vaetrain.scaling.short_training import short_training

LOW_FALL = 0.9
"""The lowest candidate is where the range test's loss has done this share of its fall."""

FACTOR = 2.0
"""Between candidates."""

MAX_BEYOND = 3
"""Trainings more, each FACTOR further, while the best rate is the lowest or the highest tried."""

AS_GOOD = 0.01
"""Share of the best loss by which another may be higher and still count as equally good."""

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
    def as_good(self) -> list[LrTrial]:
        """Those whose loss is within AS_GOOD of the best."""
        return [each for each in self.trials if each.loss <= self.best.loss + AS_GOOD * abs(self.best.loss)]

    @property
    def why_none(self) -> str:
        """Why no rate can be suggested; empty when one can."""
        if any(each.final for each in self.trials):
            return ""
        return (
            f"no short training ends with a finite loss, not even at {self.trials[0].lr:.3g}: try --optim.lr below that"
        )

    @property
    def suggestion(self) -> float | None:
        """The lowest rate that is as good as the best: a training of full length wants a lower one than a short training.

        None when all trainings broke, see `why_none`.
        """
        return None if self.why_none else self.as_good[0].lr

    @property
    def interval(self) -> tuple[float, float] | None:
        """The lowest and the highest rate that is as good as the best."""
        return None if self.why_none else (self.as_good[0].lr, self.as_good[-1].lr)

    @property
    def beyond(self) -> float | None:
        """The rate to try next, below the lowest or above the highest where that is the best; None where both sides are worse."""
        if self.best is self.trials[0]:
            return self.best.lr / FACTOR
        return self.best.lr * FACTOR if self.best is self.trials[-1] else None

    @property
    def caveat(self) -> str:
        """That the best rate is the last one tried, on which side; empty when it is not."""
        if self.why_none or self.beyond is None:
            return ""
        end, other = ("lowest", "lower") if self.beyond < self.best.lr else ("highest", "higher")
        return f"the best is {self.best.lr:.3g}, the {end} rate tried: a {other} one may be better"


def candidates(found: LrRange) -> list[float]:
    """Rates a factor of two apart, from most of the fall to one above the highest lowest point of any seed."""
    low = statistics.geometric_mean(curve.rate_at(LOW_FALL) for curve in found.curves)
    high = max(curve.rate_at(1.0) for curve in found.curves)
    count = 2 + max(1, round(math.log(high / low, FACTOR)))
    return [low * FACTOR**number for number in range(count)]


def lr_trials(
    config: Config, rates: Sequence[float], num_steps: int, accelerator: Accelerator, reader: Reader
) -> LrTrials:
    """Train with each of the ascending rates for `num_steps` steps, and beyond them while the best is at an end.

    A collective: losses, and so what is tried next, are the same on all processes.
    """
    found = LrTrials(tuple(train_at(lr, config, num_steps, accelerator, reader) for lr in rates))
    for _ in range(MAX_BEYOND):
        if found.beyond is None:
            break
        further = train_at(found.beyond, config, num_steps, accelerator, reader)
        found = LrTrials(tuple(sorted((*found.trials, further), key=lambda each: each.lr)))
    return found


def train_at(lr: float, config: Config, num_steps: int, accelerator: Accelerator, reader: Reader) -> LrTrial:
    """One short training, from scratch; a collective."""
    warmup_steps = min(config.optim.warmup_images / config.train.global_batch_size, WARMUP * num_steps)
    losses: list[float] = []
    with short_training(config, accelerator, reader) as training:
        for step in range(num_steps):
            warmed = min(1.0, (step + 1) / max(1.0, warmup_steps))
            cosine = 0.5 * (1 + math.cos(math.pi * max(0.0, step - warmup_steps) / (num_steps - warmup_steps)))
            losses.append(training.step(lr * warmed * cosine).loss)
            if not math.isfinite(losses[-1]):
                break
    whole = len(losses) == num_steps and math.isfinite(losses[-1])
    num_last = max(2, round(LAST * num_steps))
    found = LrTrial(lr, tuple(losses[-num_last:]) if whole else ())
    if accelerator.is_main_process:
        ended = f"loss {found.loss:,.5g} nats" if whole else f"the loss is not finite after {len(losses) - 1}"
        print(f"{num_steps} steps with learning rate {lr:.3g}: {ended}", flush=True)
    return found
