"""An opened folder of shards: its manifest, its index, and whether both are true. The format: manifest.py."""

from __future__ import annotations

import hashlib
import io
import os
import shlex
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import SafetensorError

from vaetrain.data.format.index import SplitIndex, unpack_index
from vaetrain.data.format.manifest import BROKEN_IMAGE, INDEX_NAME, MANIFEST_NAME, Manifest, Shard, Split
from vaetrain.data.format.tar_index import sha256_of_headers
from vaetrain.files import sha256_of_file


class ShardSet:
    """An opened folder of shards."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | Path) -> ShardSet:
        """Open a folder, or its manifest.json; raises FileNotFoundError when there is no manifest."""
        folder = Path(path).parent if Path(path).name == MANIFEST_NAME else Path(path)
        if not (folder / MANIFEST_NAME).is_file():
            if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
                # make_shards refuses a folder that is in use, so its shards go beside it.
                out = folder.with_name(f"{folder.name.split('.')[0] or folder.name}-shards")
                raise FileNotFoundError(
                    f"{folder} is no shard set (it has no {MANIFEST_NAME}); make one of what it holds in another folder, python "
                    f"tools/make_shards.py {shlex.quote(str(folder))} {shlex.quote(str(out))} --size N, and name that one"
                )
            state = f"has no {MANIFEST_NAME}" if folder.is_dir() else "does not exist"
            raise FileNotFoundError(
                f"shard set {folder} {state}; make one with tools/make_shards.py SRC {folder} --size N"
            )
        return cls(folder, Manifest.read(folder / MANIFEST_NAME))

    def path(self, shard: Shard) -> Path:
        """Where a shard lies that is not behind a URL."""
        return Path(self.place(shard))

    def place(self, shard: Shard) -> str:
        """Where a shard lies: a path or a URL."""
        return shard.url if shard.url and "://" in shard.url else os.path.join(self.folder, shard.url or shard.name)

    @property
    def is_remote(self) -> bool:
        """Whether it points at shards behind URLs."""
        return any("://" in (shard.url or "") for split in self.manifest.splits.values() for shard in split.shards)

    def resized_to(self, image_size: int | None) -> ShardSet:
        """The set as it is read with `--data.resize shorter-side`: its images of this size. None: as they are stored.

        Raises ValueError for images of many sizes that are to be read as they are.
        """
        if image_size == self.manifest.image_size:
            return self
        if image_size is not None:
            return ShardSet(
                self.folder, replace(self.manifest, image_size=image_size, resized="shorter-side", fingerprint="")
            )
        if not self.manifest.image_size:
            raise ValueError(
                f"{self.folder} points at shards whose images have sizes of their own; pass --data.resize shorter-side"
            )
        return self

    def index(self, split: str) -> SplitIndex:
        """The index of a split; raises ValueError naming the splits there are, or when the index is not the manifest's."""
        if split not in self.manifest.splits:
            raise ValueError(f"{self.folder} has no split {split}; it has {', '.join(self.manifest.splits)}")
        return self._indices[split]

    @cached_property
    def _indices(self) -> dict[str, SplitIndex]:
        remedy = "write the shard set again with tools/make_shards.py"
        return read_index(self.folder / INDEX_NAME, self.manifest.index_sha256, self.manifest.splits, remedy)

    def verify(self, full: bool = False, *, split: str | None = None, part: int = 0, num_parts: int = 1) -> None:
        """Raise ValueError listing every shard that is missing or of the wrong size, and a damaged index.

        `full` also takes each shard's SHA-256 and decodes each image. No shard is skipped because another one is bad.
        `split` leaves out the other splits' shards, and `num_parts` processes share the rest: every num_parts-th each.
        """
        if self.is_remote:
            raise ValueError(f"{self.folder} points at shards behind URLs, which are checked as they are read")
        problems: list[str] = []
        try:
            indices: dict[str, SplitIndex] = self._indices
        except (ValueError, FileNotFoundError) as error:
            problems.append(str(error))
            indices = {}
        for split_name in [split] if split else self.manifest.splits:
            for position, shard in enumerate(self.manifest.splits[split_name].shards):
                if position % num_parts != part:
                    continue
                if problem := problem_of_file(self.path(shard), shard, full):
                    problems.append(problem)
                elif full and split_name in indices:
                    problems += self._undecodable(shard, position, indices[split_name])
        if problems:
            listing = "".join(f"\n  {problem}" for problem in problems)
            raise ValueError(
                f"{self.folder} has {len(problems)} problem(s):{listing}\n"
                f"Copy the files named again from where they came, or delete {self.folder} and run tools/make_shards.py."
            )

    def _undecodable(self, shard: Shard, position: int, index: SplitIndex) -> list[str]:
        if shard.url:
            return self._undecodable_elsewhere(shard, position, index)
        expected = (self.manifest.image_size, self.manifest.image_size), "L" if self.manifest.channels == 1 else "RGB"
        from vaetrain.data.format.decode import decode_into  # here, since it brings torch, which sharding does without

        problems = []
        pixels = np.empty((self.manifest.image_size, self.manifest.image_size, self.manifest.channels), np.uint8)
        with self.path(shard).open("rb") as file:
            for image in np.flatnonzero(index.shard == position):
                file.seek(index.offset[image])
                try:
                    content = file.read(index.num_bytes[image])
                    with Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "WEBP")) as picture:
                        found = picture.size, picture.mode
                    if found == expected:
                        decode_into(content, pixels)  # as training will
                except BROKEN_IMAGE as error:
                    problems.append(f"{shard.name}: the image at byte {index.offset[image]} does not decode: {error}")
                else:
                    if found != expected:
                        problems.append(
                            f"{shard.name}: the image at byte {index.offset[image]} is {found}, not {expected}"
                        )
        return problems

    def _undecodable_elsewhere(self, shard: Shard, position: int, index: SplitIndex) -> list[str]:
        problems = []
        with self.path(shard).open("rb") as file:
            for image in np.flatnonzero(index.shard == position):
                file.seek(index.offset[image])
                try:
                    with Image.open(io.BytesIO(file.read(index.num_bytes[image]))) as picture:
                        picture.load()
                except BROKEN_IMAGE as error:
                    problems.append(f"{shard.name}: the image at byte {index.offset[image]} does not decode: {error}")
        return problems


def read_index(path: Path, sha256: str, splits: Mapping[str, Split], remedy: str) -> dict[str, SplitIndex]:
    """The index file of these splits; raises FileNotFoundError, or ValueError when it is not the one with this SHA-256."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; copy it from where the shards came from, or {remedy}")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"{path} is not the index that the manifest vouches for (its SHA-256 differs); {remedy}")
    try:
        indices = unpack_index(content, splits)
        for name, split in splits.items():
            split.check(indices[name], name)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is no valid index: {error}; {remedy}") from error
    return indices


def problem_of_file(path: Path, shard: Shard, full: bool) -> str | None:
    """What is wrong with a shard's file, if anything is: by its size and, with `full`, its SHA-256."""
    if not path.is_file():
        return f"{shard.name} is missing"
    if (num_bytes := path.stat().st_size) != shard.num_bytes:
        return f"{shard.name} has {num_bytes:,} bytes, not {shard.num_bytes:,}"
    if full and shard.url:
        try:
            found = sha256_of_headers(path)
        except ValueError as error:
            return f"{shard.name} is damaged: {error}"
        if found != shard.sha256:
            return f"{shard.name} holds other files than when it was indexed; run tools/index_shards.py again"
    elif full and sha256_of_file(path) != shard.sha256:
        return f"{shard.name} has another SHA-256 than in the manifest: its content was changed"
    return None
