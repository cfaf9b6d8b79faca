"""Measure the training of a flow-matching prior on this machine against a bare PyTorch loop of the same network, and its sampling.

python tools/bench_prior.py LATENTS [--model.width 192 …] [--json FILE]
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import tyro

from vaetrain.command_line import parse
from vaetrain.priors.flow_matching.config import NetworkConfig


@dataclass(frozen=True)
class BenchConfig:
    """Latents that vaetrain/encode.py wrote, and a network; medians over rounds in which both loops take turns."""

    latents: tyro.conf.Positional[Path]
    """Folder of the latents, kept in memory by both loops."""

    model: NetworkConfig = field(default_factory=NetworkConfig)

    batch_size: int = 64
    """Latents per step."""

    steps: int = 10
    """Steps timed in each round."""

    rounds: int = 5
    """Rounds."""

    json: Path | None = None
    """Also write medians and ratio to this file."""


if __name__ == "__main__":
    CONFIG = parse(BenchConfig, __doc__, flags=True)  # before the imports below, which take seconds

import itertools
import json
import statistics
import time
from collections.abc import Callable

import torch
from accelerate import Accelerator

from vaetrain.config import LoopConfig
from vaetrain.data.readers.order import BatchLayout
from vaetrain.distributed import processes
from vaetrain.distributed.processes import in_use
from vaetrain.latents.reader import LatentReader
from vaetrain.machine import cpu_model
from vaetrain.priors.config import FlowSettings
from vaetrain.priors.flow_matching.config import PriorTraining
from vaetrain.priors.flow_matching.model import FlowMatching
from vaetrain.priors.flow_matching.prior import FlowMatchingPrior
from vaetrain.priors.flow_matching.step import FlowMatchingStep
from vaetrain.training import precision
from vaetrain.training.meters import Meters


def our_loop(
    config: BenchConfig, latents: LatentReader, accelerator: Accelerator
) -> tuple[Callable[[], None], FlowMatching]:
    """What vaetrain/train_prior.py does in a step: read, redraw z, noise, time and labels, learn, average, count."""
    layout = BatchLayout.of(config.batch_size, None, 0, 1)
    settings = PriorTraining(
        Path("unused"), model=config.model, train=LoopConfig(global_batch_size=config.batch_size, compile=False)
    )
    step = FlowMatchingStep.build(settings, latents, layout, accelerator)
    meters = Meters(step.names_of_sums, accelerator)
    batches, positions = latents.train_batches(0, 0, layout), itertools.count(0, config.batch_size)

    def take() -> None:
        images_seen = next(positions)
        step.accumulate(batches, images_seen)
        meters.add_step(step.update(1e-4, images_seen + config.batch_size))

    return take, step.averaged


def bare_loop(config: BenchConfig, latents: LatentReader, accelerator: Accelerator) -> Callable[[], None]:
    """The same network, loss, clipping and fused AdamW, on a tensor of latents."""
    device, num_classes = accelerator.device, len(latents.manifest.classes)
    found = list(latents.eval_batches(512))
    z, labels = torch.cat([batch.z for batch in found]), torch.cat([batch.labels for batch in found])
    model = FlowMatching(config.model, latents.latent_shape, num_classes).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def take() -> None:
        rows = torch.randint(len(z), (config.batch_size,), device=device)
        noise = torch.randn(config.batch_size, *latents.latent_shape, device=device)
        t = torch.randn(config.batch_size, device=device).sigmoid()
        dropped = torch.where(torch.rand(config.batch_size, device=device) < 0.1, num_classes, labels[rows])
        optimizer.zero_grad()
        with accelerator.autocast():
            loss = model(z[rows], noise, t, dropped).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return take


def main(config: BenchConfig) -> None:
    """Measure, print a table and write the JSON."""
    accelerator = precision.start("auto")
    device = accelerator.device
    latents = LatentReader.open(config.latents, accelerator=accelerator)
    ours, model = our_loop(config, latents, accelerator)
    takes = {"vaetrain": ours, "bare loop": bare_loop(config, latents, accelerator)}
    speeds: dict[str, list[float]] = {name: [] for name in takes}
    for _, (name, take) in itertools.product(range(config.rounds + 1), takes.items()):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(config.steps):
            take()
        synchronize(device)
        speeds[name].append(config.steps * config.batch_size / (time.perf_counter() - start))
    medians = {name: statistics.median(values[1:]) for name, values in speeds.items()}  # the first round warms up
    ratio = statistics.median(a / b for a, b in list(zip(*speeds.values(), strict=True))[1:])
    prior = FlowMatchingPrior(model, (), knows_no_class=True, settings=FlowSettings(steps=30, solver="heun"))
    start = time.perf_counter()
    prior.sample(0, range(config.batch_size))
    sampled = config.batch_size / (time.perf_counter() - start)
    kind = f" on {cpu_model()}, {torch.get_num_threads()} thread(s)" if device.type == "cpu" else ""
    machine = f"{processes.device_name(device)}{kind}, torch {torch.__version__}; {in_use(accelerator)}"
    num = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{machine}; latents {latents.latent_shape}, {num:,} parameters, batch {config.batch_size}, {config.rounds} rounds"
    )
    for name, value in medians.items():
        print(f"{name:28s} {value:10,.1f} latents/s {value / config.batch_size:8,.2f} steps/s")
    print(f"{'vaetrain / bare loop':28s} {ratio:10.3f}")
    print(f"{'sampling, heun, 30 steps':28s} {sampled:10,.1f} latents/s")
    if config.json is not None:
        found = {"machine": machine, "latents_per_s": medians, "ratio": ratio, "sampled_per_s": sampled}
        config.json.write_text(json.dumps(found, indent=2) + "\n")


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(CONFIG)
