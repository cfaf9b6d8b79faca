"""Measure training on this machine: what the loop costs over a bare PyTorch loop, and what bf16 and channels_last bring.

python tools/bench_train.py [--json FILE]
python tools/bench_train.py --terms --backbone FILE --heads FILE      (what the terms beyond the ELBO cost, in their place)
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

    terms: bool = False
    """Measure in place of all this what the adversarial term costs, and with its two files the perceptual one."""

    backbone: Path | None = None
    """VGG16 of the perceptual term."""

    heads: Path | None = None
    """Its heads."""


if __name__ == "__main__":
    CONFIG = parse(BenchConfig, __doc__, flags=True)  # before the imports below, which take seconds

import contextlib
import io
import itertools
import json
import multiprocessing
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from vaetrain.config import Config, LogConfig, PrecisionName, TrainConfig
from vaetrain.data.config import DataConfig
from vaetrain.data.readers.batch import Batch
from vaetrain.data.readers.order import BatchLayout
from vaetrain.data.sharding.config import ShardingConfig
from vaetrain.data.sharding.make_shards import make_shards
from vaetrain.distributed import processes
from vaetrain.distributed.processes import in_use
from vaetrain.machine import cpu_model
from vaetrain.metrics.lpips_config import PERCEPTUAL, LpipsConfig
from vaetrain.metrics.perceptual_distance import PerceptualDistance
from vaetrain.model.autoencoder import VAE
from vaetrain.model.config import ModelConfig
from vaetrain.objective.config import AdversarialConfig, ObjectiveConfig, PerceptualConfig
from vaetrain.objective.elbo import negative_elbo
from vaetrain.train import train
from vaetrain.training import precision
from vaetrain.training.discriminator import PatchGAN
from vaetrain.training.memory import step_alone

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


LAYERS, CHANNELS = 2, 64
"""Of the discriminator."""


def objectives(config: BenchConfig) -> dict[str, ObjectiveConfig]:
    """The plain objective, each term with it, and all of them."""
    adversarial = AdversarialConfig(weight=0.5, layers=LAYERS, channels=CHANNELS)
    found = {"plain": ObjectiveConfig(), "adversarial": ObjectiveConfig(adversarial=adversarial)}
    if config.backbone is not None:
        perceptual = PerceptualConfig(weight=1000.0, backbone=config.backbone, heads=config.heads)
        found["perceptual"] = ObjectiveConfig(perceptual=perceptual)
        found["both"] = ObjectiveConfig(perceptual=perceptual, adversarial=adversarial)
    return found


def step_with(config: BenchConfig, objective: ObjectiveConfig, device: torch.device) -> Callable[[], None]:
    """One whole step of training on images of noise."""
    settings = Config(
        data=DataConfig(train="none"), model=replace(MODEL, image_size=config.image_size), objective=objective,
        train=TrainConfig(global_batch_size=config.batch_size, precision=config_precision(), compile=False),
    )  # fmt: skip
    step = step_alone(settings, device, BatchLayout.of(config.batch_size, None, 0, 1))
    pixels = torch.randint(0, 256, (config.batch_size, 3, config.image_size, config.image_size), dtype=torch.uint8)
    numbers = torch.zeros(config.batch_size, dtype=torch.int64)
    batches = itertools.repeat(Batch(pixels, numbers, numbers))
    positions = itertools.count(0, config.batch_size)

    def take() -> None:
        images_seen = next(positions)
        step.accumulate(batches, images_seen, 1.0, objective.adversarial.weight or None)
        step.update(1e-4, images_seen + config.batch_size)

    return take


def networks_alone(config: BenchConfig, objective: ObjectiveConfig, device: torch.device) -> Callable[[], None]:
    """Forward and backward of the terms' own networks, with nothing around them: down to the reconstruction, and to D's weights."""
    shape = (config.batch_size, 3, config.image_size, config.image_size)
    image, recon = (torch.rand(shape, device=device).contiguous(memory_format=torch.channels_last) for _ in range(2))
    recon.requires_grad_()
    parts: list[Callable[[], None]] = []
    if objective.perceptual.weight:
        assert config.backbone
        assert config.heads
        distance = PerceptualDistance(LpipsConfig("vgg", config.backbone, config.heads), PERCEPTUAL).to(device)
        parts.append(lambda: distance(recon, image).sum().backward())
    if objective.adversarial.weight:
        net = PatchGAN(objective.adversarial, 3).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.AdamW(net.parameters(), fused=True)
        weights = list(net.parameters())

        def judge() -> None:
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=config_precision() == "bf16"):
                of_image, of_recon = net(image), net(recon)
            torch.autograd.grad(-of_recon.mean(), recon, retain_graph=True)
            (of_recon.relu().mean() + (1 - of_image).relu().mean()).backward(inputs=weights)
            optimizer.step()

        parts.append(judge)

    def take() -> None:
        for part in parts:
            part()

    return take


def config_precision() -> PrecisionName:
    """What auto means on this machine."""
    choice = precision.choose("auto")
    assert choice is not None
    return choice.name


def peak_mib(take: Callable[[Callable[[], None]], None], build: Callable[[], Callable[[], None]]) -> float:
    """MiB that two steps need beyond the start: of the GPU's allocator, or of a process of its own."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        take(build())
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def measure() -> None:
        torch.set_num_threads(1)  # a fork has none of the parent's threads
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        take(build())
        sender.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10)

    process = context.Process(target=measure)
    process.start()
    found = float(receiver.recv())
    process.join()
    return found


