"""How far long work has come is said by the clock, whatever the work does meanwhile."""

import io
import re
import sys
import time

import pytest

from vaetrain import progress_bar
from vaetrain.progress_bar import ProgressBar, counted


@pytest.fixture
def lines(monkeypatch):
    """Where lines go, and a clock that is ten times as fast: a line after 0.2 s, and then every second."""
    monkeypatch.setattr(progress_bar, "SECONDS_TO_FIRST_LINE", 0.2)
    monkeypatch.setattr(progress_bar, "SECONDS_BETWEEN_LINES", 1.0)
    monkeypatch.setattr(progress_bar, "SECONDS_BETWEEN_LOOKS", 0.05)
    return []


def wait_for(lines, count):
    deadline = time.monotonic() + 60  # against hanging, no stopwatch
    while len(lines) < count:
        assert time.monotonic() < deadline, lines
        time.sleep(0.02)


def test_work_that_stands_still_is_not_silent(lines):
    with ProgressBar("one long step", 100, write=lines.append) as bar:
        wait_for(lines, 2)
        bar.update(40)
        bar.noted("loss 3")
        wait_for(lines, 3)
    assert re.fullmatch(r"one long step: 0 of 100 images, 0:00:\d\d so far", lines[0])
    assert re.fullmatch(r"one long step: 40 of 100 images, [\d.]+ images/s, 0:0\d:\d\d left, loss 3", lines[-2])
    assert re.fullmatch(r"one long step: 40 images in 0:00:\d\d", lines[-1])


def test_work_that_is_soon_done_says_nothing(lines, monkeypatch):
    monkeypatch.setattr(progress_bar, "SECONDS_TO_FIRST_LINE", 600)
    with ProgressBar("short", 3, write=lines.append) as bar:
        bar.update(3)
        time.sleep(0.2)
    assert lines == []


def test_the_innermost_work_speaks(lines):
    with ProgressBar("outer", write=lambda line: lines.append(f"outer {line}")):
        with ProgressBar("inner", 5, write=lambda line: lines.append(f"inner {line}")):
            wait_for(lines, 3)
        assert all(line.startswith("inner ") for line in lines)
        wait_for(lines, len(lines) + 1)
        assert lines[-1].startswith("outer ")


def test_items_are_counted_when_they_are_done_with(lines):
    seen = []
    with ProgressBar("items", 6, write=lines.append) as bar:
        for item in bar.counting([1, 2, 3], size=lambda number: number):
            seen.append((item, bar.done))
    assert (seen, bar.done) == ([(1, 0), (2, 1), (3, 3)], 6)
    assert list(counted("items", [1, 2], 2, quiet=True)) == [1, 2]


def test_a_failure_is_not_called_done_and_ends_the_clock(lines):
    def fail():
        with ProgressBar("failing", 5, write=lines.append):
            wait_for(lines, 1)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    count = len(lines)
    time.sleep(0.3)
    assert len(lines) == count
    assert " in 0:00" not in lines[-1]


def test_the_rate_is_of_the_last_minute(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress_bar.time, "monotonic", lambda: now[0])
    bar = ProgressBar("training", 10_000)
    bar._seen.append((0.0, 0))
    for second in range(0, 210, 10):
        now[0] = float(second)
        bar.done = 0 if second < 100 else (second - 100) * 10
        line = bar.line()
    assert line == "training: 1,000 of 10,000 images, 10 images/s, 0:15:00 left"


def test_numbers_in_other_units(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress_bar.time, "monotonic", lambda: now[0])
    bar = ProgressBar("file", 3 * 10**6, "MB", scale=10**6)
    bar._seen.append((0.0, 0))
    now[0], bar.done = 2.0, 10**6
    assert bar.line() == "file: 1 of 3 MB, 0.50 MB/s, 0:00:04 left"


def test_a_terminal_gets_a_bar_and_lines_go_to_stdout(monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    lines = []
    with ProgressBar("outer", 4, write=lines.append) as outer:
        with ProgressBar("inner", 2) as inner:
            inner.update(2)
            time.sleep(0.6)
            inner.update(0)
        outer.update(4)
        time.sleep(0.6)
        outer.say("a line of its own")
    assert lines == []
    assert capsys.readouterr().out == "a line of its own\n"
    assert "outer: 100%" in terminal.getvalue()


def test_other_processes_are_quiet(lines):
    with ProgressBar("quiet", 5, quiet=True, write=lines.append) as bar:
        bar.update(2)
        bar.say("nothing")
        time.sleep(0.3)
    assert lines == []
