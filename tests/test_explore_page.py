"""The page of tools/explore.py in Chromium: a slider changes the picture, photographs are interpolated, nobody else is asked."""

from __future__ import annotations

import importlib.util
import os
import urllib.error
import urllib.request
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from launching import ROOT, end, free_port, run_here, start
from test_report_in_a_browser import CHROMIUM, SWITCHES

HAS_GRADIO = importlib.util.find_spec("gradio") is not None


@pytest.mark.skipif(HAS_GRADIO, reason="gradio is installed")
def test_a_missing_gradio_is_one_line_that_names_the_extra(tiny_run, capsys):
    assert run_here("tools/explore.py", tiny_run) == 1
    assert capsys.readouterr().err == "error: explore.py needs gradio; install vaetrain[explore]\n"


class Served:
    """A tiny run's page, and what the command has printed."""

    def __init__(self, run: object) -> None:
        self.port = free_port()
        arguments = ("tools/explore.py", run, "--port", self.port, "--num-images", 20, "--num-directions", 3)
        # Whatever a user's shell says of gradio, and a proxy that is nobody.
        hostile = {"GRADIO_SHARE": "True", "GRADIO_ALLOWED_PATHS": str(ROOT), "http_proxy": "http://127.0.0.1:9"}
        self.process = start(*arguments, environment=hostile)
        self.printed: list[str] = []
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.printed.append(line)
            if line.startswith("exploring "):
                return
        raise AssertionError(f"it ended: {self.printed} {end(self.process)}")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"


UPLOAD_OF_GRADIO = "warning: Method not implemented."
"""What gradio 6.31's own picture says to the console when a file is uploaded into it."""


@pytest.fixture(scope="module")
def served(tiny_run) -> Iterator[Served]:
    if not HAS_GRADIO:
        pytest.skip("gradio is not installed; `make explore` tests the page")
    served = Served(tiny_run)
    yield served
    end(served.process)


@pytest.fixture
def opened(served):
    """The page in the browser, with its first picture; at the end, it has said nothing and asked nobody else."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium is installed")
    os.environ.setdefault("DBUS_SESSION_BUS_ADDRESS", "disabled:")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=(*SWITCHES, "--no-proxy-server"))
        tab = browser.new_page(viewport={"width": 1280, "height": 1000})
        tab.set_default_timeout(120_000)
        said: list[str] = []
        requests: list[str] = []
        tab.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(served.url)
        tab.locator("#grid img").wait_for()
        yield tab
        browser.close()
    complaints = [message for message in said if message.startswith(("error", "warning"))]
    assert [message for message in complaints if message != UPLOAD_OF_GRADIO] == []
    assert len(requests) > 3
    assert [url for url in requests if not url.startswith((served.url, "data:", "blob:"))] == []


def picture(tab) -> str:
    return str(tab.locator("#grid img").get_attribute("src"))


def wait_for_another(tab, than: str) -> str:
    tab.wait_for_function("old => document.querySelector('#grid img')?.getAttribute('src') != old", arg=than)
    return picture(tab)


def test_sliders_and_the_seed_change_the_picture_and_zero_brings_it_back(opened):
    first = picture(opened)  # named by its content
    sliders = opened.locator("input[type=range][aria-label*='direction ']")
    assert sliders.count() == 3
    assert opened.get_by_role("button", name="Share").count() == 0
    sliders.first.fill("3")
    moved = wait_for_another(opened, first)
    assert moved != first
    opened.get_by_role("button", name="All to 0").click()
    assert wait_for_another(opened, moved).split("/file=")[-1] == first.split("/file=")[-1]
    opened.get_by_label("Seed").fill("1")
    opened.get_by_label("Seed").press("Enter")
    assert wait_for_another(opened, first) != first
    assert opened.get_by_text("Of the posterior means of 20 training images.").is_visible()


def test_two_photographs_become_a_strip(opened, tmp_path):
    rng = np.random.default_rng(0)
    opened.get_by_role("tab", name="Interpolation").click()
    for number, size in enumerate([(40, 30), (16, 16)]):
        file = tmp_path / f"{number}.png"
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(file)
        opened.locator("input[type=file]").nth(number).set_input_files(file)
        opened.wait_for_function(
            "count => [...document.images].filter(each => each.naturalWidth && each.offsetParent).length >= count",
            arg=number + 1,
        )
    strip = opened.locator("#strip img")
    strip.wait_for()
    assert strip.evaluate("image => image.decode().then(() => image.naturalWidth)") == 10 * 82 + 2


def test_no_file_of_this_machine_is_served_and_no_link_is_shared(served):
    assert served.printed[-1].endswith(f" at {served.url} (Ctrl-C ends it)\n")
    assert not any("gradio.live" in line for line in served.printed)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    assert direct.open(served.url, timeout=60).status == 200
    with pytest.raises(urllib.error.HTTPError) as refused:
        direct.open(f"{served.url}gradio_api/file={ROOT}/pyproject.toml", timeout=60)
    assert refused.value.code == 403
