"""What each reader is at, for the training process to see when a reader was killed or hangs; without importing torch.

A reader is a worker process, or a thread of the training process that reads. It notes every image before it opens the shard;
its row lies in shared memory and outlives it.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from jaxtyping import Bool, Float, Int64

from vaetrain.data.readers.shared_memory import SharedMemory

Where = Callable[[int, int], str]
"""Says in which shard and sample the images from one position to another lie: `Selection.where`."""

_PID, _NOTES, _FIRST, _LAST, _BUSY, _NUM_COLUMNS = range(6)


class _Here(threading.local):
    row: memoryview | None = None


_here = _Here()


def note_reading(first: int, last: int) -> None:
    """Say that this thread now reads images `first` to `last` of its selection, or goes on with them."""
    row = _here.row
    if row is not None:
        row[_FIRST], row[_LAST], row[_BUSY] = first, last, 1
        row[_NOTES] += 1


def mark_idle() -> None:
    """Say that this thread has read what it was asked for, and waits for more."""
    if _here.row is not None:
        _here.row[_BUSY] = 0


class ReaderProgress:
    """One row for each of `num_readers`; picklable to a child process."""

    def __init__(self, num_readers: int) -> None:
        self.num_readers = num_readers
        self._memory = SharedMemory(num_readers * _NUM_COLUMNS * 8)

    @property
    def _rows(self) -> Int64[np.ndarray, "readers columns"]:
        return self._memory.array((self.num_readers, _NUM_COLUMNS), np.int64)

    def begin(self, reader: int) -> None:
        """From now on this thread is reader number `reader`."""
        # A memoryview takes an integer in a third of an array's time.
        _here.row = memoryview(self._rows[reader])
        _here.row[_PID] = os.getpid()

    @contextmanager
    def reader(self, number: int) -> Iterator[None]:
        """This thread is reader `number` inside the block."""
        outer = _here.row
        self.begin(number)
        try:
            yield
        finally:
            mark_idle()
            _here.row = outer

    def reader_of(self, pid: int) -> int | None:
        """The number of a reader that is a process; None when it has not got so far as to begin."""
        found = np.flatnonzero(self._rows[:, _PID] == pid)
        return int(found[0]) if len(found) else None

    def pid_of(self, reader: int) -> int:
        """The process of a reader; 0 before it began."""
        return int(self._rows[reader, _PID])

    def images_of(self, reader: int) -> tuple[int, int] | None:
        """First and last of the images that a reader is at, or was at before it came to rest; None before its first."""
        row = self._rows[reader]
        return (int(row[_FIRST]), int(row[_LAST])) if row[_NOTES] else None

    def describe(self, reader: int | None, where: Where) -> str:
        """Shard and sample that a reader is or was at, for messages."""
        images = None if reader is None else self.images_of(reader)
        return where(*images) if images else "no image yet"

    def notes(self) -> Int64[np.ndarray, " readers"]:
        """How many notes each reader has made: a reader whose number grows does not hang."""
        return self._rows[:, _NOTES].copy()

    def busy(self) -> Bool[np.ndarray, " readers"]:
        """Which readers read, as opposed to waiting to be asked."""
        return self._rows[:, _BUSY] == 1


class StallDetector:
    """Tells which readers have made no progress for `timeout_s`, by looking every `every_s`.

    The looks are counted rather than the clock read, so that a job that was suspended for an hour has not timed out.
    """

    def __init__(self, progress: ReaderProgress, timeout_s: float, every_s: float) -> None:
        self._progress = progress
        self._timeout_s, self._every_s = timeout_s, every_s
        self._notes = progress.notes()
        self._waited_s: Float[np.ndarray, " readers"] = np.zeros(progress.num_readers)

    def look(self) -> None:
        """To be called every `every_s`."""
        notes = self._progress.notes()
        self._waited_s = np.where(notes == self._notes, self._waited_s + self._every_s, 0.0)
        self._notes = notes

    def stuck(self) -> list[int]:
        """Readers that have been at the same image for too long."""
        return [int(reader) for reader in np.flatnonzero((self._waited_s >= self._timeout_s) & self._progress.busy())]


@contextmanager
def watched(progress: ReaderProgress, timeout_s: float, on_stuck: Callable[[int], None]) -> Iterator[None]:
    """Inside the block a thread watches the readers, and is told by `on_stuck` what to do with one that hangs."""
    over = threading.Event()
    every_s = min(1.0, timeout_s / 4)
    detector = StallDetector(progress, timeout_s, every_s)

    def watch() -> None:
        while not over.wait(every_s):
            detector.look()
            if stuck := detector.stuck():
                on_stuck(stuck[0])
                return

    threading.Thread(target=watch, daemon=True, name="data watch").start()
    try:
        yield
    finally:
        over.set()


def end_process(message: str) -> None:
    """End this process at once, with an error message and exit status 1.

    For a thread that hangs in a read: from storage that does not answer it cannot be called back, so no exception could
    get out of it.
    """
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(1)


def stuck_message(progress: ReaderProgress, reader: int, where: Where, timeout_s: float) -> str:
    """What to tell the user about a reader that hangs."""
    return (
        f"reading hangs: for {timeout_s:g} s (--data.timeout-s) there was no progress at "
        f"{progress.describe(reader, where)}; see whether the storage answers, or raise --data.timeout-s"
    )
