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
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

Tensors = Mapping[str, Mapping[str, Tensor]]
"""Tensors by file and name."""

K = TypeVar("K", bound=Hashable)

LOWEST_PRIORITY = 19
ALIGNMENT = 64
"""Bytes, a multiple of every dtype's size and a cache line."""
SMALLEST_BUFFER = 4096
"""Bytes, a page of memory."""


class SnapshotWriter:
    """Hands snapshots of tensors to a function that runs in a thread, one at a time.

    An error in the thread is raised by the next call of any method here. The interpreter waits for the thread before
    it exits.
    """

    def __init__(self) -> None:
        self.writing: Future[None] | None = None
        self.copied = threading.Event()
        self.buffers: dict[tuple[str, str], Tensor] = {}
        """Views into few large pieces of memory, by file and name."""
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
            self._make_room(tensors)
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

    def _make_room(self, tensors: Tensors) -> None:
        # The same memory every time: the first touch of a page costs more than copying it does.
        named = {(file, name): tensor for file, group in tensors.items() for name, tensor in group.items()}
        layout = {key: (tensor.shape, tensor.dtype) for key, tensor in named.items()}
        if layout == {key: (buffer.shape, buffer.dtype) for key, buffer in self.buffers.items()}:
            return
        self.buffers = {}  # before there is more
        sizes, places = packed({key: tensor.nbytes for key, tensor in named.items()})
        pinned = any(tensor.is_cuda for tensor in named.values())
        memory = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for size in sizes]
        for key, (number, offset) in places.items():
            part = memory[number][offset : offset + named[key].nbytes]
            self.buffers[key] = part.view(named[key].dtype).view(named[key].shape)

    def _copy(self, key: tuple[str, str], tensor: Tensor) -> Tensor:
        buffer = self.buffers[key]
        if tensor.is_cuda:
            return buffer.copy_(tensor.detach(), non_blocking=True)
        # Not Tensor.copy_, whose own threads would contend with those of training for the cores.
        np.copyto(buffer.numpy(), tensor.detach().numpy())
        return buffer


class Place(NamedTuple):
    """Where a tensor's copy lies."""

    buffer: int
    offset: int
    """In bytes."""


def packed(num_bytes: Mapping[K, int]) -> tuple[list[int], dict[K, Place]]:
    """Sizes of few buffers, all powers of two, and a place in them for each tensor of so many bytes, apart from all others.

    PyTorch's allocator of pinned memory rounds each request up to a power of two, which for kernels of 3×3 is 1.8 times what they
    take. So the sizes follow the binary digits of the sum, and tensors go from large to small into the first buffer with room.
    """
    room = {key: -(-size // ALIGNMENT) * ALIGNMENT for key, size in num_bytes.items()}
    sizes: list[int] = []
    used: list[int] = []
    places: dict[K, Place] = {}
    left = sum(room.values())
    for key in sorted(room, key=lambda key: room[key], reverse=True):
        fits = (number for number, size in enumerate(sizes) if used[number] + room[key] <= size)
        number = next(fits, len(sizes))
        if number == len(sizes):
            sizes.append(max(SMALLEST_BUFFER, power_of_two_below(left), power_of_two_above(room[key])))
            used.append(0)
        places[key] = Place(number, used[number])
        used[number] += room[key]
        left -= room[key]
    return sizes, places


def power_of_two_above(number: int) -> int:
    """The smallest power of two that is no less than a number (from 0 on)."""
    return 1 << max(0, number - 1).bit_length()


def power_of_two_below(number: int) -> int:
    """The largest power of two that is no more than a number, 1 below that."""
    return 1 << max(0, number.bit_length() - 1)
