"""Steps that would spoil the weights are skipped; after too many in a row training goes back, once, and says so."""

import json
import math
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

import vaetrain.training.divergence
from fault_scenarios import spoilt_losses, train_together
from launching import TINY
from vaetrain.config import OptimConfig, TrainConfig
from vaetrain.training.divergence import note_steps
from vaetrain.training.figures import mark_incidents
from vaetrain.training.meters import LogWindow
from vaetrain.training.progress import Progress
from vaetrain.training.schedule import learning_rate_at
from vaetrain.training.spikes import STEPS_BEFORE_JUDGING, SpikeDetector, skipping

CPU = torch.device("cpu")
SPOILT = ("--train.max-nonfinite-steps", 5, "--optim.schedule", "constant", "--train.ema-half-life-images", 0)


def judge_all(judge, norms):
    return [tuple(int(verdict) for verdict in judge.detect(torch.tensor(norm))) for norm in norms]


def test_a_norm_far_above_the_recent_ones_is_skipped():
    judge = SpikeDetector(100.0, CPU)
    assert judge_all(judge, [2.0, 0.5] * (STEPS_BEFORE_JUDGING // 2)) == [(0, 0)] * STEPS_BEFORE_JUDGING
    assert judge_all(judge, [99.0, 105.0, math.nan, math.inf, 1.0]) == [(0, 0), (0, 0), (1, 0), (1, 0), (0, 0)]
    assert judge_all(judge, [1e4, 1e9]) == [(1, 1)] * 2


def test_skipped_norms_do_not_move_the_mean_and_a_zero_gradient_does_not_break_it():
    judge = SpikeDetector(100.0, CPU)
    judge_all(judge, [1.0] * STEPS_BEFORE_JUDGING)
    before = judge.mean_log_norm.item()
    judge_all(judge, [1e9, math.nan] * 10)
    assert judge.mean_log_norm.item() == before
    judge_all(judge, [0.0])
    assert math.isfinite(judge.mean_log_norm.item())


def test_the_first_steps_are_not_judged_and_none_never_judges():
    assert judge_all(SpikeDetector(2.0, CPU), [1.0] * (STEPS_BEFORE_JUDGING - 1) + [1e9])[-1] == (0, 0)
    judge = SpikeDetector(None, CPU)
    assert judge_all(judge, [1.0] * STEPS_BEFORE_JUDGING + [1e30, math.nan])[-2:] == [(0, 0), (1, 0)]


def test_it_goes_on_from_its_state():
    one, other = SpikeDetector(100.0, CPU), SpikeDetector(100.0, CPU)
    norms = torch.rand(70, generator=torch.Generator().manual_seed(0)).tolist()
    judge_all(one, norms)
    other.load_state_dict(one.state_dict())
    assert judge_all(one, [30.0, 80.0]) == judge_all(other, [30.0, 80.0])
    assert torch.equal(one.mean_log_norm, other.mean_log_norm)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_skipped_step_changes_neither_weights_nor_moments(scaled):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if scaled else None

    def step(skipped, gradient=1.0):
        weight.grad = torch.full((3,), gradient * (8.0 if scaler else 1.0))
        with skipping(torch.tensor(skipped), optimizer):
            if scaler is None:
                optimizer.step()
                return
            scaler.scale(torch.zeros(()))
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
        scaler.update()

    step(0.0)
    before = weight.detach().clone(), optimizer.state[weight]["exp_avg"].clone()
    assert not torch.equal(before[0], torch.ones(3))
    step(1.0)
    if scaler:
        assert scaler.get_scale() == 8, "a spike does not lower the scale"
        step(0.0, gradient=torch.inf)
        assert scaler.get_scale() == 4
    assert torch.equal(weight, before[0])
    assert torch.equal(optimizer.state[weight]["exp_avg"], before[1])
    step(0.0)
    assert not torch.equal(weight, before[0])


def records(run_dir, split):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["split"] == split]


def check_rolled_back(run_dir):
    """An explosion at the seventh step and five NaN after it: back to step 5, and to the end with half the rate."""
    (event,) = records(run_dir, "event")
    assert (event["event"], event["from_step"], event["to_step"], event["lr_factor"]) == ("rollback", 12, 5, 0.5)
    assert event["reason"].startswith("6 steps in a row up to step 12")
    assert event["step"] == 5
    train = records(run_dir, "train")
    assert [record["step"] for record in train] == [1, 2, 4, 5, 6, 8, 10, 12, 14, 15]
    full = [
        learning_rate_at(OptimConfig(warmup_images=40, schedule="constant"), record["images_seen"], 300)
        for record in train
    ]
    assert [record["train/lr"] for record in train] == [rate * (0.5 if n > 3 else 1) for n, rate in enumerate(full)]
    assert [record["epoch"] for record in records(run_dir, "val")] == [1.0, 2.0, 3.0]
    state = json.loads((run_dir / "checkpoints" / "step-00000015" / "state.json").read_text())
    assert (state["progress"]["rollbacks"], state["progress"]["lr_factor"]) == (1, 0.5)


def test_two_processes_go_back_together(tiny_shards, tmp_path):
    own = ("--data.train", tiny_shards, "--train.epochs", 3, "--run-dir", tmp_path / "run")
    outcome = train_together(tmp_path / "out", "spoilt", *TINY, *own, *SPOILT)
    assert outcome.exit_codes == [0, 0], outcome.printed
    assert "rolled back from step 12 to 5, learning rates × 0.5" in outcome.printed[0]
    assert outcome.weights[0] == outcome.weights[1] != ""
    check_rolled_back(tmp_path / "run")


def test_one_process_goes_back(train_tiny):
    with spoilt_losses():
        run_dir = train_tiny(*SPOILT, epochs=3)
    check_rolled_back(run_dir)


def test_the_checkpoint_to_go_back_to_outlives_those_of_the_skipped_steps(train_tiny):
    """One each step, of which two stay; a validation at step 10, in the midst of them, is not the best."""
    with spoilt_losses():
        run_dir = train_tiny(*SPOILT, "--checkpoint.every-steps", 1, "--checkpoint.keep-last", 2, epochs=3)
    (event,) = records(run_dir, "event")
    assert (event["from_step"], event["to_step"]) == (12, 6)


def test_streaks_that_end_move_the_step_to_go_back_to():
    def window(longest, running):
        return LogWindow({}, skipped_steps=longest, exploded_steps=0, longest_streak=longest, skip_streak=running)

    progress = Progress(step=10)
    assert not note_steps(progress, window(3, 0), 20)
    assert progress.sound_step == 10
    progress.step = 20
    assert not note_steps(progress, window(4, 4), 20)
    assert progress.sound_step == 16
    best = Progress(step=20, sound_step=16, best_score=1.0, best_step=16)
    best.note_validation(2.0)
    assert (best.best_step, best.validations_without_best) == (16, 0)
    progress.step = 50
    assert note_steps(progress, window(25, 0), 20)  # over by now, and still a divergence
    assert progress.sound_step == 16


def test_the_figure_of_losses_shows_it():
    train = [{"epoch": epoch, "train/skipped_steps": skipped} for epoch, skipped in ((0.5, 0), (1.0, 2), (1.5, 1))]
    figure, axis = plt.subplots()
    mark_incidents(axis, train, [{"event": "rollback", "epoch": 1.0}])
    shown = {marks.get_label(): marks.get_offsets()[:, 0].tolist() for marks in axis.collections}
    assert shown == {"steps skipped": [1.0, 1.5], "rolled back": [1.0]}
    assert not axis.get_lines()  # by which the limits of the axis are chosen
    plt.close(figure)


def test_what_was_skipped_is_counted(train_tiny):
    with spoilt_losses():
        run_dir = train_tiny(epochs=3)
    train = records(run_dir, "train")
    assert sum(record["train/skipped_steps"] for record in train) == 6
    assert sum(record["train/exploded_steps"] for record in train) == 1
    state = json.loads((run_dir / "checkpoints" / "step-00000015" / "state.json").read_text())
    assert (state["progress"]["skipped_steps"], state["progress"]["exploded_steps"]) == (6, 1)
    assert records(run_dir, "event") == []


def test_a_second_divergence_stops_the_run_after_a_resume_too(train_tiny):
    with spoilt_losses():
        run_dir = train_tiny(*SPOILT, epochs=3)
    with (
        spoilt_losses(),
        pytest.raises(FloatingPointError, match=r"after going back once to learning rates × 0\.5; no weight"),
    ):
        train_tiny(*SPOILT, epochs=6)
    rollback, end = records(run_dir, "event")
    assert (rollback["event"], end["event"], end["step"]) == ("rollback", "diverged", 20)
    assert end["reason"].startswith("5 steps in a row up to step 20")


def test_a_kill_while_it_goes_back_leaves_one_event_and_no_record_of_the_skipped_steps(train_tiny, monkeypatch):
    """After the checkpoint with the lower learning rate is written, before the records are put right; then before that."""

    def kill(*_):
        raise KeyboardInterrupt

    for moment in ("log_rollback", "finish"):
        run_dir = Path(moment)
        with spoilt_losses(), monkeypatch.context() as patched:
            if moment == "finish":
                patched.setattr(vaetrain.training.divergence.Checkpoints, "load", kill)
            else:
                patched.setattr(vaetrain.training.divergence.RunLogger, moment, kill)
            with pytest.raises(KeyboardInterrupt):
                train_tiny(*SPOILT, epochs=3, run_dir=run_dir)
        run_dir = train_tiny(*SPOILT, epochs=3, run_dir=run_dir)
        events = [(event["event"], event["to_step"], event["lr_factor"]) for event in records(run_dir, "event")]
        assert events == ([("rollback", 5, 0.5)] if moment == "log_rollback" else [])
        assert [record["step"] for record in records(run_dir, "train")][-4:] == [10, 12, 14, 15]
        assert len({record["step"] for record in records(run_dir, "train")}) == len(records(run_dir, "train"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--train.rollback-lr-factor", "None"), "5 steps in a row up to step 12"),
        (("--train.val-every-epochs", 3), "there is no checkpoint from before them"),
    ],
)
def test_where_there_is_no_way_back_the_run_stops(train_tiny, arguments, message):
    with spoilt_losses(), pytest.raises(FloatingPointError, match=message.replace("5 steps", "6 steps")):
        train_tiny(*SPOILT, *arguments, epochs=3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"skip_above": 1.0}, "--train.skip-above is 1.0; give a factor above 1"),
        ({"rollback_lr_factor": 0.0}, "--train.rollback-lr-factor is 0.0; give a factor in"),
        ({"timeout_s": 0.0}, "--train.timeout-s is 0.0; it must be positive"),
    ],
)
def test_settings_that_mean_nothing_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**values)
