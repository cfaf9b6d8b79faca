"""What a shard set is made from: the command's arguments, and which original becomes which sample of which shard."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tyro.conf import Positional

from vaetrain.data.picture import Recipe
from vaetrain.data.shard_set_source import ShardSetSource, is_shard_set
from vaetrain.data.shards import Crop, Encoding, ImageFormat
from vaetrain.data.sources import Faces, Item, Listing, Source, open_source
from vaetrain.strict_json import sha256_of_json

FACES = "faces"
DEFAULT_NUM_FACES = 3000
SPLIT_ORDER = ("train", "val", "test")


@dataclass(frozen=True)
class ShardingConfig:
    """Make a shard set of square images."""

    src: Positional[str]
    """A folder, zip or tar of images, with a folder per class, and perhaps train/ and val/ or test/ above those; a folder
    of MNIST's four idx files; another shard set, whose records travel along, and whose images stay as they are, byte for
    byte, unless size, channels, format or quality change; or the word `faces`: the built-in drawn animal faces."""

    out: Positional[Path]
    """Folder for the shards and their manifest.json."""

    size: int
    """Height and width of the images, in pixels."""

    val_count: int | None = None
    """Take the last so many images of a seeded shuffle for validation; for a SRC without a split of its own,
    or a shard set, whose own split is given up for it."""

    val_src: str | None = None
    """Take the images of this folder, zip or tar for validation; its classes must be among those of SRC."""

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
        for name in ("size", "images_per_shard", "val_count", "workers", "num_images", "num_tasks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"--quality is {self.quality}; it must be between 1 and 100")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed is {self.seed}; it must be between 0 and {2**32 - 1}")
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

    def recipe(self, source: Source) -> Recipe:
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
        return Recipe(self.size, channels, encoding)


class ShardTask(NamedTuple):
    """Everything a worker needs to write one shard."""

    plan: str
    """Digest of the plan it belongs to."""
    out: Path
    aside: Path
    """Folder for unfinished files, on the same disk as `out`, that no other run writes to."""
    split: str
    number: int
    """The shard's number in its split."""
    first: int
    """Position of its first image in the split."""
    items: tuple[Item, ...]
    source: Source
    recipe: Recipe
    classes: tuple[str, ...]

    @property
    def name(self) -> str:
        """The shard's name without .tar."""
        return f"{self.split}-{self.number:06d}"


@dataclass(frozen=True)
class Plan:
    """Which originals become which split, in which order."""

    classes: tuple[str, ...]
    """Class names, in the order of labels."""
    recipe: Recipe
    """What is done to each original."""
    splits: dict[str, tuple[Source, tuple[Item, ...]]]
    """Per split its source and its originals in shard order."""
    digest: str
    """SHA-256 over all that decides the bytes."""
    ignored: tuple[str, ...]
    """Files that are no images."""

    @classmethod
    def of(cls, config: ShardingConfig) -> Plan:
        """List the originals and deal them out; raises ValueError when the arguments do not fit them."""
        if config.src == FACES:
            source: Source = Faces(config.num_images or DEFAULT_NUM_FACES, config.seed, config.size)
        else:
            source = _source_at(config.src)
        listing = source.listing()
        own_splits = sorted({item.split for item in listing.items if item.split is not None})
        if source.may_resplit and config.val_count is not None:
            own_splits = []
        if own_splits and (config.val_count is not None or config.val_src is not None):
            asked = "--val-count" if config.val_src is None else "--val-src"
            raise ValueError(f"{config.src} has splits of its own ({', '.join(own_splits)}); leave out {asked}")
        shuffled = _shuffle(listing.items, config.seed)
        if own_splits:
            names = sorted(own_splits, key=SPLIT_ORDER.index)
            splits = {name: (source, tuple(item for item in shuffled if item.split == name)) for name in names}
        elif config.val_count is not None:
            if config.val_count >= len(shuffled):
                raise ValueError(
                    f"--val-count {config.val_count} leaves nothing to train on: there are {len(shuffled)} images"
                )
            splits = {
                "train": (source, shuffled[: -config.val_count]),
                "val": (source, shuffled[-config.val_count :]),
            }
        else:
            splits = {"train": (source, shuffled)}
        ignored = listing.ignored
        if config.val_src is not None:
            val_source = _source_at(config.val_src)
            val_listing = val_source.listing()
            splits["val"] = val_source, _shuffle(_relabelled(val_listing, listing, config), config.seed)
            ignored += val_listing.ignored
        recipe = config.recipe(source)
        content = dataclasses.asdict(recipe), listing.classes, config.images_per_shard, config.seed
        items = {name: items for name, (_, items) in splits.items()}
        fingerprints = [source.fingerprint for source, _ in splits.values() if source.fingerprint]
        digest = sha256_of_json([content, items, *fingerprints])
        return cls(listing.classes, recipe, splits, digest, ignored)

    @property
    def num_images(self) -> int:
        """Images of all splits."""
        return sum(len(items) for _, items in self.splits.values())

    def staged(self, folder: Path) -> Plan:
        """The same plan on sources that open each original at once; they may put files into `folder`."""
        sources = {source for source, _ in self.splits.values()}
        staged = {source: source.staged(folder / f"source-{number}.tar") for number, source in enumerate(sources)}
        splits = {name: (staged[source], items) for name, (source, items) in self.splits.items()}
        return dataclasses.replace(self, splits=splits)

    def tasks(self, out: Path, aside: Path, images_per_shard: int) -> Iterator[ShardTask]:
        """The shards to write, in order; see ShardTask."""
        for split, (source, items) in self.splits.items():
            for number, first in enumerate(range(0, len(items), images_per_shard)):
                chosen = items[first : first + images_per_shard]
                yield ShardTask(
                    self.digest, out, aside, split, number, first, chosen, source, self.recipe, self.classes
                )


def _source_at(src: str) -> Source:
    return ShardSetSource.open_set(Path(src)) if is_shard_set(Path(src)) else open_source(src)


def _shuffle(items: tuple[Item, ...], seed: int) -> tuple[Item, ...]:
    # RandomState's stream is frozen (NEP 19), so that the same seed gives the same shards with any NumPy.
    return tuple(items[i] for i in np.random.RandomState(seed).permutation(len(items)))


def _relabelled(val: Listing, train: Listing, config: ShardingConfig) -> tuple[Item, ...]:
    if any(item.split for item in val.items):
        raise ValueError(
            f"--val-src {config.val_src} has splits of its own; name a folder of one of them, or a source without"
        )
    if not val.has_class_folders and not train.has_class_folders:
        return val.items  # one class each, named after the folders
    if unknown := [name for name in val.classes if name not in train.classes]:
        raise ValueError(f"--val-src {config.val_src} has classes that SRC lacks: {', '.join(unknown)}")
    return tuple(item._replace(label=train.classes.index(val.classes[item.label])) for item in val.items)
