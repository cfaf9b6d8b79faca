"""MNIST's four idx files as originals, wherever they lie: in a folder, torchvision's root, a zip or a tar."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vaetrain.data.format.tar_headers import members_of, open_tar
from vaetrain.data.sources.archives import decompressed, file_identity, is_compressed, readable_archive
from vaetrain.data.sources.idx import PARTS, find_idx, idx_name, parse_idx_name, read_idx
from vaetrain.data.sources.preprocess import PICTURE_SUFFIXES, suffix_of
from vaetrain.data.sources.source import DirectSource, Listing, SourceItem

MAPPING = "-mapping.txt"
"""Ends the name of EMNIST's file of characters: a label and the codes of what is written, a line each."""


@dataclass(frozen=True)
class IdxSource(DirectSource):
    """MNIST's four files; t10k is the validation split. EMNIST's lie on their side, and their classes are characters."""

    path: Path
    """The folder or the archive."""
    names: tuple[tuple[str, int, str], ...]
    """Part, dimensions and name in it of each file."""
    mapping: str | None = None
    """EMNIST's file of characters."""
    channels = 1
    format = "png"

    @classmethod
    def find(cls, path: Path) -> IdxSource | None:
        """The four files in a folder or an archive, or beside one that is named; None where there is none of them.

        Raises ValueError where there are several sets.
        """
        wanted = parse_idx_name(path.name) if path.is_file() else None
        root = path.parent if wanted else path
        names = []
        for name in _names(root):
            names.append(name)
            if suffix_of(name) in PICTURE_SUFFIXES and not any(map(parse_idx_name, names)):
                return None  # without listing a million of them
        found = find_idx(names, root, wanted.set if wanted else None)
        if found is None:
            return None
        in_set = parse_idx_name(next(iter(found.values())))
        assert in_set is not None
        mapping = next(
            (name for name in names if in_set.set and PurePosixPath(name).name == f"{in_set.set}{MAPPING}"), None
        )
        return cls(root, tuple((part, dimensions, name) for (part, dimensions), name in sorted(found.items())), mapping)

    def listing(self) -> Listing:
        """All images; raises FileNotFoundError for a missing file, ValueError for one that is damaged."""
        items = []
        largest = 9
        for part, split in zip(PARTS, ("train", "val"), strict=True):
            labels, images = self._array(part, 1), self._array(part, 3)
            if len(labels) != len(images):
                raise ValueError(
                    f"{self.path}: {part} has {len(images)} images and {len(labels)} labels; download it again"
                )
            largest = max(largest, int(labels.max(initial=0)))
            num_bytes = images[0].size
            items += [
                SourceItem(f"{part}/{i:05d}", label, split, i, num_bytes) for i, label in enumerate(labels.tolist())
            ]
        if largest > 9 and not self._is_emnist:
            raise ValueError(
                f"{self.path}: train and t10k have labels up to {largest}, and MNIST's are 0 to 9; if these are EMNIST's, give "
                "them their own names back (emnist-letters-train-images-idx3-ubyte.gz, …), which tell how they are turned"
            )
        if not self._is_emnist:
            return Listing(tuple("0123456789"), tuple(items))
        names = self._characters() or {label: str(label) for label in {item.label for item in items}}
        labels_there = sorted(names)
        position = {label: i for i, label in enumerate(labels_there)}
        if unknown := {item.label for item in items} - position.keys():
            raise ValueError(
                f"{self.path}: {self.mapping} has no character for label {min(unknown)}; download it again"
            )
        items = [item._replace(label=position[item.label]) for item in items]
        return Listing(tuple(names[label] for label in labels_there), tuple(items))

    def open(self, item: SourceItem) -> tuple[Image.Image, dict[str, Any]]:
        """A grayscale picture."""
        pixels = self._array(item.source.split("/")[0], 3)[int(item.member)]
        return Image.fromarray(np.ascontiguousarray(pixels.T) if self._is_emnist else pixels), {}

    @property
    def _is_emnist(self) -> bool:
        return any("emnist" in name.lower() for *_, name in self.names)

    def _characters(self) -> dict[int, str] | None:
        """Label → character, the first of those that EMNIST takes for one (A of A and a)."""
        if self.mapping is None:
            return None
        with opened_in(self.path, self.mapping) as file:
            lines = [
                line.split() for line in file.read(1 << 16).decode("ascii", "replace").splitlines() if line.strip()
            ]
        try:
            return {int(label): chr(int(code)) for label, code, *_ in lines}
        except ValueError as error:
            raise ValueError(f"{self.path}: {self.mapping} is damaged: {error}; download it again") from error

    def _array(self, part: str, dimensions: int) -> UInt8[np.ndarray, "..."]:
        name = next((name for p, d, name in self.names if (p, d) == (part, dimensions)), None)
        if name is None:
            raise FileNotFoundError(f"{self.path} lacks {idx_name(part, dimensions)}.gz; MNIST is four files")
        file = self.path / name if self.path.is_dir() else self.path
        return _open_idx(self.path, name, file_identity(file), dimensions)


@contextmanager
def opened_in(path: Path, name: str) -> Iterator[Any]:
    """A file in a folder, zip or tar; raises ValueError when the archive is damaged."""
    if path.is_dir():
        with (path / name).open("rb") as file:
            yield file
        return
    with readable_archive(path):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive, archive.open(name) as file:
                yield file
            return
        with (
            decompressed(path) if is_compressed(path) else path.open("rb") as plain,
            open_tar(plain) as tar,
        ):
            found = next((info for info in members_of(tar) if info.name == name and info.isreg()), None)
            member = found and tar.extractfile(found)
            if not member:
                raise ValueError(f"{path}: {name} is no file")
            yield member


def _names(path: Path) -> Iterator[str]:
    if path.is_dir():
        for folder, folders, files in os.walk(path):
            depth = len(Path(folder).relative_to(path).parts)
            folders[:] = [name for name in folders if depth < 3 and not name.startswith(".")]  # ROOT/MNIST/raw
            yield from (Path(folder, name).relative_to(path).as_posix() for name in files)
        return
    with readable_archive(path):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                yield from (info.filename for info in archive.infolist() if not info.is_dir())
            return
        with (
            decompressed(path) if is_compressed(path) else path.open("rb") as plain,
            open_tar(plain) as tar,
        ):
            yield from (info.name for info in members_of(tar) if info.isreg())


@lru_cache(maxsize=4)
def _open_idx(path: Path, name: str, identity: tuple[int, int, int], dimensions: int) -> UInt8[np.ndarray, "..."]:
    with opened_in(path, name) as file:
        return read_idx(path / name, dimensions, file)
