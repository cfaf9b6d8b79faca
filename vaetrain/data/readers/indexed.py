"""Random access to local shards: any image, by its byte offset, in the exact order of the epoch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, repeat
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch.utils.data import Dataset

from vaetrain.data.format.decode import JPEG_DECODER
from vaetrain.data.readers.batch import Batch, load_batch
from vaetrain.data.readers.loader_workers import BatchOrError, WorkerPool
from vaetrain.data.readers.order import BatchLayout, crop_places, eval_indices, seen_before, train_indices
from vaetrain.data.readers.selection import Selection

Request = tuple[Int64[np.ndarray, " b"], Float64[np.ndarray, " b"] | None]
"""Positions, and places of crops (None: central ones)."""


class _Images(Dataset[BatchOrError]):
    """A selection as DataLoader reads it: a whole batch at a time, straight into one buffer."""

    def __init__(self, selection: Selection) -> None:
        self.selection = selection

    def __getitems__(self, request: Request) -> BatchOrError:
        try:
            return load_batch(self.selection, *request)
        except ValueError as error:
            return error


class IndexedReader:
    """Reads and decodes each batch when it is due; memory is the index (24 bytes an image) and the batches in flight."""

    def __init__(
        self,
        selection: Selection,
        *,
        num_workers: int,
        device: torch.device,
        reason: str,
        timeout_s: float,
        crop: Literal["center", "random"] = "center",
    ) -> None:
        self._options: dict[str, Any] = {
            "num_workers": num_workers,
            "device": device,
            "timeout_s": timeout_s,
            "crop": crop,
        }
        self._crop = crop
        self.manifest = selection.shard_set.manifest
        self.num_images = selection.num_images
        self.description = (
            f"indexed ({reason}): {self.num_images:,} images read by offset from {selection.source}, "
            f"{num_workers} decoding worker(s), {JPEG_DECODER}"
        )
        self._selection = selection
        self._images = _Images(selection)
        self._workers = WorkerPool(num_workers, device, selection.where, timeout_s)

    def train_batches(self, seed: int, images_seen: int, layout: BatchLayout) -> Iterator[Batch]:
        """Endless micro-batches of this process from the global position `images_seen` on."""
        indices = train_indices(self.num_images, seed, images_seen, layout)
        places: Iterator[Float64[np.ndarray, " b"] | None] = repeat(None)
        if self._crop == "random":
            first = images_seen // layout.global_batch_size * layout.grad_accum_steps
            places = (crop_places(seed, seen_before(number, layout)) for number in count(first))
        return self._workers.train_iter(self._images, zip(indices, places, strict=False))

    def eval_batches(self, batch_size: int, rank: int, num_processes: int) -> Iterator[Batch]:
        """This process's share of one pass over the split, every image exactly once over all processes."""
        return self._workers.eval_iter(
            (batch_size, rank, num_processes),
            lambda: self._images,
            lambda: [(positions, None) for positions in eval_indices(self.num_images, batch_size, rank, num_processes)],
        )

    def first(self, num_images: int) -> Batch:
        """The first images of the split, or all when it has fewer."""
        return self._workers.read_inline(
            lambda: load_batch(self._selection, np.arange(min(num_images, self.num_images)))
        )

    def subset(self, positions: Int64[np.ndarray, " n"]) -> IndexedReader:
        """The images at `positions` alone."""
        return IndexedReader(self._selection.at(positions), reason="a subset", **self._options)

    def close(self) -> None:
        """End the worker processes."""
        self._workers.close()
