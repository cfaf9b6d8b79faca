"""Where originals come from: folders and archives of images, MNIST's idx files, and the built-in faces.

A source lists its images once, in the process that plans, and opens them by item in any process. It holds a path and no
open file, so that it travels to worker processes; what each process opens stays open in caches here.
"""

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
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vaetrain.data.faces import CLASSES, draw_face
from vaetrain.data.idx import PARTS, find_idx, idx_name, read_idx
from vaetrain.data.picture import MAX_FILE_BYTES, SUFFIXES, Recipe, decode_picture
from vaetrain.data.shards import TAR_BLOCK, ImageFormat

SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
DECOMPRESSORS = {".gz": gzip.GzipFile, ".tgz": gzip.GzipFile, ".bz2": bz2.BZ2File, ".xz": lzma.LZMAFile}


class Item(NamedTuple):
    """One original."""

    source: str
    """Its name, as the shards record it."""

    label: int
    """Position in the listing's classes."""

    split: str | None
    """The split it belongs to, in a source that has splits."""

    member: str | int
    """How its source finds it: a path inside, a byte offset, or a number."""

    num_bytes: int
    """Size of the original."""


@dataclass(frozen=True)
class Listing:
    """All originals of a source, sorted by name."""

    classes: tuple[str, ...]
    """Class names, sorted."""

    items: tuple[Item, ...]
    """The originals."""

    has_class_folders: bool = True
    """False: the images lie in no class folders, and their one class is named after the source."""

    ignored: tuple[str, ...] = ()
    """Files whose names say that they are no images."""


class Source(ABC):
    """Originals of one kind."""

    channels: int = 3
    """What is made of them unless told: 3 for RGB, 1 for grayscale."""
    format: ImageFormat = "jpg"
    """File format that is made of them unless told."""
    fingerprint: str = ""
    """Of the originals' content, where that is known without reading them."""
    may_resplit: bool = False
    """Whether --val-count overrides splits of its own."""

    @abstractmethod
    def listing(self) -> Listing:
        """All originals; raises ValueError when there are none or when they are not laid out as the source demands."""

    @abstractmethod
    def open(self, item: Item) -> tuple[Image.Image, dict[str, Any]]:
        """The picture, and what else its record should say; raises one of UNREADABLE when it is damaged."""

    def encoded(self, item: Item, recipe: Recipe) -> tuple[bytes, dict[str, Any]]:
        """The image after `recipe`, and what else its record should say; raises as `open` and Recipe.apply do."""
        picture, extra = self.open(item)
        return recipe.apply(picture), extra

    def staged(self, file: Path) -> Source:
        """A source of the same originals that opens each at once; `file` may be written for it."""
        return self


def open_source(src: str) -> Source:
    """The source at a path; raises FileNotFoundError or ValueError when there is none."""
    path = Path(src)
    if not path.exists():
        raise FileNotFoundError(f"{src} does not exist; give a folder, zip or tar of images, MNIST's files, or faces")
    if path.is_dir():
        has_idx = any(find_idx(path, part, dimensions) for part in PARTS for dimensions in (1, 3))
        return IdxFolder(path) if has_idx else ImageFolder(path)
    if path.suffix in DECOMPRESSORS:
        return CompressedTar(path)
    if zipfile.is_zipfile(path):
        return ImageZip(path)
    if tarfile.is_tarfile(path):
        return ImageTar(path)
    raise ValueError(f"{src} is no folder, zip or tar; give a folder or an archive of images, MNIST's files, or faces")


class Member(NamedTuple):
    """One file in a folder or an archive."""

    name: str
    member: str | int
    num_bytes: int


@dataclass(frozen=True)
class _Files(Source):
    path: Path

    @abstractmethod
    def members(self) -> Iterator[Member]:
        """All files."""

    @abstractmethod
    def read(self, item: Item) -> bytes:
        """The content of one."""

    def listing(self) -> Listing:
        return arrange(self.members(), self.path)

    def open(self, item: Item) -> tuple[Image.Image, dict[str, Any]]:
        if item.num_bytes > MAX_FILE_BYTES:
            raise ValueError(f"it has {item.num_bytes:,} bytes, more than {MAX_FILE_BYTES:,}")
        return decode_picture(self.read(item)), {}


