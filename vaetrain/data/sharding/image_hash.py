"""What an image looks like, in 272 bytes: enough to find its exact and near duplicates.

Everything is computed in integers, so that all machines find the same duplicates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

SIDE = 16
IMAGE_HASH = np.dtype([("digest", "<u8"), ("phash", "<u8"), ("thumbnail", "u1", SIDE**2)])
"""Of one image: 64 bits of the SHA-256 of its file, its perceptual hash, and its gray thumbnail, row by row."""

# The eight lowest frequencies of the cosine transform, times 128: all sums stay below 2³¹.
_FREQUENCIES = np.arange(8)[:, None] * (2 * np.arange(SIDE) + 1)[None]
_COSINES = np.rint(128 * np.cos(np.pi * _FREQUENCIES / (2 * SIDE))).astype(np.int32)


class Thumbnail(NamedTuple):
    """What is kept of one image until the likenesses of many are computed at once."""

    digest: bytes
    thumbnail: bytes


def thumbnail_of(image: bytes, picture: Image.Image) -> Thumbnail:
    """Look at an encoded image and its pixels, a square in RGB or grayscale."""
    thumbnail = picture.resize((SIDE, SIDE), Image.Resampling.BOX, reducing_gap=1.0).convert("L")
    return Thumbnail(hashlib.sha256(image).digest()[:8], thumbnail.tobytes())


def likenesses(glimpses: Sequence[Thumbnail]) -> np.ndarray:
    """An array of LIKENESS.

    The hash is pHash (Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash Functions", section 3.2.1), but of
    a picture of 16×16: which of the 64 lowest coefficients of its cosine transform are above their median.
    """
    found = np.zeros(len(glimpses), IMAGE_HASH)
    found["digest"] = np.frombuffer(b"".join(glimpse.digest for glimpse in glimpses), dtype="<u8")
    thumbnail = np.frombuffer(b"".join(glimpse.thumbnail for glimpse in glimpses), dtype=np.uint8)
    found["thumbnail"] = thumbnail.reshape(len(glimpses), SIDE**2)
    gray = thumbnail.reshape(len(glimpses), SIDE, SIDE).astype(np.int32)
    coefficients = (_COSINES @ gray @ _COSINES.T).reshape(len(glimpses), 64)
    median = np.sort(coefficients[:, 1:], axis=1)[
        :, 31:32
    ]  # without the first, the mean, which is far above all others
    found["phash"] = np.packbits(coefficients > median, axis=1).view("<u8")[:, 0]
    return found
