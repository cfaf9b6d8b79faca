"""What an image looks like, in 272 bytes: enough to find its exact and near duplicates.

Everything is computed in integers, so that all machines find the same duplicates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

SIDE = 32  # of the gray picture that the hash is taken of, as in pHash
THUMBNAIL_SIDE = 16
LIKENESS = np.dtype([("digest", "<u8"), ("phash", "<u8"), ("thumbnail", "u1", THUMBNAIL_SIDE**2)])
"""Of one image: 64 bits of the SHA-256 over its pixels, its perceptual hash, and its gray thumbnail, row by row."""

# The eight lowest frequencies of the cosine transform, times 1024.
_FREQUENCIES = np.arange(8)[:, None] * (2 * np.arange(SIDE) + 1)[None]
_COSINES = np.rint(1024 * np.cos(np.pi * _FREQUENCIES / (2 * SIDE))).astype(np.int64)


class Glimpse(NamedTuple):
    """What is kept of one picture until the likenesses of many are computed at once."""

    digest: bytes
    gray: bytes
    """32×32 pixels."""


def glance(picture: Image.Image) -> Glimpse:
    """Look at a square RGB or grayscale picture."""
    small = picture.resize((SIDE, SIDE), Image.Resampling.BOX, reducing_gap=1.0)
    return Glimpse(hashlib.sha256(picture.tobytes()).digest()[:8], small.convert("L").tobytes())


def likenesses(glimpses: Sequence[Glimpse]) -> np.ndarray:
    """An array of LIKENESS.

    The hash is pHash (Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash Functions", section 3.2.1):
    which of the 64 lowest coefficients of the picture's cosine transform are above their median.
    """
    gray = np.frombuffer(b"".join(glimpse.gray for glimpse in glimpses), dtype=np.uint8).reshape(
        len(glimpses), SIDE, SIDE
    )
    found = np.zeros(len(gray), LIKENESS)
    found["digest"] = np.frombuffer(b"".join(glimpse.digest for glimpse in glimpses), dtype="<u8")
    coefficients = (_COSINES @ gray.astype(np.int64) @ _COSINES.T).reshape(len(gray), 64)
    median = np.sort(coefficients[:, 1:], axis=1)[:, 31:32]  # the first is the brightness, far above all others
    found["phash"] = np.packbits(coefficients > median, axis=1).view("<u8")[:, 0]
    factor = SIDE // THUMBNAIL_SIDE
    blocks = gray.reshape(len(gray), THUMBNAIL_SIDE, factor, THUMBNAIL_SIDE, factor)
    found["thumbnail"] = (blocks.sum(axis=(2, 4), dtype=np.uint16) // factor**2).reshape(len(gray), THUMBNAIL_SIDE**2)
    return found
