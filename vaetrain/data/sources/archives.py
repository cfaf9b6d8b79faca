"""Image files in folders, zips and tars."""

from __future__ import annotations

import gzip
import importlib
import io
import lzma
import os
import posixpath
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from abc import abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple

from PIL import Image

from vaetrain.data.format.manifest import TAR_BLOCK
from vaetrain.data.format.tar_headers import members_of, open_tar
from vaetrain.data.sources.class_folders import Member, find_classes
from vaetrain.data.sources.file_kind import head_of, kind_of
from vaetrain.data.sources.preprocess import (
    MAX_FILE_BYTES,
    UNREADABLE,
    decode_picture,
    frames_in,
    refuse_unread,
    suffix_of,
)
from vaetrain.data.sources.source import (
    AS_IT_IS,
    DirectSource,
    ImageOpener,
    ImageSource,
    Listing,
    SourceItem,
    SourceOptions,
)
from vaetrain.data.sources.split_names import said_split

LINK = "\0link to "
"""Begins the member of a link that leads to no file of its archive; no file name has a NUL."""
MAX_OPEN_SHARDS = 256  # of those that a folder of tars holds, where the usual limit is 1,024 files
MAX_LINK_BYTES = 4096
MAX_LINKS = 40  # from one to the next, as in Linux
MAX_UNPACKED_RATIO, ALWAYS_UNPACKED_BYTES = 100, 1 << 30
"""How much larger a compressed tar may become, and what any may."""
WINDOWS = (0, 10, 11, 14)  # and DOS: systems by which a zip says that it was made
MANY_FRAMES = frozenset([".gif", ".webp", ".png", ".apng", ".tif", ".tiff", ".avif"])


@dataclass(frozen=True)
class _ImageFiles(DirectSource):
    path: Path
    options: SourceOptions = AS_IT_IS

    @abstractmethod
    def members(self) -> Iterator[Member]:
        """All files."""

    @abstractmethod
    def read(self, item: SourceItem) -> bytes:
        """The content of one."""

    def listing(self) -> Listing:
        members = list(self.members())
        if self.options.frames == "all":
            members = [member._replace(frames=_frames(member, self.peek([member]))) for member in members]
        return find_classes(members, self.path, self.peek, self.options.splits)

    def peek(self, members: Sequence[Member]) -> Iterator[bytes]:
        """The contents of some files; nothing for those that cannot be read."""
        for member in members:
            content = b""
            with suppress(*UNREADABLE):
                if member.num_bytes <= MAX_FILE_BYTES:
                    content = self.read(SourceItem(member.name, 0, None, member.member, member.num_bytes))
            yield content

    def open(self, item: SourceItem) -> tuple[Image.Image, dict[str, Any]]:
        if item.num_bytes > MAX_FILE_BYTES:
            raise ValueError(f"it has {item.num_bytes:,} bytes, more than {MAX_FILE_BYTES:,}")
        if str(item.member).startswith(LINK):
            raise ValueError(f"it is a {str(item.member)[1:]}, which the archive does not hold")
        refuse_unread(item.source.rpartition("#")[0] or item.source)
        return decode_picture(self.read(item), item.frame), {}


def _frames(member: Member, content: Iterable[bytes]) -> tuple[int, ...]:
    return next(map(frames_in, content)) if suffix_of(member.name) in MANY_FRAMES else (0,)


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
        files, links = [], []
        with readable_archive(self.path), zipfile.ZipFile(self.path) as archive:
            for info in archive.infolist():
                if info.flag_bits & 1:
                    raise ValueError(f"{self.path} is encrypted; decrypt it first")
                name = info.filename.replace("\\", "/") if info.create_system in WINDOWS else info.filename
                if stat.S_ISLNK(info.external_attr >> 16) and info.file_size <= MAX_LINK_BYTES:
                    target = archive.read(info).decode(errors="replace")
                    links.append(_Link(name, posixpath.join(posixpath.dirname(name), target), target))
                elif not info.is_dir() and not name.endswith("/"):
                    files.append(Member(name, info.filename, info.file_size))
        return _with_links(files, links)

    def read(self, item: SourceItem) -> bytes:
        """The content of one; raises ValueError when its checksum is wrong or its compression unknown."""
        try:
            return _open_zip(self.path, file_identity(self.path)).read(str(item.member))
        except NotImplementedError as error:
            raise ValueError(f"{error}; pack it again with deflate, as zip does, or unpack it") from error
        except (zipfile.BadZipFile, lzma.LZMAError) as error:
            raise ValueError(str(error)) from error


class ImageTar(_ImageFiles):
    """A tar of such a folder, read in place."""

    def members(self) -> Iterator[Member]:
        """All files with their byte offsets; raises ValueError when the tar is cut short."""
        return _plain_tar_members(self.path)

    def read(self, item: SourceItem) -> bytes:
        """The content of one."""
        return os.pread(_open_file(self.path, file_identity(self.path)).fileno(), item.num_bytes, int(item.member))


