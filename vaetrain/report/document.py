"""The report: the page of one run, or of several runs compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from vaetrain.command_line import flatten
from vaetrain.report.comparing import comparison_sections
from vaetrain.report.curves import curves_of_run
from vaetrain.report.gallery import SIDE_BY_SIDE, gallery_of_run
from vaetrain.report.origin import configuration_of_run, dataset_of_run, provenance_of_run
from vaetrain.report.page import Section, page, paragraph, side_by_side, subheading, table
from vaetrain.report.scores import scores_of_run, summary_rows
from vaetrain.report.values import exact, inner, number_text
from vaetrain.runs.record import RunRecord, number

SETTINGS = {
    "model.latent": "latent", "model.latent_channels": "latent channels", "model.likelihood": "likelihood",
    "objective.beta": "β", "optim.lr": "learning rate", "train.global_batch_size": "global batch size",
    "train.precision": "precision", "seed": "seed",
}  # fmt: skip
"""Of the configuration, what one asks for first."""


MAX_RUNS_IN_TITLE = 3
"""The names of more stand under the title."""


def report(paths: Sequence[Path]) -> str:
    """The HTML document of one run, or of several with their comparison first.

    Raises FileNotFoundError naming the folder that is no run, and ValueError for a later format.
    """
    runs = [RunRecord.read(path) for path in paths]
    if len(runs) == 1:
        [recorded] = runs
        return page(recorded.name, _subtitle(recorded), _sections(recorded))
    labels = short_names([recorded.run.path for recorded in runs])
    sections = comparison_sections(runs, labels)
    for recorded, label in zip(runs, labels, strict=True):
        inner = _sections(recorded, leave_out=SIDE_BY_SIDE)
        body = "".join(subheading(section.heading) + section.body for section in inner)
        sections.append(Section(label, paragraph(_subtitle(recorded)) + body, f"run-{label}"))
    names, count = " · ".join(labels), f"{len(runs)} runs compared"
    title, subtitle = (names, count) if len(runs) <= MAX_RUNS_IN_TITLE else (count, names)
    return page(title, subtitle, sections)


def short_names(paths: Sequence[Path]) -> list[str]:
    """The ends of the paths, as long as it takes to tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{path.resolve().name} ({number})" for number, path in enumerate(paths, start=1)]  # one of them twice


def _sections(recorded: RunRecord, leave_out: Sequence[str] = ()) -> list[Section]:
    return [
        Section("Summary", _summary(recorded)),
        Section("Curves", curves_of_run(recorded)),
        Section("Pictures", gallery_of_run(recorded, leave_out=leave_out)),
        Section("Scores", scores_of_run(recorded)),
        Section("Data", dataset_of_run(recorded)),
        Section("Configuration", configuration_of_run(recorded)),
        Section("Provenance", provenance_of_run(recorded)),
    ]


def _subtitle(recorded: RunRecord) -> str:
    """What was trained on what, where and when, as far as it is recorded."""
    model, dataset, provenance = (inner(recorded.config, "model"), recorded.dataset or {}, recorded.provenance or {})
    kind = f"{model.get('kind', '')} {'VAE' if model.get('variational', True) else 'autoencoder'}".strip()
    images = number(inner(inner(inner(dataset, "train"), "splits"), "train").get("num_images"))
    size = inner(dataset, "train").get("image_size")
    said = f"{kind[0].upper()}{kind[1:]}"
    if math.isfinite(images):
        said += f" on {images:,.0f} images of {size} × {size} pixels"
    if provenance.get("started"):
        said += f", started {str(provenance['started']).replace('T', ' ')[:16]} UTC on {provenance.get('device')}"
    return said


def _summary(recorded: RunRecord) -> str:
    tables = []
    validations = recorded.split("val")
    scores = recorded.evaluation or (validations[-1] if validations else {})
    if rows := summary_rows(scores):
        tables.append(table(("scored by evaluate.py" if recorded.evaluation else "last validation", "value"), rows))
    settings = dict(flatten(recorded.config or {}))
    if rows := [(label, exact(settings[key])) for key, label in SETTINGS.items() if settings.get(key) is not None]:
        tables.append(table(("setting", "value"), rows))
    return paragraph(_progress(recorded)) + side_by_side(tables)


def _progress(recorded: RunRecord) -> str:
    """How far training came, in a sentence."""
    records = [record for record in recorded.metrics if math.isfinite(number(record.get("images_seen")))]
    if not records:
        return "Training has recorded nothing yet."
    last = records[-1]
    images, steps, epochs = (number_text(number(last.get(name))) for name in ("images_seen", "step", "epoch"))
    said = f"Trained for {epochs} epochs: {images} images seen in {steps} steps"
    wanted = _wanted_images(recorded)
    if math.isfinite(wanted) and last["images_seen"] < wanted:
        return f"{said}, of {number_text(wanted)} images wanted: training goes on, was interrupted, or stopped early."
    return f"{said}."


def _wanted_images(recorded: RunRecord) -> float:
    """Images that training was to see at least, in whole batches; NaN when it is not recorded."""
    train = inner(recorded.config, "train")
    if math.isfinite(num_images := number(train.get("num_images"))):
        return num_images
    images = number(inner(inner(inner(recorded.dataset, "train"), "splits"), "train").get("num_images"))
    batch = number(train.get("global_batch_size"))
    return number(train.get("epochs")) * (images // batch * batch) if images >= batch > 0 else math.nan
