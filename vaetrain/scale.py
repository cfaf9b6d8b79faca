"""Measure which batch size, which learning rate and how many processes to train with, and write a config that does.

accelerate launch --config_file launch/gpu1.yaml vaetrain/scale.py --config configs/C.yaml --out DIR
(launch/ has layouts for more processes, too)
"""

from __future__ import annotations

if __name__ == "__main__":
    from vaetrain.distributed.launcher import end_with_launcher

    end_with_launcher()  # before anything that takes time

from vaetrain.command_line import parse, user_errors
from vaetrain.scaling.config import ScaleConfig

if __name__ == "__main__":
    CONFIG = parse(ScaleConfig, __doc__)  # before the imports below, which take seconds

    from vaetrain.preflight import check_scaling, refusing

    with refusing():
        check_scaling(CONFIG)

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import yaml
from accelerate import Accelerator

from vaetrain.command_line import plain
from vaetrain.config import OptimConfig
from vaetrain.data.readers.order import BatchLayout
from vaetrain.data.readers.reader import open_split
from vaetrain.distributed import processes
from vaetrain.distributed.watchdog import longest_wait_s
from vaetrain.files import replace_file
from vaetrain.model.autoencoder import VAE
from vaetrain.runs.directory import write_json
from vaetrain.runs.provenance import provenance
from vaetrain.scaling.advice import Advice, Measurements, advise, largest_divisor, stops_helping, table, verdict
from vaetrain.scaling.all_reduce import Interconnect
from vaetrain.scaling.figure import save_figure
from vaetrain.scaling.lr_range import LrRange, lr_range
from vaetrain.scaling.lr_trials import LrTrials, candidates, lr_trials
from vaetrain.scaling.measure_noise import MeasuredNoise, measure_noise, noise_micro_batch
from vaetrain.scaling.probe import Probe, probe
from vaetrain.training import compilation, precision
from vaetrain.training.memory import suggest_on_oom
from vaetrain.training.noise_scale import NoiseScale

ASSUMED_GB_PER_S, ASSUMED_LATENCY_US = 10.0, 50.0
"""Of a network that nobody measured and nobody gave."""


