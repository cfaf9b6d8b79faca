"""Tars of strangers, whose headers could otherwise take memory and time without end."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_HEADER_BYTES = 1 << 20
"""Of one extended header (PAX), of one long name (GNU), and of all global headers of a tar together."""

MAX_FILE_BYTES = 1 << 62
"""Of any file, an offset beyond being no number that the system takes."""

_EXTENDED = (
    tarfile.XHDTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
SPARSE = "a file in it is sparse; pack it again without --sparse"


def open_tar(file: Any) -> tarfile.TarFile:
    """A tar that is not compressed, from a binary file, to be read by `members_of`.

    Reading it raises tarfile.ReadError for headers that are too large and for sparse files, which hold fewer bytes than they claim.
    """

    class Header(tarfile.TarInfo):
        global_bytes = 0

        @classmethod
        def frombuf(cls, buf: Any, encoding: str, errors: str) -> Any:
            header = super().frombuf(buf, encoding, errors)
            _check_size(header)
            if header.type == tarfile.GNUTYPE_SPARSE:
                raise tarfile.ReadError(SPARSE)
            if header.type == tarfile.XGLTYPE:
                Header.global_bytes += header.size
            if header.type in _EXTENDED and max(header.size, Header.global_bytes) > MAX_HEADER_BYTES:
                raise tarfile.ReadError(f"a header has more than {MAX_HEADER_BYTES:,} bytes")
            return header

        def _proc_gnusparse_10(self, *_: Any) -> None:  # its list would be as long as the file
            raise tarfile.ReadError(SPARSE)

    return tarfile.open(fileobj=file, mode="r:", tarinfo=Header)


def is_tar(path: Path) -> bool:
    """Whether a file begins as a tar that is not compressed does; no more of it is read."""
    with path.open("rb") as file:
        block = file.read(tarfile.BLOCKSIZE)
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return block == bytes(tarfile.BLOCKSIZE)  # an empty one
    return True


def members_of(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """All members in their order, none of which is kept."""
    try:
        for member in archive:
            archive.members.clear()  # type: ignore[attr-defined]  # each holds a copy of all global headers
            _check_size(member)  # which an extended header may say, too
            if member.issparse():
                raise tarfile.ReadError(SPARSE)
            yield member
    except ValueError as error:  # of a header that says that its file ends beyond 2⁶³ bytes
        raise tarfile.ReadError(str(error)) from error


def _check_size(header: tarfile.TarInfo) -> None:
    if not 0 <= header.size <= MAX_FILE_BYTES:
        raise tarfile.ReadError(f"{header.name[:60]!r} is said to have {str(header.size)[:30]} bytes")
