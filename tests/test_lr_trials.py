"""Short trainings decide: made-up losses, broken trainings, and the rates that are tried."""

from __future__ import annotations

import math
from contextlib import closing
from itertools import pairwise

import pytest

from launching import TINY
from vaetrain.command_line import parse
from vaetrain.config import Config, OptimConfig
from vaetrain.data.readers.reader import open_split
from vaetrain.scale import describe_lr, suggested_lr
from vaetrain.scaling import lr_trials as module
from vaetrain.scaling.lr_range import LrCurve, LrRange
from vaetrain.scaling.lr_trials import LrTrial, LrTrials, candidates, lr_trials


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
    found = LrRange((LrCurve(0, rates, losses, reached_end=True),))
    lowest = found.curves[0].rate_at(1.0)
    chosen = candidates(found)
    assert chosen[0] == pytest.approx(found.curves[0].rate_at(0.9))
    assert lowest * 2**0.5 < chosen[-1] * 1.001 <= lowest * 2**1.5 * 1.002
    assert [b / a for a, b in pairwise(chosen)] == pytest.approx([2.0] * (len(chosen) - 1))


@pytest.fixture
def trials_where(tiny_shards, accelerator, monkeypatch):
    """Run lr_trials where a function of the rate is the loss that a training ends with; returns the rates as tried, too."""
    config = parse(Config, None, [*TINY, "--data.train", str(tiny_shards)])

    def run(function, rates):
        tried = []

        def train_at(lr, *_):
            tried.append(lr)
            return LrTrial(lr, () if function(lr) is None else (function(lr),))

        monkeypatch.setattr(module, "train_at", train_at)
        with closing(open_split(config.data, accelerator, "train")) as reader:
            return lr_trials(config, rates, 20, accelerator, reader), tried

    return run


def around(best):
    return lambda lr: 100 + 10 * abs(math.log2(lr / best))


@pytest.mark.parametrize(
    ("best", "further"),
    [(2.0, []), (1.0, [0.5]), (0.5, [0.5, 0.25]), (4.0, [8.0]), (8.0, [8.0, 16.0]), (1e-3, [0.5, 0.25, 0.125])],
)
def test_while_the_best_is_at_an_end_one_more_is_tried(trials_where, best, further):
    found, rates = trials_where(around(best), [1.0, 2.0, 4.0])
    assert rates == [1.0, 2.0, 4.0, *further]
    assert [each.lr for each in found.trials] == sorted(rates)
    if best == 1e-3:
        assert found.caveat == "the best is 0.125, the lowest rate tried: a lower one may be better"
    else:
        assert found.suggestion == best
        assert found.caveat == ""


def test_a_best_rate_at_the_end_is_told():
    assert "the highest rate tried: a higher one may be better" in trials_of(3.0, 2.0, 1.0).caveat
    range_test = LrRange((LrCurve(0, tuple(10.0**n for n in range(-5, 0)), (9.0, 8.9, 5.0, 1.0, 9.0), True),))
    assert range_test.suggestion is not None
    assert "may be better; the config has" in describe_lr(range_test, trials_of(1.0, 2.0, 3.0), OptimConfig())


def test_where_all_trainings_break_none_is_suggested_and_the_configs_own_is_kept(trials_where):
    found, rates = trials_where(lambda lr: None, [1.0, 2.0])
    assert rates == [1.0, 2.0, 0.5, 0.25, 0.125]  # lower ones might have lived
    assert found.suggestion is found.interval is None
    assert "not even at 0.125" in found.why_none
    assert found.caveat == ""
    range_test = LrRange((LrCurve(0, tuple(10.0**n for n in range(-5, 0)), (9.0, 8.9, 5.0, 1.0, 9.0), True),))
    assert suggested_lr(range_test, found) is None
    said = describe_lr(range_test, found, OptimConfig(lr=0.02))
    assert "no learning rate can be suggested" in said
    assert said.endswith("--optim.lr 0.02 is kept")
