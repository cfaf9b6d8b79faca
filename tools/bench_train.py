"""Measure training on this machine: what the loop costs over a bare PyTorch loop, and what bf16 and channels_last bring.

python tools/bench_train.py [--json FILE]
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vaetrain.command_line import parse


@dataclass(frozen=True)
class BenchConfig:
    """A model at random weights on images of noise; medians over rounds in which all variants take turns."""

    json: Path | None = None
    """Also write the medians and ratios to this file."""

    image_size: int = 64
    """Height and width of the images, in pixels."""

    batch_size: int = 32
    """Images per step."""

    steps: int = 10
    """Steps timed in each round."""

    rounds: int = 5
    """Rounds; every variant runs once in each."""

    compile: bool = False
    """Also train compiled, which takes minutes at the start."""


if __name__ == "__main__":
    CONFIG = parse(BenchConfig, __doc__, flags=True)  # before the imports below, which take seconds

import contextlib
import io
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from vaetrain.config import Config, LogConfig, TrainConfig
from vaetrain.data.config import DataConfig
from vaetrain.data.sharding.config import ShardingConfig
from vaetrain.data.sharding.make_shards import make_shards
from vaetrain.distributed import processes
from vaetrain.distributed.processes import in_use
from vaetrain.machine import cpu_model
from vaetrain.model.autoencoder import VAE
from vaetrain.model.config import ModelConfig
from vaetrain.objective.elbo import negative_elbo
from vaetrain.train import train
from vaetrain.training import precision

MODEL = ModelConfig(
    patch_size=2, base_channels=32, channel_mult=(1, 2, 4), num_res_blocks=1, latent="vector", latent_channels=64
)


def bare_loop(config: BenchConfig, *, bf16: bool, channels_last: bool) -> Callable[[], float]:
    """Images per second of forward, backward and AdamW on one batch that is already there."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = VAE(replace(MODEL, image_size=config.image_size)).to(device, memory_format=memory_format)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-4, fused=True)
    x = (torch.rand(config.batch_size, 3, config.image_size, config.image_size, device=device) * 2 - 1).to(
        memory_format=memory_format
    )
    noise = torch.randn(config.batch_size, *vae.config.latent_shape, device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            terms = vae(x, noise)
        (negative_elbo(terms.distortion, terms.kl, 1.0).mean() / vae.config.num_pixels).backward()
        optimizer.step()
        optimizer.zero_grad()

    def measure() -> float:
        step()
        synchronize()
        start = time.perf_counter()
        for _ in range(config.steps):
            step()
        synchronize()
        return config.steps * config.batch_size / (time.perf_counter() - start)

    return measure


def make_images(config: BenchConfig, folder: Path) -> None:
    """Shards of noise in FOLDER/shards."""
    originals = folder / "originals"
    originals.mkdir()
    rng = np.random.default_rng(0)
    for number in range(config.batch_size * 2):
        pixels = rng.integers(0, 256, (config.image_size, config.image_size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(originals / f"{number}.png")
    make_shards(
        ShardingConfig(
            str(originals), folder / "shards", size=config.image_size, val_count=config.batch_size, workers=1
        )
    )


def vaetrain_loop(
    config: BenchConfig, accelerator: Accelerator, folder: Path, *, compiled: bool
) -> Callable[[], float]:
    """Images per second that vaetrain/train.py itself records: reader, flips, EMA, schedules, meters and clipping."""
    runs = iter(range(1000))

    def measure() -> float:
        run_dir = folder / f"run{next(runs)}-{compiled}"
        settings = Config(
            data=DataConfig(train=str(folder / "shards")),
            model=replace(MODEL, image_size=config.image_size),
            train=TrainConfig(
                num_images=(config.steps + 1) * config.batch_size, val_every_epochs=1000,
                global_batch_size=config.batch_size, compile=compiled,
            ),
            log=LogConfig(every_steps=1, num_pictures=2),
            run_dir=run_dir,
        )  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()):
            train(settings, accelerator)
        accelerator.free_memory()
        records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        speeds = [record["perf/images_per_s"] for record in records if record["split"] == "train"][1:]
        return statistics.harmonic_mean(speeds)

    return measure


def synchronize() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main(config: BenchConfig) -> None:
    """Measure, print a table and write the JSON."""
    accelerator = precision.start("auto")
    own = in_use(accelerator)
    with tempfile.TemporaryDirectory() as folder:
        make_images(config, Path(folder))
        variants = {
            "vaetrain": vaetrain_loop(config, accelerator, Path(folder), compiled=False),
            "bare_bf16_channels_last": bare_loop(config, bf16=True, channels_last=True),
            "bare_fp32_channels_last": bare_loop(config, bf16=False, channels_last=True),
            f"bare_{own}_contiguous": bare_loop(config, bf16=own == "bf16", channels_last=False),
        }
        if config.compile:
            variants["vaetrain_compiled"] = vaetrain_loop(config, accelerator, Path(folder), compiled=True)
        speeds: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(config.rounds):
            for name, measure in variants.items():
                speeds[name].append(measure())
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    ratios = {
        "vaetrain_vs_bare_loop": medians["vaetrain"] / medians[f"bare_{own}_channels_last"],
        "channels_last_vs_contiguous": medians[f"bare_{own}_channels_last"] / medians[f"bare_{own}_contiguous"],
        "bf16_vs_fp32": medians["bare_bf16_channels_last"] / medians["bare_fp32_channels_last"],
    }
    if config.compile:
        # What a loop like most others' makes of the same network: uncompiled, contiguous, nothing besides the step.
        ratios["compiled_vs_bare_contiguous"] = medians["vaetrain_compiled"] / medians[f"bare_{own}_contiguous"]
    device = processes.device_name(accelerator.device)
    processor = f" on {cpu_model()}" if accelerator.device.type == "cpu" else ""
    machine = f"{device}{processor}, {platform.machine()}, torch {torch.__version__}; vaetrain in {own}"
    print(
        f"{machine}; {config.image_size}×{config.image_size}, batch {config.batch_size}, medians of {config.rounds} rounds"
    )
    for name, value in medians.items():
        print(f"{name:28s} {value:10,.0f} images/s")
    for name, value in ratios.items():
        print(f"{name:28s} {value:10.2f}")
    if config.json is not None:
        config.json.write_text(
            json.dumps({"machine": machine, "images_per_s": medians, "ratios": ratios}, indent=2) + "\n"
        )
        print(f"written to {config.json}")


if __name__ == "__main__":
    main(CONFIG)
