"""Files that are whole or absent, and their hashes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

READ_BYTES = 1 << 20
"""Read at a time, of what is read from front to back."""


class NewerFormatError(ValueError):
    """A file that only a newer vaetrain reads: neither damaged nor readable."""


def replace_file(path: Path, content: bytes) -> None:
    """Write a file aside and rename it into place, so that nobody ever sees half of it."""
    aside = path.with_name(path.name + ".partial")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
