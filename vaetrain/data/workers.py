"""Worker processes that read and decode while the training process computes."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator
from multiprocessing.context import BaseContext
from typing import Any
from weakref import WeakSet

import torch
from torch.utils.data import DataLoader, Dataset

from vaetrain.data.batch import Batch
from vaetrain.data.config import PREFETCH_BATCHES_PER_WORKER
from vaetrain.machine import num_cores

# One worker decodes about 7,000 images of 128 pixels a second; more than eight have not been needed by one device.
MAX_WORKERS = 8

Outcome = Batch | ValueError
"""What a worker hands over: a batch, or why there is none. An error raised in a worker would reach the user with the
worker's traceback in its message."""


def choose_num_workers(device: torch.device, processes_per_node: int) -> int:
    """Decoding processes for one training process: one per core left to it, none on a CPU, whose cores all compute."""
    if device.type == "cpu":
        return 0
    cores = num_cores() // processes_per_node
    return max(1, min(MAX_WORKERS, cores - 1))


class WorkerPool:
    """The decoding processes of one reader: batches in order for any number of them, 0 being this process itself."""

    def __init__(self, num_workers: int, device: torch.device) -> None:
        self.num_workers = num_workers
        self._device = device
        self._repeated: dict[Hashable, DataLoader[Outcome]] = {}
        self._passes: WeakSet[Generator[Batch, None, None]] = WeakSet()

    def once(self, dataset: Dataset[Outcome], indices: Iterable[Any] | None = None) -> Iterator[Batch]:
        """Start reading a dataset. A mapping one reads `indices` with `__getitems__`; an iterable one has none."""
        return self._start(self._loader(dataset, indices, persistent=False))

    def repeated(
        self, key: Hashable, dataset: Callable[[], Dataset[Outcome]], indices: Callable[[], Iterable[Any] | None]
    ) -> Iterator[Batch]:
        """The same for a pass that comes again under the same `key`: its workers stay alive between passes."""
        if key not in self._repeated:
            self._repeated[key] = self._loader(dataset(), indices(), persistent=self.num_workers > 0)
        return self._start(self._repeated[key])

    def close(self) -> None:
        """End all workers; passes still running end as well."""
        for running in list(self._passes):
            running.close()
        self._repeated.clear()

    def _start(self, loader: DataLoader[Outcome]) -> Iterator[Batch]:
        # Workers start now rather than at the first batch, so that they read while the model is built.
        batches = _raising(iter(loader))
        self._passes.add(batches)
        return batches

    def _loader(
        self, dataset: Dataset[Outcome], indices: Iterable[Any] | None, persistent: bool
    ) -> DataLoader[Outcome]:
        return DataLoader(
            dataset,
            batch_size=None if indices is None else 1,
            batch_sampler=indices,
            collate_fn=_unchanged,
            worker_init_fn=_outlive_a_stop_signal,
            num_workers=self.num_workers,
            prefetch_factor=PREFETCH_BATCHES_PER_WORKER if self.num_workers else None,
            persistent_workers=persistent,
            pin_memory=self._device.type == "cuda",
            multiprocessing_context=_worker_context() if self.num_workers else None,
            # Otherwise each pass draws a seed from the global generator, and noise would depend on how data is read.
            generator=torch.Generator(),
        )


def _raising(outcomes: Iterator[Outcome]) -> Generator[Batch, None, None]:
    for outcome in outcomes:
        if not isinstance(outcome, ValueError):
            yield outcome
            continue
        try:
            raise outcome
        finally:
            # The error keeps this frame, and the frame must keep neither the error nor the iterator: found by the cycle
            # collector, DataLoader's iterator waits ten seconds for workers it can no longer tell to end.
            del outcome, outcomes


def _unchanged(batch: Any) -> Any:
    # A dataset here returns whole batches; the default would stack them once more.
    return batch


def _outlive_a_stop_signal(worker: int) -> None:
    # Launchers and Slurm send SIGTERM and SIGUSR1 to all processes. The training process needs its workers until all
    # ranks have stopped at the same step; what ends them is the pass being closed, or a minute.
    for signal_number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signal_number, lambda *_: signal.alarm(60))


def _worker_context() -> BaseContext:
    # Not fork: NCCL, and Gloo over InfiniBand, are not fork-safe and deadlock (PyTorch's notes on
    # DistributedDataParallel). The fork server imports torch once, 4 s, and each worker forks from it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vaetrain.data.indexed", "vaetrain.data.stream"])
    return context
