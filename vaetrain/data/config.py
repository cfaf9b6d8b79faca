"""What to train on and how to read it, without importing torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

ReaderName = Literal["auto", "indexed", "stream", "resident", "decoded"]

# Batches that each of `num_workers` has ready or in the making.
PREFETCH_BATCHES_PER_WORKER = 4
MOST_WORKERS = 1024


@dataclass(frozen=True)
class DataConfig:
    """The shard sets of a run, the classes kept, and the reader that brings their images to the device."""

    train: str
    """Shard set whose `train` split is learned from: a folder, its manifest.json, or a URL of either: https://,
    or what fsspec knows, such as s3://, gs:// and hf:// with the packages s3fs, gcsfs and huggingface_hub."""

    val: str | None = None
    """Shard set whose `val` split is scored; None: the same as `train`."""

    classes: tuple[str, ...] = ()
    """Keep only the images of these classes; none given: all of them. Labels keep the manifest's numbering."""

    reader: ReaderName = "auto"
    """indexed: random access to local shards. resident: decoded once and kept as uint8. stream: shards read front to
    back, for URLs. decoded: decoded once and kept as uint8 in a file on this node's disk. auto: resident when the decoded split
    fits in `resident_gib`; otherwise decoded where the workers of a GPU could not keep up and it fits in `decoded_gib`, or
    indexed; stream for a URL."""

    num_workers: int | None = None
    """Decoding worker processes per training process (0: decode in the training process). None: chosen from the cores."""

    resident_gib: float = 4.0
    """auto picks resident when a split, decoded to uint8, is no larger than this (GiB on every node, whose processes share
    it; a copy in the memory of each GPU where that has room)."""

    decoded_dir: Path | None = None
    """Folder on this node's own disk for what the decoded reader keeps, for all its processes and later runs; None:
    vaetrain-decoded-UID in the system's folder for temporary files ($TMPDIR)."""

    decoded_gib: float = 100.0
    """Size of that folder at most (GiB): what was not used for longest makes room."""

    timeout_s: float = 120.0
    """A reader that makes no progress at one image for so long (seconds) ends the run, as when storage no longer answers. A
    decoding worker that dies is noticed at once, whatever this says."""

    verify: Literal["sizes", "full"] = "sizes"
    """What is checked before training. sizes: that all files are there and have their sizes. full: also the SHA-256 of
    every shard and that every image decodes, shared among the processes; for local shards, as `verify_shards.py --full`.
    Shards behind a URL are checked as they are read: each image's tar header and, into a cache, each shard's SHA-256.
    There `full` needs a cache and takes the SHA-256 again whenever a shard is opened from it."""

    cache_dir: Path | None = None
    """Folder on this node in which shards read through a URL are kept, for all its processes and later runs; None: none."""

    cache_gib: float = 20.0
    """Size of that folder at most (GiB): the shards that were not used for longest make room."""

    resize: Literal["none", "shorter-side"] = "none"
    """What becomes of images of other sizes than --model.image-size. none: they are refused. shorter-side: as they are read, the
    shorter side is made that long (Lanczos, JPEGs decoded at reduced scale where that is large enough) and a square cut out."""

    crop: Literal["center", "random"] = "center"
    """Which square: the central one, or, in training, one that the seed and the images seen decide (indexed and stream alone);
    validation and scores always take the central one."""

    image_size: int | None = None
    """Height and width of what `resize` makes (pixels); training sets it to --model.image-size."""

    horizontal_flip: bool = True
    """Mirror each training image left to right with probability 1/2, on the device."""

    def location(self, split: Literal["train", "val"]) -> str:
        """The shard set that a split is read from."""
        return self.train if split == "train" or self.val is None else self.val

    @property
    def resized_to(self) -> int | None:
        """The size that images are brought to as they are read; None: they are read as they are stored."""
        if self.resize != "none" and self.image_size is None:
            raise ValueError("--data.resize shorter-side needs a size: give --data.image-size")
        return self.image_size if self.resize != "none" else None

    def as_recorded(self) -> DataConfig:
        """The same from a run's files, which may be somebody else's: only what is a cache already is written to."""
        is_cache = self.cache_dir is not None and (self.cache_dir / ".lock").is_file()
        is_decoded = self.decoded_dir is not None and (self.decoded_dir / ".lock").is_file()
        return replace(
            self,
            cache_dir=self.cache_dir if is_cache else None,
            decoded_dir=self.decoded_dir if is_decoded else None,
        )

    def __post_init__(self) -> None:
        """Refuse values that no reader can honour."""
        for name in ("train", "val"):
            if getattr(self, name) == "":
                raise ValueError(f"--data.{name} is empty; give a shard set's folder, or the URL of its manifest.json")
        if len(set(self.classes)) < len(self.classes):
            raise ValueError(f"--data.classes {' '.join(self.classes)} names a class twice")
        if self.crop == "random" and self.resize == "none":
            raise ValueError(
                "--data.crop random cuts out of images that are resized; pass --data.resize shorter-side, too"
            )
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"--data.image-size is {self.image_size}; it must be at least 1 pixel")
        if self.num_workers is not None and self.num_workers < 0:
            raise ValueError(
                f"--data.num-workers is {self.num_workers}; give 0 or more, or None to choose from the cores"
            )
        if self.num_workers is not None and self.num_workers > MOST_WORKERS:
            raise ValueError(f"--data.num-workers is {self.num_workers}; give at most {MOST_WORKERS}")
        if self.timeout_s <= 0:
            raise ValueError(f"--data.timeout-s is {self.timeout_s:g}; give a positive number of seconds")
        if self.resident_gib < 0:
            raise ValueError(f"--data.resident-gib is {self.resident_gib}; a size is not negative (0: never resident)")
        if not self.decoded_gib >= 0:
            raise ValueError(f"--data.decoded-gib is {self.decoded_gib}; a size is not negative (0: never decoded)")
        if not self.cache_gib > 0:
            raise ValueError(f"--data.cache-gib is {self.cache_gib}; give the largest size the cache may have, in GiB")
