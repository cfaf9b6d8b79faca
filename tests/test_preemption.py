"""A signal to any process: all save and stop at the same step, and go on as if nothing had been."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load

from fault_scenarios import STEP, train_together
from launching import TINY, run
from vaetrain.command_line import parse
from vaetrain.config import Config
from vaetrain.data.config import DataConfig
from vaetrain.data.readers.order import BatchLayout
from vaetrain.data.readers.reader import open_reader
from vaetrain.distributed import processes
from vaetrain.distributed.preemption import SIGNALS, StopRequest
from vaetrain.exit_codes import EXIT_STOPPED
from vaetrain.runs.checkpoint_names import list_checkpoints
from vaetrain.train import train
from vaetrain.training.checkpoint import Checkpoints
from vaetrain.training.control import Control


def weights(run_dir):
    return load((list_checkpoints(run_dir / "checkpoints")[-1] / "model.safetensors").read_bytes())


def records(run_dir):
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if not key.startswith("perf/")} for line in lines]


def check_equal(one, other):
    assert records(one) == records(other)
    assert [record["epoch"] for record in records(one) if record["split"] == "val"] == [1.0, 2.0, 3.0]
    for name, weight in weights(one).items():
        assert torch.equal(weight, weights(other)[name]), name


def arguments(tiny_shards, run_dir):
    return (*TINY, "--data.train", tiny_shards, "--train.epochs", 3, "--run-dir", run_dir)


@pytest.fixture(scope="module")
def undisturbed(tiny_shards, tmp_path_factory):
    """The run directory of two processes that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    outcome = train_together(folder / "out", "none", *arguments(tiny_shards, folder / "run"))
    assert outcome.exit_codes == [0, 0], outcome.printed
    return folder / "run"


def test_all_stop_at_the_same_step_and_go_on(tiny_shards, tmp_path, undisturbed):
    run_dir = tmp_path / "run"
    outcome = train_together(tmp_path / "first", "told", *arguments(tiny_shards, run_dir))
    assert outcome.exit_codes == [EXIT_STOPPED, EXIT_STOPPED] == [75, 75]
    assert outcome.weights[0] == outcome.weights[1] != ""
    # Told when the step begins, known to the other at the next question, after one step more.
    assert list_checkpoints(run_dir / "checkpoints")[-1].name == f"step-{STEP + 2:08d}"
    said = "".join(outcome.printed)
    assert said.count("saved and stopped by a signal to another process; the same command goes on from here") == 1
    outcome = train_together(tmp_path / "second", "none", *arguments(tiny_shards, run_dir))
    assert outcome.exit_codes == [0, 0]
    check_equal(run_dir, undisturbed)


def test_torchrun_starts_again_after_a_kill_and_the_training_resumes(tiny_shards, tmp_path, undisturbed):
    result = run(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "--max-restarts", 1,
        "tests/fault_scenarios.py", "killed", *arguments(tiny_shards, tmp_path / "run"),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "died without a word" in result.stderr
    assert result.stdout.count("resuming from") == 1
    check_equal(tmp_path / "run", undisturbed)


def test_more_signals_do_not_spoil_the_checkpoint(tiny_shards, accelerator, tmp_path, monkeypatch):
    original = Checkpoints.save

    def save_under_fire(self, progress):
        for number in SIGNALS:
            os.kill(os.getpid(), number)
        target = original(self, progress)
        os.kill(os.getpid(), signal.SIGTERM)
        return target

    def run_training(run_dir, stop):
        config = parse(Config, None, [str(argument) for argument in arguments(tiny_shards, run_dir)])
        progress = train(config, accelerator, Control(stop=stop))
        accelerator.free_memory()
        return progress

    before = [signal.getsignal(number) for number in SIGNALS]
    whole = tmp_path / "whole"
    run_training(whole, StopRequest())
    stop = StopRequest()
    with stop.on_signals(), monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "save", save_under_fire)  # the first, after five steps, is the first told
        progress = run_training(tmp_path / "run", stop)
    assert stop.agreed
    assert stop.reason == "SIGTERM"
    assert progress.step == 6
    assert [signal.getsignal(number) for number in SIGNALS] == before
    run_training(tmp_path / "run", StopRequest())
    check_equal(tmp_path / "run", whole)


def test_an_orphan_stops(monkeypatch):
    """`accelerate launch` of a single process dies of a signal and leaves the training behind."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    stop = StopRequest()
    assert not stop.agree()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert stop.agree()
    assert stop.reason == "the end of its launcher"
    monkeypatch.undo()
    assert processes.launcher() is None  # nobody's child: closing the terminal's shell must not stop a training


def test_decoding_workers_outlive_the_signal(tiny_shards):
    """Launchers signal the whole process group, and the step that is under way still needs its data."""
    reader = open_reader(
        DataConfig(train=str(tiny_shards), reader="indexed", num_workers=1), "train", device=torch.device("cpu")
    )
    batches = reader.train_batches(0, 0, BatchLayout.of(20, None, 0, 1))
    next(batches)
    import multiprocessing

    workers = multiprocessing.active_children()
    assert workers
    for number in SIGNALS:
        for worker in workers:
            os.kill(worker.pid, number)
    for _ in range(20):
        next(batches)
    reader.close()
    assert not any(worker.is_alive() for worker in workers)
    assert all(worker.exitcode != -signal.SIGALRM for worker in workers), "closing waited until their minute was over"
