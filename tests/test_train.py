"""Training end to end: what a run leaves behind, resuming, divergence, early stopping, and that it learns."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load

import vaetrain
import vaetrain.train
import vaetrain.training.ema
import vaetrain.training.logger
import vaetrain.training.step
from launching import TINY, run
from together import script_succeeds
from vaetrain.runs.checkpoint_names import list_checkpoints
from vaetrain.training import precision
from vaetrain.training.gradient_step import nan_unless_finite
from vaetrain.training.progress import Progress


def records(run_dir, split):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["split"] == split]


def weights(run_dir):
    """Raw and averaged weights of the newest checkpoint, read into memory: load_file alone maps the file."""
    checkpoint = list_checkpoints(run_dir / "checkpoints")[-1]
    return load((checkpoint / "model.safetensors").read_bytes()), load((checkpoint / "ema.safetensors").read_bytes())


def test_a_run_leaves_everything_behind(train_tiny, tiny_shards):
    run_dir = train_tiny(figures=True)
    assert {path.name for path in run_dir.iterdir()} - {"uncommitted.patch"} == {
        "config.yaml", "provenance.json", "dataset.json", "metrics.jsonl", "checkpoints", "figures", ".lock",
    }  # fmt: skip
    figures = {path.name for path in (run_dir / "figures").iterdir()}
    assert figures == {f"{name}.png" for name in ("losses", "kl", "reconstructions", "samples", "interpolations")}
    assert [record["step"] for record in records(run_dir, "train")] == [1, 2, 4, 5, 6, 8, 10]
    assert [record["epoch"] for record in records(run_dir, "val")] == [1.0, 2.0]
    for record in (*records(run_dir, "train"), *records(run_dir, "val")):
        assert {"step", "images_seen", "epoch", "split"} <= record.keys()
    last = records(run_dir, "train")[-1]
    assert last["images_seen"] == 200
    assert last["train/loss"] == pytest.approx(last["train/distortion_nats"] + last["train/rate_nats"], rel=1e-6)
    assert {
        "train/beta",
        "train/grad_norm",
        "perf/images_per_s",
        "perf/data_wait_frac",
        "perf/mfu",
        "perf/peak_memory_gib",
    } <= last.keys()
    val = records(run_dir, "val")[-1]
    assert {
        f"val/{name}"
        for name in ("elbo_nats", "distortion_nats", "rate_nats", "bits_per_dim", "mse", "psnr_db", "ssim")
    } <= val.keys()
    assert val["val/elbo_nats"] == pytest.approx(-val["val/distortion_nats"] - val["val/rate_nats"])
    assert val["val/elbo_nats"] != val["val_raw/elbo_nats"]
    provenance = json.loads((run_dir / "provenance.json").read_text())
    manifest = json.loads((tiny_shards / "manifest.json").read_text())
    assert provenance["dataset_fingerprint"] == manifest["fingerprint"]
    assert provenance["packages"]["torch"] == torch.__version__.split("+")[0]
    checkpoint = list_checkpoints(run_dir / "checkpoints")[-1]
    for name in ("config.yaml", "provenance.json", "dataset.json"):
        assert (checkpoint / name).read_text() == (run_dir / name).read_text()


def test_an_interrupted_run_equals_the_uninterrupted_one(train_tiny, monkeypatch):
    whole = train_tiny(run_dir="whole", epochs=4)

    class Killed(Exception):
        pass

    def die_later(self, progress, *arguments, **keywords):
        if progress.step == 18:  # past the checkpoint of step 15, and past the record of step 16
            raise Killed
        return original(self, progress, *arguments, **keywords)

    original = vaetrain.training.logger.RunLogger.log_training
    monkeypatch.setattr(vaetrain.training.logger.RunLogger, "log_training", die_later)
    with pytest.raises(Killed):
        train_tiny(run_dir="broken", epochs=4)
    monkeypatch.undo()
    broken = train_tiny(run_dir="broken", epochs=4)
    for before, after in zip(weights(whole), weights(broken), strict=True):
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    for split in ("train", "val"):
        timeless = [
            [
                {key: value for key, value in record.items() if not key.startswith("perf/")}
                for record in records(run_dir, split)
            ]
            for run_dir in (whole, broken)
        ]
        assert timeless[0] == timeless[1]
    assert len(json.loads((broken / "provenance.json").read_text())["resumes"]) == 1


def test_a_damaged_checkpoint_is_passed_over(train_tiny, capsys):
    run_dir = train_tiny(epochs=3)
    before = weights(run_dir)[0]
    newest = list_checkpoints(run_dir / "checkpoints")[-1]
    content = bytearray((newest / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "model.safetensors").write_bytes(content)
    train_tiny(epochs=3)
    printed = capsys.readouterr()
    assert "model.safetensors is damaged" in printed.err
    assert "resuming from" in printed.out
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(run_dir)[0].items())


def test_what_may_not_change_on_resume(train_tiny, copy_of_tiny_run):
    copy_of_tiny_run()
    with pytest.raises(ValueError, match=r"--seed 0, now it is 1"):
        train_tiny("--seed", 1)
    with pytest.raises(ValueError, match=r"--model"):
        train_tiny("--model.latent-channels", 8)
    with pytest.raises(FileExistsError, match="already holds a run"):
        train_tiny("--resume", "never")


def test_resuming_from_another_run(train_tiny, copy_of_tiny_run):
    first = copy_of_tiny_run("first")
    both = train_tiny("--resume", first, run_dir="second", epochs=2)
    assert [record["epoch"] for record in records(both, "val")] == [2.0]
    assert records(first, "val")[-1]["epoch"] == 1.0
    assert vaetrain.load(both).sample(1).shape == (1, 3, 16, 16)  # the best checkpoint is the second run's own


def test_steps_that_are_not_finite_change_nothing_and_stop_the_run(train_tiny, copy_of_tiny_run, monkeypatch):
    good = copy_of_tiny_run("good")
    before = weights(good)[0]
    monkeypatch.setattr(vaetrain.training.step, "negative_elbo", lambda distortion, *_: distortion * math.nan)
    with pytest.raises(FloatingPointError, match=r"5 steps in a row.*lr"):
        train_tiny("--train.max-nonfinite-steps", 5, run_dir="good", epochs=3)
    assert records(good, "train")[-1]["train/loss"] is None
    assert records(good, "train")[-1]["train/skipped_steps"] == 2
    monkeypatch.undo()
    after = weights(good)[0]
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert train_tiny(run_dir="good", epochs=3)  # and it can go on


def test_one_bad_step_is_skipped_and_counted(train_tiny, monkeypatch):
    calls = iter(range(100))

    def once_infinite(distortion, kl, beta, free_bits):
        return distortion + kl.sum(1).sum() * (math.inf if next(calls) == 3 else 1.0)

    monkeypatch.setattr(vaetrain.training.step, "negative_elbo", once_infinite)
    average = vaetrain.training.ema.ExponentialMovingAverage
    skipped_by_average = []
    update = average.update
    monkeypatch.setattr(average, "update", lambda *a: (skipped_by_average.append(float(a[4])), update(*a)))
    run_dir = train_tiny()
    assert skipped_by_average == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0]
    assert [record["train/skipped_steps"] for record in records(run_dir, "train")] == [0, 0, 1, 0, 0, 0, 0]
    assert all(torch.isfinite(tensor).all() for part in weights(run_dir) for tensor in part.values())
    state = json.loads((list_checkpoints(run_dir / "checkpoints")[-1] / "state.json").read_text())
    assert state["progress"]["skipped_steps"] == 1


def test_a_loss_that_is_not_finite_has_a_gradient_that_is_not():
    """Even where the loss's own gradient would be finite: it must reach the other processes through the reduction."""
    x = torch.tensor(2.0, requires_grad=True)
    nan_unless_finite(x + math.inf).backward()
    assert x.grad.isnan()
    x.grad = None
    nan_unless_finite(3 * x).backward()
    assert x.grad == 3


