"""Reports in Chromium, offline: what one can click on works, and nothing else happens."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from html_document import Document
from test_report import hostile_run, run  # noqa: F401 (fixtures)
from vaetrain.report.chart import Series, chart
from vaetrain.report.document import report
from vaetrain.report.page import Section, code, page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SWITCHES = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")


class Opened:
    """A page in the browser, with all that it said and asked for."""

    def __init__(self, tab: sync_api.Page, file: Path) -> None:
        self.tab = tab
        self.said: list[str] = []
        self.requests: list[str] = []
        tab.on("console", lambda message: self.said.append(message.text))
        tab.on("pageerror", lambda error: self.said.append(str(error)))
        tab.on("request", lambda request: self.requests.append(request.url))
        tab.goto(file.as_uri())
        self.url = file.as_uri()

    def chart(self, title: str) -> sync_api.Locator:
        return self.tab.locator("figure.chart", has=self.tab.locator("figcaption", has_text=title)).first

    def ticks(self, title: str) -> tuple[list[str], list[str]]:
        figure = self.chart(title)
        return tuple(figure.locator(f"text.tick.{axis}").all_text_contents() for axis in "xy")

    def drag(self, title: str, start: tuple[float, float], end: tuple[float, float]) -> None:
        """From one place to another, each in shares of the plot's width and height."""
        area = self.chart(title).locator("svg.area")
        area.scroll_into_view_if_needed()
        # The nested <svg> has no box of its own in every browser: its frame has.
        box = self.chart(title).locator("path.frame").bounding_box()
        places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in (start, end)]
        self.tab.mouse.move(*places[0])
        self.tab.mouse.down()
        self.tab.mouse.move(*places[1], steps=4)
        self.tab.mouse.up()


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    os.environ.setdefault("DBUS_SESSION_BUS_ADDRESS", "disabled:")  # nothing to wait for
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        yield browser
        browser.close()


@pytest.fixture
def show(browser, tmp_path):
    """Open HTML; options are the browser's."""
    contexts = []

    def show_page(text: str, **options: object) -> Opened:
        (tmp_path / "page.html").write_text(text)
        contexts.append(browser.new_context(**{"viewport": {"width": 1280, "height": 900}, "offline": True} | options))
        return Opened(contexts[-1].new_page(), tmp_path / "page.html")

    yield show_page
    for context in contexts:
        context.close()


LINE = Series("training", tuple((float(x), 100.0 / (x + 1)) for x in range(101)))
OTHER = Series("validation", tuple((float(x), 50.0 / (x + 1)) for x in range(0, 101, 10)))


def one_chart(**options: object) -> str:
    return page("t", "s", [Section("Curves", chart("Loss", [LINE, OTHER], x="epoch", y="nats", **options))])


def test_a_report_renders_quietly_and_asks_for_nothing(run, show):  # noqa: F811
    opened = show(report([run, run]))
    opened.tab.wait_for_timeout(300)
    assert opened.said == []
    assert [url for url in opened.requests if not url.startswith("data:")] == [opened.url]
    widths = opened.tab.eval_on_selector_all("main img", "found => found.map((image) => image.naturalWidth)")
    assert len(widths) >= 9
    assert all(widths)
    assert opened.tab.locator("svg.area path.line").count() > 10


def test_hostile_text_does_nothing(hostile_run, show):  # noqa: F811
    opened = show(report([hostile_run, hostile_run]))
    opened.tab.wait_for_timeout(300)
    assert opened.tab.evaluate("window.hacked") is None
    assert opened.tab.title().startswith("<script>window.hacked=1")
    entry = opened.tab.locator("figure.chart .entry", has_text="<script>").first
    entry.click()
    opened.chart("Loss").hover()
    assert opened.tab.evaluate("window.hacked") is None
    assert opened.said == []


def test_a_script_that_got_in_would_not_run(show):
    opened = show(
        page("t", "s", [Section("x", "<script>window.hacked=1</script><img src=x onerror='window.hacked=1'>")])
    )
    opened.tab.wait_for_timeout(200)
    assert opened.tab.evaluate("window.hacked") is None
    assert any("Content Security Policy" in line for line in opened.said)


