"""The curves of metrics.jsonl: training and validation of one run, or one metric of several runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

from vaetrain.report.chart import Series, chart
from vaetrain.report.page import absent, fold, paragraph, side_by_side, table
from vaetrain.report.values import number_text
from vaetrain.runs.curves import DISTORTION, LOSS, NEGATED, RATE, Curve, line_of
from vaetrain.runs.record import RunRecord, number

MAX_POINTS = 2000
"""Of a line; of more, each stretch keeps its lowest and its highest."""

AVERAGED, RAW = "averaged weights (EMA)", "weights of the step"

PLACE = ("step", "images_seen", "epoch", "split")
"""What every record carries besides its metrics."""


CURVES = (
    LOSS,
    DISTORTION,
    RATE,
    Curve("ELBO", "nats per image", ((AVERAGED, "val/elbo_nats"), (RAW, "val_raw/elbo_nats"))),
    Curve("PSNR of reconstructions", "dB", ((AVERAGED, "val/psnr_db"), (RAW, "val_raw/psnr_db"))),
    Curve("SSIM of reconstructions", "SSIM", ((AVERAGED, "val/ssim"), (RAW, "val_raw/ssim"))),
)  # fmt: skip
"""Shown first; every other metric follows in a fold."""

FURTHER = (
    Curve("Bits per dimension", "bits/dim", ((AVERAGED, "val/bits_per_dim"), (RAW, "val_raw/bits_per_dim"))),
    Curve("Mean squared error", "MSE on [0, 1]", ((AVERAGED, "val/mse"), (RAW, "val_raw/mse"))),
    Curve("Perceptual distance of reconstructions", "LPIPS",
          (("training", "train/perceptual"), (AVERAGED, "val/lpips"), (RAW, "val_raw/lpips"))),
    Curve("Fréchet distance of reconstructions", "rFID", ((AVERAGED, "val/rfid"),)),
    Curve("Adversarial term", "mean over patches",
          (("training", "train/adversarial"), (AVERAGED, "val/adversarial"), (RAW, "val_raw/adversarial"))),
    Curve("Weight of the adversarial term", "nats", (("training", "train/adversarial_weight"),), log_y=True),
    Curve("Loss of the discriminator", "mean over patches", (("training", "train/discriminator_loss"),)),
    Curve("Patches that the discriminator tells right", "share",
          (("images, training", "train/discriminator_accuracy_real"),
           ("reconstructions, training", "train/discriminator_accuracy_recon"),
           ("images, validation", "val/discriminator_accuracy_real"),
           ("reconstructions, validation", "val/discriminator_accuracy_recon"))),
    Curve("Distortion and rate of the step's weights", "nats per image",
          (("distortion", "val_raw/distortion_nats"), ("rate", "val_raw/rate_nats"))),
    Curve("Gradient norm", "norm", (("training", "train/grad_norm"),), log_y=True),
    Curve("Learning rate", "learning rate", (("training", "train/lr"),)),
    Curve("β", "β", (("training", "train/beta"),)),
    Curve("Gradient noise scale", "images",
          (("simple", "train/noise_scale_images"), ("Adam's", "train/adam_noise_scale_images")), log_y=True),
    Curve("Speed", "images per second", (("training", "perf/images_per_s"),)),
    Curve("Waiting for data", "share of the time", (("training", "perf/data_wait_frac"),)),
    Curve("Peak memory", "GiB", (("training", "perf/peak_memory_gib"),)),
)  # fmt: skip

COMPARED = tuple(
    Curve(title, y, ((title, metric),), log_y)
    for title, y, metric, log_y in (
        ("Validation ELBO", "nats per image", "val/elbo_nats", False),
        ("Training loss", "nats per image", "train/loss", False),
        ("Validation distortion", "nats per image", "val/distortion_nats", False),
        ("Validation rate", "nats per image", "val/rate_nats", False),
        ("Validation PSNR", "dB", "val/psnr_db", False),
        ("Validation SSIM", "SSIM", "val/ssim", False),
        ("Gradient norm", "norm", "train/grad_norm", True),
        ("Speed", "images per second", "perf/images_per_s", False),
    )
)
"""Of several runs, a line for each run."""


def curves_of_run(recorded: RunRecord) -> str:
    """All curves over epochs, incidents, and what stayed constant."""
    if not recorded.metrics:
        return absent(recorded.why_not(recorded.run.metrics_file, "training has recorded nothing yet."))
    fault = recorded.faults.get(recorded.run.metrics_file.name)
    constants: dict[str, float] = {}
    first = [drawn for curve in CURVES if (drawn := _draw(recorded, curve, constants))]
    known = {metric.removeprefix(NEGATED) for curve in (*CURVES, *FURTHER) for _, metric in curve.lines}
    others = [Curve(name, name, ((name, name),)) for name in _metric_names(recorded) if name not in known]
    further = [drawn for curve in (*FURTHER, *others) if (drawn := _draw(recorded, curve, constants))]
    parts = [absent(fault) if fault else "", _incidents(recorded)]
    parts.append(side_by_side(first) if first else absent("No record holds a finite loss or score."))
    if further:
        parts.append(fold(f"Further curves ({len(further)})", side_by_side(further)))
    if constants:
        rows = [(name, number_text(value)) for name, value in constants.items()]
        parts.append(table(("metric", "value"), rows, caption="Constant throughout", fold=True))
    return "".join(parts)


def curves_of_runs(runs: Sequence[RunRecord], labels: Sequence[str]) -> str:
    """A chart for each metric that at least one run has, over images seen, a line for each run."""
    drawn = []
    for curve in COMPARED:
        [(title, metric)] = curve.lines
        series = [
            Series(label, thinned(line_of(recorded.metrics, metric, "images_seen")))
            for recorded, label in zip(runs, labels, strict=True)
        ]
        if any(math.isfinite(y) for line in series for _, y in line.points):
            drawn.append(chart(title, series, x="images seen", y=curve.y, log_y=curve.log_y))
    return side_by_side(drawn) if drawn else absent("None of these runs has recorded anything yet.")


def thinned(line: Sequence[tuple[float, float]], max_points: int = MAX_POINTS) -> tuple[tuple[float, float], ...]:
    """At most so many points, the lowest and the highest of each stretch, so that no spike is lost; gaps may close."""
    if len(line) <= max_points:
        return tuple(line)
    stretch = math.ceil(2 * len(line) / max_points)
    found: list[tuple[float, float]] = []
    for start in range(0, len(line), stretch):
        finite = [point for point in line[start : start + stretch] if math.isfinite(point[1])]
        ends = (
            {min(finite, key=itemgetter(1)), max(finite, key=itemgetter(1))} if finite else {(line[start][0], math.nan)}
        )
        found += sorted(ends)
    return tuple(found)


def _draw(recorded: RunRecord, curve: Curve, constants: dict[str, float]) -> str:
    """The chart; empty when there is no finite value, and when there is nothing to see but one value again and again."""
    series, values = [], []
    for label, metric in curve.lines:
        line = thinned(line_of(recorded.metrics, metric))
        finite = [y for _, y in line if math.isfinite(y)]
        if finite:
            series.append(Series(label, line))
            values += finite
    if not values:
        return ""
    if len(set(values)) == 1 and len(curve.lines) == 1:
        constants[curve.lines[0][1]] = values[0]
        return ""
    return chart(curve.title, series, x="epoch", y=curve.y, log_y=curve.log_y)


def _metric_names(recorded: RunRecord) -> list[str]:
    names = dict.fromkeys(name for record in recorded.metrics if record.get("split") != "event" for name in record)
    return [name for name in names if name not in PLACE]


def _incidents(recorded: RunRecord) -> str:
    train = recorded.split("train")
    said = []
    skipped = sum(count for record in train if math.isfinite(count := number(record.get("train/skipped_steps"))))
    if skipped:
        said.append(paragraph(f"{skipped:,.0f} step(s) were skipped because of non-finite or exploding gradients."))
    empty = sum(not math.isfinite(number(record.get("train/loss"))) for record in train)
    if empty:
        said.append(
            paragraph(f"{empty:,} of {len(train):,} training records have no finite loss; the curves have gaps there.")
        )
    events: list[dict[str, Any]] = recorded.split("event")
    if events:
        columns = ("event", "from_step", "to_step", "lr_factor", "reason")
        rows = [[str(event.get(column, "–")) for column in columns] for event in events]
        said.append(table(columns, rows, caption="Incidents"))
    return "".join(said)
