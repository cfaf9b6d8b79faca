"""Measure which batch size, which learning rate and how many processes to train with, and write a config that does.

accelerate launch [--config_file launch/F.yaml] vaetrain/scale.py --config configs/C.yaml --out DIR
"""

from __future__ import annotations

from vaetrain.command_line import parse, user_errors
from vaetrain.scaling.config import ScaleConfig

if __name__ == "__main__":
    CONFIG = parse(ScaleConfig, __doc__)  # before the imports below, which take seconds

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import yaml
from accelerate import Accelerator

from vaetrain import distributed
from vaetrain.command_line import plain
from vaetrain.config import OptimConfig
from vaetrain.data.order import BatchLayout
from vaetrain.data.reader import Reader, open_split
from vaetrain.files import replace_file
from vaetrain.model.autoencoder import VAE
from vaetrain.run import provenance, write_json
from vaetrain.scaling.advice import Advice, Facts, advise, stops_helping, table, verdict
from vaetrain.scaling.all_reduce import Network
from vaetrain.scaling.figure import Stretch, save_figure
from vaetrain.scaling.lr_range import LrRange, lr_range
from vaetrain.scaling.lr_trials import LrTrials, candidates, lr_trials
from vaetrain.scaling.noise_scale import NoiseScale, by_progress
from vaetrain.scaling.probe import Probe, probe
from vaetrain.scaling.trial import Step, trial

ASSUMED_GB_PER_S, ASSUMED_LATENCY_US = 10.0, 50.0
"""Of a network that nobody measured and nobody gave."""

NUM_STRETCHES = 10
"""Points of the curve of the noise scale over training."""


@dataclass(frozen=True)
class Noise:
    """The gradient noise scale, over all steps that count and over stretches of training."""

    simple: NoiseScale
    """From plain averages over steps."""
    adam: NoiseScale
    """Adam's, stretches counted by their progress: the critical batch that advice goes by."""
    stretches: tuple[Stretch, ...]
    small_batch: int
    big_batch: int


def scale(config: ScaleConfig, accelerator: Accelerator) -> dict[str, Any]:
    """Measure, advise, and write DIR/scaling.json, scaling.png and recommended.yaml; returns what is in the first.

    A collective. Raises ValueError when not a single image fits, and FileExistsError when DIR already holds a result.
    """
    if (config.out / "scaling.json").exists():
        raise FileExistsError(f"{config.out} already holds a scaling.json; name another folder with --out")
    with closing(open_split(config.data, accelerator, "train")) as reader:
        config.model.check_images(reader.manifest.image_size, reader.manifest.channels)
        probes = probe(config, config.probe, accelerator)
        fastest = best_of(probes)
        report(accelerator, describe_probes(probes))
        found_lr = lr_range(config, config.lr_range, accelerator, reader) if "lr" in config.phases else None
        optim, trials = config.optim, None
        if found_lr is not None:
            if found_lr.suggestion is not None and config.lr_range.trial_steps:
                trials = lr_trials(config, candidates(found_lr), config.lr_range.trial_steps, accelerator, reader)
            report(accelerator, describe_lr(found_lr, trials, config.optim))
            optim = replace(optim, lr=suggested_lr(found_lr, trials) or optim.lr)
        noise = measure_noise(replace(config, optim=optim), accelerator, reader) if "noise" in config.phases else None
        if noise is not None:
            report(accelerator, describe_noise(noise))
        layout = BatchLayout.of(
            config.train.global_batch_size, config.train.micro_batch_size, 0, accelerator.num_processes
        )
        total_images = config.train.num_images or config.train.epochs * layout.images_per_epoch(reader.num_images)
        fingerprint = reader.manifest.fingerprint
    network = network_of(config, accelerator)
    gradient_bytes = 4 * sum(parameter.numel() for parameter in VAE(config.model).parameters())
    knee, largest_safe = fastest.knee, fastest.largest_safe
    assert knee is not None
    assert largest_safe is not None
    facts = Facts(
        step_s=fastest.step_s, knee=knee.micro_batch_size, largest_safe=largest_safe,
        all_reduce_s=lambda count: network.all_reduce_s(gradient_bytes, count),
        critical_batch=noise.adam.images if noise else None, base_batch=config.train.global_batch_size, optim=optim,
        total_images=total_images, rule=config.advice.rule,
    )  # fmt: skip
    advice = advise(facts, config.for_num_processes)
    result = {
        "probe": [
            plain(each) | {"knee": plain(each.knee) if each.knee else None, "largest_safe": each.largest_safe} for each in probes
        ],
        "lr_range": None if found_lr is None else plain(found_lr) | {
            "suggestion": found_lr.suggestion, "interval": found_lr.interval, "why_none": found_lr.why_none,
        },
        "lr_trials": None if trials is None else plain(trials) | {
            "suggestion": trials.suggestion, "interval": trials.interval, "why_none": trials.why_none,
            "caveat": trials.caveat,
        },
        "noise_scale": None if noise is None else plain(noise),
        "network": plain(network) | {"gradient_bytes": gradient_bytes, "model": "ring, not hidden behind the backward pass"},
        "advice": [plain(each) for each in advice],
        "stops_helping_at": stops_helping(advice),
        "config": plain(config),
        "provenance": provenance(
            device=distributed.device_name(accelerator.device), num_processes=accelerator.num_processes,
            processes_per_node=distributed.processes_per_node(),
            dataset_fingerprint=fingerprint,
        ),
    }  # fmt: skip
    if accelerator.is_main_process:
        config.out.mkdir(parents=True, exist_ok=True)
        own = next((each for each in advice if each.num_processes == accelerator.num_processes), advice[0])
        replace_file(config.out / "recommended.yaml", recommended(own, fastest, network).encode())
        save_figure(
            probes, found_lr, trials, noise.stretches if noise else (), noise.adam if noise else None, advice,
            config.out / "scaling.png",
        )  # fmt: skip
        write_json(config.out / "scaling.json", result)  # last: its presence says that all is there
        print(f"\nnetwork: {network.bytes_per_s / 1e9:.3g} GB/s, {network.latency_s * 1e6:.3g} µs, {network.source}")
        print(f"{table(advice)}\n{verdict(advice)}\n")
        print(
            f"recommended.yaml (for {own.num_processes} processes), scaling.json and scaling.png written to {config.out}"
        )
    return result


