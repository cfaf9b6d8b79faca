"""What a sweep found: one row a set of values, seeds averaged, as a table, as JSON and as a picture."""

from __future__ import annotations

import difflib
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vaetrain.files import replace_file, write_png
from vaetrain.sweeps.runner import TrialRun
from vaetrain.sweeps.sweep_file import Sweep

SEED = "seed"
"""The parameter over which trials are averaged."""


@dataclass(frozen=True)
class TrialRow:
    """The trials that differ in their seed alone."""

    values: dict[str, Any]
    """Of the parameters that vary, without the seed."""
    final: tuple[float, ...]
    """The metric at the end of each finished trial."""
    best: tuple[float, ...]
    """The best value of the metric in each."""
    images_per_s: float | None
    """Median over the records of all trials."""
    unfinished: tuple[str, ...]
    """State and reason of every other trial."""

    @property
    def mean(self) -> float | None:
        """Of the final values; None without a finished trial."""
        return statistics.fmean(self.final) if self.final else None

    @property
    def standard_error(self) -> float | None:
        """Of that mean; None with fewer than two seeds."""
        return statistics.stdev(self.final) / math.sqrt(len(self.final)) if len(self.final) > 1 else None


def rows_of(sweep: Sweep, runs: Sequence[TrialRun]) -> list[TrialRow]:
    """The sweep's rows, in the order of its trials."""
    names = [name for name in sweep.varied if name != SEED]
    groups: dict[str, list[TrialRun]] = {}
    for run in runs:
        groups.setdefault(json.dumps([run.parameters[name] for name in names]), []).append(run)
    better = max if sweep.goal == "maximize" else min
    rows = []
    for members in groups.values():
        final, best, speeds, unfinished = [], [], [], []
        for run in members:
            records = run.metrics() if run.job.state == "finished" else []
            found = [float(record[sweep.metric]) for record in records if record.get(sweep.metric) is not None]
            speeds += [record["perf/images_per_s"] for record in records if record.get("perf/images_per_s")]
            if found:
                final.append(found[-1])
                best.append(better(found))
            elif run.job.state == "finished":
                unfinished.append(f"no record has {sweep.metric}")
            else:
                unfinished.append(f"{run.job.state}{f': {run.job.reason}' if run.job.reason else ''}")
        values = {name: members[0].parameters[name] for name in names}
        speed = statistics.median(speeds) if speeds else None
        rows.append(TrialRow(values, tuple(final), tuple(best), speed, tuple(unfinished)))
    return rows


def check_metric(sweep: Sweep, runs: Sequence[TrialRun]) -> None:
    """Raise ValueError when trials finished and none of their records has the sweep's metric."""
    records = [record for run in runs if run.job.state == "finished" for record in run.metrics()]
    if any(run.job.state == "finished" for run in runs) and all(record.get(sweep.metric) is None for record in records):
        names = {name for record in records for name in record}
        near = difflib.get_close_matches(sweep.metric, sorted(names), n=3) or sorted(n for n in names if "val/" in n)
        hint = f", such as {', '.join(near)}" if near else ""
        raise ValueError(
            f"no record of any trial has the metric {sweep.metric}; give metric in {sweep.path} a name that "
            f"metrics.jsonl holds{hint}"
        )


def best_row(sweep: Sweep, rows: Sequence[TrialRow]) -> TrialRow | None:
    """The one with the best mean; None when nothing finished."""
    finished = [row for row in rows if row.mean is not None]
    key = lambda row: row.mean  # noqa: E731
    return (max if sweep.goal == "maximize" else min)(finished, key=key) if finished else None


def table(sweep: Sweep, rows: Sequence[TrialRow]) -> str:
    """Aligned columns, the best row marked."""
    names = [name for name in sweep.varied if name != SEED]
    lines = [(*names, sweep.metric, "± se", "best", "seeds", "images/s", "")]
    winner = best_row(sweep, rows)
    for row in rows:
        number = (
            ("–", "–", "–") if row.mean is None
            else (f"{row.mean:,.6g}", "–" if row.standard_error is None else f"{row.standard_error:.3g}",
                  f"{statistics.fmean(row.best):,.6g}")
        )  # fmt: skip
        speed = "–" if row.images_per_s is None else f"{row.images_per_s:,.0f}"
        note = "; ".join([*(["← best"] if row is winner else []), *row.unfinished])
        lines.append((*(_shown(row.values[name]) for name in names), *number, str(len(row.final)), speed, note))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def write(sweep: Sweep, runs: Sequence[TrialRun], rows: Sequence[TrialRow], out: Path) -> None:
    """OUT/results.json and OUT/results.png."""
    content = {
        "sweep": str(sweep.path),
        "method": sweep.method,
        "metric": sweep.metric,
        "goal": sweep.goal,
        "parameters": sweep.parameters,
        "rows": [{**asdict(row), "mean": row.mean, "standard_error": row.standard_error} for row in rows],
        "trials": [
            {"parameters": run.parameters, "run": run.folder.name, "state": run.job.state, "reason": run.job.reason}
            for run in runs
        ],
    }
    replace_file(out / "results.json", (json.dumps(content, indent=2) + "\n").encode())
    draw(sweep, rows, out / "results.png")


def draw(sweep: Sweep, rows: Sequence[TrialRow], file: Path) -> None:
    """One line a value of the second parameter over the first; with more parameters, a panel of points for each."""
    from matplotlib.figure import Figure

    from vaetrain.picture_text import as_it_is, legible, name_entries

    def readable(values: Iterable[str], max_columns: int) -> list[str]:
        return legible({f"value {number}": value for number, value in enumerate(values, start=1)}, max_columns)

    names = [name for name in sweep.varied if name != SEED]
    finished = [row for row in rows if row.mean is not None]
    panels = names if len(names) > 2 else names[:1]
    figure = Figure(figsize=(max(1, len(panels)) * 4.8, 3.8), layout="constrained")
    title, metric = legible({"sweep": sweep.name, "metric": sweep.metric})
    as_it_is(figure.suptitle(f"{title}: {metric} ({sweep.goal})", fontsize=11))
    for number, name in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), number)
        groups: dict[str, list[TrialRow]] = {}
        for row in finished:
            groups.setdefault(_shown(row.values[names[1]]) if len(names) == 2 else "", []).append(row)
        values = list(dict.fromkeys(row.values[name] for row in finished))
        numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        if numeric and values and min(values) > 0 and max(values) / min(values) >= 8:
            axes.set_xscale("log")
        lines = []
        for members in groups.values():
            if numeric:
                members = sorted(members, key=lambda row: row.values[name])
            x = [row.values[name] if numeric else values.index(row.values[name]) for row in members]
            errors = [row.standard_error or 0.0 for row in members]
            style = "o" if len(names) > 2 or not numeric else "o-"
            means = [row.mean for row in members if row.mean is not None]
            lines.append(axes.errorbar(x, means, yerr=errors, fmt=style, capsize=3))
        if not numeric:
            axes.set_xticks(range(len(values)), readable(map(_shown, values), max(8, 48 // len(values))))
            as_it_is(*axes.get_xticklabels())
        if len(names) == 2:
            legend = axes.legend(lines, [str(number) for number in range(len(lines))], fontsize=8)
            name_entries(legend, [f"{names[1]} {value}" for value in readable(groups, 24)])
        as_it_is(axes.set_xlabel(name), axes.set_ylabel(metric))
        axes.grid(alpha=0.3)
    write_png(figure, file, dpi=150)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
