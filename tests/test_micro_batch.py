"""Out of memory: the message names the micro-batch that fits, found by trying."""

import threading

import pytest
import torch

from fault_scenarios import train_together
from launching import TINY
from vaetrain.command_line import parse
from vaetrain.config import Config
from vaetrain.model.autoencoder import VAE
from vaetrain.training import memory as micro_batch
from vaetrain.training.memory import FitResult, is_out_of_memory, largest_that_fits, suggest_on_oom


@pytest.fixture
def config(tiny_shards):
    own = ("--data.train", tiny_shards, "--train.global-batch-size", 24)
    return parse(Config, None, [str(argument) for argument in (*TINY, *own)])


@pytest.fixture
def memory_for(monkeypatch):
    """Let the model run out of memory above a number of images."""
    original = VAE.forward

    def limit(num_images):
        def forward(self, x, noise):
            if len(x) > num_images:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return original(self, x, noise)

        monkeypatch.setattr(VAE, "forward", forward)

    return limit


@pytest.mark.parametrize(
    ("limit", "fit"),
    [
        (0, FitResult(None, None, 1)),
        (1, FitResult(1, 1.5, 2)),
        (5, FitResult(4, 6.0, 6)),
        (6, FitResult(6, 9.0, 8)),
        (99, FitResult(12, 18.0, None)),
    ],
)
def test_the_largest_is_found_by_bisection(config, accelerator, monkeypatch, limit, fit):
    tried = []

    def peak_memory(config, accelerator, size):
        tried.append(size)
        return None if size > limit else size * 1.5

    monkeypatch.setattr(micro_batch, "peak_memory", peak_memory)
    assert largest_that_fits(config, accelerator, [8, 1, 2, 12, 3, 4, 6]) == fit
    assert len(tried) <= 3


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        (
            5,
            "out of memory with 24 images at a time in each process; --train.micro-batch-size 4 fits, 6 does not (CUDA",
        ),
        (0, "not even --train.micro-batch-size 1 fits: use a smaller model"),
    ],
)
def test_what_would_fit_is_said(config, accelerator, memory_for, limit, said):
    memory_for(limit)
    with pytest.raises(ValueError, match="out of memory") as error, suggest_on_oom(config, accelerator):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nAnd much more.")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_the_frames_that_ran_out_of_memory_are_cleared_first(config, accelerator, monkeypatch):
    class Large:
        alive = 0

        def __init__(self):
            Large.alive += 1

        def __del__(self):
            Large.alive -= 1

    def train():
        activations = Large()
        raise torch.OutOfMemoryError(f"CUDA out of memory {activations.alive}")

    seen = []
    monkeypatch.setattr(micro_batch, "advice", lambda *_: seen.append(Large.alive) or "advice")
    with pytest.raises(ValueError, match="advice"), suggest_on_oom(config, accelerator):
        train()
    assert seen == [0]


def test_a_device_that_does_not_answer_is_not_waited_for(config, accelerator, monkeypatch):
    """Beside a process that is gone a synchronisation may last for ever, and giving memory back is one, too."""
    gone = threading.Event()
    monkeypatch.setattr(micro_batch, "release_memory", lambda accelerator: gone.wait(100))
    monkeypatch.setattr(micro_batch, "ADVICE_S", 0.2)
    expected = (
        r"out of memory with 24 images at a time in each process; what fits could not be tried out, the device did not answer "
        r"within 0\.2 s: lower --train\.micro-batch-size \(CUDA out of memory"
    )
    with pytest.raises(ValueError, match=expected), suggest_on_oom(config, accelerator):
        raise torch.OutOfMemoryError("CUDA out of memory")
    gone.set()


def test_what_goes_wrong_while_trying_is_said(config, accelerator, monkeypatch):
    def broken(config, accelerator):
        raise ArithmeticError("the moon")

    monkeypatch.setattr(micro_batch, "advice", broken)
    with pytest.raises(ArithmeticError, match="the moon"), suggest_on_oom(config, accelerator):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_the_advice_is_tried_out_on_this_processs_device(config, accelerator, monkeypatch):
    """A thread begins on the first device, whichever its process computes on."""
    chosen = []

    class Device:
        def __init__(self, device):
            chosen.append(device)

        def __enter__(self):
            chosen.append("entered")

        def __exit__(self, *_):
            chosen.append("left")

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(micro_batch, "advice", lambda *_: chosen.append("advice") or "advice")
    monkeypatch.setattr(type(accelerator), "device", property(lambda self: torch.device("cuda", 2)))
    with pytest.raises(ValueError, match="advice"), suggest_on_oom(config, accelerator):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert chosen == [torch.device("cuda", 2), "entered", "advice", "left"]


def test_only_want_of_memory_is_explained(config, accelerator):
    assert is_out_of_memory(
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")
    )
    with pytest.raises(RuntimeError, match="Connection closed"), suggest_on_oom(config, accelerator):
        raise RuntimeError("Connection closed by peer")


def test_one_of_two_processes_runs_out_of_memory(tiny_shards, tmp_path):
    own = ("--data.train", tiny_shards, "--train.epochs", 1, "--run-dir", tmp_path / "run")
    outcome = train_together(tmp_path / "out", "out of memory", *TINY, *own)
    assert outcome.exit_codes == [1, 1]
    (said,) = [line for text in outcome.printed for line in text.splitlines() if "rror:" in line]
    assert said.startswith(
        "error: out of memory with 10 images at a time in each process; --train.micro-batch-size 2 fits, 5 "
    )
    assert f"pid {outcome.pids[1]}) of 2 processes)" in said
