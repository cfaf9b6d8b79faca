"""Batches as they leave a reader: the pixels of a selection's images, decoded into one buffer."""

from __future__ import annotations

import math
import mmap
import weakref
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float64, Int64, UInt8
from torch import Tensor

from vaetrain.data.format.decode import decode_into
from vaetrain.data.readers.resize import decode_resized
from vaetrain.data.readers.selection import Selection
from vaetrain.data.readers.shared_memory import SharedMemory

# Of each shape; a training loop holds one batch while it asks for the next.
MAX_UNUSED_BUFFERS = 2

_unused_buffers: defaultdict[tuple[int, ...], deque[UInt8[np.ndarray, "b h w c"]]] = defaultdict(
    lambda: deque(maxlen=MAX_UNUSED_BUFFERS)
)


class Batch(NamedTuple):
    """Images as they leave a reader, on the host (pinned for CUDA) or already on the device."""

    images: UInt8[Tensor, "b c h w"]
    """Laid out channels last, as decoders write and convolutions like them."""
    labels: Int64[Tensor, " b"]
    """Class numbers of the manifest, whatever classes were kept."""
    indices: Int64[Tensor, " b"]
    """Positions in the split after the class filter."""


class SharedBatch:
    """A batch copied into shared memory; pickled to another process, it is a Batch there. OSError when there is no such memory.

    PyTorch's own way lies in /dev/shm, of which many containers have 64 MB, and opens a file for each tensor.
    """

    def __init__(self, batch: Batch) -> None:
        arrays = batch.labels.numpy(), batch.indices.numpy(), batch.images.permute(0, 2, 3, 1).numpy()
        self._shape = arrays[-1].shape
        self._memory = SharedMemory(sum(array.nbytes for array in arrays))
        offset = 0
        for array in arrays:
            self._memory.write(array, offset)
            offset += array.nbytes

    def __reduce__(self) -> tuple[Callable[..., Batch], tuple[Any, ...]]:
        """Hand over the memory."""
        return _batch_in, (self._memory, self._shape)


def _batch_in(memory: SharedMemory, shape: tuple[int, int, int, int]) -> Batch:
    """Labels, indices and pixels that lie one after the other."""
    num_images = shape[0]
    labels, indices = torch.from_numpy(memory.array((2, num_images), np.int64))
    images = torch.from_numpy(memory.array(shape, np.uint8, offset=2 * num_images * 8))
    return Batch(images.permute(0, 3, 1, 2), labels, indices)


def decode_image(
    selection: Selection,
    encoded: bytes | bytearray,
    position: int,
    out: UInt8[np.ndarray, "h w c"],
    place: float | None = None,
) -> None:
    """Decode an image's bytes into `out`, resized and cut at `place` (see decode_resized) where its set is read so.

    Raises ValueError naming the sample when they are damaged.
    """
    try:
        if selection.shard_set.manifest.resized:
            decode_resized(encoded, out, place)
        else:
            decode_into(encoded, out)
    except ValueError as error:
        raise ValueError(f"{selection.where(position)}: {error}; run tools/verify_shards.py") from error


def load_batch(
    selection: Selection, positions: Int64[np.ndarray, " b"], places: Float64[np.ndarray, " b"] | None = None
) -> Batch:
    """Read and decode images from local shards, cut out at `places` (None: in the middle) where they are resized."""
    pixels = batch_buffer((len(positions), *selection.image_shape))
    middle = [None] * len(positions)
    for position, image, place in zip(
        positions.tolist(), pixels, middle if places is None else places.tolist(), strict=True
    ):
        decode_image(selection, selection.read(position), position, out=image, place=place)
    return make_batch(selection, pixels, positions)


def empty_batch(shape: tuple[int, ...], *, pin: bool) -> UInt8[Tensor, "b h w c"]:
    """Memory for a batch, with anything in it; pinned, so that a GPU fetches it by itself, or that of an earlier batch."""
    return torch.empty(shape, dtype=torch.uint8, pin_memory=True) if pin else torch.from_numpy(batch_buffer(shape))


def batch_buffer(shape: tuple[int, ...]) -> UInt8[np.ndarray, "b h w c"]:
    """Memory for a batch, with anything in it: that of an earlier batch which nobody holds any more, if there is one.

    Fresh memory of this size comes from the system page by page, which took a fifth of the time of decoding into it.
    Whoever holds a tensor made of the result holds the memory; an array derived from the result does not.
    """
    unused = _unused_buffers[shape]
    try:
        buffer = unused.pop()
    except IndexError:
        buffer = _at_a_page(shape)
    handed_out = buffer[:]  # another object, whose end says that the memory is free again
    weakref.finalize(handed_out, unused.append, buffer)
    return handed_out


def _at_a_page(shape: tuple[int, ...]) -> UInt8[np.ndarray, "b h w c"]:
    """Fresh memory that begins at a page, as files in memory do.

    NumPy's own begins 16 bytes into one. Where a copy's target lies 1 to 31 bytes beyond its source, seen within a page, AMD's
    `rep movsb`, which copies whole images, takes three times as long (docs/LOG.md).
    """
    num_bytes = math.prod(shape)
    memory = np.empty(num_bytes + mmap.PAGESIZE, np.uint8)
    start = -memory.ctypes.data % mmap.PAGESIZE
    return memory[start : start + num_bytes].reshape(shape)


def make_batch(selection: Selection, pixels: UInt8[np.ndarray, "b h w c"], positions: Int64[np.ndarray, " b"]) -> Batch:
    """Decoded images with their labels and indices."""
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    labels = torch.from_numpy(selection.index.label[positions].astype(np.int64))
    return Batch(images, labels, torch.from_numpy(positions))