class ImageTars(_ImageFiles):
    """A folder of tars that are pieces of one set, such as the shards of WebDataset."""

    def members(self) -> Iterator[Member]:
        """All files of all tars; raises ValueError for tars that do not look like pieces, and for one that is cut short."""
        tars = sorted(file.relative_to(self.path).as_posix() for file in self.path.rglob("*.tar"))
        if len(tars) > 1 and (
            strange := [name for name in tars if not re.search(r"\d\.tar$", name) and said_split(name) is None]
        ):
            raise ValueError(
                f"{self.path} holds tars, and {strange[0]} looks like no piece of a set (train-000000.tar); name one of them, or "
                "unpack each into a folder of its class"
            )
        for name in tars:
            for member in _plain_tar_members(self.path / name):
                yield member._replace(member=f"{name}:{member.member}", shard=name)

    def read(self, item: SourceItem) -> bytes:
        """The content of one."""
        name, _, offset = str(item.member).rpartition(":")
        return os.pread(_open_shard(self.path / name).fileno(), item.num_bytes, int(offset))


@dataclass(frozen=True)
class CompressedTar(ImageSource):
    """A compressed tar. It has no random access, so it is decompressed (one file) before its images are opened."""

    path: Path
    options: SourceOptions = AS_IT_IS

    def listing(self) -> Listing:
        """All files with their byte offsets in the decompressed tar; raises ValueError when it is damaged."""
        with self._opened() as archive:
            members = list(_tar_members(archive))
        if self.options.frames == "all":
            many = [member for member in members if suffix_of(member.name) in MANY_FRAMES]
            frames = dict(zip(many, map(frames_in, self.peek(many)), strict=True))
            members = [member._replace(frames=frames.get(member, (0,))) for member in members]
        return find_classes(members, self.path, self.peek, self.options.splits)

    def peek(self, members: Sequence[Member]) -> Iterator[bytes]:
        """The contents of some files, in one pass over the archive, that holds no more of them than their order demands."""
        left = deque(members)
        wanted = Counter(member.member for member in members)
        contents: dict[str | int, bytes] = {}
        with self._opened() as archive:
            for info in members_of(archive):
                if info.offset_data in wanted and info.isreg() and info.size <= MAX_FILE_BYTES:
                    file = archive.extractfile(info)
                    contents[info.offset_data] = file.read() if file is not None else b""
                while left and (left[0].member in contents or isinstance(left[0].member, str)):
                    member = left.popleft().member
                    wanted[member] -= 1
                    yield contents.get(member, b"") if wanted[member] else contents.pop(member, b"")
        yield from (contents.get(member.member, b"") for member in left)

    def staged(self, file: Path, items: Sequence[SourceItem]) -> ImageOpener:
        """Decompress into `file`; raises ValueError when the tar is damaged or cut short."""
        with readable_archive(self.path), decompressed(self.path) as source, file.open("wb") as plain:
            shutil.copyfileobj(source, plain, 1 << 20)
        staged = ImageTar(file)
        for _ in staged.members():  # for its look at the end
            pass
        return staged

    @contextmanager
    def _opened(self) -> Iterator[tarfile.TarFile]:
        with (
            readable_archive(self.path),
            decompressed(self.path) as source,
            open_tar(source) as archive,
        ):
            yield archive


def is_tar(path: Path) -> bool:
    """Whether a file begins as a plain or compressed tar does; what follows may be damaged."""
    if kind_of(head_of(path)) == "tar":
        return True
    with suppress(OverflowError):  # of a header that says that its file ends beyond 2⁶³ bytes
        return tarfile.is_tarfile(path)
    return False


def is_compressed(path: Path) -> bool:
    """Whether a file's first bytes are those of something that `decompressed` opens."""
    return kind_of(head_of(path)) in DECOMPRESSORS


def decompressed(path: Path) -> Any:
    """What a compressed file holds, as a binary file, by its first bytes; raises ValueError where the library for it is missing.

    Reading on raises tarfile.ReadError where it becomes larger than it may.
    """
    kind = kind_of(head_of(path)) or ""
    for name, opener in DECOMPRESSORS[kind].items():
        with suppress(ImportError):
            most = max(ALWAYS_UNPACKED_BYTES, MAX_UNPACKED_RATIO * path.stat().st_size)
            return _Decompressed(opener(importlib.import_module(name), path), most)
    raise ValueError(f"{path} is compressed with {kind}, which a library reads: pip install 'vaetrain[archives]'")


