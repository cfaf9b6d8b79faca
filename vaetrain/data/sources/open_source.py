"""Which kind of source lies at a path, MNIST's idx files, and the built-in faces."""

from __future__ import annotations

import tarfile
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vaetrain.data.sources.archives import DECOMPRESSORS, CompressedTar, ImageFolder, ImageTar, ImageZip, file_identity
from vaetrain.data.sources.faces.faces import CLASSES, draw_face
from vaetrain.data.sources.idx import PARTS, find_idx, idx_name, read_idx
from vaetrain.data.sources.parquet import ParquetSource, is_parquet
from vaetrain.data.sources.shard_set import ShardSetSource, is_shard_set
from vaetrain.data.sources.source import DirectSource, ImageSource, Listing, SourceItem

WHAT_THERE_IS = "a folder, zip or tar of images, Parquet files, MNIST's files, a shard set, or faces"


def open_source(src: str, image_column: str | None = None, label_column: str | None = None) -> ImageSource:
    """The source at a path; the columns are for Parquet. Raises FileNotFoundError or ValueError when there is none."""
    path = Path(src)
    if not path.exists():
        raise FileNotFoundError(f"{src} does not exist; give {WHAT_THERE_IS}")
    if is_parquet(path):
        return ParquetSource.open_files(path, image_column, label_column)
    if image_column or label_column:
        raise ValueError(f"--image-column and --label-column are for Parquet files, and {src} is none; leave them out")
    if is_shard_set(path):
        return ShardSetSource.open_set(path)
    if path.is_dir():
        has_idx = any(find_idx(path, part, dimensions) for part in PARTS for dimensions in (1, 3))
        return IdxFolder(path) if has_idx else ImageFolder(path)
    if path.suffix in DECOMPRESSORS:
        return CompressedTar(path)
    if zipfile.is_zipfile(path):
        return ImageZip(path)
    if tarfile.is_tarfile(path):
        return ImageTar(path)
    raise ValueError(f"{src} is no source of images; give {WHAT_THERE_IS}")


@dataclass(frozen=True)
class IdxFolder(DirectSource):
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
            items += [
                SourceItem(f"{part}/{i:05d}", label, split, i, num_bytes) for i, label in enumerate(labels.tolist())
            ]
        return Listing(tuple("0123456789"), tuple(items))

    def open(self, item: SourceItem) -> tuple[Image.Image, dict[str, Any]]:
        """A grayscale picture."""
        part = item.source.split("/")[0]
        return Image.fromarray(self._array(part, 3)[int(item.member)]), {}

    def _array(self, part: str, dimensions: int) -> UInt8[np.ndarray, "..."]:
        file = find_idx(self.path, part, dimensions)
        if file is None:
            raise FileNotFoundError(f"{self.path} lacks {idx_name(part, dimensions)}.gz; MNIST is four files")
        return _open_idx(file, file_identity(file), dimensions)


@dataclass(frozen=True)
class Faces(DirectSource):
    """The built-in dataset."""

    num_images: int
    seed: int
    size: int

    def listing(self) -> Listing:
        """Faces 0 to `num_images` − 1, the classes taking turns."""
        items = [SourceItem(f"faces/{self.seed}/{i}", i % len(CLASSES), None, i, 0) for i in range(self.num_images)]
        return Listing(CLASSES, tuple(items))

    def open(self, item: SourceItem) -> tuple[Image.Image, dict[str, Any]]:
        """Draw a face; its record says every factor that made it."""
        pixels, face = draw_face(self.seed, int(item.member), self.size)
        return Image.fromarray(pixels), {"face": face.to_json()}


@lru_cache(maxsize=4)
def _open_idx(path: Path, identity: tuple[int, int, int], dimensions: int) -> UInt8[np.ndarray, "..."]:
    return read_idx(path, dimensions)
