"""Work shared out among processes that end with their parent. Nothing here imports torch."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

Argument = TypeVar("Argument")
Result = TypeVar("Result")

# Pieces of work that are handed out before the oldest one's result is taken, so that no worker waits and memory is bounded.
AHEAD_PER_WORKER = 4


def map_in_order(
    function: Callable[[Argument], Result], arguments: Iterable[Argument], num_workers: int
) -> Generator[Result, None, None]:
    """function(argument) of each argument, in order; in this process when one worker is enough.

    Raises ValueError when a worker process is killed.
    """
    if num_workers <= 1:
        yield from map(function, arguments)
        return
    # Spawned, not forked: a fork would share the sources' open files and their positions.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=spawn, initializer=_start_worker) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for argument in arguments:
                waiting.append(pool.submit(function, argument))
                if len(waiting) >= AHEAD_PER_WORKER * num_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise ValueError(
                "a worker process was killed (out of memory?); run the same command again to go on, with fewer --workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told too, and decides
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()  # returns only when the parent has been killed; workers would wait for tasks for ever
    os._exit(1)
