"""How far long work has come, by the clock: a bar on a terminal, elsewhere a line every ten seconds.

One thread speaks, so that a step, a fit or a picture that takes minutes is not silent meanwhile. Work may contain work, such as
the fit of a prior within a scoring: the innermost speaks.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

SECONDS_TO_BAR = 0.5
"""Work that takes less shows no bar."""

SECONDS_TO_FIRST_LINE = 2.0
"""Work that is done sooner says nothing where there is no terminal."""
SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_OF_RATE = 60.0
"""The rate, and from it the time left, are of the last minute: the first steps are slow."""


class ProgressBar:
    """Counts what is done, in a `with` block.

    On a terminal (stderr) a bar; elsewhere a line after two seconds and then every ten:
    "features of samples: 512 of 2,000 images, 41 images/s, 0:00:36 left".
    """

    def __init__(
        self,
        doing: str,
        total: int | None = None,
        unit: str = "images",
        *,
        done: int = 0,
        quiet: bool = False,
        scale: int = 1,
        write: Callable[[str], None] | None = None,
    ) -> None:
        """`total` None: it is not known how much there is to do.

        `quiet` says nothing: for all processes but the main one. `scale` divides the numbers that are shown, such as bytes to
        megabytes. `write` takes the lines where there is no terminal; by default they go to stderr.
        """
        self.doing = doing
        self.total = total
        self.unit = unit
        self.done = done
        self.note = ""
        """What stands after the numbers, such as a loss."""
        self.quiet = quiet
        self.on_terminal = sys.stderr.isatty()
        self._scale = scale
        self._write = write or _write_to_stderr
        self._bar: tqdm | None = None
        self._started = self._spoke = 0.0
        self._lines = 0
        self._seen: deque[tuple[float, int]] = deque()

    def update(self, count: int) -> None:
        """So many more are done; fewer than none where work is done again."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)

    def moved_to(self, done: int) -> None:
        """So many are done altogether."""
        self.update(done - self.done)

    def noted(self, note: str) -> None:
        """Show `note` after the numbers from now on."""
        self.note = note
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)

    def counting(self, items: Iterable[T], size: Callable[[T], int] = lambda _: 1) -> Iterator[T]:
        """The items, each counted, as `size` of it, when the next one is asked for."""
        for item in items:
            yield item
            self.update(size(item))

    def say(self, line: str) -> None:
        """A line of its own, above the bar on a terminal."""
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.write(line)
        else:
            self._write(line)
            self._spoke = time.monotonic()

    def line(self) -> str:
        """How far it is, as it is printed where there is no terminal."""
        now = time.monotonic()
        self._seen.append((now, self.done))
        while len(self._seen) > 2 and now - self._seen[1][0] >= SECONDS_OF_RATE:
            self._seen.popleft()
        since, before = self._seen[0]
        rate = (self.done - before) / (now - since) if now > since else 0.0
        numbers = f"{self.done // self._scale:,}"
        numbers += f" {self.unit}" if self.total is None else f" of {self.total // self._scale:,} {self.unit}"
        parts = [numbers] if self.total is not None or self.done else []
        if rate > 0:
            per_s = rate / self._scale
            parts.append(f"{per_s:,.{0 if per_s >= 10 else 1 if per_s >= 1 else 2}f} {self.unit}/s")
        if rate > 0 and self.total is not None:
            parts.append(f"{timedelta(seconds=round((self.total - self.done) / rate))} left")
        else:
            parts.append(f"{timedelta(seconds=round(now - self._started))} so far")
        return f"{self.doing}: {', '.join([*parts, *filter(None, [self.note])])}"

    def __enter__(self) -> ProgressBar:
        """Start the clock."""
        self._started = self._spoke = time.monotonic()
        self._seen.append((self._started, self.done))
        if self.quiet:
            return self
        if self.on_terminal:
            self._bar = tqdm(
                total=self.total,
                initial=self.done,
                desc=self.doing,
                unit=f" {self.unit}",
                unit_scale=1 / self._scale,
                smoothing=0.05,
                delay=SECONDS_TO_BAR,
                leave=self.total is not None and _SPEAKER.is_idle,
                bar_format=None if self.total is not None else "{desc}: {elapsed} {postfix}",
            )
        _SPEAKER.add(self)
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Stop the clock, unless `close` has."""
        self.close(finished=error is None)

    def close(self, *, finished: bool = True) -> None:
        """Leave the bar as it stands; where lines were printed, say that all is done."""
        if self.quiet or not _SPEAKER.remove(self):
            return
        if self._bar is not None:
            self._bar.close()
        elif self._lines and finished:
            numbers = f"{self.done // self._scale:,} {self.unit} " if self.done else "done "
            self._write(f"{self.doing}: {numbers}in {timedelta(seconds=round(time.monotonic() - self._started))}")

    def tick(self, spoken_at: float) -> bool:
        """Called every second while this is the innermost work; speaks where it is time, and says whether it did."""
        if self._bar is not None:
            self._bar.refresh()
            return False
        quiet_for = time.monotonic() - max(self._spoke, spoken_at)
        if quiet_for < (SECONDS_BETWEEN_LINES if self._lines else SECONDS_TO_FIRST_LINE):
            return False
        self._write(self.line())
        self._lines += 1
        self._spoke = time.monotonic()
        return True


def counted(
    doing: str,
    items: Iterable[T],
    total: int,
    unit: str = "images",
    *,
    size: Callable[[T], int] = lambda _: 1,
    quiet: bool,
) -> Iterator[T]:
    """The items, with a `ProgressBar` while they are worked on; each counts as `size` of it."""
    with ProgressBar(doing, total, unit, quiet=quiet) as bar:
        yield from bar.counting(items, size)


class _Speaker:
    """The thread that looks at the innermost work every second, while there is any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._working: list[ProgressBar] = []
        self._idle = threading.Event()
        self._thread: threading.Thread | None = None
        self._spoken_at = 0.0

    @property
    def is_idle(self) -> bool:
        return not self._working

    def add(self, bar: ProgressBar) -> None:
        with self._lock:
            self._working.append(bar)
            if self._thread is None:
                self._idle = threading.Event()
                self._thread = threading.Thread(target=self._run, args=(self._idle,), name="progress", daemon=True)
                self._thread.start()

    def remove(self, bar: ProgressBar) -> bool:
        with self._lock:
            if bar not in self._working:
                return False
            self._working.remove(bar)
            if not self._working:
                self._idle.set()
                self._thread = None
            return True

    def _run(self, idle: threading.Event) -> None:
        while not idle.wait(SECONDS_BETWEEN_LOOKS):
            with self._lock:
                # Held while it speaks: nobody's last line comes before its last but one.
                if self._working and self._working[-1].tick(self._spoken_at):
                    self._spoken_at = time.monotonic()


_SPEAKER = _Speaker()


def _write_to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
