"""Several runs held against each other: overlaid curves, what differs, results and pictures side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vaetrain.report.curves import curves_of_runs
from vaetrain.report.gallery import gallery_of_runs
from vaetrain.report.page import Section, absent, bullets, subheading, table
from vaetrain.runs.comparison import SECTIONS, Comparison, Result, shown
from vaetrain.runs.record import RunRecord

TITLES = {
    "config": "Configuration", "data": "Data", "code": "Code", "packages": "Packages", "machine": "Machine",
    }  # fmt: skip
"""By section of a comparison."""


def comparison_sections(runs: Sequence[RunRecord], labels: Sequence[str]) -> list[Section]:
    """The sections of a page that compares runs."""
    comparison, unreadable = _compare(runs)
    differences, results = "", ""
    if len(comparison.results) > 1:
        names = [label for label, recorded in zip(labels, runs, strict=True) if recorded.run.path not in unreadable]
        differences, results = _differences(comparison, names), _results(comparison, names)
    else:
        differences = absent("Fewer than two of these runs can be compared.")
        results = absent("Fewer than two of these runs can be compared.")
    faults = "".join(absent(f"{path} is left out: {reason}") for path, reason in unreadable.items())
    return [
        Section("Results side by side", faults + results, "results"),
        Section("Curves compared", curves_of_runs(runs, labels), "curves-compared"),
        Section("What differs", differences, "differences"),
        Section("Pictures compared", gallery_of_runs(runs, labels), "pictures-compared"),
    ]


SCORED = "evaluation "
"""What the comparison puts before the names of scores."""

MAX_ROWS_SHOWN = 20
"""Longer tables of scores are folded."""


def _compare(runs: Sequence[RunRecord]) -> tuple[Comparison, dict[Path, str]]:
    """Of the runs that can be read in full; of the others why not."""
    results, unreadable = [], {}
    for recorded in runs:
        try:
            results.append(Result.read(recorded.run.path))
        except (OSError, ValueError) as error:
            unreadable[recorded.run.path] = str(error)
    return Comparison(tuple(results)), unreadable


def _differences(comparison: Comparison, names: Sequence[str]) -> str:
    said = comparison.headline().splitlines()
    if between := comparison.code_between(Path(__file__).parent):
        said.append(f"code of the first two: {between}")
    parts = [bullets(said)]
    for section in SECTIONS[:-1]:
        if rows := _rows(comparison, section, comparison.differing(section)):
            parts += [subheading(TITLES[section]), table(("", *names), rows)]
    return "".join(parts)


def _results(comparison: Comparison, names: Sequence[str]) -> str:
    rows = _rows(comparison, "results", comparison.names("results"))
    trained = [row for row in rows if not row[0].startswith(SCORED)]
    scored = [(row[0].removeprefix(SCORED), *row[1:]) for row in rows if row[0].startswith(SCORED)]
    parts = [table(("", *names), trained, caption="Training and its last validation")]
    if scored:
        parts.append(table(("", *names), scored, caption="Scores of evaluate.py", fold=len(scored) > MAX_ROWS_SHOWN))
    return "".join(parts)


def _rows(comparison: Comparison, section: str, names: Sequence[str]) -> list[tuple[str, ...]]:
    return [(name, *map(shown, comparison.row(section, name))) for name in names]
