"""Processes wait for each other at the launcher's key-value store, and in no collective.

A collective has one time for all that may delay it. On GPUs that is NCCL's, which keeps the device busy and ends in an abort
without our words. Here, whoever waits for the work of another process, the main one mostly, has the time that the user gave, and
says in the end what he waited for and who is missing. A collective that comes next finds everybody there.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import distributed as dist
from torch.distributed.distributed_c10d import Store, _get_default_store

T = TypeVar("T")

TIMEOUT_S = 600.0
"""The time of a command that has no option for it."""

LONGEST_PAUSE_S = 0.5
"""Between two looks whether the others have come; a tenth of the time waited so far, if that is less."""
PAUSE_PER_PROCESS_S = 5e-5
"""Shortest such pause for each process, for the sake of the one store that answers all."""

SECONDS_TO_BE_HEARD = 10.0
"""How long the main process, which may keep the store, stays for the others to learn that all are there."""

MISSING_NAMED = 8
"""Ranks named in a message; of more, only the number."""

AT, ARRIVALS, LEFT, PROBLEMS = (f"vaetrain/exchange/{name}" for name in ("at", "arrivals", "left", "problems"))
"""The store's keys: the meeting that a process has come to, arrivals at all meetings, how many need no store any more, and what
went wrong with a piece of work."""


class WaitedTooLong(TimeoutError):
    """Others have not come within the time that the user gave."""


@dataclass
class Patience:
    """How long processes wait for each other."""

    seconds: float = TIMEOUT_S
    option: str = ""
    """What sets it, for messages; "" if nothing does."""


PATIENCE = Patience()
"""That of this process; `processes.join` sets it."""


def alone() -> bool:
    """Whether this is the only process."""
    return not dist.is_initialized() or dist.get_world_size() == 1


def shared_store() -> Store | None:
    """A connection of one's own to the launcher's key-value store, which no collective uses; None when alone."""
    return None if alone() else _get_default_store().clone()


class MeetingPlace:
    """Where the processes of a run wait for each other; all come to the same meetings in the same order."""

    def __init__(self, store: Store, rank: int, num_processes: int) -> None:
        self._store = store
        self._rank = rank
        self._num_processes = num_processes
        self._number = self._piece = 0

    def meet(self, what: str, patience: Patience = PATIENCE) -> None:
        """See the function of this name."""
        self._number += 1
        self._store.set(f"{AT}/{self._rank}", str(self._number))
        self._store.add(ARRIVALS, 1)
        if not self._all_come(ARRIVALS, self._number * self._num_processes, patience.seconds):
            raise WaitedTooLong(f"waited {said(patience)} for {what}; missing: {self._missing()}")

    def leave(self) -> None:
        """The last call: the main process returns when no other needs the store any more."""
        if self._rank > 0:
            self._store.add(LEFT, 1)
        else:
            self._all_come(LEFT, self._num_processes - 1, SECONDS_TO_BE_HEARD)

    def problems(self, problem: str, patience_s: float) -> list[str]:
        """See `problems_of_all`."""
        self._piece += 1
        key = f"{PROBLEMS}/{self._piece}"
        self._store.set(f"{key}/{self._rank}", json.dumps(problem))
        self._store.add(key, 1)
        if not self._all_come(key, self._num_processes, patience_s if problem else PATIENCE.seconds):
            raise WaitedTooLong(problem or f"waited {said(PATIENCE)} for other processes to finish the same work")
        return [json.loads(self._store.get(f"{key}/{rank}")) for rank in range(self._num_processes)]

    def _all_come(self, counter: str, target: int, seconds: float) -> bool:
        """Whether a counter reaches its target in time. Looks again and again: the store's own wait hears no signal."""
        start = time.monotonic()
        while self._store.add(counter, 0) < target:
            waited = time.monotonic() - start
            if waited >= seconds:
                return False
            pause = max(PAUSE_PER_PROCESS_S * self._num_processes, min(LONGEST_PAUSE_S, waited / 10))
            time.sleep(min(pause, seconds - waited))
        return True

    def _missing(self) -> str:
        at = [f"{AT}/{rank}" for rank in range(self._num_processes)]
        missing = [
            rank
            for rank, key in enumerate(at)
            if not self._store.check([key]) or int(self._store.get(key)) < self._number
        ]
        more = f" and {len(missing) - MISSING_NAMED} more" if len(missing) > MISSING_NAMED else ""
        return f"rank {', '.join(map(str, missing[:MISSING_NAMED]))}{more}"


@functools.cache
def meeting_place() -> MeetingPlace:
    """That of this process, which is not alone."""
    store = shared_store()
    assert store is not None
    return MeetingPlace(store, dist.get_rank(), dist.get_world_size())


def meet(what: str) -> None:
    """Wait until every process has come here.

    Raises WaitedTooLong, after the time the user gave, which says that it waited for `what` ("the main process to draw figures")
    and who has not come.
    """
    if not alone():
        meeting_place().meet(what)


def leave() -> None:
    """Once, before the process group ends: the main process, which may keep the store, waits until no other needs it."""
    if not alone():
        meeting_place().leave()


def decided_by_main(accelerator: Accelerator, decide: Callable[[], T], what: str) -> T:
    """What `decide` returns on the main process, on every process; what it raises there is raised on all.

    The others wait as in `meet`: `what` follows "the main process to".
    """
    decision: list[T | None] = [None]
    problem: list[Exception | None] = [None]
    if accelerator.is_main_process:
        try:
            decision = [decide()]
        except Exception as error:
            problem = [error]
    if accelerator.num_processes > 1:
        meet(f"the main process to {what}")
        decision, problem = broadcast_object_list([decision, problem])
    if problem[0] is not None:
        raise problem[0]
    return decision[0]  # type: ignore[return-value]  # None only where `decide` returned it


def gather_objects(objects: list[Any], what: str) -> list[Any]:
    """The objects of all processes in order of rank; those that have theirs early wait as in `meet`."""
    meet(what)
    return list(gather_object(objects))


def problems_of_all(problem: str, *, patience_s: float = 60.0) -> list[str]:
    """What kept each process from finishing some work ("": nothing), in order of rank; every process calls this after it.

    Whoever failed inside the work may have left the others in a collective that waits for him. He waits `patience_s` for them to
    fail as well, or to finish; then TimeoutError ends him, and the launcher the others.
    """
    if alone():
        return [problem]
    return meeting_place().problems(problem, patience_s)


def said(patience: Patience) -> str:
    """For messages."""
    return f"{patience.seconds:g} s" + (f" ({patience.option})" if patience.option else "")
