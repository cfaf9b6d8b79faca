"""Encoded image bytes (JPEG, PNG, WebP) to uint8 pixels, straight into the place where a batch wants them.

JPEGs go through simplejpeg where it is installed (`pip install vaetrain[fast]`) and through torchvision elsewhere, to the same
pixels; docs/LOG.md says what each costs. PNG and WebP go through Pillow.
"""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from vaetrain.data.format.jpeg import JPEG_SIGNATURE, refuse_many_scans, simplejpeg

JPEG_DECODER = "torchvision" if simplejpeg is None else f"simplejpeg {simplejpeg.__version__}"
"""What decodes JPEGs here, for messages and benchmarks."""

_JPEG_FRAME = struct.Struct(">HH")


def decode_into(encoded: bytes | bytearray, out: UInt8[np.ndarray, "h w c"]) -> None:
    """Decode an image of the size of `out`, which is contiguous and has 1 (grayscale) or 3 (RGB) channels.

    Raises ValueError when the bytes are damaged or hold an image of another size, which is never decoded: so a bomb costs
    no more memory than its bytes.
    """
    if not encoded.startswith(JPEG_SIGNATURE):
        _decode_with_pillow(encoded, out)
        return
    refuse_many_scans(encoded)
    if simplejpeg is None:
        _decode_with_torchvision(encoded, out)
    else:
        _decode_with_simplejpeg(encoded, out)


def _decode_with_simplejpeg(encoded: bytes | bytearray, out: UInt8[np.ndarray, "h w c"]) -> None:
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(encoded)
        _check_size((height, width), out)
        # strict: without it a truncated file decodes to grey without a word.
        simplejpeg.decode_jpeg(encoded, "GRAY" if out.shape[-1] == 1 else "RGB", buffer=out, strict=True)
    except ValueError as error:
        raise ValueError(f"not a readable JPEG: {error}") from error


def _decode_with_torchvision(encoded: bytes | bytearray, out: UInt8[np.ndarray, "h w c"]) -> None:
    # Here, since it takes seconds to import (it brings torch._dynamo), which nobody needs who has simplejpeg.
    from torchvision.io import ImageReadMode, decode_jpeg

    # torchvision takes the header's word and fills up to 12 GB for a file of one kilobyte, hence a look at it first.
    _check_size(_jpeg_size(encoded), out)
    mode = ImageReadMode.GRAY if out.shape[-1] == 1 else ImageReadMode.RGB
    try:
        pixels: Tensor = decode_jpeg(torch.frombuffer(bytearray(encoded), dtype=torch.uint8), mode)
    except RuntimeError as error:
        raise ValueError(f"not a readable JPEG: {error}") from error
    # Not Tensor.copy_, which starts OpenMP threads for 32,768 values: 65 µs in place of 4.
    out[...] = pixels.permute(1, 2, 0).numpy()


def _jpeg_size(encoded: bytes | bytearray) -> tuple[int, int]:
    """Height and width in the frame header, (0, 0) where there is none."""
    position = 2
    while position >= 0 and position + 9 <= len(encoded):
        marker = encoded[position + 1]
        if encoded[position] != 0xFF:  # like libjpeg, on to the next marker
            position = encoded.find(0xFF, position)
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a start of frame
            height, width = _JPEG_FRAME.unpack_from(encoded, position + 5)
            return int(height), int(width)
        if marker == 0xFF:  # padding before a marker
            position += 1
        elif marker <= 0x01 or 0xD0 <= marker <= 0xD8:  # those without a length
            position += 2
        else:
            position += 2 + (encoded[position + 2] << 8 | encoded[position + 3])
    return 0, 0


def _decode_with_pillow(encoded: bytes | bytearray, out: UInt8[np.ndarray, "h w c"]) -> None:
    # Not torchvision: 0.29 ends the process (SIGSEGV) on a PNG with one wrong byte, and knows no grayscale WebP.
    try:
        with Image.open(io.BytesIO(encoded), formats=["PNG", "WEBP"]) as image:
            if image.mode.startswith("I"):
                raise ValueError("16 bits per channel, not 8")
            _check_size((image.height, image.width), out)
            pixels = np.asarray(image.convert("L" if out.shape[-1] == 1 else "RGB"))
    except UnidentifiedImageError as error:  # whose own message is a memory address
        raise ValueError("not a readable image: it begins as none of JPEG, PNG, WebP") from error
    except (OSError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError) as error:
        # Pillow raises SyntaxError for a broken PNG chunk, the others for broken lengths and text
        raise ValueError(f"not a readable image: {error}") from error
    out[...] = pixels.reshape(out.shape)


def _check_size(found: tuple[int, int], out: UInt8[np.ndarray, "h w c"]) -> None:
    if found != out.shape[:2]:
        raise ValueError(f"{found[1]}×{found[0]} pixels, not {out.shape[1]}×{out.shape[0]} as the manifest says")