class ImageFolder(_Files):
    """A folder of images."""

    def members(self) -> Iterator[Member]:
        """All files; links are followed, each folder once."""
        seen = set()
        for folder, subfolders, names in os.walk(self.path, followlinks=True):
            seen.add(os.path.realpath(folder))
            subfolders[:] = [name for name in subfolders if os.path.realpath(os.path.join(folder, name)) not in seen]
            for name in names:
                file = Path(folder, name)
                relative = file.relative_to(self.path).as_posix()
                yield Member(relative, relative, file.stat().st_size if file.is_file() else 0)

    def read(self, item: Item) -> bytes:
        """The content of one; raises ValueError for a pipe, which may never end, and for a link to nothing."""
        file = self.path / str(item.member)
        if not file.is_file():
            raise ValueError("it is no file, or a link to none")
        return file.read_bytes()


class ImageZip(_Files):
    """A zip of such a folder, read in place."""

    def members(self) -> Iterator[Member]:
        """All files; raises ValueError when they are encrypted."""
        with _readable(self.path), zipfile.ZipFile(self.path) as archive:
            for info in archive.infolist():
                if info.flag_bits & 1:
                    raise ValueError(f"{self.path} is encrypted; decrypt it first")
                if not info.is_dir():
                    yield Member(info.filename, info.filename, info.file_size)

    def read(self, item: Item) -> bytes:
        """The content of one; raises ValueError when its checksum is wrong or its compression unknown."""
        try:
            return _open_zip(self.path, _identity(self.path)).read(str(item.member))
        except (zipfile.BadZipFile, NotImplementedError, lzma.LZMAError) as error:
            raise ValueError(str(error)) from error


class ImageTar(_Files):
    """A tar of such a folder, read in place."""

    def members(self) -> Iterator[Member]:
        """All files with their byte offsets; raises ValueError when the tar is cut short."""
        with _readable(self.path), tarfile.open(self.path) as archive:
            yield from _tar_members(archive)
            # Where tarfile finds no header it stops as if that were the end, which is a block of zeros.
            if os.pread(_open_file(self.path, _identity(self.path)).fileno(), TAR_BLOCK, archive.offset) != bytes(
                TAR_BLOCK
            ):
                raise tarfile.ReadError(f"no file and no end at byte {archive.offset:,}")

    def read(self, item: Item) -> bytes:
        """The content of one."""
        return os.pread(_open_file(self.path, _identity(self.path)).fileno(), item.num_bytes, int(item.member))


class CompressedTar(ImageTar):
    """A compressed tar. It has no random access, so it is decompressed (one file) before its images are opened."""

    def members(self) -> Iterator[Member]:
        """All files with their byte offsets in the decompressed tar; raises ValueError when it is damaged."""
        with _readable(self.path), tarfile.open(self.path) as archive:
            yield from _tar_members(archive)

    def staged(self, file: Path) -> Source:
        """Decompress into `file`; raises ValueError when the tar is damaged or cut short."""
        with _readable(self.path), DECOMPRESSORS[self.path.suffix](self.path, "rb") as source, file.open("wb") as plain:
            shutil.copyfileobj(source, plain, 1 << 20)
        staged = ImageTar(file)
        for _ in staged.members():  # for its look at the end
            pass
        return staged


def _tar_members(archive: tarfile.TarFile) -> Iterator[Member]:
    for info in archive:
        if info.isreg():
            yield Member(info.name, info.offset_data, info.size)


@dataclass(frozen=True)
class IdxFolder(Source):
    """The four canonical MNIST files, gzipped or not; t10k is the validation split."""

    path: Path
    channels = 1
    format = "png"

    def listing(self) -> Listing:
        """All images; raises FileNotFoundError for a missing file, ValueError for one that is damaged."""
        items = []
        for part, split in zip(PARTS, ("train", "val"), strict=True):
            labels, images = self._array(part, 1), self._array(part, 3)
            if len(labels) != len(images) or labels.max(initial=0) > 9:
                raise ValueError(
                    f"{self.path}: {part} has {len(images)} images and {len(labels)} labels up to {labels.max()}"
                )
            num_bytes = images[0].size
            items += [Item(f"{part}/{i:05d}", label, split, i, num_bytes) for i, label in enumerate(labels.tolist())]
        return Listing(tuple("0123456789"), tuple(items))

    def open(self, item: Item) -> tuple[Image.Image, dict[str, Any]]:
        """A grayscale picture."""
        part = item.source.split("/")[0]
        return Image.fromarray(self._array(part, 3)[int(item.member)]), {}

    def _array(self, part: str, dimensions: int) -> UInt8[np.ndarray, "..."]:
        file = find_idx(self.path, part, dimensions)
        if file is None:
            raise FileNotFoundError(f"{self.path} lacks {idx_name(part, dimensions)}.gz; MNIST is four files")
        return _open_idx(file, _identity(file), dimensions)


