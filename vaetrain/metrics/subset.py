"""A part of a split, chosen by a seed: the same images for any number of processes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Int64

from vaetrain.data.readers.order import epoch_order
from vaetrain.data.readers.reader import Batch, Reader
from vaetrain.distributed.randomness import mixed_seed


def choose_images(split_size: int, num_images: int | None, seed: int) -> Int64[np.ndarray, " n"]:
    """Positions of `num_images` images of a split, ascending; None, or more than there are: of all.

    A larger choice with the same seed contains the smaller.
    """
    if num_images is None or num_images >= split_size:
        return np.arange(split_size, dtype=np.int64)
    # Another permutation than the one that training with this seed follows: its first images are no random choice.
    return np.sort(epoch_order(split_size, mixed_seed(seed, split_size), epoch=0)[:num_images])


def subset_batches(
    reader: Reader, chosen: Int64[np.ndarray, " n"], batch_size: int, rank: int = 0, num_processes: int = 1
) -> Iterator[Batch]:
    """This process's part of the chosen images, their indices being positions in the split; no others are read."""
    subset = reader.subset(chosen)
    try:
        for batch in subset.eval_batches(batch_size, rank, num_processes):
            yield batch._replace(indices=torch.from_numpy(chosen)[batch.indices.cpu()])
    finally:
        subset.close()
