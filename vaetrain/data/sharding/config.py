"""The arguments of tools/make_shards.py."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from vaetrain.data.format.manifest import Crop, Encoding, ImageFormat
from vaetrain.data.sources.preprocess import Preprocessing
from vaetrain.data.sources.source import ImageSource, SourceOptions

FACES = "faces"
NEAR_DUPLICATES = 0.99


@dataclass(frozen=True)
class ShardingConfig:
    """Make a shard set of square images."""

    src: Positional[str]
    """A folder, zip or tar of images, with a folder per class, and perhaps train/ and val/ or test/ above those, or a folder of
    WebDataset's tars; a Parquet file with a column of images, or a folder of them (train-*.parquet, test-*.parquet, as on the
    Hugging Face hub); MNIST's four idx files in a folder, zip or tar; another shard set, whose records travel along, and whose
    images stay as they are, byte for byte, unless size, channels, format or quality change; or the word `faces`: the built-in
    drawn animal faces."""

    out: Positional[Path]
    """Folder for the shards and their manifest.json."""

    size: int
    """Height and width of the images, in pixels."""

    val_count: Annotated[int | str | None, tyro.conf.arg(metavar="COUNT|P%")] = None
    """Take the last so many images of a seeded shuffle for validation, or this share of all there are, such as 10% (rounded,
    and at least one); for a SRC without a split of its own, or a shard set, whose own split is given up for it."""

    val_src: str | None = None
    """Take the images of this folder, zip or tar for validation; its classes must be among those of SRC."""

    group_duplicates: bool = False
    """Keep exact and near duplicates on the same side of --val-count; reads all images once more before that, in each of
    --num-tasks too. Such groups are listed in OUT/duplicates.jsonl in any case. A SRC with splits of its own keeps them: what
    straddles is only reported."""

    near_duplicates: float = NEAR_DUPLICATES
    """Correlation of two images' 16×16 gray thumbnails from which on they may be near duplicates, below 1. 0.95 finds more
    among photographs (another crop of the same one), and too many where all images resemble each other, as in MNIST."""

    image_column: str | None = None
    """Column of the images in Parquet files; None: the one that can be of images."""

    label_column: str | None = None
    """Column of the classes in Parquet files, integers or strings; `none`: there are no classes. None: the one that the files
    say is of classes, or that is called label."""

    splits: Literal["auto", "none"] = "auto"
    """auto: folders and files called as splits are (train, Training, seg_test, val2017, dev, …) are split so. none: whatever they
    are called, folders are classes and files are pieces of one set."""

    frames: Literal["first", "all"] = "first"
    """What is taken of files that hold several pictures, as animations and stacks of slices do (GIF, WebP, PNG, TIFF, AVIF)."""

    white: float | None = None
    """Value of white in pixels of more than 8 bits, such as 4095 in 16-bit files of 12-bit pictures, or 1.0 in those of numbers;
    None: 65535 in 16 bits, and others are rejected."""

    gray: bool = False
    """One channel in place of three (MNIST's idx files and grayscale shard sets always have one)."""

    images_per_shard: int = 1000
    """Images in a shard file (the last one of a split may have fewer)."""

    workers: int | None = None
    """Processes that read and encode; None: one per core. The result does not depend on it."""

    format: ImageFormat | None = None
    """File format of the images. None: png (lossless) for MNIST's idx files, that of a SRC shard set, jpg with full
    colour resolution otherwise."""

    quality: int = 95
    """Quality of jpg and webp, 1 to 100."""

    crop: Crop = "center"
    """Images that are not square: keep the central square, pad with black bars, or reject them (none)."""

    seed: int = 0
    """Decides the order of the images, with it the choice of --val-count, and which faces are drawn."""

    num_images: int | None = None
    """How many faces to draw (only for SRC faces); None: 3000."""

    max_rejected: int = 0
    """Images that may be left out because they cannot be read; with more, no manifest is written."""

    task: int | None = None
    """Make only the share of this task, from 0, of `--num-tasks` (for a Slurm array: $SLURM_ARRAY_TASK_ID), all with the same
    other arguments and the same OUT. The last one to finish completes the shard set, as does --merge."""

    num_tasks: int | None = None
    """Tasks that share the work."""

    merge: bool = False
    """Only complete the shard set whose shards the tasks have made."""

    def __post_init__(self) -> None:
        """Refuse what cannot be made."""
        if isinstance(self.val_count, str):
            share_of(self.val_count)
        for name in ("size", "images_per_shard", "val_count", "workers", "num_images", "num_tasks"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"--quality is {self.quality}; it must be between 1 and 100")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed is {self.seed}; it must be between 0 and {2**32 - 1}")
        if self.white is not None and not 0 < self.white < math.inf:
            raise ValueError(f"--white is {self.white}; give the value of white, such as 4095 for 12 bits")
        if not 0 < self.near_duplicates < 1:
            raise ValueError(f"--near-duplicates is {self.near_duplicates}; it must be between 0 and 1, such as 0.99")
        if self.group_duplicates and self.val_count is None:
            raise ValueError("--group-duplicates is about what --val-count deals out; give that too, or leave this out")
        if self.max_rejected < 0:
            raise ValueError(f"--max-rejected is {self.max_rejected}; it must not be negative")
        if self.val_count is not None and self.val_src is not None:
            raise ValueError("--val-count and --val-src both say what to validate on; give one of them")
        if self.num_images is not None and self.src != FACES:
            raise ValueError(f"--num-images says how many faces to draw, but SRC is {self.src}; leave it out")

        if (self.task is None) != (self.num_tasks is None):
            raise ValueError("--task I and --num-tasks N belong together: give both, or neither")
        if self.task is not None and self.num_tasks is not None and not 0 <= self.task < self.num_tasks:
            raise ValueError(
                f"--task is {self.task}; with --num-tasks {self.num_tasks} it is 0 to {self.num_tasks - 1}"
            )
        if self.merge and self.task is not None:
            raise ValueError("--merge completes what all tasks have made; leave out --task and --num-tasks")

    def num_val(self, num_images: int) -> int:
        """How many of so many images are for validation; raises ValueError where that leaves none for training.

        A share is rounded to the nearest whole number, a half up, and leaves at least one image on either side.
        """
        assert self.val_count is not None
        return num_val_of(self.val_count, num_images, self.src)

    def recipe(self, source: ImageSource) -> Preprocessing:
        """What is done to each image of `source`; raises ValueError for grayscale WebP, which there is not."""
        channels = 1 if self.gray else source.channels
        image_format = self.format or source.format
        if channels == 1 and image_format == "webp":
            raise ValueError("WebP has no grayscale; choose --format png or jpg")
        match image_format:
            case "jpg":
                encoding = Encoding("jpg", self.quality, "4:4:4" if channels == 3 else None, crop=self.crop)
            case "webp":
                encoding = Encoding("webp", self.quality, "4:2:0", crop=self.crop)
            case "png":
                encoding = Encoding("png", None, None, crop=self.crop)
        return Preprocessing(self.size, channels, encoding, self.white)

    @property
    def source_options(self) -> SourceOptions:
        """How the originals are read."""
        return SourceOptions(self.image_column, self.label_column, self.splits, self.frames)


def num_val_of(val_count: int | str, num_images: int, src: str) -> int:
    """How many of the images of `src` --val-count takes; raises ValueError where that leaves none for training."""
    if num_images < 2:
        raise ValueError(
            f"--val-count {val_count} needs an image to train on and one to validate on, and {src} has {num_images}; give it "
            "more, or leave out --val-count"
        )
    if isinstance(val_count, str):
        return min(max(1, math.floor(share_of(val_count) * num_images + Fraction(1, 2))), num_images - 1)
    if val_count >= num_images:
        raise ValueError(
            f"--val-count {val_count} leaves no training image of the {num_images} there are; try --val-count 10%"
        )
    return val_count


def share_of(percent: str) -> Fraction:
    """`10%` as a tenth, exactly; raises ValueError for what is no percentage between 0 and 100."""
    number = re.fullmatch(r"([+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)) ?%", percent.strip())
    if number is None:
        raise ValueError(
            f"--val-count is {percent}; it must be a number of images, such as 500, or a share, such as 10%"
        )
    share = Fraction(number[1]) / 100
    if not 0 < share < 1:
        raise ValueError(f"--val-count is {percent}; a share must be above 0% and below 100%, such as 10%")
    return share
