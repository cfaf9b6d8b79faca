"""What tools/gpu_check.py trains, and how fast that is: images per second, MFU, memory, waiting for data."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from vaetrain.command_line import parse, to_yaml
from vaetrain.config import Config
from vaetrain.data.readers.batch import Batch
from vaetrain.data.readers.order import BatchLayout
from vaetrain.data.readers.reader import open_reader
from vaetrain.data.sharding.config import ShardingConfig
from vaetrain.data.sharding.make_shards import make_shards
from vaetrain.distributed.arithmetic import set_tf32
from vaetrain.model.autoencoder import VAE
from vaetrain.model.config import ModelConfig
from vaetrain.training.memory import is_out_of_memory, release_memory, step_alone
from vaetrain.training.meters import Meters
from vaetrain.training.step import TrainStep
from vaetrain.training.throughput import Stopwatch, peak_flops, training_flops_per_image

TINY = ModelConfig(image_size=16, base_channels=8, channel_mult=(1, 2), num_res_blocks=1, latent_channels=4)


class Options(Protocol):
    """Of the command that measures."""

    training: Path
    """Configuration whose network is taken."""
    device: str
    tiny: bool
    micro_batch_sizes: tuple[int, ...]
    steps: int
    minutes: float


class Bench:
    """Shards of noise, and trainings of a network on them, in this process alone."""

    def __init__(self, options: Options, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.accelerator = Accelerator(cpu=options.device == "cpu")
        self.device = self.accelerator.device
        self.sizes = (2, 4) if options.tiny else options.micro_batch_sizes
        self.deadline = time.monotonic() + 60 * options.minutes
        config = parse(Config, None, ["--config", str(options.training), "--data.train", str(folder / "shards")])
        model = TINY if options.tiny else config.model
        rng = np.random.default_rng(0)
        (folder / "originals").mkdir()
        for number in range(2 * self.sizes[-1] + 8):
            pixels = rng.integers(0, 256, (model.image_size, model.image_size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "originals" / f"{number:04d}.png")
        make_shards(
            ShardingConfig(
                str(folder / "originals"), folder / "shards", size=model.image_size, val_count=8, images_per_shard=16, workers=1
            )
        )  # fmt: skip
        self.config = dataclasses.replace(config, model=model)
        (folder / "training.yaml").write_text(to_yaml(self.config))

    def training(self, precision: str, size: int, *, compiled: Any = False, levels: tuple[int, ...] = ()) -> Config:
        """The configuration, in this arithmetic, with so many images at a time."""
        train = dataclasses.replace(self.config.train, precision=precision, compile=compiled, global_batch_size=size)
        model = dataclasses.replace(self.config.model, checkpoint_levels=levels)
        return dataclasses.replace(self.config, train=train, model=model)

    def step(self, config: Config) -> TrainStep:
        """A new model with the same seeded weights every time, and all that trains it."""
        release_memory(self.accelerator)
        torch._dynamo.reset()
        torch.manual_seed(0)
        set_tf32(config.train.precision == "tf32")
        size = config.train.global_batch_size
        return step_alone(config, self.device, BatchLayout(size, size, rank=0, num_processes=1))

    @contextmanager
    def batches(self, size: int, reader: str = "resident") -> Iterator[Iterator[Batch]]:
        """Of the reader by that name."""
        config = dataclasses.replace(self.config.data, reader=reader, num_workers=1)
        with closing(open_reader(config, "train", device=self.device)) as opened:
            yield opened.train_batches(0, 0, BatchLayout(size, size, rank=0, num_processes=1))

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def train(
    step: TrainStep, batches: Iterator[Batch], images_seen: int, num_steps: int, meters: Meters | None = None
) -> int:
    """So many steps on; returns the images seen then."""
    for _ in range(num_steps):
        step.accumulate(batches, images_seen, step.config.objective.beta)
        images_seen += step.layout.global_batch_size
        result = step.update(step.config.optim.lr, images_seen)
        if meters:
            meters.add_step(result)
    return images_seen


def speed(bench: Bench, precision: str, size: int, compiled: Any, checkpointed: bool) -> dict[str, Any]:
    """Images per second, MFU, GiB and the share of time spent waiting for data."""
    row = {"precision": precision, "micro_batch": size, "compiled": compiled, "checkpointed": checkpointed}
    if time.monotonic() > bench.deadline:
        return row | {"note": "time was up"}
    try:
        levels = tuple(range(len(bench.config.model.channel_mult))) if checkpointed else ()
        step = bench.step(bench.training(precision, size, compiled=compiled, levels=levels))
        with bench.batches(size) as batches:
            seen = train(step, batches, 0, 3)  # compiles, and makes what is kept
            bench.synchronize()
            if bench.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            stopwatch = Stopwatch(seen)
            seen = train(step, stopwatch.timing(batches), seen, bench.options.steps)
            bench.synchronize()
            lap = stopwatch.lap(bench.accelerator, seen)
    except RuntimeError as error:
        return row | {"note": "out of memory" if is_out_of_memory(error) else str(error).splitlines()[0]}
    flops = training_flops_per_image(VAE(bench.config.model)) * lap["perf/images_per_s"]
    peak = peak_flops(bench.device, precision)  # type: ignore[arg-type]
    return row | {
        "images_per_s": lap["perf/images_per_s"], "mfu": flops / peak if peak else None,
        "gib": lap["perf/peak_memory_gib"], "data_wait": lap["perf/data_wait_frac"],
    }  # fmt: skip


def speeds(bench: Bench) -> Iterator[dict[str, Any]]:
    """Eager at every size, checkpointed at the largest; compiled at the largest, and at the smallest without launches."""
    precisions = ("fp32", "tf32", "bf16")
    for precision, size in itertools.product(precisions, bench.sizes):
        yield speed(bench, precision, size, False, False)
    for precision in precisions[::-1]:
        yield speed(bench, precision, bench.sizes[-1], False, True)
    if bench.device.type == "cuda":  # a CPU takes a minute and a C++ compiler for each
        yield speed(bench, "bf16", bench.sizes[-1], "default", True)
        for precision in precisions[::-1]:
            yield speed(bench, precision, bench.sizes[-1], "default", False)
        yield speed(bench, "bf16", bench.sizes[0], "reduce-overhead", False)