class _Decompressed(io.RawIOBase):
    """A file that comes out of a decompressor, up to a number of bytes: how many there are nobody knows before."""

    def __init__(self, file: Any, max_bytes: int) -> None:
        self._file, self._max_bytes = file, max_bytes

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        content: bytes = self._file.read(min(size, self._max_bytes + 1) if size >= 0 else self._max_bytes + 1)
        self._check()
        return content

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence == io.SEEK_SET, "its end is not known"
        position: int = self._file.seek(min(offset, self._max_bytes + 1))
        self._check()
        return position

    def tell(self) -> int:
        position: int = self._file.tell()
        return position

    def close(self) -> None:
        self._file.close()
        super().close()

    def _check(self) -> None:
        if self._file.tell() > self._max_bytes:
            raise tarfile.ReadError(
                f"it becomes larger than {self._max_bytes:,} bytes; unpack it yourself if it is meant to"
            )


# Kind → modules that read it, the first that is installed.
DECOMPRESSORS: dict[str, dict[str, Callable[[Any, Path], Any]]] = {
    "gzip": {"gzip": lambda module, path: module.GzipFile(path)},
    "bzip2": {"bz2": lambda module, path: module.BZ2File(path)},
    "xz": {"lzma": lambda module, path: module.LZMAFile(path)},
    "lzma": {"lzma": lambda module, path: module.LZMAFile(path)},
    "zstd": {
        "compression.zstd": lambda module, path: module.ZstdFile(path),
        "backports.zstd": lambda module, path: module.ZstdFile(path),
        # Frames follow each other where several threads compressed, and it would end with the first.
        "zstandard": lambda module, path: module.ZstdDecompressor().stream_reader(
            path.open("rb"), read_across_frames=True
        ),
    },
    "lz4": {"lz4.frame": lambda module, path: module.LZ4FrameFile(path)},
}


class _Link(NamedTuple):
    name: str
    path: str
    """Where it leads, from the archive's root."""
    target: str
    """What it says."""


def _plain_tar_members(path: Path) -> Iterator[Member]:
    with readable_archive(path), path.open("rb") as plain, open_tar(plain) as archive:
        yield from _tar_members(archive)
        # Where tarfile finds no header it stops as if that were the end, which is a block of zeros.
        file = _open_file(path, file_identity(path))
        if os.pread(file.fileno(), TAR_BLOCK, archive.offset) != bytes(TAR_BLOCK):
            raise tarfile.ReadError(f"no file and no end at byte {archive.offset:,}")


def _tar_members(archive: tarfile.TarFile) -> Iterator[Member]:
    """All files, links that lead to one in the archive as that one. A device's content is empty."""
    files, links = [], []
    for info in members_of(archive):
        if info.islnk():
            links.append(_Link(info.name, info.linkname, info.linkname))
        elif info.issym():
            links.append(_Link(info.name, posixpath.join(posixpath.dirname(info.name), info.linkname), info.linkname))
        elif not info.isdir():
            files.append(Member(info.name, info.offset_data, info.size if info.isreg() else 0))
    return _with_links(files, links)


def _with_links(files: list[Member], links: list[_Link]) -> Iterator[Member]:
    yield from files
    content = {posixpath.normpath(file.name): file for file in files}
    leads = {posixpath.normpath(link.name): posixpath.normpath(link.path) for link in links}
    for link in links:
        path = posixpath.normpath(link.path)
        for _ in range(MAX_LINKS):
            path = leads.get(path, path)
        file = content.get(path)
        yield file._replace(name=link.name) if file else Member(link.name, f"{LINK}{link.target}", 0)


def _refuse(error: OSError) -> None:
    raise ValueError(
        f"{error.filename} cannot be listed: {error.strerror}; make it readable, or move it away"
    ) from error


def file_identity(path: Path) -> tuple[int, int, int]:
    """What changes when a file is replaced by another of the same name; what stays open is kept under this too."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


@contextmanager
def readable_archive(path: Path) -> Iterator[None]:
    """Turn what damaged archives raise into a ValueError that names the file."""
    damage = (
        tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError, UnicodeDecodeError,
        NotImplementedError, RuntimeError, OverflowError,
    )  # fmt: skip
    try:
        yield
    # A zip may claim UTF-8 for names that are none, and to need a version of the format that there is not.
    except Exception as error:
        if not isinstance(error, damage) and type(error).__name__ != "ZstdError":
            raise
        raise ValueError(f"{path} is damaged or no archive: {error}; download or pack it again") from error


@lru_cache(maxsize=2)
def _open_zip(path: Path, identity: tuple[int, int, int]) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


@lru_cache(maxsize=MAX_OPEN_SHARDS)
def _open_shard(path: Path) -> IO[bytes]:
    return io.FileIO(path)


@lru_cache(maxsize=2)
def _open_file(path: Path, identity: tuple[int, int, int]) -> IO[bytes]:
    return io.FileIO(path)
