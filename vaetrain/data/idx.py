"""MNIST's idx files: a magic number, the dimensions as big-endian integers, then bytes."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

# The parts of the four canonical names; .gz may follow. `t10k` is MNIST's test set.
PARTS = ("train", "t10k")
UBYTE_MAGIC = 0x0800  # the low byte is the number of dimensions


def idx_name(part: str, dimensions: int) -> str:
    """The canonical file name of a part's images (3 dimensions) or labels (1)."""
    return f"{part}-{'images' if dimensions == 3 else 'labels'}-idx{dimensions}-ubyte"


def find_idx(folder: Path, part: str, dimensions: int) -> Path | None:
    """The file of that name in a folder, compressed or not, or None."""
    name = idx_name(part, dimensions)
    return next((file for file in (folder / name, folder / f"{name}.gz") if file.is_file()), None)


def read_idx(path: Path, dimensions: int) -> UInt8[np.ndarray, "..."]:
    """The array in an idx file of unsigned bytes; raises ValueError when it is damaged or not of these dimensions."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is no intact gzip file: {error}; download it again") from error
    header_bytes = 4 * (1 + dimensions)
    header: list[Any] = np.frombuffer(content[: len(content[:header_bytes]) // 4 * 4], dtype=">u4").tolist()
    if not header or header[0] != UBYTE_MAGIC + dimensions:
        found = header[0] if header else "missing"
        raise ValueError(
            f"{path}: its magic number is {found}, not {UBYTE_MAGIC + dimensions}: no idx{dimensions} file"
        )
    shape = header[1:]
    if len(shape) < dimensions or len(content) != header_bytes + int(np.prod(shape)):
        raise ValueError(f"{path} says {shape} of itself but has {len(content):,} bytes; download it again")
    return np.frombuffer(content, dtype=np.uint8, offset=header_bytes).reshape(shape)
