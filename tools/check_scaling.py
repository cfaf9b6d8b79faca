"""Hold scale.py's advice against trainings: the suggested rate against a grid, the batch rule against its prediction.

python tools/check_scaling.py --lr-grid DIR --suggested DIR --rule DIR --lengths DIR --noise DIR --out FILE.png
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vaetrain.command_line import parse, user_errors


@dataclass(frozen=True)
class CheckArguments:
    """Folders of finished runs (tools/sweep.py's, tools/reproduce.py's), and what scale.py measured."""

    lr_grid: Path
    """Runs that differ in learning rate and seed."""

    suggested: tuple[Path, ...]
    """Runs with the rate that scale.py suggested, else like the grid's."""

    rule: tuple[Path, ...]
    """Runs whose batch differs, the optimizer following it, for the same number of images."""

    lengths: tuple[Path, ...]
    """Runs at one small batch for several numbers of images: what a number of images is worth."""

    noise: Path
    """Run with the rule at one of its batches and --log.noise-scale True: its critical batch over all of training makes the
    prediction."""

    out: Path
    """Picture to write."""

    title: str = ""
    """Of the picture."""


if __name__ == "__main__":
    ARGUMENTS = parse(CheckArguments, __doc__, flags=True)

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reproduce.scaling_evidence import Run, SeedGroup, critical_batches, points, predicted, runs_below, score_gap
from vaetrain.picture_text import as_it_is, legible


def main(arguments: CheckArguments) -> None:
    """Print both tables as Markdown and draw them."""
    grid = points(runs_below(arguments.lr_grid), lambda run: run.lr)
    [own] = points(every(arguments.suggested), lambda run: run.lr)
    best = max(point.mean for point in grid)
    print("| learning rate | ELBO, nats | below the best |\n|---|---|---|")
    for point in sorted([*grid, own], key=lambda each: each.x):
        name = f"**{point.x:.3g}, suggested**" if point is own else f"{point.x:.3g}"
        print(f"| {name} | {shown(point)} | {score_gap(point.mean, best):.1%} |")

    adam, simple = critical_batches(arguments.noise)
    if adam.images is None:
        raise ValueError(f"{arguments.noise} has no critical batch to predict from: {adam.why_none}")
    critical, error = adam.images, adam.standard_error
    runs, by_length = every(arguments.rule), every(arguments.lengths)
    batches, lengths = points(runs, lambda run: run.batch), points(by_length, lambda run: run.images)
    images, smallest = min(run.images for run in runs), batches[0]
    expected = [predicted(lengths, images, by_length[0].batch, point.x, critical) for point in batches]
    print(f"\ncritical batch {critical:,.0f} ± {error or 0:,.0f} images; {images:,} images each")
    print(
        f"(simple noise scale, counted alike: {simple.images or math.inf:,.0f} ± {simple.standard_error or 0:,.0f})\n"
    )
    print("| batch | ELBO, nats | below the smallest batch | predicted |\n|---|---|---|---|")
    for point, score in zip(batches, expected, strict=True):
        below, foretold = (score_gap(each, smallest.mean) for each in (point.mean, score))
        print(f"| {point.x:,.0f} | {shown(point)} | {below:.1%} | {score:,.1f} ({foretold:.1%}) |")

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    [title] = legible({"": arguments.title}, max_columns=120)
    as_it_is(figure.suptitle(title))
    draw(left, grid, "grid")
    draw(left, [own], "suggested by scale.py", "s")
    left.axhspan(best - 0.02 * abs(best), best, alpha=0.15, color="k", label="within 2 % of the best")
    left.set(
        xscale="log", xlabel="learning rate", ylabel="validation ELBO, nats", title="The suggested rate against a grid"
    )
    draw(right, batches, "measured, square-root rule")
    right.plot([point.x for point in batches], expected, "--", label="predicted from the critical batch")
    right.axvline(critical, color="k", alpha=0.4, label=f"critical batch, {critical:,.0f} ± {error or 0:,.0f} images")
    right.axvspan(max(critical - (error or 0), 1), critical + (error or 0), color="k", alpha=0.1)
    right.set(xscale="log", xlabel="batch, images", ylabel="validation ELBO, nats", title=f"The same {images:,} images")
    for axes, found in ((left, grid), (right, batches)):
        axes.set_xticks([point.x for point in found], [f"{point.x:g}" for point in found], fontsize=8)
        axes.set_xticks([], minor=True)
        axes.legend(fontsize=8)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=110)
    print(f"\npicture written to {arguments.out}")


def every(folders: Iterable[Path]) -> list[Run]:
    """The runs below any of the folders."""
    return [run for folder in folders for run in runs_below(folder)]


def draw(axes: Axes, found: list[SeedGroup], label: str, marker: str = "o-") -> None:
    """Means with their errors."""
    axes.errorbar(
        [point.x for point in found], [point.mean for point in found], [point.error or 0.0 for point in found],
        fmt=marker, capsize=3, label=label,
    )  # fmt: skip


def shown(point: SeedGroup) -> str:
    """Mean and its error."""
    return f"{point.mean:,.1f}" + ("" if point.error is None else f" ± {point.error:,.1f}")


if __name__ == "__main__":
    with user_errors():
        main(ARGUMENTS)