def scale(config: ScaleConfig, accelerator: Accelerator) -> dict[str, Any]:
    """Measure, advise, and write DIR/scaling.json, scaling.png and recommended.yaml; returns what is in the first.

    A collective. Raises ValueError when not a single image fits, or when what is asked cannot be measured, before anything is;
    FileExistsError when DIR already holds a result.
    """
    config.check_out()
    with closing(open_split(config.data, accelerator, "train")) as reader:
        config.model.check_images(reader.manifest.image_size, reader.manifest.channels)
        layout = BatchLayout.of(
            config.train.global_batch_size, config.train.micro_batch_size, 0, accelerator.num_processes
        )
        total_images = config.train.num_images or config.train.epochs * layout.images_per_epoch(reader.num_images)
        config = replace(config, optim=config.optim.in_images(total_images))
        dataset_images, fingerprint = reader.num_images, reader.manifest.fingerprint
        if "noise" in config.phases:
            noise_micro_batch(config, accelerator.num_processes, layout.per_process_batch_size)
        counts = config.counts_within(dataset_images)
        probes = probe(config, config.probe, accelerator)
        fastest = best_of(probes)
        report(accelerator, describe_probes(probes))
        assert fastest.largest_safe is not None
        config = fitting(config, fastest.largest_safe, accelerator.num_processes)
        found_lr = lr_range(config, config.lr_range, accelerator, reader) if "lr" in config.phases else None
        optim, trials = config.optim, None
        if found_lr is not None:
            if found_lr.suggestion is not None and config.lr_range.trial_steps:
                trials = lr_trials(config, candidates(found_lr), config.lr_range.trial_steps, accelerator, reader)
            report(accelerator, describe_lr(found_lr, trials, config.optim))
            optim = replace(optim, lr=suggested_lr(found_lr, trials) or optim.lr)
        noise = None
        if "noise" in config.phases:
            noise = measure_noise(replace(config, optim=optim), fastest.largest_safe, accelerator, reader)
            report(accelerator, describe_noise(noise, optim))
    network = network_of(config, accelerator)
    gradient_bytes = 4 * sum(parameter.numel() for parameter in VAE(config.model).parameters())
    assert fastest.knee is not None
    facts = Measurements(
        step_s=fastest.step_s, knee=fastest.knee.micro_batch_size,
        all_reduce_s=lambda count: network.all_reduce_s(gradient_bytes, count),
        critical_batch=noise.adam.images if noise else None, base_batch=config.train.global_batch_size, optim=optim,
        total_images=total_images, dataset_images=dataset_images, rule=config.advice.rule,
    )  # fmt: skip
    advice = advise(facts, counts)
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
        "provenance": provenance(accelerator, fingerprint),
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
        if left_out := sorted(set(config.for_num_processes) - set(counts)):
            print(
                f"left out: {', '.join(map(str, left_out))} processes, more than the {dataset_images} training images\n"
            )
        print(
            f"recommended.yaml (for {own.num_processes} process{'es' * (own.num_processes > 1)}), scaling.json and scaling.png "
            f"written to {config.out}"
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


def fitting(config: ScaleConfig, largest_safe: int, num_processes: int) -> ScaleConfig:
    """The config with micro-batches that fit into memory."""
    per_process = config.train.global_batch_size // num_processes
    micro = largest_divisor(per_process, min(largest_safe, config.train.micro_batch_size or per_process))
    return replace(config, train=replace(config.train, micro_batch_size=micro))


def network_of(config: ScaleConfig, accelerator: Accelerator) -> Interconnect:
    """Each number as the options give it, else as measured between these processes, else assumed. A collective."""
    given = config.advice
    bytes_per_s = None if given.gb_per_s is None else given.gb_per_s * 1e9
    latency_s = None if given.latency_us is None else given.latency_us / 1e6
    if bytes_per_s is not None and latency_s is not None:
        return Interconnect(bytes_per_s, latency_s, "as given")
    if accelerator.num_processes > 1:
        rest = Interconnect.measure(accelerator)
    else:
        missing = [option for option, value in (("gb-per-s", bytes_per_s), ("latency-us", latency_s)) if value is None]
        source = f"ASSUMED; give {' and '.join(f'--advice.{option}' for option in missing)}"
        rest = Interconnect(ASSUMED_GB_PER_S * 1e9, ASSUMED_LATENCY_US / 1e6, source)
    if bytes_per_s is None and latency_s is None:
        return rest
    given_one, other = ("latency", "bandwidth") if bytes_per_s is None else ("bandwidth", "latency")
    return Interconnect(
        rest.bytes_per_s if bytes_per_s is None else bytes_per_s, rest.latency_s if latency_s is None else latency_s,
        f"{given_one} as given, {other} {rest.source}",
    )  # fmt: skip


def recommended(advice: Advice, fastest: Probe, network: Interconnect) -> str:
    """The config fragment: what differs from the config that was measured, for `--config C --config recommended.yaml`."""
    optim = {
        name: value
        for name, value in plain(advice.optim).items()
        # A warm-up in images, and no fraction that the same config may have, which would win over it.
        if name in ("lr", "beta1", "beta2", "eps", "warmup_images", "warmup_fraction")
    }
    train = {
        "num_images": advice.total_images,
        "global_batch_size": advice.global_batch_size,
        "micro_batch_size": advice.micro_batch_size,
        "precision": fastest.precision,
        "compile": fastest.compiled,
    }
    header = (
        f"# Measured by vaetrain/scale.py for {advice.num_processes} process(es); network {network.source}.\n"
        "# Use: accelerate launch --config_file launch/F.yaml vaetrain/train.py --config THE_SAME_CONFIG --config this file\n"
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


def describe_noise(found: MeasuredNoise | None, optim: OptimConfig) -> str:
    """The critical batch with its error, and the simple noise scale beside it."""
    if found is None:
        return f"no gradient noise scale: training with learning rate {optim.lr:.3g} diverged; lower --optim.lr"
    if found.adam.images is None:
        return f"the gradient noise scale is not measurable: {found.adam.why_none} (--noise.num-steps)"
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
        waits_s = longest_wait_s(config.train.timeout_s, config.train.start_timeout_s)
        accelerator = precision.start(
            config.train.precision, timeout_s=waits_s, timeout_option="--train.timeout-s, --train.start-timeout-s"
        )
        config = compilation.resolved(precision.resolved(config, accelerator), accelerator)
        with suggest_on_oom(config, accelerator), processes.finishing(accelerator):
            scale(config, accelerator)


if __name__ == "__main__":
    main(CONFIG)
