"""β as a pure function of images seen, and the objectives that are refused."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vaetrain.objective.config import ObjectiveConfig, beta_at

WARMUP = ObjectiveConfig(beta=4.0, beta_schedule="warmup", beta_warmup_images=1000)
CYCLICAL = ObjectiveConfig(beta=4.0, beta_schedule="cyclical", beta_cycle_images=1000)


def test_a_constant_beta_is_there_at_once():
    assert [beta_at(ObjectiveConfig(beta=2.5), images) for images in (0, 1, 10**9)] == [2.5] * 3
    assert beta_at(ObjectiveConfig(), 0) == 1


@pytest.mark.parametrize(("images", "beta"), [(0, 0), (1, 0.004), (250, 1), (500, 2), (1000, 4), (1001, 4), (10**9, 4)])
def test_warmup_rises_linearly_from_zero_and_stays(images, beta):
    assert beta_at(WARMUP, images) == pytest.approx(beta)


@pytest.mark.parametrize(("images", "beta"), [(0, 0), (125, 1), (250, 2), (499, 3.992), (500, 4), (750, 4), (999, 4)])
@pytest.mark.parametrize("cycle", [0, 1, 7])
def test_cycles_rise_in_their_first_half_and_stay_in_their_second(cycle, images, beta):
    assert beta_at(CYCLICAL, 1000 * cycle + images) == pytest.approx(beta)


def test_schedules_never_leave_zero_to_beta():
    for config in (WARMUP, CYCLICAL):
        assert all(0 <= beta_at(config, images) <= 4 for images in range(0, 3000, 7))


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"beta": -0.1}, "--objective.beta is -0.1"),
        ({"free_bits": -1.0}, "--objective.free-bits is -1.0"),
        ({"beta_schedule": "warmup"}, "warmup needs --objective.beta-warmup-images"),
        ({"beta_schedule": "cyclical", "beta_cycle_images": 1}, "cyclical needs --objective.beta-cycle-images"),
    ],
)
def test_an_objective_that_means_nothing_is_refused(field, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**field)


def test_the_objective_s_configuration_does_not_import_torch():
    subprocess.run(
        [sys.executable, "-c", "import sys, vaetrain.objective.config; sys.exit('torch' in sys.modules)"], check=True
    )
