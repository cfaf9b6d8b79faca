"""Encoded image bytes (JPEG, PNG, WebP) to uint8 pixels."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from vaetrain.data.picture import MAX_PIXELS

JPEG_SIGNATURE = b"\xff\xd8"
_JPEG_FRAME = struct.Struct(">HH")


def decode_pixels(encoded: bytearray, channels: int) -> UInt8[np.ndarray, "h w c"]:
    """Pixels in [0, 255] with 1 (grayscale) or 3 (colour) channels; raises ValueError when the bytes are damaged."""
    if not encoded.startswith(JPEG_SIGNATURE):
        return _decode_with_pillow(encoded, "L" if channels == 1 else "RGB")
    # Half of Pillow's time, to the same pixels and without the GIL. Not so for the other formats: torchvision 0.29 ends
    # the process (SIGSEGV) on a PNG with one wrong byte, and knows no grayscale WebP.
    mode = ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB
    if _jpeg_pixels(encoded) > MAX_PIXELS:
        raise ValueError(f"a JPEG that claims more than {MAX_PIXELS:,} pixels")
    try:
        pixels: Tensor = decode_jpeg(torch.frombuffer(encoded, dtype=torch.uint8), mode)
    except RuntimeError as error:
        raise ValueError(f"not a readable JPEG: {error}") from error
    return pixels.permute(1, 2, 0).numpy()


def _jpeg_pixels(encoded: bytearray) -> int:
    # torchvision takes the header's word and fills up to 12 GB for a file of one kilobyte.
    position = 2
    while position >= 0 and position + 9 <= len(encoded):
        marker = encoded[position + 1]
        if encoded[position] != 0xFF:  # like libjpeg, on to the next marker
            position = encoded.find(0xFF, position)
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a start of frame
            height, width = _JPEG_FRAME.unpack_from(encoded, position + 5)
            return int(height) * int(width)
        if marker == 0xFF:  # padding before a marker
            position += 1
        elif marker <= 0x01 or 0xD0 <= marker <= 0xD8:  # those without a length
            position += 2
        else:
            position += 2 + (encoded[position + 2] << 8 | encoded[position + 3])
    return 0


def _decode_with_pillow(encoded: bytearray, mode: str) -> UInt8[np.ndarray, "h w c"]:
    try:
        with Image.open(io.BytesIO(encoded), formats=["PNG", "WEBP"]) as image:
            if image.mode.startswith("I"):
                raise ValueError("16 bits per channel, not 8")
            pixels = np.asarray(image.convert(mode))
    except (OSError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError) as error:
        # Pillow raises SyntaxError for a broken PNG chunk, the others for broken lengths and text
        raise ValueError(f"not a readable image: {error}") from error
    return pixels[..., None] if mode == "L" else pixels
