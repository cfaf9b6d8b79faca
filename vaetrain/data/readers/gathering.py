"""What readers have in common that can gather any images at any time: whose order is that of order.py."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int64

from vaetrain.data.readers.batch import Batch
from vaetrain.data.readers.order import BatchLayout, eval_indices, train_indices


class GatheringReader(ABC):
    """See `Reader`."""

    num_images: int

    def train_batches(self, seed: int, images_seen: int, layout: BatchLayout) -> Iterator[Batch]:
        """Endless micro-batches of this process from the global position `images_seen` on."""
        return map(self._gather, train_indices(self.num_images, seed, images_seen, layout))

    def eval_batches(self, batch_size: int, rank: int, num_processes: int) -> Iterator[Batch]:
        """This process's share of one pass over the split, every image exactly once over all processes."""
        return map(self._gather, eval_indices(self.num_images, batch_size, rank, num_processes))

    def first(self, num_images: int) -> Batch:
        """The first images of the split, or all when it has fewer."""
        return self._gather(np.arange(min(num_images, self.num_images)))

    @abstractmethod
    def _gather(self, positions: Int64[np.ndarray, " b"]) -> Batch:
        """The images (b, c, h, w), uint8, at these positions of the split, and their labels."""