def test_early_stopping(train_tiny):
    run_dir = train_tiny("--train.patience", 2, "--optim.lr", "1e-12", "--train.ema-half-life-images", 0, epochs=30)
    assert len(records(run_dir, "val")) < 30


def test_best_checkpoint_survives_retention(train_tiny, monkeypatch):
    scores = iter([5.0, 9.0, 3.0, 2.0, 1.0])
    note = Progress.note_validation
    monkeypatch.setattr(Progress, "note_validation", lambda progress, *_: note(progress, next(scores)))
    run_dir = train_tiny("--checkpoint.keep-last", 1, epochs=5)
    assert [path.name for path in list_checkpoints(run_dir / "checkpoints")] == ["step-00000010", "step-00000025"]


@pytest.mark.parametrize("kind", ["vae", "ae"])
def test_it_overfits_a_handful_of_images(train_tiny, kind):
    """100 images of pure noise cannot be compressed; a model that learns them one by one must still beat their mean."""
    run_dir = train_tiny(
        "--model.kind", "dense", "--model.hidden-features", 256, "--model.latent-channels", 64,
        "--model.variational", str(kind == "vae"), "--model.likelihood", "gaussian-shared", "--objective.beta", 0.01,
        "--optim.lr", "3e-3", "--data.horizontal-flip", "False", "--train.val-every-epochs", 40, epochs=40,
    )  # fmt: skip
    losses = [record["train/distortion_nats"] for record in records(run_dir, "train")]
    assert losses[-1] < losses[0] - 300


def test_every_precision_and_option_trains(tiny_shards, tmp_path):
    """bf16, compile and the trackers."""
    out = script_succeeds(
        "vaetrain/train.py", "--data.train", tiny_shards, *TINY, "--train.epochs", 1, "--train.precision", "bf16",
        "--log.tensorboard", "True", "--log.wandb", "offline", "--run-dir", tmp_path / "run",
    )  # fmt: skip
    assert "run written to" in out
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))
    assert list((tmp_path / "run").rglob("*.wandb"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.train", "no/such/shards"], "shard set no/such/shards does not exist"),
        (["--model.image-size", "32"], "pass --model.image-size 16, or make shards with --size 32"),
        (["--model.in-channels", "1"], "pass --model.in-channels 3"),
        (["--train.micro-batch-size", "3"], "--train.micro-batch-size 3 does not divide"),
        (["--train.global-batch-size", "200"], "fewer than one global batch"),
        (["--data.classes", "dragon"], "dragon"),
    ],
)
def test_what_the_user_can_mend_is_said(train_tiny, arguments, message):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        train_tiny(*arguments)
    assert message in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, where fp16 works")
def test_fp16_without_a_gpu_is_refused():
    with pytest.raises(ValueError, match="needs a GPU"):
        precision.start("fp16")


def test_a_user_error_ends_every_process_with_a_message(tiny_shards, tmp_path):
    """21 images do not divide between two processes; both say so and exit non-zero, without a hang."""
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    result = run(
        "vaetrain/train.py", "--data.train", tiny_shards, *TINY, "--train.global-batch-size", 21, "--run-dir", tmp_path / "run",
        two_processes=True,
    )  # fmt: skip
    assert result.returncode != 0
    assert "--train.global-batch-size 21" in result.stderr
    assert not (tmp_path / "run").exists()
