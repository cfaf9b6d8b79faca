"""Training in which something goes wrong, on one process or as many as it is launched with.

[accelerate launch --config_file launch/cpu2.yaml] tests/fault_scenarios.py FAULT [--section.key value ...]
"""

import contextlib
import functools
import hashlib
import math
import multiprocessing
import multiprocessing.context
import multiprocessing.forkserver
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from launching import free_port

import vaetrain.divergence
import vaetrain.train
from vaetrain.command_line import parse
from vaetrain.config import Config
from vaetrain.model.autoencoder import VAE

GLOBAL_BATCH_SIZE = 20
STEP = 7
"""How many steps were done when it happens; an epoch of conftest.py's images, and a checkpoint, is after each five."""


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


@contextlib.contextmanager
def every_step(act: Callable[[int], None]) -> Iterator[None]:
    """Call `act` with the number of steps done at the beginning of each."""
    original = vaetrain.train.beta_at

    def acting_beta_at(objective, images_seen):
        act(images_seen // GLOBAL_BATCH_SIZE)
        return original(objective, images_seen)

    with patch.object(vaetrain.train, "beta_at", acting_beta_at):
        yield


def at_step(act: Callable[[], object]) -> contextlib.AbstractContextManager[None]:
    """Act on rank 1, and not when a launcher has started it again."""
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0

    def act_then(step: int) -> None:
        if step == STEP and rank() == 1 and not restarted:
            act()

    return every_step(act_then)


def fail() -> None:
    raise AssertionError("the moon is in the wrong phase")


def block_on_data() -> contextlib.AbstractContextManager[None]:
    """Rank 1 waits for a batch for ever."""
    from vaetrain.data.resident import ResidentReader

    original = ResidentReader.train_batches

    def blocking(self, *arguments):
        for number, batch in enumerate(original(self, *arguments)):
            if number == STEP and rank() == 1:
                time.sleep(1000)
            yield batch

    return patch.object(ResidentReader, "train_batches", blocking)


@contextlib.contextmanager
def spoilt_losses() -> Iterator[None]:
    """Rank 0 sees a gradient a million times too large at the seventh step, and NaN at the next five, once."""
    spoilt = [1e6, *[math.nan] * 5]
    now = [1.0]
    original = vaetrain.train.negative_elbo

    def spoil(step):
        now[0] = spoilt.pop(0) if step >= 6 and spoilt and rank() == 0 else 1.0

    with (
        every_step(spoil),
        patch.object(vaetrain.train, "negative_elbo", lambda *terms: original(*terms) * now[0]),
        patch.object(vaetrain.divergence, "STEPS_BEFORE_JUDGING", 4),
    ):
        yield


def small_memory(*, on_rank: int) -> contextlib.AbstractContextManager[None]:
    """One process has memory for 4 images at a time."""
    original = VAE.forward

    def forward(self, x, noise):
        if len(x) > 4 and rank() == on_rank and x.device.type != "meta":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines.")
        return original(self, x, noise)

    return patch.object(VAE, "forward", forward)


FAULTS: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "none": contextlib.nullcontext,
    "slow": lambda: every_step(lambda step: time.sleep(0.2)),
    "killed": lambda: at_step(lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "stopped": lambda: at_step(lambda: os.kill(os.getpid(), signal.SIGSTOP)),
    "raises": lambda: at_step(fail),
    "blocks": block_on_data,
    "told": lambda: at_step(lambda: os.kill(os.getpid(), signal.SIGUSR1)),
    "spoilt": spoilt_losses,
    "out of memory": lambda: small_memory(on_rank=int(os.environ.get("WORLD_SIZE", "1")) - 1),
}


def main(fault: str, arguments: Sequence[str]) -> None:
    config = parse(Config, None, arguments)
    with FAULTS[fault]():
        vaetrain.train.main(config)


@dataclass(frozen=True)
class Outcome:
    """What became of the processes of one training, by rank."""

    pids: list[int]
    exit_codes: list[int]
    printed: list[str]
    weights: list[str]
    """SHA-256 of the weights each process had in the end; "" where it did not get that far."""


@functools.cache
def fork_server() -> multiprocessing.context.ForkServerContext:
    """A server that has imported everything, so that tests can tell how long a training takes to end."""
    multiprocessing.forkserver._forkserver._stop()  # another test's, which has imported less
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vaetrain.train"])
    nothing = context.Process(target=int)
    nothing.start()
    nothing.join()
    return context


def train_together(folder: Path, fault: str, *arguments: object, within_s: float, num_processes: int = 2) -> Outcome:
    """Run a training with a fault on processes forked from a server that has imported all; no launcher ends anybody."""
    folder.mkdir()
    port = free_port()
    processes = [
        fork_server().Process(target=run_rank, args=(folder, fault, [*map(str, arguments)], rank, num_processes, port))
        for rank in range(num_processes)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + within_s
    try:
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        printed = [(folder / f"printed-{rank}").read_text() for rank in range(num_processes)]
        codes = [process.exitcode for process in processes]
        assert None not in codes, f"not all had ended within {within_s} s: {codes}\n" + "\n".join(printed)
    finally:
        for process in processes:
            process.kill()
    hashes = [
        file.read_text() if (file := folder / f"weights-{rank}").exists() else "" for rank in range(num_processes)
    ]
    return Outcome([process.pid for process in processes], codes, printed, hashes)


def run_rank(folder: Path, fault: str, arguments: list[str], rank: int, num_processes: int, port: int) -> None:
    output = os.open(folder / f"printed-{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1",
        "LOCAL_WORLD_SIZE": str(num_processes), "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    built: list[VAE] = []

    class RememberedVAE(VAE):
        def __init__(self, model_config):
            super().__init__(model_config)
            built.append(self)

    with patch.object(vaetrain.train, "VAE", RememberedVAE):
        try:
            main(fault, arguments)
        finally:
            if built:
                content = b"".join(weight.detach().numpy().tobytes() for weight in built[0].parameters())
                (folder / f"weights-{rank}").write_text(hashlib.sha256(content).hexdigest())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