@dataclass(frozen=True)
class Faces(Source):
    """The built-in dataset."""

    num_images: int
    seed: int
    size: int

    def listing(self) -> Listing:
        """Faces 0 to `num_images` − 1, the classes taking turns."""
        items = [Item(f"faces/{self.seed}/{i}", i % len(CLASSES), None, i, 0) for i in range(self.num_images)]
        return Listing(CLASSES, tuple(items))

    def open(self, item: Item) -> tuple[Image.Image, dict[str, Any]]:
        """Draw a face; its record says every factor that made it."""
        pixels, face = draw_face(self.seed, int(item.member), self.size)
        return Image.fromarray(pixels), {"face": face.to_json()}


def arrange(members: Iterable[Member], path: Path) -> Listing:
    """Find splits and classes in the paths of files.

    CLASS/…/NAME.jpg, or SPLIT/CLASS/…/NAME.jpg where `train` lies beside a validation or test folder; without class
    folders all images are of one class, named after the source. Folders that wrap everything are looked through. Raises
    ValueError when there is no image, and when images lie both inside and outside class folders.
    """
    visible = {
        PurePosixPath(member.name).parts: member
        for member in members
        if not any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(member.name).parts)
    }
    images = {parts: member for parts, member in visible.items() if PurePosixPath(parts[-1]).suffix.lower() in SUFFIXES}
    ignored = tuple(sorted("/".join(parts) for parts in visible.keys() - images.keys()))
    if not images:
        raise ValueError(f"{path} has no images ({', '.join(sorted(SUFFIXES))}), only {len(ignored)} other file(s)")
    while len({parts[0] for parts in images}) == 1 and all(len(parts) > 2 for parts in images):
        images = {parts[1:]: member for parts, member in images.items()}
    splits = _splits({parts[0] for parts in images if len(parts) > 1}, path)
    if splits and any(len(parts) == 1 for parts in images):
        raise ValueError(f"{path} has images beside its folders {', '.join(sorted(splits))}; move them into one")
    class_parts = {parts: parts[1 if splits else 0 : -1] for parts in images}
    has_class_folders = any(class_parts.values())
    if has_class_folders and not all(class_parts.values()):
        stray = next("/".join(parts) for parts, folders in class_parts.items() if not folders)
        raise ValueError(f"{path} has class folders, but {stray} lies in none; move or remove such images")
    name = path.resolve().name.split(".")[0]
    classes = tuple(sorted({folders[0] for folders in class_parts.values()})) if has_class_folders else (name,)
    labels = {class_name: label for label, class_name in enumerate(classes)}
    items = (
        Item(
            source="/".join(parts),
            label=labels[class_parts[parts][0]] if has_class_folders else 0,
            split=splits[parts[0]] if splits else None,
            member=member.member,
            num_bytes=member.num_bytes,
        )
        for parts, member in images.items()
    )
    return Listing(classes, tuple(sorted(items)), has_class_folders, ignored)


def _splits(folders: set[str], path: Path) -> dict[str, str]:
    # CIFAR-100 has a class called train, so that name alone makes no split.
    held_out = folders & (SPLIT_FOLDERS.keys() - {"train"})
    if "train" not in folders or not held_out:
        return {}
    if others := folders - SPLIT_FOLDERS.keys():
        raise ValueError(
            f"{path} has {', '.join(sorted(others))} beside its splits; name the folders to read one by one"
        )
    splits = {folder: SPLIT_FOLDERS[folder] for folder in folders}
    return splits if "val" in splits.values() else splits | {"test": "val"}


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    damage = (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError)
    try:
        yield
    except damage as error:
        raise ValueError(f"{path} is damaged or no archive: {error}; download or pack it again") from error


def _identity(path: Path) -> tuple[int, int, int]:
    # What stays open is kept under this too: a file may be replaced by another of the same name.
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


@lru_cache(maxsize=2)
def _open_zip(path: Path, identity: tuple[int, int, int]) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


@lru_cache(maxsize=2)
def _open_file(path: Path, identity: tuple[int, int, int]) -> IO[bytes]:
    return io.FileIO(path)


@lru_cache(maxsize=4)
def _open_idx(path: Path, identity: tuple[int, int, int], dimensions: int) -> UInt8[np.ndarray, "..."]:
    return read_idx(path, dimensions)
