"""A split decoded once and kept as uint8: batches are gathered from memory, on the device when it fits there."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import numpy as np
import torch
from jaxtyping import Int64, UInt8

from vaetrain.data.readers.batch import Batch, decode_image, empty_batch
from vaetrain.data.readers.gathering import GatheringReader
from vaetrain.data.readers.selection import Selection
from vaetrain.data.readers.shared_array import Gather, SharedArray
from vaetrain.data.readers.worker_progress import ReaderProgress, end_process, mark_idle, stuck_message, watched
from vaetrain.machine import available_memory
from vaetrain.upload import upload

# Of the device memory free before the model is built; the rest is for weights and activations.
DEVICE_MEMORY_SHARE = 0.25
IMAGES_PER_TASK = 64


class ResidentReader(GatheringReader):
    """The whole decoded split in memory: num_images × channels × height × width bytes, once for the processes of a node.

    Each of them decodes a part of it. On a CUDA device the split then moves to the memory of each device where it takes at most
    a quarter of what is free; otherwise each batch is gathered from host memory into a pinned buffer. In neither case does the
    host wait for the device.
    """

    def __init__(
        self,
        selection: Selection,
        *,
        num_threads: int,
        device: torch.device,
        reason: str,
        timeout_s: float,
        rank: int = 0,
        gather: Gather | None = None,
    ) -> None:
        """Decode. With `gather` a collective; raises ValueError in all processes when one of them finds a damaged image.

        Raises ValueError, too, when there is not so much memory.
        """
        self.manifest = selection.shard_set.manifest
        self.num_images = selection.num_images
        available = available_memory()
        if available is not None and selection.decoded_bytes > available:
            raise ValueError(
                f"{selection.source}: the {selection.split} split takes {selection.decoded_bytes / 2**30:.2f} GiB decoded and "
                f"{available / 2**30:.2f} GiB of memory are available; use --data.reader indexed"
            )
        share = SharedArray.agree(selection.decoded_bytes, rank, gather)
        decoded = share.memory_array((selection.num_images, *selection.image_shape))
        with share.fill_collectively():
            _decode_part(selection, decoded, share.part, share.num_parts, num_threads, timeout_s)
        pixels = torch.from_numpy(decoded)
        where = share.description
        if device.type == "cuda" and pixels.nbytes <= DEVICE_MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]:
            pixels = pixels.to(device)
            where = "in the memory of each device"
        self._pixels = pixels
        self._pin = device.type == "cuda"
        self._rows: Int64[np.ndarray, " n"] | None = None
        """Of a subset's images; None: all."""
        self._labels = torch.from_numpy(selection.index.label.astype(np.int64))
        self.description = (
            f"resident on {pixels.device} ({reason}): {self.num_images:,} images from {selection.source}, "
            f"{pixels.nbytes / 2**20:,.1f} MiB {where}"
        )

    def subset(self, positions: Int64[np.ndarray, " n"]) -> ResidentReader:
        """The images at `positions` alone, in the same memory."""
        part = copy.copy(self)
        part.num_images = len(positions)
        part._rows = positions if self._rows is None else self._rows[positions]
        return part

    def close(self) -> None:
        """Nothing to end: the memory is freed with the reader."""

    def _gather(self, positions: Int64[np.ndarray, " b"]) -> Batch:
        indices = torch.from_numpy(positions)
        if self._rows is not None:
            positions = self._rows[positions]
        rows = torch.from_numpy(positions)
        if self._pixels.device.type == "cpu":
            out = empty_batch((len(positions), *self._pixels.shape[1:]), pin=self._pin)
            # One thread of NumPy does 155,000 images of 128 pixels a second. index_select starts OpenMP threads, and with
            # other processes on the cores they waited for each other: 9,000. "clip": "raise" would copy once more.
            np.take(self._pixels.numpy(), positions, axis=0, out=out.numpy(), mode="clip")
        else:
            out = torch.index_select(self._pixels, 0, upload(rows, self._pixels.device))
        return Batch(out.permute(0, 3, 1, 2), self._labels[rows], indices)


def _decode_part(
    selection: Selection,
    out: UInt8[np.ndarray, "n h w c"],
    part: int,
    num_parts: int,
    num_threads: int,
    timeout_s: float,
) -> None:
    """Decode every num_parts-th stretch of images into its place."""
    progress, numbers = ReaderProgress(num_threads), count()

    def decode_from(start: int) -> None:
        for position in range(start, min(start + IMAGES_PER_TASK, selection.num_images)):
            decode_image(selection, selection.read(position), position, out=out[position])
        mark_idle()

    def end(reader: int) -> None:
        end_process(stuck_message(progress, reader, selection.where, timeout_s))

    starts = range(part * IMAGES_PER_TASK, selection.num_images, num_parts * IMAGES_PER_TASK)
    # Threads, since JPEGs are decoded without the GIL.
    with (
        watched(progress, timeout_s, end),
        ThreadPoolExecutor(num_threads, initializer=lambda: progress.begin(next(numbers))) as threads,
    ):
        for _ in threads.map(decode_from, starts):
            pass