def test_the_legend_hides_a_line_and_shows_it_again(show):
    opened = show(one_chart())
    lines = opened.chart("Loss").locator("svg.area path.line")
    assert lines.count() == 2
    entry = opened.chart("Loss").locator("button.entry", has_text="validation")
    entry.click()
    assert lines.count() == 1
    assert entry.get_attribute("aria-pressed") == "false"
    entry.press("Enter")
    assert lines.count() == 2
    assert entry.get_attribute("aria-pressed") == "true"


def test_a_dragged_box_becomes_the_axes_and_reset_goes_back(show):
    opened = show(one_chart())
    before = opened.ticks("Loss")
    reset = opened.chart("Loss").locator("button.reset")
    assert not reset.is_visible()
    opened.drag("Loss", (0.2, 0.1), (0.4, 0.9))
    across, up = opened.ticks("Loss")
    assert all(20 <= float(text) <= 40 for text in across)
    assert up != before[1]
    reset.click()
    assert opened.ticks("Loss") == before
    assert not reset.is_visible()
    opened.drag("Loss", (0.5, 0.5), (0.9, 0.5))  # along one axis the other stays
    assert all(50 <= float(text) <= 90 for text in opened.ticks("Loss")[0])
    assert opened.ticks("Loss")[1] == before[1]
    opened.chart("Loss").locator("svg.plot").dblclick(position={"x": 300, "y": 150})
    assert opened.ticks("Loss") == before
    opened.drag("Loss", (0.5, 0.5), (0.503, 0.503))  # a click with an unsteady hand
    assert opened.ticks("Loss") == before
    assert opened.said == []


def test_keys_zoom_too(show):
    opened = show(one_chart())
    before = opened.ticks("Loss")
    plot = opened.chart("Loss").locator("svg.plot")
    plot.press("+")
    assert all(20 <= float(text) <= 80 for text in opened.ticks("Loss")[0])
    plot.press("ArrowRight")
    assert all(31 <= float(text) <= 93 for text in opened.ticks("Loss")[0])
    plot.press("0")
    assert opened.ticks("Loss") == before


def test_enormous_values_are_shown_on_request(show):
    steep = Series("s", ((0, 9000.0), *((float(x), 100.0 - x) for x in range(1, 40))))
    opened = show(page("t", "s", [Section("c", chart("Loss", [steep], x="x", y="y"))]))
    before = opened.ticks("Loss")
    assert max(float(text.replace("−", "-")) for text in before[1]) <= 110
    opened.chart("Loss").locator("button.whole").click()
    assert "8,000" in opened.ticks("Loss")[1]
    opened.chart("Loss").locator("button.reset").click()
    assert opened.ticks("Loss") == before


def test_values_stand_under_the_pointer(show):
    opened = show(one_chart())
    box = opened.chart("Loss").locator("path.frame").bounding_box()
    opened.tab.mouse.move(box["x"] + 0.1001 * box["width"], box["y"] + box["height"] / 2)
    tip = opened.chart("Loss").locator(".tip")
    assert tip.inner_text().split("\n") == ["epoch 10", "training: 9.0909", "validation: 4.5455"]
    opened.tab.mouse.move(0, 0)
    assert not tip.is_visible()


def test_folds_open_and_charts_in_them_fill_their_place(run, show):  # noqa: F811
    opened = show(report([run]))
    fold = opened.tab.locator("details", has=opened.tab.locator("summary", has_text="Further curves"))
    inside = fold.locator("svg.plot").first
    assert not inside.is_visible()
    fold.locator("> summary").click()
    assert inside.is_visible()
    for width in (1280, 700):
        opened.tab.set_viewport_size({"width": width, "height": 900})
        opened.tab.wait_for_timeout(200)
        box, view = inside.bounding_box(), inside.get_attribute("viewBox").split()
        assert float(view[2]) == pytest.approx(box["width"], abs=1.5)


def test_the_command_is_copied(show):
    opened = show(page("t", "s", [Section("c", code("python tools/rerun.py 'a b'"))]))
    opened.tab.locator("button.copy").click()
    sync_api.expect(opened.tab.locator("button.copy")).to_have_text("Copied")
    opened.tab.evaluate("document.querySelector('main').append(document.createElement('textarea'))")
    opened.tab.locator("textarea").press("Control+V")
    assert opened.tab.locator("textarea").input_value() == "python tools/rerun.py 'a b'"


