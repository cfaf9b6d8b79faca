"""A process that dies, raises or hangs ends all of them within bounded time, with one message that names it.

Each process marks in its `Heartbeat` which step and phase it has reached. A thread of each, the `Watchdog`, tells the others
every second (with over 64 processes more rarely) through the launcher's key-value store, no collective, so that it works
when those are stuck, and looks at them:

- An exception: the process reports it and exits, the others end quietly within a second or two. A lost connection is
  reported only if, within `SECONDS_FOR_A_BETTER_REASON`, nobody turns out to have caused it.
- A process that is gone (killed): those of its machine see it at once. Where it was alone on its machine, the launcher
  there and the broken connections tell, at the latest the next case.
- A store that is lost, with the machine it was on: each goes on to watch itself alone, so that the next case ends it.
- A hang: nobody has made progress for `--train.timeout-s`. Whoever is furthest behind is to blame, or who does not even
  answer (stopped, its machine lost). Before the first step the time is `--train.start-timeout-s`.
  Every process that can writes its stacks to RUN/hang-rank-R.txt.

The launcher then ends what is left: with SIGTERM, and SIGKILL after 30 s.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import NoReturn, TypeVar

from torch.distributed import DistError
from torch.distributed.distributed_c10d import Store

from vaetrain.distributed.stacks import write_stacks
from vaetrain.machine import process_space

T = TypeVar("T")

SECONDS_BETWEEN_LOOKS = 1.0
PROCESSES_PER_SECOND = 64
"""With more of them looks are rarer, for the sake of the one store that answers all."""
SECONDS_FOR_A_BETTER_REASON = 5.0
"""How long an error that may be another process's fault, such as a lost connection, waits for that to show."""
SECONDS_TO_ANSWER = 10.0
"""A process whose thread has not been heard for so long is stopped or lost, should nobody make progress."""
FIRST_STEP_S = 1800.0
"""Patience with the first step of a compiled model, in seconds."""
SECONDS_TO_SPEAK_FIRST = 60.0
"""So much longer processes wait for each other than the watchdog is patient: it knows who is missing, and where."""

SECONDS_TO_BE_HEARD = 3.0
"""How long the process that speaks waits, before it leaves, for the others to see it; rank 0 may keep the store."""

END, SEEN = "vaetrain/end", "vaetrain/seen"
"""The store's keys for why everything ends, whoever sets it first speaks, and for how many others have seen it."""


@dataclass(frozen=True, order=True)
class Position:
    """How far a process is; later is larger, the same on all processes that are equally far."""

    step: int
    """Optimizer steps taken, or −1 before the loop."""
    stage: int
    """Phases entered since."""
    phase: str
    """What it does there, in words."""


def longest_wait_s(timeout_s: float, start_timeout_s: float) -> float:
    """Seconds after which a process gives up waiting for another, in a collective or not, should no watchdog have spoken."""
    return max(timeout_s + FIRST_STEP_S, start_timeout_s) + SECONDS_TO_SPEAK_FIRST


class Heartbeat:
    """What the training loop says about itself; every process enters the same phases in the same order."""

    def __init__(self) -> None:
        self.place = Position(-1, 0, "starting")
        self.progress_count = 0

    def begin(self, step: int) -> None:
        """A new turn of the loop, after `step` optimizer steps."""
        self.place = Position(step, 0, "agreeing with the others to go on")
        self.progress_count += 1

    def enter(self, phase: str) -> None:
        """What comes next, such as "forward"; takes a microsecond."""
        self.place = Position(self.place.step, self.place.stage + 1, phase)
        self.progress_count += 1

    def each(self, items: Iterable[T]) -> Iterator[T]:
        """The items, each a sign of life: for a long phase whose length differs between processes."""
        for item in items:
            self.progress_count += 1
            yield item


@dataclass(frozen=True)
class ProcessStatus:
    """What a process publishes about itself."""

    rank: int
    machine: str
    """Identifies the machine and its process ids, so that a neighbour can see whether a process still exists."""
    host: str
    pid: int
    step: int
    stage: int
    phase: str
    where: str
    """Innermost Python frame of its main thread, as file:line."""
    progress_count: int
    """Grows when the loop makes progress."""
    heartbeat_count: int
    """Grows every second while the process's watchdog runs."""
    finished: bool
    """It has left the training in good order."""

    @property
    def name(self) -> str:
        """For messages."""
        return f"rank {self.rank} ({self.host}, pid {self.pid})"

    @property
    def waits_for_others(self) -> bool:
        """It is not at work itself (exchange.py)."""
        return self.where.startswith("exchange.py:")

    @property
    def position(self) -> str:
        """For messages."""
        return self.phase if self.step < 0 else f"at step {self.step}, {self.phase}"


