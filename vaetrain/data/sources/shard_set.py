"""A shard set as originals for another one: its images are re-sized, re-split or re-encoded, and their records travel along."""

from __future__ import annotations

import json
import os
import tarfile
from dataclasses import dataclass, replace
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import Any

from PIL import Image

from vaetrain.data.format.manifest import MANIFEST_NAME, TAR_BLOCK, ImageFormat, Manifest
from vaetrain.data.format.shard_set import ShardSet
from vaetrain.data.sources.preprocess import Preprocessing, decode_picture
from vaetrain.data.sources.source import DirectSource, Listing, Sample, SourceItem

# Shuffled reading over thousands of shards must stay below the usual limit of 1,024 open files.
MAX_OPEN_SHARDS = 256
MAX_RECORD_BYTES = 1 << 20
SPLITS = ("train", "val", "test")


def is_shard_set(path: Path) -> bool:
    """Whether a path is a shard set's folder or manifest, and not a folder of images that has some manifest.json in it."""
    if path.name == MANIFEST_NAME:
        return path.is_file()
    return (path / MANIFEST_NAME).is_file() and any(path.glob("*.tar"))


@dataclass(frozen=True)
class ShardSetSource(DirectSource):
    """The images of a shard set, which is checked (not each byte of it) when it is listed."""

    path: Path
    """Its folder."""
    fingerprint: str
    """The data's, so that a rerun sees when it has become other data."""
    channels: int
    format: ImageFormat
    may_resplit = True

    @classmethod
    def open_set(cls, path: Path) -> ShardSetSource:
        """The shard set at a path; raises ValueError when its manifest is damaged."""
        shard_set = ShardSet.open(path)
        manifest = shard_set.manifest
        return cls(shard_set.folder, manifest.fingerprint, manifest.channels, manifest.encoding.format)

    def listing(self) -> Listing:
        """All images, named after where they lie; raises ValueError listing shards that are missing or of a wrong size."""
        shard_set = ShardSet.open(self.path)
        shard_set.verify()
        splits = shard_set.manifest.splits
        if unknown := splits.keys() - set(SPLITS):
            raise ValueError(f"{self.path} has a split {sorted(unknown)[0]!r}; only {', '.join(SPLITS)} are known")
        items = []
        for name, split in splits.items():
            index = shard_set.index(name)
            kept = None if splits.keys() == {"train"} else name
            for shard, offset, num_bytes, label in zip(
                index.shard.tolist(), index.offset.tolist(), index.num_bytes.tolist(), index.label.tolist(), strict=True
            ):
                where = f"{split.shards[shard].name}:{offset}"
                items.append(SourceItem(where, label, kept, where, num_bytes))
        classes = shard_set.manifest.classes
        return Listing(classes, tuple(items), has_class_folders=len(classes) > 1)

    def open(self, item: SourceItem) -> tuple[Image.Image, dict[str, Any]]:
        """The picture, and all that its record says but the class, which may have another label now."""
        return decode_picture(self._image(item)), self._record(item)

    def sample(self, item: SourceItem, recipe: Preprocessing) -> Sample:
        """The image after `recipe`: if it is as asked for already, its own bytes, since encoding again would cost quality."""
        picture, record = self.open(item)
        manifest = _manifest(self.path, self.fingerprint)
        wanted = replace(recipe.encoding, crop=manifest.encoding.crop)  # they are square, so no crop would change them
        same_recipe = recipe == Preprocessing(manifest.image_size, manifest.channels, recipe.encoding, recipe.white)
        if same_recipe and wanted == manifest.encoding and picture.size == (recipe.size, recipe.size):
            return Sample(self._image(item), recipe.prepare(picture), record)
        prepared = recipe.prepare(picture)
        return Sample(recipe.encode(prepared), prepared, record)

    def _image(self, item: SourceItem) -> bytes:
        return self._read(item, 0, item.num_bytes)

    def _record(self, item: SourceItem) -> dict[str, Any]:
        start = item.num_bytes + -item.num_bytes % TAR_BLOCK
        try:
            header = tarfile.TarInfo.frombuf(self._read(item, start, TAR_BLOCK), "utf-8", "strict")
            if not (header.isreg() and header.name.endswith(".json") and header.size <= MAX_RECORD_BYTES):
                raise ValueError(f"{header.name!r} of {header.size:,} bytes follows it")
            record = json.loads(self._read(item, start + TAR_BLOCK, header.size))
        except (tarfile.HeaderError, ValueError, RecursionError) as error:  # JSON can be nested too deep
            raise ValueError(f"it has no record: {error}") from error
        if not isinstance(record, dict):
            raise ValueError("its record is no mapping")
        return {name: value for name, value in record.items() if name not in ("label", "class")}

    def _read(self, item: SourceItem, start: int, num_bytes: int) -> bytes:
        shard, _, offset = item.source.partition(":")
        return os.pread(_open_shard(self.path / shard).fileno(), num_bytes, int(offset) + start)


@lru_cache(maxsize=MAX_OPEN_SHARDS)
def _open_shard(path: Path) -> FileIO:
    return FileIO(path)


@lru_cache(maxsize=2)
def _manifest(path: Path, fingerprint: str) -> Manifest:
    manifest = Manifest.read(path / MANIFEST_NAME)
    assert manifest.fingerprint == fingerprint, f"{path} was replaced while it was read"
    return manifest
