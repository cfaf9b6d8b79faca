"""Which kind of source lies at a path, and the built-in faces."""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from vaetrain.data.format.tar_headers import is_tar
from vaetrain.data.sources.archives import CompressedTar, ImageFolder, ImageTar, ImageTars, ImageZip, is_compressed
from vaetrain.data.sources.faces.faces import CLASSES, draw_face
from vaetrain.data.sources.file_kind import head_of, kind_of
from vaetrain.data.sources.idx import parse_idx_name
from vaetrain.data.sources.idx_source import IdxSource
from vaetrain.data.sources.parquet import ParquetSource, is_parquet
from vaetrain.data.sources.preprocess import PICTURE_SUFFIXES, suffix_of
from vaetrain.data.sources.shard_set import ShardSetSource, is_shard_set
from vaetrain.data.sources.source import DirectSource, ImageSource, Listing, SourceItem, SourceOptions

WHAT_THERE_IS = "a folder, zip or tar of images, Parquet files, MNIST's files, a shard set, or faces"


def open_source(src: str, options: SourceOptions | None = None, **others: Any) -> ImageSource:
    """The source at a path, of the kind that its first bytes say, read as `options` say (or `others`, fields of SourceOptions).

    Raises FileNotFoundError or ValueError when there is none.
    """
    options = replace(options or SourceOptions(), **others)
    path = Path(src)
    if not path.exists():
        raise FileNotFoundError(f"{src} does not exist; give {WHAT_THERE_IS}")
    if is_parquet(path):
        _refuse_frames(src, options, "a Parquet file")
        return ParquetSource.open_files(path, options)
    if options.image_column or options.label_column:
        raise ValueError(f"--image-column and --label-column are for Parquet files, and {src} is none; leave them out")
    if is_shard_set(path):
        _refuse_frames(src, options, "a shard set")
        return ShardSetSource.open_set(path)
    if path.is_file() and not (is_compressed(path) or zipfile.is_zipfile(path) or is_tar(path)):
        if parse_idx_name(path.name) and (idx := IdxSource.find(path)):
            return idx
        kind = kind_of(head_of(path))
        if suffix_of(src) in PICTURE_SUFFIXES:
            raise ValueError(f"{src} is one image; give the folder of all of them")
        if kind == "zip":
            raise ValueError(f"{src} is damaged: it begins as a zip does and has no end; download or pack it again")
        unpack = kind in ("7z", "RAR", "compress (.Z)")
        what = (
            f"is {kind}, which is not read: unpack it"
            if unpack
            else f"is no source of images{f' but {kind}' if kind else ''}"
        )
        raise ValueError(f"{src} {what}; give {WHAT_THERE_IS}")
    if idx := IdxSource.find(path):
        _refuse_frames(src, options, "MNIST's")
        return idx
    if path.is_dir():
        return (ImageTars if _holds_tars_alone(path) else ImageFolder)(path, options)
    if is_compressed(path):
        return CompressedTar(path, options)
    if zipfile.is_zipfile(path):
        return ImageZip(path, options)
    return ImageTar(path, options)


def _refuse_frames(src: str, options: SourceOptions, kind: str) -> None:
    if options.frames == "all":
        raise ValueError(f"--frames all is for image files in folders and archives, and {src} is {kind}; leave it out")


def _holds_tars_alone(folder: Path) -> bool:
    """Whether there are tars and no pictures in a folder; its first picture ends the search."""
    has_tars = False
    for _, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for suffix in {suffix_of(name) for name in names if not name.startswith(".")}:
            if suffix in PICTURE_SUFFIXES:
                return False
            has_tars |= suffix == ".tar"
    return has_tars


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
