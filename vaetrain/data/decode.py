"""Encoded image bytes (JPEG, PNG, WebP) to uint8 pixels."""

from __future__ import annotations

import io

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

JPEG_SIGNATURE = b"\xff\xd8"


def decode_pixels(encoded: bytearray, channels: int) -> UInt8[np.ndarray, "h w c"]:
    """Pixels in [0, 255] with 1 (grayscale) or 3 (colour) channels; raises ValueError when the bytes are damaged."""
    if not encoded.startswith(JPEG_SIGNATURE):
        return _decode_with_pillow(encoded, "L" if channels == 1 else "RGB")
    # Half of Pillow's time, to the same pixels and without the GIL. Not so for the other formats: torchvision 0.29 ends
    # the process (SIGSEGV) on a PNG with one wrong byte, and knows no grayscale WebP.
    mode = ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB
    try:
        pixels: Tensor = decode_jpeg(torch.frombuffer(encoded, dtype=torch.uint8), mode)
    except RuntimeError as error:
        raise ValueError(f"not a readable JPEG: {error}") from error
    return pixels.permute(1, 2, 0).numpy()


def _decode_with_pillow(encoded: bytearray, mode: str) -> UInt8[np.ndarray, "h w c"]:
    try:
        with Image.open(io.BytesIO(encoded), formats=["PNG", "WEBP"]) as image:
            if image.mode.startswith("I"):
                raise ValueError("16 bits per channel, not 8")
            pixels = np.asarray(image.convert(mode))
    except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for a broken PNG chunk
        raise ValueError(f"not a readable image: {error}") from error
    return pixels[..., None] if mode == "L" else pixels