def test_a_picture_is_shown_in_full_and_closes_again(run, show):  # noqa: F811
    opened = show(report([run]))
    opened.tab.locator("button.enlarge").first.click()
    assert opened.tab.locator("dialog[open] img").is_visible()
    opened.tab.keyboard.press("Escape")
    assert opened.tab.locator("dialog[open]").count() == 0


@pytest.mark.parametrize("width", [360, 800])
def test_a_page_fits_a_phone(run, show, width):  # noqa: F811
    opened = show(report([run, run]), viewport={"width": width, "height": 740})
    opened.tab.wait_for_timeout(200)
    assert opened.tab.evaluate("document.documentElement.scrollWidth") <= width
    opened.tab.evaluate("window.scrollTo(0, 3000)")
    opened.tab.wait_for_timeout(400)
    assert opened.tab.locator("nav").bounding_box()["y"] == pytest.approx(0, abs=1)


def test_the_contents_stay_in_sight(run, show):  # noqa: F811
    opened = show(report([run]))
    opened.tab.locator("nav a", has_text="Provenance").click()
    sync_api.expect(opened.tab.locator("nav a[aria-current]")).to_have_text("Provenance")
    assert opened.tab.locator("nav ol").bounding_box()["y"] >= 0


def test_the_dark_is_dark(show):
    def brightness(scheme: str) -> list[int]:
        opened = show(one_chart(), color_scheme=scheme)
        body = "getComputedStyle(document.body)"
        colours = opened.tab.evaluate(f"[{body}.backgroundColor, {body}.color]")
        return [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours]

    light, dark = brightness("light"), brightness("dark")
    assert light[0] > 700 > 200 > light[1]
    assert dark[0] < 150 < 500 < dark[1]


def test_paper_is_light_and_takes_two_charts_beside_each_other(run, show):  # noqa: F811
    """Whatever the screen is: pale text on white paper is not read, nor are charts blown up to the width of a page."""
    opened = show(report([run]), color_scheme="dark")
    opened.tab.set_viewport_size({"width": 718, "height": 1000})  # A4 less its margins
    opened.tab.emulate_media(media="print")
    assert opened.tab.evaluate("getComputedStyle(document.body).color") == "rgb(34, 38, 43)"
    loss, distortion = (opened.chart(title).bounding_box() for title in ("Loss", "Distortion"))
    assert loss["y"] == distortion["y"]
    assert loss["x"] + loss["width"] < distortion["x"]


@pytest.mark.parametrize(
    ("points", "options"),
    [
        (((0, -98.4), (5, -80.1), (9, -70.0)), {}),
        (((0, 0.0012), (1, 0.0019)), {}),
        (((0, 2e7), (1, 9e8)), {}),
        (((1, 1e-9), (1e6, 1e5)), {"log_x": True, "log_y": True}),
        (((20, 3.0), (60, 4.0)), {"log_x": True, "markers": True}),
        (((1, 1.0), (1000, 40.0)), {"log_x": True, "log_y": True}),
        (((3, 7.0),), {}),
        (((-1e-7, -3e-9), (2e-7, 5e-9)), {}),
    ],
)
def test_the_script_draws_what_python_drew(show, points, options):
    """At the width that chart.py draws for, the ticks and lines are the same, so that nobody without JavaScript is misled."""
    text = page("t", "s", [Section("c", chart("Loss", [Series("s", points)], x="x", y="y", **options))])
    document = Document(text)
    opened = show(text, viewport={"width": 752, "height": 900})
    assert opened.chart("Loss").locator("svg.plot").get_attribute("viewBox") == "0 0 720 380"
    for axis, found in zip("xy", opened.ticks("Loss"), strict=True):
        assert found == [t.text for t in document.all("text", class_=axis) if "tick" in t.attributes["class"]]
    for kind, names in (("line", ("d",)), ("dot", ("cx", "cy"))):
        wanted = [
            e for e in document.elements if e.attributes.get("class") == kind and "M1 5h20" not in e.attributes.values()
        ]
        drawn = opened.chart("Loss").locator(f"svg.area .{kind}")
        assert drawn.count() >= len(wanted)
        for number, element in enumerate(wanted):
            for name in names:
                mine = [float(part) for part in re.findall(r"-?[\d.]+", element.attributes[name])]
                theirs = [float(part) for part in re.findall(r"-?[\d.]+", drawn.nth(number).get_attribute(name))]
                assert theirs == pytest.approx(mine, abs=0.11)
