"""Charts: values land where they belong, gaps stay gaps, and no value or name breaks the fragment."""

from __future__ import annotations

import json
import math
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from html_document import Document
from vaetrain.report.axis import Axis, round_step
from vaetrain.report.chart import Series, chart
from vaetrain.report.values import number_text
from vaetrain.runs.curves import without_outliers

NAN = math.nan


def drawn(*series: Series, **options: object) -> Document:
    return Document(chart("A chart", series, **{"x": "epoch", "y": "nats", **options}))


def paths(document: Document, kind: str = "line") -> list[list[tuple[float, float]]]:
    """Corners of the lines in the plot; the legend has one of each too."""
    found = [path.attributes["d"] for path in document.all("path", class_=kind)]
    return [[tuple(map(float, pair.split())) for pair in d[1:].split("L")] for d in found if "h" not in d]


def ticks(document: Document, axis: str) -> list[str]:
    return [text.text for text in document.all("text", class_="tick") if axis in text.attributes["class"].split()]


def test_a_line_goes_through_its_values():
    document = drawn(Series("loss", ((0, 0.0), (5, 10.0), (10, 5.0))))
    [area] = document.all("svg", class_="area")
    width, height = (float(area.attributes[name]) for name in ("width", "height"))
    [[first, middle, last]] = paths(document)
    assert [point[0] for point in (first, middle, last)] == pytest.approx([0, width / 2, width], abs=0.1)
    # 5% of the range are left free above and below.
    assert [point[1] for point in (first, middle, last)] == pytest.approx(
        [height * (1 - 0.5 / 11), height * 0.5 / 11, height / 2], abs=0.1
    )
    assert ticks(document, "x") == ["0", "2", "4", "6", "8", "10"]
    assert ticks(document, "y") == ["0", "2", "4", "6", "8", "10"]


def test_what_is_not_finite_leaves_a_gap():
    document = drawn(Series("loss", ((0, 1.0), (1, 2.0), (2, NAN), (3, 3.0), (4, 4.0), (5, math.inf), (6, 2.5))))
    assert [len(path) for path in paths(document)] == [2, 2]
    assert len(document.all("circle")) == 1  # the last point has no neighbour to be joined to
    data = json.loads(document.all("figure")[0].attributes["data-chart"])
    assert data["series"][0]["points"][2] == [2.0, None]
    assert data["series"][0]["points"][5] == [5.0, None]


@pytest.mark.parametrize("points", [(), ((0.0, NAN), (1.0, math.inf)), ((NAN, 1.0),)])
def test_a_chart_of_nothing_says_so(points):
    document = drawn(Series("loss", points))
    assert "There is no finite value to draw." in document.all("figure")[0].text
    assert not document.all("svg")


def test_logarithmic_axes():
    document = drawn(
        Series("s", ((1, 0.001), (10, 1.0), (0, 5.0), (100, 1000.0), (1000, -1.0))), log_x=True, log_y=True
    )
    assert [len(path) for path in paths(document)] == [2]  # zero and negative numbers have no place
    assert len(document.all("circle")) == 1
    assert ticks(document, "y") == ["0.001", "0.01", "0.1", "1", "10", "100", "1,000"]
    assert ticks(document, "x") == ["1", "2", "5", "10", "20", "50", "100"]
    narrow = Axis.around([20.0, 60.0], log=True, padding=0.0)
    assert [text for _, text in narrow.ticks(5)] == ["20", "30", "40", "50", "60"]


def test_enormous_first_values_are_cut_off_and_offered():
    line = Series("loss", ((0, 9000.0), *((float(x), 100.0 - x) for x in range(1, 40))))
    document = drawn(line)
    assert document.all("button", class_="whole")
    data = json.loads(document.all("figure")[0].attributes["data-chart"])
    assert data["view"][3] < 110
    assert data["whole"][3] > 9000
    assert not drawn(Series("loss", line.points[1:])).all("button", class_="whole")
    assert without_outliers([1.0, 100.0]) == [1.0, 100.0]


def test_error_bars_dots_and_labels():
    series = Series("FID", ((1, 5.0), (10, 4.0), (100, 2.0)), (0.5, NAN, 0.1))
    document = drawn(series, Series("other", ((1, 3.0),)), log_x=True, markers=True, labels=["β 1", "<β>"])
    assert len(document.all("path", class_="error")) == 2
    assert len(document.all("circle", class_="dot")) == 4
    assert [text.text for text in document.all("text", class_="label")] == ["β 1", "<β>"]
    with pytest.raises(ValueError, match="series FID has 2 points and 1 errors"):
        Series("FID", ((1, 5.0), (2, 1.0)), (0.5,))


def test_names_are_text():
    hostile = '"><script>alert(1)</script>'
    text = chart(hostile, [Series(hostile, ((0, 1.0), (1, 2.0)))], x=hostile, y=hostile, labels=[hostile, hostile])
    document = Document(text)
    assert not document.all("script")
    assert document.all("figcaption")[0].text.startswith(hostile)
    assert document.all("button", class_="entry")[0].text == hostile
    data = json.loads(document.all("figure")[0].attributes["data-chart"])
    assert data["series"][0]["label"] == data["x"] == data["y"] == data["labels"][1] == hostile


def test_one_who_does_not_see_the_picture_gets_its_numbers():
    document = drawn(Series("training", ((0, 3.0), (1, NAN), (2, 1.5), (3, 2.0))))
    [svg] = document.all("svg", class_="plot")
    assert svg.attributes["role"] == "img"
    assert svg.attributes["aria-label"] == "A chart: nats over epoch; training from 3 to 2"
    assert [cell.text for cell in document.all("td")] == ["3", "3", "2", "1.5000", "3"]


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.floats(), st.floats(), st.floats()), max_size=12),
    st.booleans(), st.booleans(), st.booleans(),
)  # fmt: skip
@example([(0.0, 1.7e308, 0.0), (1.0, -1.7e308, 0.0), (2.0, 1.0, 1.7e308)], False, False, False)
@example([(5e-324, 5e-324, 5e-324)], False, False, False)
@example([(5e-324, 5e-324, -1.0)], True, True, True)
def test_no_number_breaks_a_chart(values, log_x, log_y, markers):
    series = Series("s", tuple((x, y) for x, y, _ in values), tuple(error for _, _, error in values))
    text = chart("t", [series], x="x", y="y", log_x=log_x, log_y=log_y, markers=markers)
    document = Document(text)
    for element in document.elements:
        for name in ("d", "x", "y", "cx", "cy"):
            assert not re.search("nan|inf", element.attributes.get(name, "")), element
    assert len(document.all("text", class_="tick")) < 60


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (3.0, "3"), (-98.38, "−98.380"), (1234567.0, "1,234,567"), (2.5e-5, "2.500·10⁻⁵"), (NAN, "–"), (0.5, "0.50000")],
)  # fmt: skip
def test_numbers_are_written_for_people(value, text):
    assert number_text(value) == text


def test_steps_are_round():
    assert [round_step(step) for step in (0.9, 1.4, 1.6, 4.0, 8.0, 0.03)] == pytest.approx([1, 1, 2, 5, 10, 0.02])
