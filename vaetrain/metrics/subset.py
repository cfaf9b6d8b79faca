"""A part of a split, chosen by a seed: the same images for any number of processes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Int64

from vaetrain.data.readers.order import epoch_order
from vaetrain.data.readers.reader import Batch, Reader
from vaetrain.distributed.randomness import mixed_seed

READ_SIZE = 64
"""Images read at a time, of which a subset keeps some."""


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
    """The chosen images that lie in this process's part of the split, in whole batches but for the last.

    Parts are equal for the split, so that of a small choice some process may get more than another.
    """
    wanted = torch.zeros(reader.num_images, dtype=torch.bool)
    wanted[torch.from_numpy(chosen)] = True
    held: list[Batch] = []
    for batch in reader.eval_batches(READ_SIZE, rank, num_processes):
        keep = wanted[batch.indices.cpu()].nonzero().squeeze(1)
        held.append(Batch(*(tensor[keep.to(tensor.device)] for tensor in batch)))
        if sum(len(part.indices) for part in held) >= batch_size:
            *whole, rest = _cut(held, batch_size)
            yield from whole
            held = [rest]
    yield from (batch for batch in _cut(held, batch_size) if len(batch.indices))


def _cut(parts: list[Batch], batch_size: int) -> list[Batch]:
    """Join batches and cut them into batches of `batch_size`; the last is smaller, or empty."""
    if not parts:
        return []
    joined = Batch(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
    starts = range(0, len(joined.indices) + 1, batch_size)
    return [Batch(*(tensor[start : start + batch_size] for tensor in joined)) for start in starts]