def best_of(probes: Sequence[Probe]) -> Probe:
    """The arithmetic with the highest safe throughput; raises ValueError when nothing fits in any."""
    usable = [each for each in probes if each.knee is not None]
    if not usable:
        raise ValueError(
            f"not even one image at a time fits into {probes[0].safe_gib:.2f} GiB; use a smaller model, or on a CPU raise "
            "--probe.cpu-memory-gib"
        )
    return max(usable, key=lambda each: (each.knee.images_per_s or 0.0) if each.knee else 0.0)


def measure_noise(config: ScaleConfig, accelerator: Accelerator, reader: Reader) -> Noise:
    """Train with the config's learning rate and read off the noise scale; on one process a step is cut into parts."""
    options = config.noise
    batch = config.train.global_batch_size
    train = config.train
    if accelerator.num_processes == 1:
        if batch % options.parts:
            raise ValueError(
                f"--noise.parts {options.parts} does not divide --train.global-batch-size {batch}; give a number that does"
            )
        train = replace(train, micro_batch_size=batch // options.parts)
    steps: list[Step] = []
    with trial(replace(config, train=train), accelerator, reader, watch_noise=True) as training:
        assert training.small is not None
        small_batch = training.small.batch_size
        for number in range(options.num_steps):
            warmed = min(1.0, (number + 1) * batch / max(1, config.optim.warmup_images))
            steps.append(training.step(config.optim.lr * warmed))

    def simple(chosen: Sequence[Step]) -> NoiseScale:
        small_sq = [step.small_grad_sq for step in chosen if step.small_grad_sq is not None]
        return NoiseScale.of(small_sq, [step.grad_sq for step in chosen], small_batch, batch)

    def adam(chosen: Sequence[Step]) -> NoiseScale:
        small_sq = [step.adam_small_grad_sq for step in chosen if step.adam_small_grad_sq is not None]
        big_sq = [step.adam_grad_sq for step in chosen if step.adam_grad_sq is not None]
        return NoiseScale.of(*by_progress(small_sq, big_sq), small_batch, batch)

    length = max(2, options.num_steps // NUM_STRETCHES)  # Adam's first step has no preconditioner yet
    stretches = []
    for start in range(0, options.num_steps - length + 1, length):
        part = steps[start : start + length]
        stretches.append(Stretch((start + length) * batch, simple(part).images, adam(part).images))
    counted = steps[options.skip_steps :]
    return Noise(simple(counted), adam(counted), tuple(stretches), small_batch, batch)


def network_of(config: ScaleConfig, accelerator: Accelerator) -> Network:
    """What the options say, what can be measured between these processes, or what is assumed. A collective."""
    given = config.advice
    if given.gb_per_s is not None and given.latency_us is not None:
        return Network(given.gb_per_s * 1e9, given.latency_us / 1e6, "as given")
    if accelerator.num_processes > 1:
        return Network.measure(accelerator)
    gb_per_s = ASSUMED_GB_PER_S if given.gb_per_s is None else given.gb_per_s
    latency_us = ASSUMED_LATENCY_US if given.latency_us is None else given.latency_us
    return Network(gb_per_s * 1e9, latency_us / 1e6, "ASSUMED; give --advice.gb-per-s and --advice.latency-us")


def recommended(advice: Advice, fastest: Probe, network: Network) -> str:
    """The config fragment: what differs from the config that was measured, for `--config C --config recommended.yaml`."""
    optim = {name: value for name, value in plain(advice.optim).items() if name in ("lr", "beta1", "beta2", "eps")}
    train = {
        "num_images": advice.total_images,
        "global_batch_size": advice.global_batch_size,
        "micro_batch_size": advice.micro_batch_size,
        "precision": fastest.precision,
        "compile": fastest.compiled,
    }
    header = (
        f"# Measured by vaetrain/scale.py for {advice.num_processes} process(es); network {network.source}.\n"
        "# Use: accelerate launch ... vaetrain/train.py --config THE_SAME_CONFIG --config this file\n"
    )
    return header + yaml.safe_dump({"optim": optim, "train": train}, sort_keys=False)


def describe_probes(probes: Sequence[Probe]) -> str:
    """The measured sizes as lines."""
    lines = []
    for each in probes:
        lines.append(f"micro-batches, {each.precision}{', compiled' if each.compiled else ''}:")
        for m in each.measurements:
            what = (
                "does not fit"
                if m.images_per_s is None
                else f"{m.images_per_s:10,.1f} images/s  peak {m.peak_gib:.2f} GiB"
            )
            lines.append(f"  {m.micro_batch_size:5d}  {what}")
        knee = each.knee.micro_batch_size if each.knee else None
        lines.append(
            f"  knee {knee}, largest safe {each.largest_safe} (below {each.safe_gib:.2f} of {each.memory_gib:.2f} GiB)"
        )
    return "\n".join(lines)


def suggested_lr(found: LrRange, trials: LrTrials | None) -> float | None:
    """Of the short trainings where there were some, else of the range test; None where it makes no suggestion."""
    return found.suggestion if trials is None else trials.suggestion


def describe_lr(found: LrRange, trials: LrTrials | None, optim: OptimConfig) -> str:
    """The suggestion, or why there is none."""
    if found.suggestion is None or found.interval is None:
        return f"no learning rate can be suggested: {found.why_none}; --optim.lr {optim.lr:g} is kept"
    low, high = found.interval
    text = f"the range test suggests learning rate {found.suggestion:.3g} (seeds {low:.3g} to {high:.3g})"
    if trials is not None:
        if trials.suggestion is None or trials.interval is None:
            return f"{text}, but no learning rate can be suggested: {trials.why_none}; --optim.lr {optim.lr:g} is kept"
        low, high = trials.interval
        text += f"; short trainings: {trials.suggestion:.3g} ({low:.3g} to {high:.3g} as good)"
        text += f"; {trials.caveat}" if trials.caveat else ""
    return f"{text}; the config has {optim.lr:g}"


def describe_noise(found: Noise) -> str:
    """The critical batch with its error, and the simple noise scale beside it."""
    if found.adam.images is None:
        return "the gradient noise scale is not measurable: noise drowns the gradient; give more --noise.num-steps"
    return f"critical batch (Adam's gradient noise scale) {shown(found.adam)} images; simple noise scale {shown(found.simple)}"


def shown(found: NoiseScale) -> str:
    """The estimate with its error."""
    if found.images is None:
        return "not measurable"
    error = "" if found.standard_error is None else f" ± {found.standard_error:,.0f}"
    return f"{found.images:,.0f}{error}"


def report(accelerator: Accelerator, text: str) -> None:
    """Print on the main process."""
    if accelerator.is_main_process:
        print(text, flush=True)


def main(config: ScaleConfig) -> None:
    """Join the other processes and measure."""
    with user_errors():
        accelerator = distributed.start(config.train.precision)
        with distributed.finishing(accelerator):
            scale(config, accelerator)


if __name__ == "__main__":
    main(CONFIG)
