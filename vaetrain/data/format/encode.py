"""Pixels to PNG, without loss."""

from __future__ import annotations

import io

from jaxtyping import UInt8
from PIL import Image
from torch import Tensor


def png(image: UInt8[Tensor, "c h w"]) -> bytes:
    """One image with one or three channels as a PNG file."""
    pixels = image.permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(buffer, format="PNG")
    return buffer.getvalue()
