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
from vaetrain.distributed.launcher import launcher
from vaetrain.distributed.preemption import LONGEST_PAUSE_S, SIGNALS, StopRequest
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
    assert launcher() is None  # nobody's child: closing the terminal's shell must not stop a training


class Ring:
    """Some processes of many, all in this one: each asks in its turn of a step, and what it waits for is the largest of all."""

    def __init__(self, size, num_shown, monkeypatch):
        self._size, self._rounds, self.num_questions = size, [], 0
        monkeypatch.setattr("vaetrain.distributed.preemption.control_group", lambda timeout_s: self)
        monkeypatch.setattr("vaetrain.distributed.preemption.dist.all_reduce", self._all_reduce)
        self.clock = 100.0
        monkeypatch.setattr("vaetrain.distributed.preemption.time.monotonic", lambda: self.clock)
        self.stops = [StopRequest() for _ in range(num_shown)]

    def size(self):
        return self._size

    def _all_reduce(self, tensor, operation, group, async_op):
        assert async_op
        if not self._rounds or len(self._rounds[-1]) == len(self.stops):
            self._rounds.append([])
            self.num_questions += 1
        self._rounds[-1].append(tensor)
        return Answer(self._rounds[-1], len(self.stops))

    def train(self, steps, step_s, told_at=None):
        """So many steps, after every tenth of which the processes know how long they took; the step at which all stop."""
        for step in steps:
            if step == told_at:
                self.stops[1].reason = "SIGTERM"
            agreed = [stop.agree() for stop in self.stops]
            assert len(set(agreed)) == 1, "some stop and some go on"
            if agreed[0]:
                return step
            self.clock += step_s
            if step % 10 == 9:
                for number, stop in enumerate(self.stops):
                    stop._measured_at = stop._measured_at and (
                        stop._measured_at[0],
                        stop._measured_at[1] + 1e-3 * number,
                    )
                    stop.measure(step + 1)
        return None


class Answer:
    def __init__(self, tensors, number):
        self.tensors, self.number = tensors, number

    def wait(self):
        assert len(self.tensors) == self.number, "one waits for an answer to what others have not asked"
        largest = torch.stack(self.tensors).amax(0)
        for tensor in self.tensors:
            tensor.copy_(largest)


@pytest.mark.parametrize(
    ("num_processes", "step_s", "num_questions"),
    [
        (2, 0.02, 400),  # few processes: at every step, as are long steps
        (512, 8.0, 400),
        (512, 0.1, 28),  # at the first twenty, whose time is not known, then every 5 s
        (64, 0.1, 82),  # every 0.63 s
    ],
)
def test_many_processes_ask_by_the_clock(monkeypatch, num_processes, step_s, num_questions):
    ring = Ring(num_processes, 3, monkeypatch)
    assert ring.train(range(400), step_s) is None
    assert ring.num_questions == pytest.approx(num_questions, abs=3)


@pytest.mark.parametrize("told_at", [1, 7, 25, 151, 199])
@pytest.mark.parametrize(("num_processes", "step_s"), [(2, 0.02), (512, 0.1), (512, 0.7), (64, 0.001)])
def test_all_stop_at_the_same_step_soon_however_seldom_they_ask(monkeypatch, num_processes, step_s, told_at):
    ring = Ring(num_processes, 3, monkeypatch)
    stopped = ring.train(range(100_000), step_s, told_at)
    assert stopped is not None
    assert (stopped - told_at) * step_s <= LONGEST_PAUSE_S + 2 * step_s
    assert ring.stops[0].reason is None


def test_the_time_limit_leaves_room_for_the_pause_between_questions(monkeypatch):
    control = Control(stop=Ring(512, 1, monkeypatch).stops[0])
    asked = []
    monkeypatch.setattr(control.time_limit, "is_near", lambda seconds: asked.append(seconds) or False)
    assert not control.should_stop(3.0)
    assert asked == [3.0 + LONGEST_PAUSE_S]


def test_the_loop_measures_its_steps():
    control = Control()
    control.begin(9)
    control.forecast(100, 1.0, print)
    control.begin(19)
    control.forecast(100, 1.0, print)
    assert control.stop._measured_at[0] == 20
    assert 0 < control.stop._step_s < 60


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
