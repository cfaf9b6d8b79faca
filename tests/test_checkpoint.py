"""One checkpoint: what it holds, and what a full disk, a kill or a damaged file leave of it."""

import copy
import errno
import json
import resource
import shutil
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import vaetrain.training.async_writer
from vaetrain.config import CheckpointConfig
from vaetrain.files import sha256_of_file
from vaetrain.runs.checkpoint_names import list_checkpoints
from vaetrain.runs.directory import RunDirectory
from vaetrain.training.checkpoint import CheckpointNotWritten, Checkpoints, best, check, find, newest_good
from vaetrain.training.figures import RunFigures
from vaetrain.training.meters import Meters
from vaetrain.training.progress import Progress
from vaetrain.training.spikes import SpikeDetector


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """They take two seconds each time."""
    monkeypatch.setattr(RunFigures, "draw", lambda *_, **__: None)


class Training:
    """A model, its average and an optimizer that has made a step, and checkpoints of them."""

    def __init__(self, folder: Path, accelerator, config: CheckpointConfig) -> None:
        self.run = RunDirectory(folder)
        self.run.checkpoints.mkdir(parents=True, exist_ok=True)
        for file in (self.run.config_file, self.run.provenance_file, self.run.dataset_file):
            file.write_text("{}")
        self.model = nn.Conv2d(32, 32, 3).to(memory_format=torch.channels_last)
        self.ema = copy.deepcopy(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.meters = Meters(("loss",), accelerator)
        self.checkpoints = Checkpoints(
            self.run, config, accelerator, model=self.model, ema=self.ema, optimizer=self.optimizer, meters=self.meters,
            spikes=SpikeDetector(None, torch.device("cpu")),
        )  # fmt: skip
        self.progress = Progress()

    def step(self) -> None:
        self.model(torch.randn(2, 32, 4, 4)).square().sum().backward()
        self.checkpoints.before_update()
        self.optimizer.step()
        self.meters.add(2, torch.tensor(0.0), torch.tensor(0.0), loss=torch.rand(()))
        self.progress.step += 1
        self.progress.images_seen += 2
        self.progress.sound_step = self.progress.step

    def save(self) -> Path:
        self.checkpoints.save(self.progress)
        self.checkpoints.finish()
        return list_checkpoints(self.run.checkpoints)[-1]

    def state(self) -> dict[str, object]:
        moments = [state[name].clone() for state in self.optimizer.state.values() for name in sorted(state)]
        weights = [value.clone() for module in (self.model, self.ema) for value in module.state_dict().values()]
        meters = [value.clone() for value in self.meters.state_dict().values()]
        return {"tensors": [*weights, *moments, *meters], "progress": copy.copy(self.progress)}


@pytest.fixture
def training(tmp_path, accelerator):
    """Keeps the last two."""
    return lambda **options: Training(tmp_path / "run", accelerator, CheckpointConfig(**options))


def assert_equal(state: dict, other: dict) -> None:
    assert state["progress"] == other["progress"]
    assert len(state["tensors"]) == len(other["tensors"]) == 4 + 6 + 6
    assert all(torch.equal(a, b) for a, b in zip(state["tensors"], other["tensors"], strict=True))


def test_load_restores_what_save_saw(training, monkeypatch):
    monkeypatch.setattr(
        "vaetrain.training.checkpoint.save_file", lambda *arguments: (time.sleep(0.05), save_file(*arguments))
    )
    first = training()
    first.step()
    before = first.state()
    first.checkpoints.save(first.progress)
    first.step()  # while it is written
    first.progress.best_score = 7.0
    first.checkpoints.finish()
    assert [path.name for path in list_checkpoints(first.run.checkpoints)] == ["step-00000001"]
    second = training()
    checkpoint, damaged = newest_good(second.run.checkpoints)
    assert damaged == []
    second.progress = second.checkpoints.load(checkpoint)
    assert_equal(before, second.state())
    weight = next(iter(second.optimizer.state.values()))["exp_avg"]
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_a_resume_takes_the_new_options_of_the_optimizer(training):
    first = training()
    first.step()
    checkpoint = first.save()
    second = training()
    new = {"betas": (0.5, 0.7), "eps": 1e-3, "weight_decay": 0.3, "lr": 7.0}
    second.optimizer.param_groups[0].update(new)
    second.checkpoints.load(checkpoint)
    (group,) = second.optimizer.param_groups
    assert {name: group[name] for name in new} == new
    assert all(state["step"] == 1 for state in second.optimizer.state.values())


def test_its_manifest_names_every_file(training):
    first = training()
    first.step()
    checkpoint = first.save()
    checksums = json.loads((checkpoint / "checksums.json").read_text())
    files = {file.name for file in checkpoint.iterdir()} - {"checksums.json"}
    assert checksums == {name: sha256_of_file(checkpoint / name) for name in files}
    assert files == {
        "model.safetensors", "ema.safetensors", "optimizer.safetensors", "meters.safetensors", "judge.safetensors", "state.json",
        "config.yaml", "provenance.json", "dataset.json",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "checksums.json", "config.yaml"])
