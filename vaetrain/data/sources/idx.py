"""MNIST's idx files: a magic number, the dimensions as big-endian integers, then bytes. What their names say."""

from __future__ import annotations

import gzip
import math
import re
import zlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

# The parts of the four canonical names; .gz may follow. `t10k` is MNIST's test set, `test` EMNIST's.
PARTS = ("train", "t10k")
MAX_BYTES = 1 << 32  # of an array; MNIST's largest has 47 million
UBYTE_MAGIC = 0x0800  # the low byte is the number of dimensions
NAME = re.compile(
    r"(?:(?P<set>.*?)[-_.])?(?P<part>train|training|t10k|test)[-_.](?P<what>images?|labels?)[-_.](?:idx(?P<dimensions>[13])(?:[-_.]ubyte)?"
    r"|ubyte)(?P<packed>\.gz)?",
    re.IGNORECASE,
)


class IdxName(NamedTuple):
    """What the name of an idx file says."""

    set: str
    """What stands before the part: `emnist-letters`; empty in MNIST, Fashion-MNIST and KMNIST."""
    part: str
    """One of PARTS."""
    dimensions: int
    """3 of images, 1 of labels."""


def idx_name(part: str, dimensions: int) -> str:
    """The canonical file name of a part's images (3 dimensions) or labels (1)."""
    return f"{part}-{'images' if dimensions == 3 else 'labels'}-idx{dimensions}-ubyte"


def parse_idx_name(name: str) -> IdxName | None:
    """What a file's name says: MNIST's, with dots (Kaggle) or capitals, EMNIST's; None for one that is none of these."""
    found = NAME.fullmatch(PurePosixPath(name).name)
    if not found:
        return None
    part = "train" if found["part"].lower().startswith("train") else "t10k"
    return IdxName(found["set"] or "", part, 3 if found["what"].lower().startswith("image") else 1)


def find_idx(names: Iterable[str], source: Path, wanted: str | None = None) -> dict[tuple[str, int], str] | None:
    """The files of MNIST's four among those of a folder or archive, by part and dimensions; None where there is none of them.

    Raises ValueError where there are several sets, as in EMNIST's download, unless one is `wanted` by name.
    """
    found: dict[tuple[str, str], dict[tuple[str, int], str]] = {}
    # The shallowest first: Kaggle's download has each file a second time, in a folder called as the file is.
    for name in sorted(names, key=lambda name: (name.count("/"), name)):
        said = parse_idx_name(name)
        if said and (wanted is None or said.set == wanted):
            folder = PurePosixPath(name).parent
            folder = folder.parent if parse_idx_name(folder.name) else folder
            found.setdefault((str(folder), said.set), {}).setdefault((said.part, said.dimensions), name)
    if len(found) > 1:
        first = next(iter(found.values()))
        several = ", ".join(sorted({str(PurePosixPath(folder) / name) for folder, name in found}))
        raise ValueError(
            f"{source} has several sets of MNIST's kind ({several}); name one of its files, such as "
            f"{source / next(iter(first.values()))}"
        )
    return next(iter(found.values()), None)


def read_idx(path: Path, dimensions: int, opened: Any = None) -> UInt8[np.ndarray, "..."]:
    """The array in an idx file of unsigned bytes, gzipped where its name says so; `opened` is read in place of `path`.

    Raises ValueError when it is damaged or not of these dimensions.
    """
    header_bytes = 4 * (1 + dimensions)
    try:
        with opened or path.open("rb") as raw, _unpacked(raw, path) as file:
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


def _unpacked(raw: Any, path: Path) -> Any:
    # Browsers unpack what they download, and leave it its name.
    is_packed = path.suffix.lower() == ".gz" and raw.read(2) == b"\x1f\x8b"
    raw.seek(0)
    return gzip.open(raw) if is_packed else raw
