"""Measure what a checkpoint costs training on this machine: written beside it, and with training waiting for it.

python tools/bench_checkpoint.py [--json FILE] [--folder DIR]
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vaetrain.command_line import parse


@dataclass(frozen=True)
class BenchConfig:
    """A model at random weights on noise; rounds in which plain steps, steps beside a save, and saves take turns."""

    json: Path | None = None
    """Also write the medians and ratios to this file."""

    folder: Path | None = None
    """Write the checkpoints below this folder, for example on the file system of your runs. None: the system's temporary
    folder."""

    base_channels: int = 128
    """Width of the model; 128 makes one of about 100 M parameters."""

    batch_size: int = 16
    """Images of 64×64 pixels per step."""

    rounds: int = 5
    """Rounds timed, after one that is not."""


if __name__ == "__main__":
    CONFIG = parse(BenchConfig, __doc__, flags=True)  # before the imports below, which take seconds

import json
import platform
import statistics
import tempfile
import time

import torch

from vaetrain.config import CheckpointConfig, OptimConfig
from vaetrain.distributed import processes
from vaetrain.machine import num_cores
from vaetrain.model.autoencoder import VAE
from vaetrain.model.config import ModelConfig
from vaetrain.objective.elbo import negative_elbo
from vaetrain.runs.directory import RunDirectory
from vaetrain.training.checkpoint import Checkpoints
from vaetrain.training.ema import ExponentialMovingAverage
from vaetrain.training.meters import Meters
from vaetrain.training.optimizer import build_optimizer
from vaetrain.training.progress import Progress
from vaetrain.training.spikes import SpikeDetector


class Training:
    """The steps of vaetrain/train.py on one batch that is already there, in bf16."""

    def __init__(self, config: BenchConfig, folder: Path) -> None:
        self.accelerator = processes.start("bf16")
        device = self.accelerator.device
        model = ModelConfig(
            image_size=64, base_channels=config.base_channels, channel_mult=(1, 2, 4, 6), num_res_blocks=2
        )
        self.vae = VAE(model).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.ema = ExponentialMovingAverage(self.vae, 1000)
        self.optimizer = build_optimizer(self.vae, OptimConfig())
        self.x = torch.rand(config.batch_size, 3, 64, 64, device=device).contiguous(memory_format=torch.channels_last)
        self.noise = torch.randn(config.batch_size, *model.latent_shape, device=device)
        run = RunDirectory(folder)
        run.checkpoints.mkdir()
        for file in (run.config_file, run.provenance_file, run.dataset_file):
            file.write_text("{}\n")
        self.checkpoints = Checkpoints(
            run, CheckpointConfig(keep_last=1), self.accelerator,
            model=self.vae, ema=self.ema.module, optimizer=self.optimizer, meters=Meters((), self.accelerator),
            spikes=SpikeDetector(None, device),
        )  # fmt: skip
        self.progress = Progress()

    def step(self, *, save: bool = False) -> tuple[float, float]:
        """Seconds of a step that may begin with a save, and those of them in which training waited for the save."""
        start = time.perf_counter()
        blocked = self.timed_save() if save else 0.0
        with self.accelerator.autocast():
            terms = self.vae(self.x, self.noise)
        (negative_elbo(terms.distortion, terms.kl, 1.0).mean() / self.vae.config.num_pixels).backward()
        waiting = time.perf_counter()
        self.checkpoints.before_update()
        blocked += time.perf_counter() - waiting
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.progress.step += 1
        self.progress.images_seen += len(self.x)
        self.ema.update(self.vae, len(self.x), self.progress.images_seen)
        if self.x.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start, blocked

    def timed_save(self, *, finish: bool = False) -> float:
        """Seconds in which training waits for a save, to the end with `finish`."""
        start = time.perf_counter()
        self.checkpoints.save(self.progress)
        if finish:
            self.checkpoints.finish()
        return time.perf_counter() - start


def measure(training: Training, rounds: int) -> dict[str, float]:
    """Medians in seconds over rounds; in each, a plain step, steps until a save is written, a plain step, a whole save."""
    times: dict[str, list[float]] = {
        name: [] for name in ("step", "step_with_copy", "step_with_write", "blocked", "background", "synchronous_save")
    }
    for number in range(-1, rounds):
        new: dict[str, list[float]] = {name: [] for name in times}
        new["step"].append(training.step()[0])
        begun = time.perf_counter()
        with_copy, blocked = training.step(save=True)
        new["step_with_copy"].append(with_copy)
        new["blocked"].append(blocked)
        while training.checkpoints.writer.writing is not None:
            new["step_with_write"].append(training.step()[0])
        new["background"].append(time.perf_counter() - begun)
        new["step"].append(training.step()[0])
        new["synchronous_save"].append(training.timed_save(finish=True))
        if number >= 0:  # the first round allocates the host's memory
            for name, values in new.items():
                times[name] += values
    return {name: statistics.median(values) for name, values in times.items() if values}


def main(config: BenchConfig) -> None:
    """Measure, print a table and write the JSON."""
    with tempfile.TemporaryDirectory(dir=config.folder) as folder:
        training = Training(config, Path(folder))
        training.step()  # makes the moments
        with training.checkpoints:
            medians = measure(training, config.rounds)
        num_bytes = training.checkpoints.num_bytes()
    num_parameters = sum(parameter.numel() for parameter in training.vae.parameters())
    step = medians["step"]
    ratios = {
        "blocked_vs_step": medians["blocked"] / step,
        "stall_vs_step": (medians["step_with_copy"] - step) / step,
        "synchronous_save_vs_step": medians["synchronous_save"] / step,
    }
    device = processes.device_name(training.accelerator.device)
    machine = f"{device}, {num_cores()} cores, {platform.machine()}, torch {torch.__version__}"
    print(
        f"{machine}; {num_parameters / 1e6:.0f} M parameters, checkpoint of {num_bytes / 2**20:,.0f} MiB, batch "
        f"{config.batch_size}, medians of {config.rounds} rounds"
    )
    for name, value in medians.items():
        print(f"{name:28s} {value * 1e3:10,.1f} ms")
    for name, value in ratios.items():
        print(f"{name:28s} {value:10.3f}")
    if config.json is not None:
        record = {"machine": machine, "num_parameters": num_parameters, "seconds": medians, "ratios": ratios}
        config.json.write_text(json.dumps(record, indent=2) + "\n")
        print(f"written to {config.json}")


if __name__ == "__main__":
    main(CONFIG)
