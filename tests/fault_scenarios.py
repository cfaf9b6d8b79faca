"""Training in which something goes wrong, on one process or as many as it is launched with.

[accelerate launch --config_file launch/cpu2.yaml] tests/fault_scenarios.py FAULT [--section.key value ...]
"""

import contextlib
import hashlib
import itertools
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch

import vaetrain.train
import vaetrain.training.divergence
import vaetrain.training.schedule
import vaetrain.training.step
import vaetrain.training.time_limit
from together import HANGS_S, Outcome, run_together
from vaetrain.command_line import parse
from vaetrain.config import Config
from vaetrain.model.autoencoder import VAE
from vaetrain.training.figures import RunFigures

GLOBAL_BATCH_SIZE = 20
STEP = 7
"""How many steps were done when it happens; an epoch of conftest.py's images, and a checkpoint, is after each five."""


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


@contextlib.contextmanager
def every_step(act: Callable[[int], None]) -> Iterator[None]:
    """Call `act` with the number of steps done at the beginning of each."""
    original = vaetrain.training.schedule.beta_at

    def acting_beta_at(objective, images_seen):
        act(images_seen // GLOBAL_BATCH_SIZE)
        return original(objective, images_seen)

    with patch.object(vaetrain.training.schedule, "beta_at", acting_beta_at):
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


def kill_a_worker() -> None:
    """As the system does when memory runs out."""
    worker = multiprocessing.active_children()[0]
    print(f"killed worker {worker.pid}", flush=True)
    worker.kill()


def block_on_data() -> contextlib.AbstractContextManager[None]:
    """Rank 1 waits for a batch for ever."""
    from vaetrain.data.readers.resident import ResidentReader

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
    original = vaetrain.training.step.negative_elbo

    def spoil(step):
        now[0] = spoilt.pop(0) if step >= 6 and spoilt and rank() == 0 else 1.0

    with (
        every_step(spoil),
        patch.object(vaetrain.training.step, "negative_elbo", lambda *terms: original(*terms) * now[0]),
        patch.object(vaetrain.training.spikes, "STEPS_BEFORE_JUDGING", 4),
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


@contextlib.contextmanager
def slow_steps() -> Iterator[None]:
    """For the time limit every step takes a second, and nothing else takes any time."""
    seconds = itertools.count()
    now = [float(next(seconds))]

    def tick(step):
        now[0] = float(next(seconds))

    clock = SimpleNamespace(monotonic=lambda: now[0])
    with every_step(tick), patch.object(vaetrain.training.time_limit, "time", clock):
        yield


FAULTS: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "none": contextlib.nullcontext,
    "slow": slow_steps,
    "killed": lambda: at_step(lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "stopped": lambda: at_step(lambda: os.kill(os.getpid(), signal.SIGSTOP)),
    "raises": lambda: at_step(fail),
    "worker killed": lambda: at_step(kill_a_worker),
    "blocks": block_on_data,
    "told": lambda: at_step(lambda: os.kill(os.getpid(), signal.SIGUSR1)),
    "spoilt": spoilt_losses,
    "out of memory": lambda: small_memory(on_rank=int(os.environ.get("WORLD_SIZE", "1")) - 1),
}


def main(fault: str, arguments: Sequence[str]) -> None:
    config = parse(Config, None, arguments)
    with FAULTS[fault](), patch.object(RunFigures, "draw"):  # figures take longer than these trainings
        vaetrain.train.main(config)


@dataclass(frozen=True)
class Trained(Outcome):
    """What became of the processes of one training, by rank."""

    weights: list[str]
    """SHA-256 of the weights each process had in the end; "" where it did not get that far."""


def train_together(
    folder: Path, fault: str, *arguments: object, within_s: float = HANGS_S, num_processes: int = 2
) -> Trained:
    """Run a training with a fault on processes forked from a server that has imported all; no launcher ends anybody."""
    folder.mkdir()
    outcome = run_together(
        train_rank, folder, fault, [*map(str, arguments)], num_processes=num_processes, within_s=within_s
    )
    hashes = [
        file.read_text() if (file := folder / f"weights-{rank}").exists() else "" for rank in range(num_processes)
    ]
    return Trained(outcome.pids, outcome.exit_codes, outcome.printed, hashes)


def train_rank(folder: Path, fault: str, arguments: list[str]) -> None:
    """Train, and leave the SHA-256 of the weights in the folder however it ends."""
    built: list[VAE] = []

    class RememberedVAE(VAE):
        def __init__(self, model_config):
            super().__init__(model_config)
            built.append(self)

    with patch.object(vaetrain.training.step, "VAE", RememberedVAE):
        try:
            main(fault, arguments)
        finally:
            if built:
                content = b"".join(weight.detach().numpy().tobytes() for weight in built[0].parameters())
                (folder / f"weights-{rank()}").write_text(hashlib.sha256(content).hexdigest())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
