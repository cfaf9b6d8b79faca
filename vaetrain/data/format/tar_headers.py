"""What lies where in a plain tar: its headers read, its content left alone. Nothing here imports torch."""

from __future__ import annotations

import hashlib
import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from vaetrain.data.format.manifest import TAR_BLOCK


@dataclass(frozen=True)
class TarMember:
    """One file in a tar."""

    name: str
    """Its path."""

    offset: int
    """First byte of its content."""

    num_bytes: int
    """Length of its content."""

    is_file: bool = True
    """False for what has no content of its own: a link that leads to no earlier file of the tar, a device, a sparse file."""


class TarHeaders:
    """Reads a tar's headers from a file that can seek; iterated, its files in order, hard links as what they link to.

    Raises ValueError for what is no plain tar, and for one that is cut short or damaged. Attributes, once it has been read to the
    end: `sha256`, over where each member lies, how long it is and its header's checksum, and `num_bytes`, where the last one ends.
    """

    def __init__(self, file: BufferedReader) -> None:
        self.sha256 = ""
        self.num_bytes = 0
        self._file = file

    def __iter__(self) -> Iterator[TarMember]:
        """See the class."""
        digest = hashlib.sha256()
        files: dict[str, TarMember] = {}
        try:
            with tarfile.open(fileobj=self._file, mode="r:") as archive:
                while (info := archive.next()) is not None:
                    archive.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
                    kind = info.type.decode("latin-1")
                    digest.update(
                        f"{info.name}\0{kind}\0{info.offset_data}\0{info.size}\0{info.chksum}\n".encode(
                            errors="replace"
                        )
                    )
                    name = posixpath.normpath(info.name)
                    if info.islnk() and (linked := files.get(posixpath.normpath(info.linkname))):
                        yield TarMember(info.name, linked.offset, linked.num_bytes)
                    elif info.isreg() and not info.issparse():
                        files[name] = TarMember(info.name, info.offset_data, info.size)
                        yield files[name]
                    elif not info.isdir():
                        yield TarMember(info.name, info.offset_data, 0, is_file=False)
                # Where tarfile finds no header it stops as if that were the end, which is a block of zeros.
                self._file.seek(archive.offset)
                if self._file.read(TAR_BLOCK) not in (bytes(TAR_BLOCK), b""):
                    raise ValueError(f"no file and no end at byte {archive.offset:,}")
                self.num_bytes = archive.offset
        except (tarfile.TarError, UnicodeDecodeError, EOFError) as error:
            raise ValueError(str(error)) from error
        self.sha256 = digest.hexdigest()


def sha256_of_headers(path: Path) -> str:
    """The `sha256` of a local tar's headers; raises ValueError as TarHeaders does."""
    with path.open("rb") as file:
        headers = TarHeaders(file)
        for _ in headers:
            pass
    return headers.sha256
