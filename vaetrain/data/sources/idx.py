"""MNIST's idx files: a magic number, the dimensions as big-endian integers, then bytes."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

# The parts of the four canonical names; .gz may follow. `t10k` is MNIST's test set.
PARTS = ("train", "t10k")
MAX_BYTES = 1 << 32  # of an array; MNIST's largest has 47 million
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
    header_bytes = 4 * (1 + dimensions)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            start = file.read(header_bytes)
            header: list[Any] = np.frombuffer(start[: len(start) // 4 * 4], dtype=">u4").tolist()
            if not header or header[0] != UBYTE_MAGIC + dimensions:
                found = header[0] if header else "missing"
                raise ValueError(
                    f"{path}: its magic number is {found}, not {UBYTE_MAGIC + dimensions}: no idx{dimensions} file"
                )
            shape = header[1:]
            # What the header says and a byte more: a small file may decompress to anything.
            num_bytes = min(math.prod(shape), MAX_BYTES)
            content = file.read(num_bytes + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is no intact gzip file: {error}; download it again") from error
    if len(shape) < dimensions or len(content) != math.prod(shape):
        found = f"{header_bytes + len(content):,} bytes{' or more' if len(content) > num_bytes else ''}"
        raise ValueError(f"{path} says {shape} of itself but has {found}; download it again")
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)
