"""The two pages, lecture and takeaways, and the same tables as Markdown and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from reproduce.datasets import Scale
from reproduce.lecture import Experiment
from reproduce.provenance_table import provenance_table
from reproduce.scores import Scores, scores_of
from reproduce.tables import Table
from reproduce.takeaways import Condition, Takeaway, Verdict, shown
from vaetrain.files import replace_file
from vaetrain.report.chart import Series, chart
from vaetrain.report.document import report
from vaetrain.report.page import Section, absent, code, links, page, paragraph, picture, side_by_side, table, verdict
from vaetrain.runs.curves import DISTORTION, RATE, line_of
from vaetrain.runs.directory import RunDirectory
from vaetrain.sweeps.results import SEED
from vaetrain.sweeps.runner import TrialRun

ABOUT_DISTANCE = (
    "Distances of samples are Fréchet distances in the features of a small network trained on the data at hand (MNIST: ten "
    "digits; cats: which way up; drawn faces: their class). They rank models on this data and are no FID."
)
ABOUT_FID = "Distances of samples are FID in Inception's features, by the lecture-2k protocol."
SCORES = (
    ("val/elbo_nats", "ELBO, nats"), ("val/distortion_nats", "distortion, nats"), ("val/rate_nats", "rate, nats"),
    ("val/psnr_db", "PSNR, dB"), ("val/ssim", "SSIM"), ("eval/fid", "distance of samples"),
    ("eval/fid_floor", "floor (real against real)"),
)  # fmt: skip


@dataclass(frozen=True)
class ReproductionResult:
    """What a page is about, beside its sections."""

    out: Path
    scale: Scale
    command: str
    missing: Mapping[str, str]
    failed: Mapping[str, str]
    """Jobs that failed, with their reason."""
    has_inception: bool


def write_lecture(experiments: Sequence[tuple[Experiment, Path | None]], outcome: ReproductionResult) -> None:
    """OUT/lecture.html, lecture.md and lecture.json."""
    sections, rows, found = [], [], {}
    for experiment, run in experiments:
        heading = f"{experiment.figures}: {experiment.title}"
        parts = [paragraph(f"The lecture: {experiment.lecture}")]
        if outcome.scale == "small":
            parts.append(paragraph(f"Here, at the small scale: {experiment.small}."))
        if run is None or not RunDirectory(run).metrics_file.is_file():
            reason = outcome.missing.get(experiment.name) or outcome.failed.get(
                f"{experiment.name} training", "it has not been run"
            )
            sections.append(Section(heading, "".join([*parts, absent(f"Not run: {reason}")])))
            continue
        parts.append(paragraph(_what_it_saw(RunDirectory(run))))
        scores = scores_of(run)
        found[experiment.name] = scores
        rows.append((experiment.figures, experiment.title, *_cells(scores, [name for name, _ in SCORES])))
        figures = RunDirectory(run).figures
        parts.append(side_by_side([picture(figures / file, caption) for file, caption in experiment.pictures]))
        parts.append(side_by_side(_curves(run)))
        parts.append(_score_table(scores, experiment.priors).html())
        replace_file(run / "report.html", report([run]).encode())
        parts.append(_links(run, ("report.html", "provenance.json", "config.yaml", "metrics.jsonl"), outcome))
        sections.append(Section(heading, "".join(parts)))
    summary = Table(("figure", "experiment", *(name for _, name in SCORES)), tuple(rows), "All experiments")
    runs = [run for _, run in experiments if run is not None]
    _write(
        "lecture", "The lecture, reproduced", _subtitle(outcome),
        [Section("Results", _about(outcome) + summary.html()), *sections, _provenance(runs, outcome)],
        summary.markdown(), found, outcome,
    )  # fmt: skip


def write_takeaways(
    judged: Sequence[tuple[Takeaway, Mapping[str, Sequence[TrialRun]] | None, Verdict | str]],
    outcome: ReproductionResult,
) -> None:
    """OUT/takeaways.html, takeaways.md and takeaways.json. A judgement that is a text says why there is none."""
    sections, documents, rows, found, runs = [], [], [], {}, []
    for takeaway, trials, judgement in judged:
        parts = [paragraph(f"Claim: {takeaway.claim}"), paragraph(f"Experiment: {takeaway.design}")]
        if trials is not None:
            runs += [trial.folder for each in trials.values() for trial in each]
        if isinstance(judgement, str):
            parts.append(absent(f"No verdict: {judgement}"))
            rows.append((takeaway.title, "–", judgement))
        else:
            parts.append(verdict(judgement.kind, judgement.verdict))
            parts += [exhibit.html() for exhibit in judgement.exhibits]
            if takeaway.priors and trials is not None:
                parts.append(_samples(trials))
            rows.append((takeaway.title, judgement.kind, judgement.verdict))
            tables = "\n".join(filter(None, (exhibit.markdown() for exhibit in judgement.exhibits)))
            documents.append(
                f"## {takeaway.title}\n\nClaim: {takeaway.claim}\nExperiment: {takeaway.design}\n\n"
                f"**{judgement.kind}.** {judgement.verdict}\n\n{tables}"
            )
            found[takeaway.name] = asdict(judgement) | {"exhibits": len(judgement.exhibits)}
        if trials is not None:
            parts += [
                _links(run[0].folder.parent, (each.folder.name for each in run), outcome) for run in trials.values()
            ]
            parts.append(code("\n".join(" ".join(each[0].job.command) for each in trials.values() if each)))
        sections.append(Section(takeaway.title, "".join(parts)))
    summary = table(("takeaway", "verdict", "measured"), rows)
    _write(
        "takeaways", "The lecture's takeaways, measured", _subtitle(outcome),
        [Section("Verdicts", _about(outcome) + summary), *sections, _provenance(runs, outcome)],
        "\n".join(documents), found, outcome,
    )  # fmt: skip


def findings(trials: Mapping[str, Sequence[TrialRun]]) -> dict[str, list[Condition]]:
    """The scores of finished trials, by sweep and value of what it varies, seeds together; raises ValueError when one failed."""
    found: dict[str, list[Condition]] = {}
    for sweep, runs in trials.items():
        by_value: dict[str, tuple[Any, list[Scores]]] = {}
        for run in runs:
            if run.job.state != "finished":
                raise ValueError(f"{run.job.name} {run.job.state}{f': {run.job.reason}' if run.job.reason else ''}")
            [value] = [value for name, value in run.parameters.items() if name != SEED]
            by_value.setdefault(str(value), (value, []))[1].append(scores_of(run.folder))
        found[sweep] = [Condition(value, tuple(scores)) for value, scores in by_value.values()]
    return found


def _what_it_saw(run: RunDirectory) -> str:
    """How many images of which classes, and for how long."""
    dataset, config = run.dataset(), run.config()

    def count(split: str) -> int:
        counts: dict[str, int] = dataset[split]["splits"][split]["class_counts"]
        return sum(number for name, number in counts.items() if not config.data.classes or name in config.data.classes)

    kept = config.data.classes or tuple(dataset["train"]["classes"])
    classes = f" of {', '.join(kept)}" if len(kept) < 5 else ""
    size = config.model.image_size
    last = run.metrics()[-1]
    return (
        f"Trained on {count('train'):,} images{classes}, {size}×{size}, for {last['epoch']:g} epochs ({last['images_seen']:,} "
        f"images seen); validated on {count('val'):,} others."
    )


def _about(outcome: ReproductionResult) -> str:
    parts = [paragraph(ABOUT_FID if outcome.has_inception else ABOUT_DISTANCE)]
    parts.append(paragraph("Numbers with ± are means over seeds with the standard error of the mean."))
    parts += [absent(f"{name} failed: {reason}") for name, reason in outcome.failed.items()]
    return "".join(parts)


def _subtitle(outcome: ReproductionResult) -> str:
    sizes = {"small": "small scale: two CPU cores, minutes", "full": "full scale: the lecture's sizes and epochs"}
    return f"vaetrain, {sizes[outcome.scale]}"


def _provenance(runs: Sequence[Path], outcome: ReproductionResult) -> Section:
    rows = provenance_table(runs, outcome.out)
    body = code(outcome.command) + table(rows.header, rows.rows, caption=rows.caption, fold=True)
    return Section("Provenance", body)


def _samples(trials: Mapping[str, Sequence[TrialRun]]) -> str:
    """Samples of each setting's first seed, by prior."""
    pictures = []
    for sweep, runs in trials.items():
        for number, run in enumerate(runs):
            values = {name: value for name, value in run.parameters.items() if name != SEED}
            if all(values.items() - other.parameters.items() for other in runs[:number]):
                setting = ", ".join(f"{name.rpartition('.')[2]} {shown(value)}" for name, value in values.items())
                pictures.append(picture(run.folder / "figures" / "priors.png", f"{sweep}: {setting}"))
    return side_by_side(pictures)


