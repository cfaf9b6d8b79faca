"""The range test's rule on curves of known shape, and what it refuses to suggest from."""

from __future__ import annotations

import math
import random

import pytest

from vaetrain.scaling.lr_range import LrCurve, LrRange, half_life_steps, has_diverged, smooth

RATES = tuple(1e-5 * 10 ** (number / 30) for number in range(150))


def curve(seed: int = 0, *, noise: float = 1.0, fall: float = 300.0, at: float = 1e-3) -> LrCurve:
    """Flat, then falling where the rate passes `at`, and up again a hundred times later."""
    rng = random.Random(seed)
    losses = [
        500 - fall / (1 + (at / lr) ** 2) + fall * min(2.0, (lr / (100 * at)) ** 3) + rng.gauss(0, noise)
        for lr in RATES
    ]
    return LrCurve(seed, RATES, tuple(losses), reached_end=True)


def test_smoothing_is_an_average_without_a_bias_at_the_start():
    assert smooth([3.0, 3.0, 3.0], 4.0) == pytest.approx([3, 3, 3])
    first, second = smooth([0.0, 1.0], 4.0)
    keep = 0.5**0.25
    assert (first, second) == (0.0, pytest.approx(1 / (1 + keep)))


@pytest.mark.parametrize("at", [1e-4, 1e-3, 3e-3])
def test_the_suggestion_follows_the_curve(at):
    found = LrRange(tuple(curve(seed, at=at) for seed in range(3)))
    assert found.why_none == ""
    low, high = found.interval
    assert 0.999 * low <= found.suggestion <= 1.001 * high < 2.5 * low
    # 98 % of the fall is done at 7 × at, were it not for the rise, which the lag of the smoothing makes up for.
    assert 3 * at < found.suggestion < 15 * at


def test_a_curve_of_noise_gives_none_and_says_why():
    found = LrRange((curve(0), curve(1, noise=400.0)))
    assert found.suggestion is found.interval is None
    assert "with seed 1 the loss falls by" in found.why_none
    assert "--train.global-batch-size" in found.why_none


def test_seeds_that_disagree_give_none():
    found = LrRange((curve(0, at=1e-4), curve(1, at=5e-3)))
    assert "the seeds disagree" in found.why_none


def test_a_range_that_ends_too_early_gives_none():
    short = curve(0, at=1e-3)
    found = LrRange((LrCurve(0, short.lrs[:60], short.losses[:60], reached_end=True),))
    assert "raise --lr-range.highest" in found.why_none


def test_a_range_that_starts_too_high_gives_none_and_says_what_to_lower():
    rising = tuple(500.0 + 40 * number for number in range(12))
    found = LrRange((curve(0), LrCurve(1, RATES[:12], rising, reached_end=False)))
    assert found.suggestion is None
    assert found.why_none == (
        "with seed 1 the loss never falls below its first value: the range starts too high, lower --lr-range.lowest 1e-05"
    )
    short = LrRange((LrCurve(0, (1e-5,), (1.0,), reached_end=False),))
    assert "not finite from the start: lower --lr-range.lowest 1e-05" in short.why_none


def test_a_first_loss_that_is_not_finite_is_told():
    found = LrRange((curve(0), LrCurve(1, (), (), reached_end=False)))
    assert found.suggestion is found.interval is None
    assert "with seed 1 the loss is not finite before the first step, whatever the learning rate" in found.why_none


def test_a_loss_that_stops_being_finite_while_it_falls_ends_the_test_and_no_more():
    short = curve(0, at=1e-3)
    found = LrRange((LrCurve(0, short.lrs[:80], short.losses[:80], reached_end=False),))
    assert found.why_none == ""
    assert found.suggestion <= short.lrs[79]


def test_fewer_steps_over_the_same_rates_suggest_the_same():
    full = curve(0, noise=0.1)
    coarse = LrCurve(0, full.lrs[::4], full.losses[::4], reached_end=True)
    assert half_life_steps(coarse.lrs) == pytest.approx(half_life_steps(full.lrs) / 4)
    assert coarse.fallen_at == pytest.approx(full.fallen_at, rel=0.5)


def test_a_test_ends_when_the_loss_is_up_again():
    losses = list(curve(0).losses)
    ended = next(number for number in range(11, 150) if has_diverged(losses[:number], 4.0))
    assert losses.index(min(losses)) < ended < 149
    assert not has_diverged(losses[: losses.index(min(losses))], 4.0)
    assert math.isfinite(losses[ended])


def test_the_noise_of_a_loss_that_has_not_begun_to_fall_is_no_divergence():
    """The first losses of 64×64 cats at half width: the first is low by luck, and nothing has been won that could be lost."""
    found = (18744, 20076, 23123, 21385, 19159, 20431, 19438, 20156, 19110, 17770, 19259, 19500, 20300)
    losses = [float(loss) for loss in found]
    assert not any(has_diverged(losses[:count], 4.0) for count in range(1, 14))
    assert has_diverged([*losses, 90_000.0, 400_000.0], 4.0)
