"""Short trainings decide: made-up losses, broken trainings, and the rates that are tried."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from vaetrain.scaling.lr_range import Curve, LrRange
from vaetrain.scaling.lr_trials import LrTrial, LrTrials, candidates


def trials_of(*losses):
    """At 1e-3, 2e-3, …; None is a training that broke."""
    return LrTrials(
        tuple(
            LrTrial(1e-3 * 2**number, () if loss is None else (loss - 0.1, loss + 0.1, loss))
            for number, loss in enumerate(losses)
        )
    )


def test_the_lowest_rate_that_is_as_good_as_the_best_is_suggested():
    found = trials_of(120.0, 100.9, 100.0, 100.5, 130.0)
    assert found.best.lr == 4e-3
    assert found.suggestion == 2e-3
    assert found.interval == (2e-3, 8e-3)
    assert trials_of(120.0, 101.1, 100.0).suggestion == 4e-3
    assert trials_of(-985.0, -995.0, -1000.0, -900.0).suggestion == 2e-3  # densities
    assert trials_of(3.0, 2.0, 0.0).suggestion == 4e-3


def test_a_training_that_broke_never_wins():
    found = trials_of(2.0, None)
    assert found.best.lr == 1e-3
    assert found.trials[1].loss == math.inf
    assert found.interval == (1e-3, 1e-3)


def test_candidates_reach_from_most_of_the_fall_to_the_lowest_point():
    rates = tuple(1e-4 * 2 ** (number / 4) for number in range(40))
    losses = tuple(abs(number - 24) * 10.0 for number in range(40))
    found = LrRange((Curve(0, rates, losses, reached_end=True),))
    lowest = found.curves[0].rate_at(1.0)
    chosen = candidates(found)
    assert chosen[0] == pytest.approx(found.curves[0].rate_at(0.9))
    assert lowest * 2**0.5 < chosen[-1] * 1.001 <= lowest * 2**1.5 * 1.002
    assert [b / a for a, b in pairwise(chosen)] == pytest.approx([2.0] * (len(chosen) - 1))