def test_a_truncated_file_is_named_and_the_checkpoint_before_used(training, capsys, name):
    first = training()
    first.step()
    good = first.save()
    first.step()
    newest = first.save()
    (newest / name).write_bytes((newest / name).read_bytes()[:-9])
    found, damaged = newest_good(first.run.checkpoints)
    assert found == good
    assert len(damaged) == 1
    assert str(newest) in damaged[0]
    assert name == "checksums.json" or name in damaged[0]
    capsys.readouterr()
    assert find(first.run.path) == good
    said = capsys.readouterr().err
    assert said.startswith("warning: ")
    assert str(newest) in said
    assert said.endswith(f"; {good} is taken\n")
    first.progress = first.checkpoints.load(good)
    first.step()
    assert first.save() == newest  # and is whole again
    check(newest)


def test_a_damaged_best_is_not_replaced_by_another_without_a_word(training):
    first = training()
    first.step()
    first.progress.note_validation(1.0)
    best_of_run = first.save()
    first.step()
    newest = first.save()
    (best_of_run / "ema.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=rf"ema.* is damaged .*{newest} is the newest good one: .*--checkpoint last"):
        best(first.run.path)


def test_a_full_disk_leaves_the_checkpoint_before(training):
    """The kernel refuses to write a file beyond 20 kB, inside safetensors."""
    first = training()
    first.step()
    good = first.save()
    before = first.state()
    first.step()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        first.checkpoints.save(first.progress)
        with pytest.raises(CheckpointNotWritten, match=r"model\.safetensors.*MiB free.*whole.*same command") as raised:
            first.checkpoints.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "step-00000002" in str(raised.value)
    assert [path.name for path in first.run.checkpoints.iterdir()] == [good.name]
    second = training()
    second.progress = second.checkpoints.load(find(second.run.path))
    assert_equal(before, second.state())
    first.step()
    assert first.save().name == "step-00000003"  # and when there is room again


@pytest.mark.parametrize("call", ["save", "before_update", "finish", "load"])
def test_training_hears_of_a_full_disk_at_its_next_call(training, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    first = training()
    first.step()
    good = first.save()
    monkeypatch.setattr("vaetrain.training.checkpoint.fsync", full)
    first.checkpoints.save(first.progress)
    while not first.checkpoints.writer.writing.done():
        pass
    arguments = {"save": [first.progress], "load": [good]}.get(call, [])
    with pytest.raises(CheckpointNotWritten, match="No space left on device"):
        getattr(first.checkpoints, call)(*arguments)
    assert find(first.run.path) == good


def test_what_ends_training_is_not_hidden_by_a_full_disk(training, monkeypatch, capsys):
    def full(*_):
        raise OSError("disk on fire")

    monkeypatch.setattr("vaetrain.training.checkpoint.fsync", full)
    with pytest.raises(CheckpointNotWritten), training().checkpoints as checkpoints:
        checkpoints.save(Progress(step=1, images_seen=2))
    with pytest.raises(ZeroDivisionError), training().checkpoints as checkpoints:
        _ = checkpoints.save(Progress(step=1, images_seen=2)), 1 / 0
    assert "disk on fire" in capsys.readouterr().err


def test_an_error_of_our_own_is_raised_as_it_is(training, monkeypatch):
    monkeypatch.setattr(shutil, "copy", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), training().checkpoints as checkpoints:
        checkpoints.save(Progress(step=1, images_seen=2))
    assert not list(checkpoints.folder.iterdir())


@pytest.mark.parametrize(
    ("every_steps", "expected"),
    [(None, [0, 0, 1, 0, 0, 1, 0, 0, 1]), (2, [0, 1, 1, 1, 0, 1, 0, 1, 1])],
)
def test_when_one_is_due(training, every_steps, expected):
    """Validations at steps 3 (the best), 6 and 9 (the end); never twice at a step."""
    first = training(every_steps=every_steps)
    due = []
    for _ in range(9):
        first.step()
        validated = first.progress.step % 3 == 0
        if first.progress.step == 3:
            first.progress.note_validation(1.0)
        now = first.checkpoints.are_due(first.progress, validated=validated, at_end=first.progress.step == 9)
        if now:
            first.save()
            assert not first.checkpoints.are_due(first.progress, validated=False, at_end=True)
        due.append(int(now))
    assert due == expected


def test_one_is_due_again_when_the_step_it_was_saved_at_is_validated(training):
    """A run that is told to stop saves at once, and validates when it is resumed."""
    first = training()
    first.step()
    first.save()
    assert not first.checkpoints.are_due(first.progress, validated=False, at_end=True)
    first.progress.note_validation(3.0)
    assert first.checkpoints.are_due(first.progress, validated=True, at_end=False)
    again = training()
    assert again.checkpoints.load(first.save()).best_score == 3.0
    assert {path.name for path in first.run.checkpoints.iterdir()} == {"step-00000001"}


def test_its_size_is_known_before_training(training):
    first = training()
    expected = first.checkpoints.num_bytes()
    first.step()
    actual = sum(file.stat().st_size for file in first.save().iterdir())
    assert actual < expected < actual + 2**18


def test_training_that_would_fill_the_disk_does_not_start(train_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(2**20))
    with pytest.raises(ValueError, match=r"will need .* MiB more and its file system has 1\.0 free"):
        train_tiny()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_update_waits_for_the_copy(train_tiny, monkeypatch):
    """With a copy that takes longer than a step, the checkpoints are what they are without it."""
    options = ("--checkpoint.every-steps", 2, "--checkpoint.keep-every-images", 1)
    plain = train_tiny(*options, run_dir="plain")
    copy_of = vaetrain.training.async_writer.SnapshotWriter._copy

    def slowly(self, key, tensor):
        time.sleep(0.001)
        return copy_of(self, key, tensor)

    monkeypatch.setattr(vaetrain.training.async_writer.SnapshotWriter, "_copy", slowly)
    slow = train_tiny(*options, run_dir="slow")
    checkpoints = [list_checkpoints(run / "checkpoints") for run in (plain, slow)]
    assert [path.name[-2:] for path in checkpoints[0]] == ["02", "04", "05", "06", "08", "10"]
    for before, after in zip(*checkpoints, strict=True):
        for name in ("model", "ema", "optimizer", "meters"):
            expected, actual = (load_file(path / f"{name}.safetensors") for path in (before, after))
            assert all(torch.equal(expected[key], actual[key]) for key in expected)


def test_an_early_stop_has_a_checkpoint(train_tiny):
    """At whatever step it comes: a score that does not rise any more."""
    run_dir = train_tiny(
        "--train.patience", 1, "--optim.lr", "1e-12", "--train.ema-half-life-images", 0, "--checkpoint.every-steps", 1000,
        epochs=30,
    )  # fmt: skip
    newest = list_checkpoints(run_dir / "checkpoints")[-1]
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["epoch"] < 30
    assert int(newest.name[-8:]) == last["step"]


def test_options_that_mean_nothing_are_refused():
    for options in ({"keep_last": 0}, {"every_steps": 0}, {"keep_every_images": 0}):
        name = f"--checkpoint.{next(iter(options)).replace('_', '-')}"
        with pytest.raises(ValueError, match=name):
            CheckpointConfig(**options)
