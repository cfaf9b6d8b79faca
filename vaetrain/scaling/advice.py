"""From what was measured to what to use on 1 … 64 processes. Without importing torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from vaetrain.config import OptimConfig
from vaetrain.scaling.rules import RuleName, largest_ratio, scaled

MIN_EFFICIENCY = 0.5
"""Below this share of perfect speed-up a process more is called no help."""

MIN_STEPS = 100
"""Optimizer steps of a whole training below which no batch above the base is advised: nothing has been learned by then."""


@dataclass(frozen=True)
class Measurements:
    """What the advice stands on."""

    step_s: Callable[[int], float]
    """Seconds of forward, backward and update of a micro-batch of this size, in one process."""
    knee: int
    """Smallest micro-batch that runs at full speed."""
    all_reduce_s: Callable[[int], float]
    """Seconds to average the gradients over so many processes, not hidden behind the backward pass."""
    critical_batch: float | None
    """Images, above 0; the gradient noise scale. None: not known."""
    base_batch: int
    """The batch at which `optim` was found to be right."""
    optim: OptimConfig
    total_images: int
    """Images that training at `base_batch` takes."""
    dataset_images: int
    """Images of the training split: no batch is larger."""
    rule: RuleName


@dataclass(frozen=True)
class Advice:
    """For one number of processes."""

    num_processes: int
    global_batch_size: int
    micro_batch_size: int
    grad_accum_steps: int
    optim: OptimConfig
    total_images: int
    """To reach what the base batch reaches: more at batches near or above the critical one."""
    step_s: float
    """Of one optimizer step, communication included."""
    communication: float
    """Share of the step that is communication."""
    hours: float
    efficiency: float
    """Speed-up over one process, per process."""
    limits: tuple[str, ...]
    """What keeps it from being faster."""


def advise(facts: Measurements, for_num_processes: Iterable[int]) -> list[Advice]:
    """The fastest batch for each number of processes, from the base batch upwards by factors of two, and what it costs.

    A larger batch makes steps rarer, and with them communication, but needs more images: E = E_min (1 + B / B_crit)
    (McCandlish et al. 2018, Eq. 2.11), here relative to the base batch. Bounds are the rule for the optimizer, the data set
    and MIN_STEPS; downwards the rule is not to be trusted (docs/scaling.md). No number of processes may exceed the images.
    """
    alone = _fastest(facts, 1)
    found = []
    for count in sorted(set(for_num_processes)):
        best = _fastest(facts, count)
        efficiency = alone.hours / (count * best.hours)
        limits = list(best.limits)
        if efficiency < MIN_EFFICIENCY:
            limits.append(f"{efficiency:.0%} of perfect speed-up: more processes hardly help")
        found.append(replace(best, efficiency=efficiency, limits=tuple(limits)))
    return found


def stops_helping(advice: Iterable[Advice]) -> int | None:
    """The first number of processes at which MIN_EFFICIENCY is missed; None when none of them does."""
    return next((each.num_processes for each in advice if each.efficiency < MIN_EFFICIENCY), None)


def verdict(advice: Iterable[Advice]) -> str:
    """Where adding processes stops helping, as closely as the numbers asked for tell, and why, in a sentence."""
    advice = list(advice)
    end = stops_helping(advice)
    if end is None:
        return (
            f"up to {advice[-1].num_processes} processes each works at {MIN_EFFICIENCY:.0%} of perfect speed-up or more"
        )
    why = next(each.limits for each in advice if each.num_processes == end)
    fewer = max((each.num_processes for each in advice if each.num_processes < end), default=None)
    where = f"at {end}" if fewer in (None, end - 1) else f"between {fewer} and {end}"
    return f"adding processes stops helping {where}: {'; '.join(why)}"


def images_needed(facts: Measurements, batch: int) -> int:
    """Images at this batch for what the base batch reaches; equally many while nothing is known of the noise."""
    if facts.critical_batch is None:
        return facts.total_images
    return round(
        facts.total_images * (1 + batch / facts.critical_batch) / (1 + facts.base_batch / facts.critical_batch)
    )


def _fastest(facts: Measurements, num_processes: int) -> Advice:
    assert num_processes <= facts.dataset_images
    smallest = _smallest_batch(facts, num_processes)
    largest = max(smallest, min(facts.dataset_images, facts.total_images // MIN_STEPS))
    sizes = [smallest * 2**power for power in range((largest // smallest).bit_length())]  # up to `largest`
    candidates = [advice for size in sizes if (advice := _at(facts, num_processes, size)) is not None]
    if not candidates:  # even the smallest is more than the rule reaches
        advice = _at(facts, num_processes, smallest, beyond_rule=True)
        assert advice is not None
        return advice
    # Of nearly equal ones the smallest batch: it needs the fewest images, whatever the noise scale's error.
    fastest = min(advice.hours for advice in candidates)
    return next(advice for advice in candidates if advice.hours <= 1.02 * fastest)


def _smallest_batch(facts: Measurements, num_processes: int) -> int:
    """The first at or above the base batch that shares out evenly, in micro-batches not below half the knee if possible."""
    per_process = math.ceil(facts.base_batch / num_processes)
    if 2 * largest_divisor(per_process, facts.knee) < min(facts.knee, per_process):
        rounded = math.ceil(per_process / facts.knee) * facts.knee
        if rounded * num_processes <= facts.dataset_images:
            per_process = rounded
    return min(per_process * num_processes, facts.dataset_images // num_processes * num_processes)


def largest_divisor(number: int, at_most: int) -> int:
    """Of `number`, the largest that is not above `at_most`."""
    return next(size for size in range(min(number, at_most), 0, -1) if number % size == 0)


def _at(facts: Measurements, num_processes: int, batch: int, *, beyond_rule: bool = False) -> Advice | None:
    """The plan at one global batch; None where the optimizer's rule does not reach."""
    ratio = batch / facts.base_batch
    if facts.rule == "sqrt" and ratio > largest_ratio(facts.optim) and not beyond_rule:
        return None
    per_process = batch // num_processes
    micro = largest_divisor(per_process, facts.knee)
    accumulation = per_process // micro
    compute, communication = accumulation * facts.step_s(micro), facts.all_reduce_s(num_processes)
    total_images = images_needed(facts, batch)
    hours = math.ceil(total_images / batch) * (compute + communication) / 3600
    limits = [] if facts.critical_batch is not None else ["critical batch not known"]
    if communication > 0.2 * (compute + communication):
        limits.append("communication")
    if facts.critical_batch is not None and 2 * batch > facts.critical_batch:
        where = "above" if batch > facts.critical_batch else "at"
        limits.append(f"{where} the critical batch of {facts.critical_batch:,.0f} images")
    if micro < facts.knee:
        limits.append(f"micro-batches below {facts.knee}, where a process is slower")
    if facts.rule == "sqrt" and 2 * ratio > largest_ratio(facts.optim):
        limits.append(
            "the square-root rule ends here" if not beyond_rule else "beyond the square-root rule: not scaled"
        )
    optim = facts.optim if beyond_rule else scaled(facts.optim, ratio, facts.rule)
    return Advice(
        num_processes, batch, micro, accumulation, optim, total_images, compute + communication,
        communication / (compute + communication), hours, 1.0, tuple(limits),
    )  # fmt: skip


def table(advice: Iterable[Advice]) -> str:
    """Aligned columns; warm-up is in images."""
    lines = [
        (
            "processes",
            "global batch",
            "micro batch",
            "accum.",
            "warm-up",
            "lr",
            "β1",
            "β2",
            "images",
            "hours",
            "efficiency",
            "limits",
        )
    ]
    for each in advice:
        lines.append(
            (
                str(each.num_processes), f"{each.global_batch_size:,}", str(each.micro_batch_size),
                str(each.grad_accum_steps), f"{each.optim.warmup_images:,}",
                f"{each.optim.lr:.2e}", f"{each.optim.beta1:.3g}", f"{each.optim.beta2:.4g}",
                f"{each.total_images:,}", f"{each.hours:.3g}", f"{each.efficiency:.0%}", "; ".join(each.limits) or "–",
            )
        )  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