def bench_terms(config: BenchConfig) -> None:
    """Images per second and peak memory of a step with each term, and its cost over that of its own networks."""
    accelerator = precision.start("auto")
    device = accelerator.device
    wanted = objectives(config)

    def twice(take: Callable[[], None]) -> None:
        take()
        take()

    memory = {name: peak_mib(twice, lambda o=o: step_with(config, o, device)) for name, o in wanted.items()}
    takes = {name: step_with(config, objective, device) for name, objective in wanted.items()}
    takes |= {
        f"networks of {name}": networks_alone(config, objective, device)
        for name, objective in wanted.items()
        if name != "plain"
    }
    seconds: dict[str, list[float]] = {name: [] for name in takes}
    for _, (name, take) in itertools.product(range(config.rounds + 1), takes.items()):
        synchronize()
        start = time.perf_counter()
        for _ in range(config.steps):
            take()
        synchronize()
        seconds[name].append((time.perf_counter() - start) / config.steps)
    fastest = {name: min(times[1:]) for name, times in seconds.items()}  # other work only ever slows one down
    machine = (
        f"{processes.device_name(device)} {cpu_model() if device.type == 'cpu' else ''}, torch {torch.__version__}"
    )
    print(
        f"{machine}; {config.image_size}×{config.image_size}, batch {config.batch_size}, fastest of {config.rounds} rounds"
    )
    results: dict[str, dict[str, float]] = {}
    for name in wanted:
        results[name] = {"images_per_s": config.batch_size / fastest[name], "peak_mib": memory[name]}
        line = f"{name:12s} {results[name]['images_per_s']:10,.1f} images/s {memory[name]:8,.0f} MiB"
        if name != "plain":
            cost = (fastest[name] - fastest["plain"]) / fastest[f"networks of {name}"]
            results[name]["cost_over_its_networks"] = cost
            line += (
                f"   {fastest[name] / fastest['plain']:.2f} times the plain step; cost / its networks alone {cost:.2f}"
            )
        print(line)
    if config.json is not None:
        config.json.write_text(json.dumps({"machine": machine, "terms": results}, indent=2) + "\n")
        print(f"written to {config.json}")


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
    bench_terms(CONFIG) if CONFIG.terms else main(CONFIG)
