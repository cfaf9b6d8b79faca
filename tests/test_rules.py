"""Scaling rules: composed they are one step, and they end where β would."""

from __future__ import annotations

import dataclasses
import math

import pytest

from vaetrain.config import OptimConfig
from vaetrain.scaling.rules import largest_ratio, scaled

OPTIM = OptimConfig(lr=1e-3, beta1=0.9, beta2=0.99, eps=1e-8, warmup_images=500)


def test_the_square_root_rule_is_malladis():
    four = scaled(OPTIM, 4.0, "sqrt")
    assert (four.lr, four.eps) == (pytest.approx(2e-3), pytest.approx(5e-9))
    assert (four.beta1, four.beta2) == (pytest.approx(0.6), pytest.approx(0.96))
    assert four.warmup_images == 500
    back = scaled(four, 0.25, "sqrt")
    for field in dataclasses.fields(OptimConfig):
        before, after = getattr(OPTIM, field.name), getattr(back, field.name)
        assert after == (pytest.approx(before) if isinstance(before, float) else before)


def test_the_memory_of_adam_in_images_stays():
    def half_life(beta: float, batch: int) -> float:
        return batch * math.log(0.5) / math.log(beta)

    twice = scaled(OPTIM, 2.0, "sqrt")
    assert half_life(twice.beta2, 64) == pytest.approx(half_life(OPTIM.beta2, 32), rel=0.02)


def test_the_linear_rule_moves_the_rate_alone():
    assert scaled(OPTIM, 4.0, "linear") == dataclasses.replace(OPTIM, lr=4e-3)
    assert scaled(OPTIM, 4.0, "none") == OPTIM


def test_it_ends_where_beta_would_be_negative():
    assert largest_ratio(OPTIM) == pytest.approx(10)
    assert scaled(OPTIM, 9.99, "sqrt").beta1 == pytest.approx(0.001)
    with pytest.raises(ValueError, match=r"--optim\.beta1 to -0\.1 .* the square-root rule ends at 10 times"):
        scaled(OPTIM, 11.0, "sqrt")