def _links(folder: Path, names: Iterable[str], outcome: ReproductionResult) -> str:
    beside = folder.relative_to(outcome.out).as_posix()
    return links([(f"{beside}/{name}", name) for name in names])


def _cells(scores: Scores, names: Sequence[str]) -> list[str]:
    return [f"{scores[name]:,.4g}" if name in scores else "–" for name in names]


def _score_table(scores: Scores, priors: Sequence[str]) -> Table:
    rows = [(label, *_cells(scores, [name])) for name, label in SCORES if name in scores]
    rows += [
        (f"distance, codes from {prior}", *_cells(scores, [f"{prior}/eval/fid"]))
        for prior in priors
        if prior != "standard" and f"{prior}/eval/fid" in scores
    ]
    return Table(("score", "value"), tuple(rows))


def _curves(run: Path) -> list[str]:
    metrics = RunDirectory(run).metrics()
    drawn = {
        curve: [Series(label, line_of(metrics, metric)) for label, metric in curve.lines]
        for curve in (DISTORTION, RATE)
    }
    if not any(y > 0 for line in drawn[RATE] for _, y in line.points):
        del drawn[RATE]
    return [chart(curve.title, series, x="epoch", y=curve.y) for curve, series in drawn.items()]


def _write(
    name: str,
    title: str,
    subtitle: str,
    sections: Sequence[Section],
    markdown: str,
    found: Any,
    outcome: ReproductionResult,
) -> None:
    replace_file(outcome.out / f"{name}.html", page(title, subtitle, sections).encode())
    replace_file(outcome.out / f"{name}.md", f"{markdown}\n".encode())
    replace_file(outcome.out / f"{name}.json", (json.dumps(found, indent=2, default=str) + "\n").encode())
