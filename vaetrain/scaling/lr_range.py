"""The learning-rate range test: one short training under a rising rate, and what its loss says (Smith 2017, Sec. 3.3).

"Cyclical Learning Rates for Training Neural Networks". The rate rises by a constant factor a step; the loss falls, lies flat
where the rate is too high to go on, and rises. The lowest point of the flat part is an accident of noise; where most of the fall
is done is not, and that is the suggestion where no short trainings (lr_trials.py) decide. docs/scaling.md says how both fared
against grids.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from accelerate import Accelerator

from vaetrain.config import Config
from vaetrain.data.readers.reader import Reader
from vaetrain.scaling.config import LrRangeConfig
from vaetrain.scaling.short_training import short_training

MOST_OF_THE_FALL = 0.98
"""Share of the smoothed loss's whole fall at which the rate is taken."""

HALF_LIFE_DECADES = 0.134
"""Of the smoothing: the average loses half its memory while the rate grows by so many powers of ten (4 steps of 150 over five
decades). In rates, not steps: more steps then average over more losses, and fewer do not lag behind the curve."""

DIVERGED = 0.5
"""A test ends when the smoothed loss has lost this share of what it had won, and then at once; winnings below MIN_FALL are none."""

MIN_FALL = 5.0
"""Standard deviations of the noise about the smoothed curve that the loss must fall by for the curve to mean anything."""

MIN_STEPS = 10
"""No test ends before so many."""

MAX_SPREAD = 10.0
"""Largest ratio between the rates of different seeds that is still one answer."""


@dataclass(frozen=True)
class LrCurve:
    """One repetition."""

    seed: int
    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    """Nats per image at each rate, before the step with it; the test ends where they stop being finite or are far up again."""
    reached_end: bool
    """Whether the test lived to see its last rate."""

    @property
    def smoothed(self) -> list[float]:
        """Running average of the losses, corrected for its start."""
        return smooth(self.losses, half_life_steps(self.lrs))

    @property
    def fallen_at(self) -> float:
        """The rate by which the smoothed loss has done MOST_OF_THE_FALL."""
        return self.rate_at(MOST_OF_THE_FALL)

    def rate_at(self, share: float) -> float:
        """The rate by which the smoothed loss has done this share of its whole fall; 1 for its lowest point."""
        smoothed = self.smoothed
        lowest = min(smoothed)
        level = max(lowest, smoothed[0] - share * (smoothed[0] - lowest))
        return next(lr for lr, loss in zip(self.lrs, smoothed, strict=True) if loss <= level)

    @property
    def fall(self) -> float:
        """How far the smoothed loss falls, in standard deviations of single losses about it on the way."""
        smoothed = self.smoothed
        lowest = smoothed.index(min(smoothed))
        noise = noise_about(smoothed, self.losses, lowest + 1)
        return (smoothed[0] - smoothed[lowest]) / noise if noise > 0 else math.inf


