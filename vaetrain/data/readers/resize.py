"""Images of any size and format to square ones, as they are read: the shorter side is resized, a square cut out.

What comes out depends on the file's bytes and the place of the crop alone. It is what tools/make_shards.py would store without
loss, but for JPEGs of at least twice the size: they are decoded at a half, quarter or eighth of their scale. Pillow does it
whatever else is installed, so that the pixels are the same everywhere.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vaetrain.data.format.decode import decode_into
from vaetrain.data.format.jpeg import JPEG_SIGNATURE, refuse_many_scans
from vaetrain.data.sources.preprocess import MAX_PIXELS, STUMBLES, UNREADABLE, decode_picture, upright, with_channels


def decode_resized(encoded: bytes | bytearray, out: UInt8[np.ndarray, "h w c"], place: float | None = None) -> None:
    """Decode an image of any size into `out`, which is square, contiguous and has 1 (grayscale) or 3 (RGB) channels.

    `place` in [0, 1) is where along the longer side the square is cut out; None: in its middle. Raises ValueError when the bytes
    are damaged or hold more than MAX_PIXELS.
    """
    size, channels = out.shape[0], out.shape[2]
    try:
        picture = _decoded(bytes(encoded), size, channels)
        if picture is None:
            decode_into(encoded, out)
            return
        picture = with_channels(upright(picture), channels)
        width, height = picture.size
        side = min(width, height)
        excess = max(width, height) - side
        start = excess // 2 if place is None else int(place * (excess + 1))
        left, top = (start, 0) if width > height else (0, start)
        box = (left, top, left + side, top + side)
        if excess:  # not resize's own `box`, whose filter would look beyond it
            picture = picture.crop(box)
        if side != size:
            picture = picture.resize((size, size), Image.Resampling.LANCZOS)
    except (*UNREADABLE, *STUMBLES, Image.DecompressionBombError) as error:
        raise ValueError(f"not a readable image: {error}") from error
    out[...] = np.asarray(picture).reshape(out.shape)


def _decoded(encoded: bytes, size: int, channels: int) -> Image.Image | None:
    """The picture, not much larger than need be; None for a JPEG that is of the right size and needs nothing else."""
    if not encoded.startswith(JPEG_SIGNATURE):
        return decode_picture(encoded)
    refuse_many_scans(encoded)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # looked at below
        picture = Image.open(io.BytesIO(encoded), formats=("JPEG",))
    if picture.width * picture.height > MAX_PIXELS:
        raise ValueError(f"it has more than {MAX_PIXELS:,} pixels; shrink it first")
    if picture.size == (size, size) and picture.mode in ("L", "RGB") and "exif" not in picture.info:
        return None
    if picture.mode in ("L", "RGB"):
        picture.draft("L" if channels == 1 else picture.mode, (size, size))
    picture.load()
    return picture
