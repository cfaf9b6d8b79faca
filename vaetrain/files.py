"""Files that are whole or absent, in folders that somebody else may have filled, and their hashes."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

READ_BYTES = 1 << 20
"""Read at a time, of what is read from front to back."""


class NewerFormatError(ValueError):
    """A file that only a newer vaetrain reads: neither damaged nor readable."""


def inside(folder: Path, *names: str) -> Path:
    """The path of a file or folder in `folder`, one name for each step on the way.

    Raises ValueError, naming it, where one of the steps is a link, or would lead out: what lies in a folder that somebody else
    may have filled is neither read nor written through links.
    """
    path = folder
    for name in names:
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise ValueError(f"{name!r} is no name of a file in {path}")
        path = path / name
        if path.is_symlink():
            raise ValueError(
                f"{path} is a link, which is not followed: it could lead anywhere; put the file or folder itself there, or "
                "delete it"
            )
    return path


def fresh_name(path: Path) -> Path:
    """A name beside `path` that nobody can have foreseen, for what is written aside and then renamed."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


def create(path: Path) -> BinaryIO:
    """A new file, open for writing; FileExistsError where there is anything of that name, a link included."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "wb")


def append_to(path: Path) -> BinaryIO:
    """A file open for appending, made if need be; OSError where its name is a link."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "ab")


def replace_file(path: Path, content: bytes) -> None:
    """Write a file aside and rename it into place, so that nobody ever sees half of it; a link of its name is replaced, too."""
    aside = fresh_name(path)
    try:
        with naming_file(path), create(aside) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        with suppress(OSError):
            aside.unlink()
        raise


def write_png(figure: Any, path: Path, *, dpi: int) -> None:
    """Write a Matplotlib figure as a PNG file, whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    replace_file(path, buffer.getvalue())


def read_bytes(path: Path, max_bytes: int, remedy: str) -> bytes:
    """The content of a plain file of at most so many bytes.

    Raises FileNotFoundError, and ValueError for a pipe, a device or a larger file; both name it, and the `remedy`.
    """
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            facts = os.fstat(file.fileno())
            if not stat.S_ISREG(facts.st_mode):
                raise ValueError(f"{path} is no plain file; {remedy}")
            content = b"" if facts.st_size > max_bytes else file.read(max_bytes + 1)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist; {remedy}") from error
    if facts.st_size > max_bytes or len(content) > max_bytes:
        raise ValueError(f"{path} has {facts.st_size:,} bytes, of {max_bytes:,} at most; {remedy}")
    return content


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


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Have what goes wrong while `path` is written (a full disk) name it, as what goes wrong when it is opened does."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def readable_disk_errors(path: Path) -> Iterator[None]:
    """Turn what the file system refuses while `path` is written into a ValueError that says what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space" if full else "choose a folder that can be written"
        raise ValueError(f"cannot write {path}: {error.strerror or error}; {remedy}, then run it again") from error


def check_free_space(folder: Path, num_bytes: int, what: str) -> None:
    """Raise ValueError when so many bytes more do not fit."""
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise ValueError(f"{what} needs {num_bytes:,} bytes in {folder}, which has {free:,}; free some space")
