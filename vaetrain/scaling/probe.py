"""How fast training is, and what memory it takes, at each micro-batch size."""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator

from vaetrain.config import CompileMode, Config
from vaetrain.distributed.processes import max_over_processes
from vaetrain.scaling.config import ProbeConfig
from vaetrain.training import compilation, precision
from vaetrain.training.memory import GIB, is_out_of_memory, release_memory, train_on_dummies
from vaetrain.training.throughput import forget_peak_rss, peak_rss_gib

KNEE = 0.95
"""Share of the best throughput from which a size counts as fast enough."""


@dataclass(frozen=True)
class Measurement:
    """One micro-batch size, over all processes: the slowest one's time and the largest one's memory."""

    micro_batch_size: int
    step_s: float | None
    """Median seconds of forward, backward and update; None when it did not fit."""
    peak_gib: float | None

    @property
    def images_per_s(self) -> float | None:
        """Of one process."""
        return None if self.step_s is None else self.micro_batch_size / self.step_s


@dataclass(frozen=True)
class Probe:
    """All sizes of one arithmetic, ascending."""

    precision: str
    compiled: CompileMode | bool
    measurements: tuple[Measurement, ...]
    memory_gib: float
    """What there is: the GPU's memory, or the bound set on a CPU."""
    safe_gib: float

    @property
    def fitting(self) -> list[Measurement]:
        """Those that ran within the safe memory."""
        return [m for m in self.measurements if m.step_s is not None and (m.peak_gib or 0) <= self.safe_gib]

    @property
    def largest_safe(self) -> int | None:
        """None when not even the smallest is."""
        return self.fitting[-1].micro_batch_size if self.fitting else None

    @property
    def knee(self) -> Measurement | None:
        """The smallest safe size with KNEE of the best safe throughput: larger ones only cost memory."""
        best = max((m.images_per_s or 0.0 for m in self.fitting), default=0.0)
        return next((m for m in self.fitting if (m.images_per_s or 0.0) >= KNEE * best), None)

    def step_s(self, micro_batch_size: int) -> float:
        """Seconds of a step at any size up to the largest: between measured ones on the straight line through both."""
        known = [(m.micro_batch_size, m.step_s) for m in self.measurements if m.step_s is not None]
        assert known
        below = max((point for point in known if point[0] <= micro_batch_size), default=known[0])
        above = min((point for point in known if point[0] >= micro_batch_size), default=known[-1])
        if below[0] == above[0]:
            return below[1]
        share = (micro_batch_size - below[0]) / (above[0] - below[0])
        return below[1] + share * (above[1] - below[1])


def probe(config: Config, options: ProbeConfig, accelerator: Accelerator) -> list[Probe]:
    """Measure every arithmetic asked for. A collective: all processes try the same sizes and stop at the same one."""
    config = compilation.resolved(precision.resolved(config, accelerator), accelerator)
    found: list[Probe] = []
    for name in options.precisions or (config.train.precision,):
        for compiled in options.compile or (config.train.compile,):
            if found and accelerator.device.type == "cpu" and not forget_peak_rss() and accelerator.is_main_process:
                print(
                    "note: this system cannot reset a process's peak memory (/proc/self/clear_refs): sizes after the first "
                    "arithmetic's are charged with the peak of all before; run each arithmetic by itself to compare memory",
                    file=sys.stderr,
                )
            train = replace(config.train, precision=name, compile=compiled)
            found.append(_probe_one(replace(config, train=train), options, accelerator))
    return found


def _probe_one(config: Config, options: ProbeConfig, accelerator: Accelerator) -> Probe:
    cuda = accelerator.device.type == "cuda"
    memory_gib = (
        torch.cuda.get_device_properties(accelerator.device).total_memory / GIB if cuda else options.cpu_memory_gib
    )
    safe_gib = options.safe_fraction * memory_gib
    done: dict[int, Measurement] = {}

    def fits(size: int) -> bool:
        if size not in done:
            done[size] = _measure(config, options, accelerator, size)
        return done[size].step_s is not None and (done[size].peak_gib or 0) <= safe_gib

    size = 1
    while size <= options.largest and fits(size) and not (not cuda and _would_exceed(done, 2 * size, memory_gib)):
        size *= 2
    # Between the last that fits and the first that does not, once more in the middle.
    if size <= options.largest and not fits(size) and size > 2:
        fits(3 * size // 4)
    measurements = tuple(done[size] for size in sorted(done))
    return Probe(config.train.precision, config.train.compile, measurements, memory_gib, safe_gib)


def _would_exceed(done: dict[int, Measurement], size: int, bound_gib: float) -> bool:
    """Whether the line through the two largest sizes passes the bound: on a CPU one does not come back from trying."""
    sizes = sorted(done)[-2:]
    if len(sizes) < 2:
        return False
    (a, b), (low, high) = sizes, (done[size].peak_gib or 0.0 for size in sizes)
    return high + (high - low) / (b - a) * (size - b) > bound_gib


def _measure(config: Config, options: ProbeConfig, accelerator: Accelerator, size: int) -> Measurement:
    step_s, peak_gib = float("inf"), 0.0
    cuda = accelerator.device.type == "cuda"
    release_memory(accelerator)
    if not cuda:
        forget_peak_rss()
    try:
        times = train_on_dummies(config, accelerator, size, num_steps=2 + options.num_steps)
        step_s = statistics.median(times[2:])
        # On a CPU of the whole process, on Linux since the line above; elsewhere so far, made by the largest size yet.
        peak_gib = torch.cuda.max_memory_reserved() / GIB if cuda else peak_rss_gib()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    finally:
        release_memory(accelerator)
    step_s, peak_gib = max_over_processes(accelerator, [step_s, peak_gib])
    return Measurement(size, None, None) if step_s == float("inf") else Measurement(size, step_s, peak_gib)
