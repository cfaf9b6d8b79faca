"""Worker processes that read and decode while the training process computes."""

from __future__ import annotations

import errno
import multiprocessing
import multiprocessing.connection
import multiprocessing.queues
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.process import BaseProcess
from types import ModuleType
from typing import Any, TypeVar
from weakref import WeakSet

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from vaetrain.data.config import PREFETCH_BATCHES_PER_WORKER
from vaetrain.data.readers.batch import Batch, SharedBatch
from vaetrain.data.readers.shared_memory import SharedMemory
from vaetrain.data.readers.worker_progress import ReaderProgress, Where, end_process, mark_idle, stuck_message, watched
from vaetrain.machine import num_cores

# One worker decodes about 7,000 images of 128 pixels a second; more than eight have not been needed by one device.
MAX_WORKERS = 8
# Whether the workers live; a death is reported this late at most.
LOOK_EVERY_S = 5.0
# Where the system keeps semaphores. A pass has three for each worker and three more, each on a page of its own; a pass over
# each of two splits may be running.
SEMAPHORES = "/dev/shm"
SEMAPHORES_PER_WORKER = 3
PASSES = 2

T = TypeVar("T")
BatchOrError = Batch | ValueError
"""What a worker hands over: a batch, or why there is none. An error raised in a worker would reach the user with the
worker's traceback in its message."""


def choose_num_workers(device: torch.device, processes_per_node: int) -> int:
    """Decoding processes for one training process: one per core left to it, none on a CPU, whose cores all compute."""
    if device.type == "cpu":
        return 0
    cores = num_cores() // processes_per_node
    return max(1, min(MAX_WORKERS, cores - 1))


def check_room_for_semaphores(num_workers: int) -> None:
    """Raise ValueError where a training with so many workers would find no room in /dev/shm, now or at its first validation."""
    try:
        space = os.statvfs(SEMAPHORES)
    except OSError:  # macOS keeps them elsewhere
        return
    needed = PASSES * SEMAPHORES_PER_WORKER * (num_workers + 1) * space.f_frsize
    if space.f_bavail * space.f_frsize < needed:
        raise _no_room(f"{num_workers} decoding worker(s) need {needed / 1024:,.0f} KiB in {SEMAPHORES}", space)


def _no_room(why: str, space: os.statvfs_result) -> ValueError:
    size, free = (blocks * space.f_frsize / 1024 for blocks in (space.f_blocks, space.f_bavail))
    return ValueError(
        f"{why}, which has {size:,.0f} KiB, {free:,.0f} of them free; give it more (docker run --shm-size 64m, or "
        f"mount -o remount,size=64m {SEMAPHORES}), or decode in the training process (--data.num-workers 0)"
    )


def _shortage(error: Exception) -> ValueError | None:
    """What the system was short of when workers were started or a batch handed over, with the remedy; None for anything else."""
    number, file = (error.errno, error.filename) if isinstance(error, OSError) else (None, None)
    if number == errno.ENOSPC and file is None:  # a semaphore's name is not told; a file's is, and is elsewhere
        return _no_room(f"the decoding workers' semaphores find no room in {SEMAPHORES}", os.statvfs(SEMAPHORES))
    # The words are DataLoader's, and those of a socket for a descriptor that could not be taken in.
    if number in (errno.EMFILE, errno.ENFILE) or "Too many open files" in str(error) or "ancdata" in str(error):
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return ValueError(
            f"decoding workers need more open files than the {limit:,} that a process may have here; raise that "
            "(ulimit -n 4096), lower --data.num-workers, or decode in the training process (--data.num-workers 0)"
        )
    return None


@contextmanager
def _naming_shortage() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if shortage := _shortage(error):
            raise shortage from error
        raise


