"""The curves of a run stand in one place: the figures that training draws and the report show the same lines."""

from __future__ import annotations

import json
import math

import matplotlib.pyplot as plt
import pytest

from html_document import Document
from vaetrain.report.document import report
from vaetrain.runs.curves import DISTORTION, LOSS, RATE, line_of, without_outliers
from vaetrain.runs.directory import RunDirectory
from vaetrain.training.figures import draw, save_curves


def lines_of_figure(metrics, curve):
    figure, axis = plt.subplots()
    draw(axis, metrics, curve)
    plt.close(figure)
    assert (axis.get_title(), axis.get_xlabel(), axis.get_ylabel()) == (curve.title, "epoch", curve.y)
    return {line.get_label(): list(map(tuple, line.get_xydata())) for line in axis.get_lines()}


@pytest.mark.parametrize("curve", [LOSS, DISTORTION, RATE], ids=lambda curve: curve.title)
def test_a_figure_of_training_and_the_report_show_the_same_lines(tiny_run, curve):
    drawn = lines_of_figure(RunDirectory(tiny_run).metrics(), curve)
    figures = Document(report([tiny_run])).all("figure", class_="chart")
    [found] = [figure.attributes["data-chart"] for figure in figures if figure.text.startswith(curve.title)]
    reported = {line["label"]: line["points"] for line in json.loads(found)["series"]}
    assert list(drawn) == list(reported)
    assert len(drawn) == 2
    for label, points in reported.items():
        assert drawn[label] == [pytest.approx(point, rel=1e-6) for point in points]


def test_validation_loss_is_minus_the_elbo_and_what_has_none_draws_none():
    train = {"split": "train", "epoch": 0.5, "train/loss": 7.0}
    val = {"split": "val", "epoch": 1.0, "val/elbo_nats": -5.0, "val/distortion_nats": 4.0}
    assert lines_of_figure([train, val], LOSS) == {
        "training: distortion + β · rate": [(0.5, 7.0)],
        "validation: −ELBO": [(1.0, 5.0)],
    }
    deterministic = val | {"val/elbo_nats": None}
    assert list(lines_of_figure([train, deterministic], LOSS)) == ["training: distortion + β · rate"]


def test_what_was_not_finite_is_nan_and_left_out_of_figures(tmp_path, recwarn):
    metrics = [
        {"split": "train", "epoch": epoch, "train/loss": loss} for epoch, loss in ((1.0, 3.0), (2.0, None), (3.0, 2.0))
    ]
    assert [math.isnan(y) for _, y in line_of(metrics, "train/loss")] == [False, True, False]
    assert lines_of_figure(metrics, LOSS)["training: distortion + β · rate"] == [(1.0, 3.0), (3.0, 2.0)]
    save_curves([metrics[1]], tmp_path)  # a run that diverged at once
    assert {file.name for file in tmp_path.iterdir()} == {"losses.png", "kl.png"}
    assert not [str(warning.message) for warning in recwarn if "legend" in str(warning.message)]


def test_outliers_are_few_and_enormous():
    steep = [9000.0, *map(float, range(1, 40))]
    assert without_outliers(steep) == steep[1:]
    assert without_outliers(steep[1:]) == steep[1:]
    assert without_outliers([1.0, 100.0]) == [1.0, 100.0]
