"""Training that has a time limit saves and stops before it, and says early that it will."""

import json

import pytest

from fault_scenarios import train_together
from launching import TINY
from vaetrain.config import TrainConfig
from vaetrain.exit_codes import EXIT_STOPPED
from vaetrain.runs.checkpoint_names import list_checkpoints
from vaetrain.training.time_limit import TimeLimit


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when told to."""
    seconds = [100.0]
    monkeypatch.setattr("vaetrain.training.time_limit.time.monotonic", lambda: seconds[0])
    return seconds


def test_room_is_left_for_the_longest_turn_and_the_longest_save(clock):
    limit = TimeLimit(1.0)
    for took in (0, 300, 10, 10):  # the second had a validation
        clock[0] += took
        assert not limit.is_near(60.0)
    clock[0] = 100 + 3600 - 300 - 60 - 10 - 1 - 5
    assert not TimeLimit(None).is_near(60.0)
    limit._turn_began = clock[0] - 10
    assert not limit.is_near(60.0)
    clock[0] += 10
    assert limit.is_near(60.0)


def test_it_says_once_that_the_time_is_too_short(clock):
    limit = TimeLimit(2.0)
    assert limit.forecast(7200, images_per_s=1.0) is None
    assert limit.forecast(100_000, images_per_s=1.0) is None  # only when the speed is first known
    said = TimeLimit(2.0).forecast(36_000, images_per_s=1.0)
    assert said is not None
    assert "takes 10 hours more and --train.max-hours 2 leaves 2" in said
    assert TimeLimit(None).forecast(10**9, images_per_s=1.0) is None


def test_two_processes_stop_before_the_time_and_go_on(tiny_shards, tmp_path):
    arguments = (*TINY, "--data.train", tiny_shards, "--train.epochs", 10**6, "--run-dir", tmp_path / "run")
    limit = ("--train.max-hours", 15 / 3600)
    outcome = train_together(tmp_path / "first", "slow", *arguments, *limit)
    assert outcome.exit_codes == [EXIT_STOPPED, EXIT_STOPPED]
    assert outcome.weights[0] == outcome.weights[1] != ""
    said = outcome.printed[0]
    assert "hours more and --train.max-hours 0.00416667 leaves" in said
    assert "saved and stopped by --train.max-hours 0.00416667; the same command goes on from here" in said
    newest = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert json.loads((newest / "state.json").read_text())["progress"]["step"] > 0


def test_no_time_is_refused():
    with pytest.raises(ValueError, match=r"--train\.max-hours is 0"):
        TrainConfig(max_hours=0.0)
