"""Tensors copied to the host while the next step runs, and a thread that writes the copies.

    start ──► forward, backward ──► wait_for_copy ──► update ──► … training …        finish
      └─ thread: copy ──────────────────┘└─ write, flush, rename ─────────────────────┘

Weights and moments change in the update alone, so the copy may take as long as a forward and backward pass without
anybody waiting for it, and the writing as long as it takes until the next snapshot: on Linux it takes only what time the
training threads leave of the cores.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

Tensors = Mapping[str, Mapping[str, Tensor]]
"""Tensors by file and name."""


LOWEST_PRIORITY = 19


class SnapshotWriter:
    """Hands snapshots of tensors to a function that runs in a thread, one at a time.

    An error in the thread is raised by the next call of any method here. The interpreter waits for the thread before
    it exits.
    """

    def __init__(self) -> None:
        self.writing: Future[None] | None = None
        self.copied = threading.Event()
        self.buffers: dict[tuple[str, str], Tensor] = {}
        self.stream: torch.cuda.Stream | None = None

    def start(self, tensors: Tensors, write: Callable[[Tensors], None]) -> None:
        """Begin to copy `tensors`, then to `write` the copies: contiguous, on the host, valid until `write` returns.

        Waits for the snapshot before this one. Nobody may change the tensors until `wait_for_copy` has returned.
        """
        self.finish()
        self.copied.clear()
        if self.stream is None and any(tensor.is_cuda for group in tensors.values() for tensor in group.values()):
            self.stream = torch.cuda.Stream()
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())  # what the tensors hold when all queued work is done
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")  # another one: priorities only fall
        self.writing = thread.submit(self._copy_and_write, tensors, write)
        thread.shutdown(wait=False)  # it ends when this is written

    def wait_for_copy(self) -> None:
        """Return when the tensors may change; on CUDA when all work queued from now on will find them copied."""
        if self.writing is None:
            return
        self.copied.wait()
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)
        if self.writing.done():
            self.finish()

    def finish(self) -> None:
        """Wait until the last snapshot is written."""
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def _copy_and_write(self, tensors: Tensors, write: Callable[[Tensors], None]) -> None:
        try:
            with torch.cuda.stream(self.stream):  # does nothing for None
                copies = {
                    file: {name: self._copy((file, name), tensor) for name, tensor in group.items()}
                    for file, group in tensors.items()
                }
        finally:
            self.copied.set()
        if self.stream is not None:
            self.stream.synchronize()
        if sys.platform == "linux":  # where a priority can be a thread's
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
        write(copies)

    def _copy(self, key: tuple[str, str], tensor: Tensor) -> Tensor:
        # The same memory every time: the first touch of a page costs more than copying it does.
        buffer = self.buffers.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self.buffers[key] = buffer
        if tensor.is_cuda:
            return buffer.copy_(tensor.detach(), non_blocking=True)
        # Not Tensor.copy_, whose own threads would contend with those of training for the cores.
        np.copyto(buffer.numpy(), tensor.detach().numpy())
        return buffer
