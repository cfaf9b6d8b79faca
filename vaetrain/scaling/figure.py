"""scaling.png: what was measured and what follows, in four panels."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vaetrain.files import write_png
from vaetrain.scaling.advice import Advice
from vaetrain.scaling.lr_range import LrRange
from vaetrain.scaling.lr_trials import LrTrial, LrTrials
from vaetrain.scaling.probe import Probe
from vaetrain.training.noise_scale import NoiseScale


class Stretch(NamedTuple):
    """A part of training, and its gradient noise scales; None where noise drowns the gradient."""

    images_seen: int
    """At its end."""
    simple: float | None
    adam: float | None


def save_figure(
    probes: Sequence[Probe],
    found_lr: LrRange | None,
    trials: LrTrials | None,
    noise: Sequence[Stretch],
    critical: NoiseScale | None,
    advice: Sequence[Advice],
    file: Path,
) -> None:
    """Throughput and memory; the range test; the noise scale by images seen; time over processes."""
    figure = Figure(figsize=(12, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    _draw_probes(axes[0, 0], probes)
    _draw_lr(axes[0, 1], found_lr, trials)
    _draw_noise(axes[1, 0], noise, critical)
    _draw_advice(axes[1, 1], advice)
    write_png(figure, file, dpi=120)


def _draw_probes(axes: Axes, probes: Sequence[Probe]) -> None:
    memory = axes.twinx()
    for probe in probes:
        known = [m for m in probe.measurements if m.step_s is not None]
        sizes = [m.micro_batch_size for m in known]
        label = f"{probe.precision}{', compiled' if probe.compiled else ''}"
        [line] = axes.plot(sizes, [m.images_per_s or 0.0 for m in known], "o-", label=label)
        memory.plot(sizes, [m.peak_gib or 0.0 for m in known], "--", color=line.get_color(), alpha=0.6)
        if probe.knee:
            axes.axvline(probe.knee.micro_batch_size, color=line.get_color(), alpha=0.3)
    axes.set(xscale="log", xlabel="micro-batch, images", ylabel="images/s of one process (line at the knee)")
    memory.set_ylabel("peak memory, GiB (dashed)")
    axes.legend(fontsize=8)
    axes.set_title("Micro-batch")


def _draw_lr(axes: Axes, found: LrRange | None, trials: LrTrials | None) -> None:
    axes.set_title("Learning-rate range test, and short trainings")
    if found is None:
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
        return
    for curve in found.curves:
        [line] = axes.plot(curve.lrs, curve.smoothed, label=f"seed {curve.seed}")
        axes.plot(curve.lrs, curve.losses, ".", ms=2, alpha=0.4, color=line.get_color())
    decided, interval, why_none = found.suggestion, found.interval, found.why_none
    lived: list[LrTrial] = []
    if trials is not None:
        decided, interval, why_none = trials.suggestion, trials.interval, trials.why_none
        lived = [each for each in trials.trials if each.final]
        axes.plot([each.lr for each in lived], [each.loss for each in lived], "ks-", ms=4, label="end of a training")
    if decided is not None and interval is not None:
        at_edge = ", at the end of those tried" if trials is not None and trials.caveat else ""
        axes.axvline(decided, color="k")
        axes.axvspan(*interval, color="k", alpha=0.1, label=f"suggested {decided:.2e}{at_edge}")
    else:
        axes.text(
            0.5,
            0.95,
            textwrap.fill(f"no suggestion: {why_none}", 72),
            ha="center",
            va="top",
            fontsize=8,
            transform=axes.transAxes,
        )
    smoothed = [value for curve in found.curves for value in curve.smoothed]
    low = min([*smoothed, *(each.loss for each in lived)], default=math.inf)
    high = max((curve.smoothed[0] for curve in found.curves if curve.losses), default=-math.inf)
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss, nats per image")
    if low < high:  # unless no loss was finite, or none below the first
        axes.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
    axes.legend(fontsize=8)


def _draw_noise(axes: Axes, noise: Sequence[Stretch], critical: NoiseScale | None) -> None:
    axes.set_title("Gradient noise scale")
    if not noise:
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
        return
    for label, values in (("simple", [each.simple for each in noise]), ("Adam's", [each.adam for each in noise])):
        # A gap where noise drowns the gradient, to below zero even: a line to there would leave a logarithmic axis.
        axes.plot(
            [each.images_seen for each in noise],
            [value if value is not None and value > 0 else math.nan for value in values],
            "o-",
            label=f"{label}, by stretch",
        )
    if critical is not None and critical.images is not None:
        error = critical.standard_error or 0.0
        axes.axhline(critical.images, color="k", label=f"critical batch {critical.images:,.0f} ± {error:,.0f} images")
        if critical.images > error:
            axes.axhspan(critical.images - error, critical.images + error, color="k", alpha=0.1)
    axes.set(xlabel="images seen", ylabel="images", yscale="log")
    axes.legend(fontsize=8)


def _draw_advice(axes: Axes, advice: Sequence[Advice]) -> None:
    counts = [each.num_processes for each in advice]
    axes.plot(counts, [each.hours for each in advice], "o-", label="expected")
    first = advice[0]
    alone = first.efficiency * first.num_processes * first.hours  # what efficiency is relative to, listed or not
    perfect = sorted({1, *counts})
    axes.plot(perfect, [alone / count for count in perfect], ":", color="k", label="perfect")
    for each in advice:
        last = each is advice[-1]  # its label would run over the frame
        axes.annotate(
            f"B {each.global_batch_size:,}",
            (each.num_processes, each.hours),
            fontsize=7,
            xytext=(-3 if last else 3, 5),
            textcoords="offset points",
            ha="right" if last else "left",
        )
    axes.set(xscale="log", yscale="log", xlabel="processes", ylabel="hours to the same loss")
    axes.legend(fontsize=8)
    axes.set_title("Advice")