def _give_up(error: Exception) -> None:
    """End now what DataLoader had begun: where that was not all of it, its end is an error, too, which Python would print."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        traceback.clear_frames(error.__traceback__)
    finally:
        sys.unraisablehook = hook


class WorkerPool:
    """The decoding processes of one reader: batches in order for any number of them, 0 being this process itself.

    No pass hangs: a worker that dies, and one that makes no progress for `timeout_s` and is killed, end it with a ValueError
    that says where they were, by `where`. A hang that cannot be ended so ends this process (see `end_process`). What the
    system is short of (descriptors, room in /dev/shm) is a ValueError, too, before the first batch where that is foreseen.
    """

    def __init__(self, num_workers: int, device: torch.device, where: Where, timeout_s: float) -> None:
        if num_workers:
            check_room_for_semaphores(num_workers)
        self.num_workers = num_workers
        self._device = device
        self._where = where
        self._timeout_s = timeout_s
        self._repeated: dict[Hashable, _LoaderWorkers] = {}
        self._passes: WeakSet[Generator[Batch, None, None]] = WeakSet()

    @_naming_shortage()
    def train_iter(self, dataset: Dataset[BatchOrError], indices: Iterable[Any] | None = None) -> Iterator[Batch]:
        """Start reading a dataset. A mapping one reads `indices` with `__getitems__`; an iterable one has none."""
        return self._start(self._workers_of(dataset, indices, persistent=False))

    @_naming_shortage()
    def eval_iter(
        self, key: Hashable, dataset: Callable[[], Dataset[BatchOrError]], indices: Callable[[], Iterable[Any] | None]
    ) -> Iterator[Batch]:
        """The same for a pass that comes again under the same `key`: its workers stay alive between passes."""
        # Workers in the middle of a pass that was given up are not asked for another.
        workers = self._repeated.pop(key, None) or self._workers_of(
            dataset(), indices(), persistent=self.num_workers > 0
        )
        return self._start(workers, at_end=lambda: self._repeated.update({key: workers}))

    def read_inline(self, read: Callable[[], Batch]) -> Batch:
        """Read a batch in this process, watched."""
        progress = ReaderProgress(1)
        with watched(progress, self._timeout_s, self._ending(progress)), progress.reader(0):
            return read()

    def close(self) -> None:
        """End all workers; passes still running end as well."""
        for running in list(self._passes):
            running.close()
        self._repeated.clear()

    def _start(self, workers: _LoaderWorkers, at_end: Callable[[], None] = lambda: None) -> Iterator[Batch]:
        # Workers start now rather than at the first batch, so that they read while the model is built.
        batches = self._unless_dead(workers, workers.batches)
        if isinstance(batches, ValueError):
            raise batches
        read = self._read_here if self.num_workers == 0 else self._receive
        batches = _raising(read(batches, workers), at_end)
        self._passes.add(batches)
        return batches

    def _read_here(self, batches: Iterator[BatchOrError], workers: _LoaderWorkers) -> Iterator[BatchOrError]:
        with watched(workers.progress, self._timeout_s, self._ending(workers.progress)):
            while True:
                with workers.progress.reader(0):
                    batch = next(batches, None)
                if batch is None:
                    return
                yield batch

    def _receive(self, batches: Iterator[BatchOrError], workers: _LoaderWorkers) -> Iterator[BatchOrError]:
        # The watching thread must not be what keeps the loader, and with it the worker processes.
        progress, stuck_readers, end = workers.progress, workers.stuck_readers, self._ending(workers.progress)

        def give_up(reader: int) -> None:
            stuck_readers.append(reader)
            if not _kill(progress.pid_of(reader)):
                end(reader)

        def receive() -> BatchOrError | None:
            return next(batches, None)

        with watched(progress, self._timeout_s, give_up):
            while True:
                # Batches of other workers may last for a while yet; to ask after the workers takes longer than a batch.
                failure = self._death(workers) if time.monotonic() >= workers.next_look else None
                batch: BatchOrError | None = failure or self._unless_dead(workers, receive)
                if batch is None:
                    return
                yield batch

    def _ending(self, progress: ReaderProgress) -> Callable[[int], None]:
        """What ends this process over a reader that hangs."""
        where, timeout_s = self._where, self._timeout_s
        return lambda reader: end_process(stuck_message(progress, reader, where, timeout_s))

    def _unless_dead(self, workers: _LoaderWorkers, step: Callable[[], T]) -> T | ValueError:
        """What DataLoader answers, or why a worker is dead."""
        try:
            return step()
        except (RuntimeError, OSError, EOFError) as error:
            # DataLoader's word for a death, and what happens when a batch is fetched from a worker that died meanwhile.
            if shortage := _shortage(error):
                _give_up(error)
                return shortage
            if failure := self._death(workers, wait_s=1.0):
                return failure
            raise

    def _death(self, workers: _LoaderWorkers, wait_s: float = 0.0) -> ValueError | None:
        """Why a worker is dead that should not be; None when there is no such worker."""
        if workers.stuck_readers:
            return ValueError(stuck_message(workers.progress, workers.stuck_readers[0], self._where, self._timeout_s))
        dead = workers.dead(wait_s)
        if dead is None:
            return None
        assert dead.pid is not None
        reader = workers.progress.reader_of(dead.pid)
        return ValueError(
            f"a decoding worker (process {dead.pid}) {_how_it_ended(dead.exitcode)}; it was at "
            f"{workers.progress.describe(reader, self._where)}. {_remedy(dead.exitcode, self.num_workers)}"
        )

    def _workers_of(
        self, dataset: Dataset[BatchOrError], indices: Iterable[Any] | None, persistent: bool
    ) -> _LoaderWorkers:
        progress = ReaderProgress(max(1, self.num_workers))
        loader: DataLoader[BatchOrError] = DataLoader(
            dataset,
            batch_size=None if indices is None else 1,
            batch_sampler=indices,
            collate_fn=_hand_over,
            num_workers=self.num_workers,
            prefetch_factor=PREFETCH_BATCHES_PER_WORKER if self.num_workers else None,
            persistent_workers=persistent,
            pin_memory=self._device.type == "cuda",
            worker_init_fn=partial(_begin, progress),
            multiprocessing_context=_worker_context() if self.num_workers else None,
            # Otherwise each pass draws a seed from the global generator, and noise would depend on how data is read.
            generator=torch.Generator(),
        )
        return _LoaderWorkers(loader, progress)


class _LoaderWorkers:
    """The workers of one DataLoader, and where they are."""

    def __init__(self, loader: DataLoader[BatchOrError], progress: ReaderProgress) -> None:
        self.progress = progress
        self._loader = loader
        self.next_look = 0.0
        self.stuck_readers: list[int] = []
        self._processes: list[BaseProcess] = []

    def batches(self) -> Iterator[BatchOrError]:
        """Start the workers, or a further pass of those that wait for one."""
        others = set(multiprocessing.active_children())
        batches = iter(self._loader)
        self._processes += [process for process in multiprocessing.active_children() if process not in others]
        return batches

    def dead(self, wait_s: float) -> BaseProcess | None:
        """A worker that ended otherwise than in order, looked for again until `wait_s` have passed."""
        self.next_look = time.monotonic() + LOOK_EVERY_S
        if wait_s:
            multiprocessing.connection.wait([process.sentinel for process in self._processes], wait_s)
        return next((process for process in self._processes if process.exitcode), None)


def _kill(pid: int) -> bool:
    """End a process that does not answer; False when the system cannot do that within ten seconds."""
    for _ in range(100):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:  # it is gone
            return True
        time.sleep(0.1)
    return False


def _how_it_ended(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return f"was killed by {signal.Signals(-exitcode).name}"
    return f"ended with exit status {exitcode}"


def _remedy(exitcode: int | None, num_workers: int) -> str:
    if exitcode == -signal.SIGKILL:
        return (
            "The system does that when memory runs out: lower --data.num-workers (now "
            f"{num_workers}) or --train.micro-batch-size, or give the job more memory"
        )
    return "Run tools/verify_shards.py --full on the shard set"


def _raising(batches: Iterator[BatchOrError], at_end: Callable[[], None]) -> Generator[Batch, None, None]:
    for batch in batches:
        if not isinstance(batch, ValueError):
            yield batch
            continue
        try:
            raise batch
        finally:
            # The error keeps this frame, and the frame must keep neither the error nor the iterator: found by the cycle
            # collector, DataLoader's iterator waits ten seconds for workers it can no longer tell to end.
            del batch, batches, at_end
    at_end()


def _begin(progress: ReaderProgress, worker: int) -> None:
    # Launchers and Slurm send SIGTERM and SIGUSR1 to all processes of a training. It needs its workers until all ranks
    # have stopped at the same step; what ends them is the pass being closed, or a minute.
    for signal_number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signal_number, lambda *_: signal.alarm(60))
    progress.begin(worker)


def _hand_over(batch: Any) -> BatchOrError | SharedBatch:
    # What DataLoader calls on each batch where it was made. A dataset here returns whole batches; the default would stack
    # them once more.
    mark_idle()
    if isinstance(batch, ValueError) or get_worker_info() is None:
        return batch
    try:
        return SharedBatch(batch)
    except OSError as error:
        return _not_handed_over(error)


def _not_handed_over(error: Exception) -> ValueError:
    return _shortage(error) or ValueError(
        f"a decoding worker could not hand over a batch: {error}; --data.num-workers 0 decodes in the training process"
    )


class _Flag:
    """What DataLoader needs of multiprocessing's Event, without its lock: a worker that is killed while it holds that keeps it,
    and this process would wait for it for ever."""

    def __init__(self) -> None:
        self._memory = SharedMemory(1)

    def set(self) -> None:
        self._memory.array((1,), np.bool_)[0] = True

    def is_set(self) -> bool:
        return bool(self._memory.array((1,), np.bool_)[0])


class _ResultQueue(multiprocessing.queues.Queue):
    """A queue that tells the other end of what it could not send, which multiprocessing prints and forgets: the training process
    would wait for it for ever."""

    def _on_queue_feeder_error(self, error: Exception, item: tuple[int, object]) -> None:
        number, _ = item
        self.put((number, _not_handed_over(error)))


class _Worker(ForkServerProcess):
    """A process that does not run the training's script once more, whose imports take seconds of a core: all that a worker needs,
    the fork server has imported."""

    @staticmethod
    def _Popen(worker: BaseProcess) -> Any:
        main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
        try:
            return ForkServerProcess._Popen(worker)
        finally:
            sys.modules["__main__"] = main


class _WorkerContext(ForkServerContext):
    Process = _Worker

    def Queue(self, maxsize: int = 0) -> _ResultQueue:
        return _ResultQueue(maxsize, ctx=self.get_context())

    def Event(self) -> _Flag:  # type: ignore[override]
        return _Flag()


def _worker_context() -> _WorkerContext:
    # Not fork: NCCL, and Gloo over InfiniBand, are not fork-safe and deadlock (PyTorch's notes on
    # DistributedDataParallel). The fork server imports torch once, 4 s, and each worker forks from it.
    context = _WorkerContext()
    context.set_forkserver_preload(["vaetrain.data.readers.indexed", "vaetrain.data.readers.stream"])
    return context