class Watchdog:
    """Context manager around the training of one process; see the module's docstring."""

    def __init__(
        self,
        heartbeat: Heartbeat,
        *,
        rank: int,
        num_processes: int,
        store: Store | None,
        folder: Path,
        timeout_s: float,
        first_step_s: float = 0.0,
        start_timeout_s: float = 1800.0,
    ) -> None:
        self.heartbeat = heartbeat
        self.rank = rank
        self.num_processes = num_processes
        self.store = store
        self.folder = folder
        self.timeout_s = timeout_s
        self.first_step_s = first_step_s
        self.start_timeout_s = start_timeout_s
        self._main_thread = threading.get_ident()
        self._interval = SECONDS_BETWEEN_LOOKS * max(1.0, num_processes / PROCESSES_PER_SECOND)
        self._looks = 0
        self._first_step: int | None = None
        self._reports: dict[int, ProcessStatus] = {}
        self._heard: dict[int, float] = {}
        self._looked = time.monotonic()
        self._seconds = 0.0
        self._progressed = 0.0
        self._finished = False
        self._failure: str | None = None
        self._lost: str | None = None
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        """Start watching; the others know of this process from now on."""
        self._exchange()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Tell the others that this process has finished, or failed; only the first that fails leaves this alive."""
        if isinstance(error, Exception):
            if self.store is not None:
                error.add_note(f"{self._own_report().name} of {self.num_processes} processes")
                if isinstance(error, RuntimeError):  # a lost connection is one
                    time.sleep(SECONDS_FOR_A_BETTER_REASON)
            self._failure = f"{type(error).__name__}: {error}"
        else:
            self._finished = True  # Ctrl-C included: every process has it
        self._wake.set()
        # The thread ends the process if another has already spoken. Should the store be lost, this one speaks.
        self._thread.join(SECONDS_TO_ANSWER)

    def _watch(self) -> None:
        over = False
        while not over:
            self._wake.wait(self._interval)
            over = self._finished or self._failure is not None
            try:
                self._look()
            except DistError as error:
                if over:
                    return
                self._go_on_alone(error)

    def _look(self) -> None:
        """Exchange reports once, and end this process where there is a reason."""
        self._looks += 1
        now = time.monotonic()
        # Counted look by look: a run that was suspended and continued has not been without progress all the while.
        self._seconds += min(now - self._looked, 2 * self._interval)
        self._looked = now
        self._exchange()
        if self._finished:
            return
        if self._failure is not None and self._first_to_say(self._failure, stacks=False):
            self._wait_to_be_heard()
            return
        if self.store is not None and self.store.check([END]):
            self._leave_after_the_first(self.store)
        for dead in self._dead():
            self._end(
                f"{dead.name} of {self.num_processes} processes died without a word, last heard of {dead.position}: "
                "it was killed, by a signal or, if memory ran out, by the kernel (dmesg tells), or has said why above",
                stacks=False,
            )
        step = self.heartbeat.place.step
        patience = max(self.timeout_s, self.first_step_s if step == self._first_step else 0.0)
        if step < 0:
            patience = self.start_timeout_s
        if step >= 0 and self._first_step is None:
            self._first_step = step
        elif self._seconds - self._progressed > patience:
            self._end(self._who_hangs(patience), stacks=True)

    def _go_on_alone(self, error: DistError) -> None:
        """The store is lost: from now on look at this process only, which cannot go on for long without the others."""
        host = self._reports[0].host if 0 in self._reports else "an unknown host"
        self._lost = f"the store on {host}, the host of rank 0, by which processes hear of each other, was lost"
        print(f"warning: rank {self.rank}: {self._lost}: {error}", file=sys.stderr, flush=True)
        self.store, self._heard = None, {self.rank: self._seconds}

    def _exchange(self) -> None:
        """Publish this process's report and read the others'."""
        reports = {self.rank: self._own_report()}
        if self.store is not None:
            self.store.set(f"vaetrain/report/{self.rank}", json.dumps(asdict(reports[self.rank])))
            keys = [f"vaetrain/report/{rank}" for rank in range(self.num_processes)]
            known = [key for key in keys if self.store.check([key])] if len(self._reports) < len(keys) else keys
            for text in self.store.multi_get(known):
                report = ProcessStatus(**json.loads(text))
                reports[report.rank] = report
        for rank, report in reports.items():
            before = self._reports.get(rank)
            if before is None or report.heartbeat_count != before.heartbeat_count:
                self._heard[rank] = self._seconds
            if before is None or report.progress_count != before.progress_count:
                self._progressed = self._seconds
        self._reports = reports

    def _own_report(self) -> ProcessStatus:
        place = self.heartbeat.place
        frame = sys._current_frames()[self._main_thread]
        return ProcessStatus(
            rank=self.rank, machine=machine(), host=socket.gethostname(),
            pid=os.getpid(), step=place.step, stage=place.stage, phase=place.phase,
            where=f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}",
            progress_count=self.heartbeat.progress_count, heartbeat_count=self._looks, finished=self._finished,
        )  # fmt: skip

    def _dead(self) -> list[ProcessStatus]:
        """Processes of this machine that no longer exist and have not finished."""
        neighbours = [report for report in self._reports.values() if report.machine == machine()]
        gone = [report.rank for report in neighbours if not exists(report.pid)]
        if gone:
            self._exchange()  # who has finished said so before it was gone
        return [self._reports[rank] for rank in gone if not self._reports[rank].finished]

    def _who_hangs(self, patience: float) -> str:
        to_answer = min(max(SECONDS_TO_ANSWER, 3 * self._interval), patience / 2)
        silent = [rank for rank, heard in self._heard.items() if self._seconds - heard > to_answer]
        places = {rank: (report.step, report.stage) for rank, report in self._reports.items()}
        behind = silent or [rank for rank, place in places.items() if place == min(places.values())]
        behind = [rank for rank in behind if not self._reports[rank].waits_for_others] or behind
        culprits = [self._reports[rank] for rank in sorted(behind)]
        for culprit in culprits:
            if silent and culprit.machine == machine():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(culprit.pid, signal.SIGCONT)  # if it was stopped, it now sees that the run has ended
        named = "; ".join(f"{culprit.name} {culprit.position} ({culprit.where})" for culprit in culprits[:4])
        more = f"; and {len(culprits) - 4} more" if len(culprits) > 4 else ""
        mute = ", not even answering (stopped, or its machine is lost)" if silent else ""
        lost = f"; {self._lost} before" if self._lost else ""
        option = "--train.start-timeout-s" if self.heartbeat.place.step < 0 else "--train.timeout-s"
        return (
            f"no progress for {patience:g} s. Furthest behind{mute}: {named}{more}{lost}. "
            f"Stacks: {self.folder}/hang-rank-*.txt; {option} sets the time"
        )

    def _first_to_say(self, reason: str, *, stacks: bool) -> bool:
        """Whether this process is the one that tells why everything ends; if `stacks`, all write theirs."""
        mine = json.dumps({"rank": self.rank, "reason": reason, "stacks": stacks})
        return self.store is None or self.store.compare_set(END, "", mine).decode() == mine

    def _wait_to_be_heard(self) -> None:
        deadline = time.monotonic() + SECONDS_TO_BE_HEARD
        while self.store is not None and self.store.add(SEEN, 0) < self.num_processes - 1:
            if time.monotonic() > deadline:
                return
            time.sleep(0.05)

    def _end(self, reason: str, *, stacks: bool) -> NoReturn:
        if not self._first_to_say(reason, stacks=stacks) and self.store is not None:
            self._leave_after_the_first(self.store)  # two found it out in the same moment
        try:
            print(f"error: {reason}", file=sys.stderr, flush=True)
            if stacks:
                self._write_stacks()  # before the others are gone, and what waits for them fails
            self._wait_to_be_heard()
        finally:  # whatever fails on the way: a process that stays holds its device
            self._leave()

    def _leave_after_the_first(self, store: Store) -> NoReturn:
        first = None
        try:
            end = json.loads(store.get(END))
            first = end["rank"]
            if end["stacks"]:
                self._write_stacks()
            store.add(SEEN, 1)
        finally:
            self._leave(after=first)

    def _write_stacks(self) -> None:
        file = self.folder / f"hang-rank-{self.rank}.txt"
        if problem := write_stacks(file):
            print(f"warning: rank {self.rank} could not write its stacks to {file}: {problem}", file=sys.stderr)

    def _leave(self, *, after: int | None = None) -> NoReturn:
        """End this process from outside its main thread, which may be stuck for good.

        Waits a little for the process of rank `after`, so that the launcher takes that one for the cause.
        """
        neighbour = self._reports.get(self.rank if after is None else after)
        deadline = time.monotonic() + SECONDS_FOR_A_BETTER_REASON
        while neighbour is not None and neighbour.rank != self.rank and time.monotonic() < deadline:
            if neighbour.machine != machine() or not exists(neighbour.pid):
                break
            time.sleep(0.1)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def machine() -> str:
    """What two processes share if each can see whether the other exists; where nothing tells, a name has to do."""
    return process_space() or socket.gethostname()


def exists(pid: int) -> bool:
    """Whether a process of this machine exists; one that has ended does until its parent has noticed."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