@dataclass(frozen=True)
class LrRange:
    """All repetitions, and the rate they suggest."""

    curves: tuple[LrCurve, ...]

    @property
    def why_none(self) -> str:
        """Why no rate can be suggested; empty when one can."""
        if broken := [curve for curve in self.curves if not curve.losses]:
            return (
                f"with seed {broken[0].seed} the loss is not finite before the first step, whatever the learning rate: see to "
                "the --model and --objective options, or try --train.precision fp32"
            )
        lowest_rate = self.curves[0].lrs[0]
        if short := [curve.seed for curve in self.curves if len(curve.losses) < 3]:
            return (
                f"with seed {short[0]} the loss is not finite from the start: lower --lr-range.lowest {lowest_rate:g}"
            )
        if rising := [curve.seed for curve in self.curves if min(curve.losses) == curve.losses[0]]:
            return (
                f"with seed {rising[0]} the loss never falls below its first value: the range starts too high, lower "
                f"--lr-range.lowest {lowest_rate:g}"
            )
        if noisy := [curve for curve in self.curves if curve.fall < MIN_FALL]:
            return (
                f"with seed {noisy[0].seed} the loss falls by {noisy[0].fall:.1f} standard deviations of its noise, less than "
                f"{MIN_FALL:g}: give a larger --train.global-batch-size or more --lr-range.num-steps"
            )
        if any(curve.reached_end and curve.smoothed[-1] == min(curve.smoothed) for curve in self.curves):
            return f"the loss still falls at {self.curves[0].lrs[-1]:.3g}: raise --lr-range.highest"
        rates = [curve.fallen_at for curve in self.curves]
        if max(rates) / min(rates) > MAX_SPREAD:
            return (
                f"the seeds disagree: most of the fall is done by {min(rates):.2g} with one and {max(rates):.2g} with another; "
                "give more --lr-range.num-steps"
            )
        return ""

    @property
    def suggestion(self) -> float | None:
        """Geometric mean over seeds; None when the curves are too noisy, see `why_none`."""
        if self.why_none:
            return None
        return statistics.geometric_mean(curve.fallen_at for curve in self.curves)

    @property
    def interval(self) -> tuple[float, float] | None:
        """What the lowest and the highest seed alone would suggest."""
        if self.why_none:
            return None
        rates = [curve.fallen_at for curve in self.curves]
        return min(rates), max(rates)


def half_life_steps(lrs: Sequence[float]) -> float:
    """HALF_LIFE_DECADES in steps of rates that rise by a constant factor."""
    return HALF_LIFE_DECADES / math.log10(lrs[1] / lrs[0]) if len(lrs) > 1 else 1.0


def smooth(losses: Sequence[float], half_life: float) -> list[float]:
    """Exponential moving average that loses half its memory in `half_life` steps, divided by the weight it has gathered."""
    keep = 0.5 ** (1 / half_life)
    average, weight, smoothed = 0.0, 0.0, []
    for loss in losses:
        average = keep * average + (1 - keep) * loss
        weight = keep * weight + (1 - keep)
        smoothed.append(average / weight)
    return smoothed


def lr_range(config: Config, options: LrRangeConfig, accelerator: Accelerator, reader: Reader) -> LrRange:
    """Run the test with each seed; a collective."""
    factor = (options.highest / options.lowest) ** (1 / (options.num_steps - 1))
    rates = [options.lowest * factor**number for number in range(options.num_steps)]
    curves = []
    for number in range(options.num_seeds):
        seed = config.seed + number
        losses: list[float] = []
        with short_training(replace(config, seed=seed), accelerator, reader) as training:
            for lr in rates:
                loss = training.step(lr).loss
                if not math.isfinite(loss) or has_diverged([*losses, loss], half_life_steps(rates)):
                    break
                losses.append(loss)
        curves.append(LrCurve(seed, tuple(rates[: len(losses)]), tuple(losses), len(losses) == len(rates)))
        if accelerator.is_main_process and len(losses) > 2:
            print(
                f"learning-rate range, seed {seed}: most of the fall is done by {curves[-1].fallen_at:.3g}", flush=True
            )
    return LrRange(tuple(curves))


def noise_about(smoothed: Sequence[float], losses: Sequence[float], count: int) -> float:
    """Standard deviation of the first `count` losses about their running average; infinite where there are too few to tell."""
    residuals = [loss - mean for loss, mean in zip(losses[1:count], smoothed[1:count], strict=True)]
    return statistics.pstdev(residuals) if len(residuals) > 1 else math.inf


def has_diverged(losses: Sequence[float], half_life: float) -> bool:
    """Whether the end of a curve is so far up again that nothing below it will come."""
    if len(losses) <= MIN_STEPS:
        return False
    smoothed = smooth(losses, half_life)
    lowest = min(smoothed)
    # A low first loss is luck: the ups and downs of a loss that has not begun to fall are no divergence.
    noise = noise_about(smoothed, losses, max(MIN_STEPS, smoothed.index(lowest) + 1))
    won = max(smoothed[0] - lowest, MIN_FALL * noise)
    return smoothed[-1] - lowest > DIVERGED * won and smoothed[-1] > smoothed[-2]
