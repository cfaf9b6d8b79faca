"""Image files in folders, zips and tars."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import shutil
import tarfile
import zipfile
import zlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from PIL import Image

from vaetrain.data.format.manifest import TAR_BLOCK
from vaetrain.data.sources.class_folders import Member, find_classes
from vaetrain.data.sources.preprocess import MAX_FILE_BYTES, decode_picture
from vaetrain.data.sources.source import DirectSource, ImageOpener, ImageSource, Listing, SourceItem

DECOMPRESSORS = {".gz": gzip.GzipFile, ".tgz": gzip.GzipFile, ".bz2": bz2.BZ2File, ".xz": lzma.LZMAFile}


@dataclass(frozen=True)
class _ImageFiles(DirectSource):
    path: Path

    @abstractmethod
    def members(self) -> Iterator[Member]:
        """All files."""

    @abstractmethod
    def read(self, item: SourceItem) -> bytes:
        """The content of one."""

    def listing(self) -> Listing:
        return find_classes(self.members(), self.path)

    def open(self, item: SourceItem) -> tuple[Image.Image, dict[str, Any]]:
        if item.num_bytes > MAX_FILE_BYTES:
            raise ValueError(f"it has {item.num_bytes:,} bytes, more than {MAX_FILE_BYTES:,}")
        return decode_picture(self.read(item)), {}


class ImageFolder(_ImageFiles):
    """A folder of images."""

    def members(self) -> Iterator[Member]:
        """All files; links are followed, each folder once. Raises ValueError for a folder that cannot be listed."""
        seen = set()
        for folder, subfolders, names in os.walk(self.path, followlinks=True, onerror=_refuse):
            seen.add(os.path.realpath(folder))
            subfolders[:] = [name for name in subfolders if os.path.realpath(os.path.join(folder, name)) not in seen]
            for name in names:
                file = Path(folder, name)
                relative = file.relative_to(self.path).as_posix()
                yield Member(relative, relative, file.stat().st_size if file.is_file() else 0)

    def read(self, item: SourceItem) -> bytes:
        """The content of one; raises ValueError for a pipe, which may never end, and for a link to nothing."""
        file = self.path / str(item.member)
        if not file.is_file():
            raise ValueError("it is no file, or a link to none")
        return file.read_bytes()


class ImageZip(_ImageFiles):
    """A zip of such a folder, read in place."""

    def members(self) -> Iterator[Member]:
        """All files; raises ValueError when they are encrypted."""
        with _readable(self.path), zipfile.ZipFile(self.path) as archive:
            for info in archive.infolist():
                if info.flag_bits & 1:
                    raise ValueError(f"{self.path} is encrypted; decrypt it first")
                if not info.is_dir():
                    yield Member(info.filename, info.filename, info.file_size)

    def read(self, item: SourceItem) -> bytes:
        """The content of one; raises ValueError when its checksum is wrong or its compression unknown."""
        try:
            return _open_zip(self.path, file_identity(self.path)).read(str(item.member))
        except (zipfile.BadZipFile, NotImplementedError, lzma.LZMAError) as error:
            raise ValueError(str(error)) from error


class ImageTar(_ImageFiles):
    """A tar of such a folder, read in place."""

    def members(self) -> Iterator[Member]:
        """All files with their byte offsets; raises ValueError when the tar is cut short."""
        with _readable(self.path), tarfile.open(self.path) as archive:
            yield from _tar_members(archive)
            # Where tarfile finds no header it stops as if that were the end, which is a block of zeros.
            file = _open_file(self.path, file_identity(self.path))
            if os.pread(file.fileno(), TAR_BLOCK, archive.offset) != bytes(TAR_BLOCK):
                raise tarfile.ReadError(f"no file and no end at byte {archive.offset:,}")

    def read(self, item: SourceItem) -> bytes:
        """The content of one."""
        return os.pread(_open_file(self.path, file_identity(self.path)).fileno(), item.num_bytes, int(item.member))


@dataclass(frozen=True)
class CompressedTar(ImageSource):
    """A compressed tar. It has no random access, so it is decompressed (one file) before its images are opened."""

    path: Path

    def listing(self) -> Listing:
        """All files with their byte offsets in the decompressed tar; raises ValueError when it is damaged."""
        with _readable(self.path), tarfile.open(self.path) as archive:
            return find_classes(_tar_members(archive), self.path)

    def staged(self, file: Path, items: Sequence[SourceItem]) -> ImageOpener:
        """Decompress into `file`; raises ValueError when the tar is damaged or cut short."""
        with _readable(self.path), DECOMPRESSORS[self.path.suffix](self.path, "rb") as source, file.open("wb") as plain:
            shutil.copyfileobj(source, plain, 1 << 20)
        staged = ImageTar(file)
        for _ in staged.members():  # for its look at the end
            pass
        return staged


def _tar_members(archive: tarfile.TarFile) -> Iterator[Member]:
    for info in archive:
        if not info.isdir():  # a link's or device's content is empty, and it is rejected as that
            yield Member(info.name, info.offset_data, info.size if info.isreg() else 0)


def _refuse(error: OSError) -> None:
    raise ValueError(
        f"{error.filename} cannot be listed: {error.strerror}; make it readable, or move it away"
    ) from error


def file_identity(path: Path) -> tuple[int, int, int]:
    """What changes when a file is replaced by another of the same name; what stays open is kept under this too."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    damage = (
        tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError, UnicodeDecodeError,
        NotImplementedError,
    )  # fmt: skip
    try:
        yield
    # A zip may claim UTF-8 for names that are none, and to need a version of the format that there is not.
    except damage as error:
        raise ValueError(f"{path} is damaged or no archive: {error}; download or pack it again") from error


@lru_cache(maxsize=2)
def _open_zip(path: Path, identity: tuple[int, int, int]) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


@lru_cache(maxsize=2)
def _open_file(path: Path, identity: tuple[int, int, int]) -> IO[bytes]:
    return io.FileIO(path)
