"""Batches as they leave a reader: the pixels of a selection's images, decoded into one buffer."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from vaetrain.data.decode import decode_pixels
from vaetrain.data.selection import Selection


class Batch(NamedTuple):
    """Images as they leave a reader, on the host (pinned for CUDA) or already on the device."""

    images: UInt8[Tensor, "b c h w"]
    """Laid out channels last, as decoders write and convolutions like them."""
    labels: Int64[Tensor, " b"]
    """Class numbers of the manifest, whatever classes were kept."""
    indices: Int64[Tensor, " b"]
    """Positions in the split after the class filter."""


def decode_image(selection: Selection, encoded: bytearray, position: int, out: UInt8[np.ndarray, "h w c"]) -> None:
    """Decode an image's bytes (JPEG, PNG or WebP) into `out`; raises ValueError naming the sample when they are damaged."""
    try:
        image = decode_pixels(encoded, channels=out.shape[-1])
    except ValueError as error:
        raise ValueError(f"{selection.where(position)}: {error}; run tools/verify_shards.py") from error
    if image.shape != out.shape or image.dtype != np.uint8:
        raise ValueError(
            f"{selection.where(position)} is {tuple(image.shape)} of {image.dtype}, not {tuple(out.shape)} of uint8 as the "
            "manifest says; run tools/verify_shards.py"
        )
    out[...] = image  # not Tensor.copy_, which starts OpenMP threads for 32,768 values: 65 µs in place of 4


def load_batch(selection: Selection, positions: Int64[np.ndarray, " b"]) -> Batch:
    """Read and decode images from local shards."""
    pixels = np.empty((len(positions), *selection.image_shape), dtype=np.uint8)
    for position, image in zip(positions.tolist(), pixels, strict=True):
        decode_image(selection, selection.read(position), position, out=image)
    return make_batch(selection, pixels, positions)


def make_batch(selection: Selection, pixels: UInt8[np.ndarray, "b h w c"], positions: Int64[np.ndarray, " b"]) -> Batch:
    """Decoded images with their labels and indices."""
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    labels = torch.from_numpy(selection.index.label[positions].astype(np.int64))
    return Batch(images, labels, torch.from_numpy(positions))
