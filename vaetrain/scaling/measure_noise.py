"""A training that watches its gradient noise scale, for scale.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from accelerate import Accelerator

from vaetrain.data.readers.reader import Reader
from vaetrain.scaling.advice import largest_divisor
from vaetrain.scaling.config import ScaleConfig
from vaetrain.scaling.figure import Stretch
from vaetrain.scaling.short_training import Step, short_training
from vaetrain.training.noise_scale import NoiseScale, by_progress

NUM_STRETCHES = 10
"""Points of the curve of the noise scale over training."""


@dataclass(frozen=True)
class MeasuredNoise:
    """The gradient noise scale, over all steps that count and over stretches of training."""

    simple: NoiseScale
    """From plain averages over steps."""
    adam: NoiseScale
    """Adam's, stretches counted by their progress: the critical batch that advice goes by."""
    stretches: tuple[Stretch, ...]
    small_batch: int
    big_batch: int


def noise_micro_batch(config: ScaleConfig, num_processes: int, largest_safe: int) -> int:
    """Images of the forward passes that measure the noise; on one process a step has several, whose first is the small batch.

    Raises ValueError when a step cannot be cut into `--noise.parts`.
    """
    config.check_noise_parts(num_processes)
    batch, parts = config.train.global_batch_size, config.noise.parts
    if num_processes > 1:
        return config.train.micro_batch_size or batch // num_processes
    return largest_divisor(batch, min(batch // parts, largest_safe))


def measure_noise(
    config: ScaleConfig, largest_safe: int, accelerator: Accelerator, reader: Reader
) -> MeasuredNoise | None:
    """Train with the config's learning rate and read off the noise scale; None when that training diverges."""
    options = config.noise
    batch = config.train.global_batch_size
    micro = noise_micro_batch(config, accelerator.num_processes, largest_safe)
    train = replace(config.train, micro_batch_size=micro)
    steps: list[Step] = []
    with short_training(replace(config, train=train), accelerator, reader, watch_noise=True) as training:
        probe = training.train_step.noise_probe
        assert probe is not None
        small_batch = probe.batch_size
        for number in range(options.num_steps):
            warmed = min(1.0, (number + 1) * batch / max(1, config.optim.warmup_images))
            steps.append(training.step(config.optim.lr * warmed))
            if not math.isfinite(steps[-1].loss + steps[-1].grad_sq):
                return None

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
    return MeasuredNoise(simple(counted), adam(counted), tuple(stretches), small_batch, batch)
