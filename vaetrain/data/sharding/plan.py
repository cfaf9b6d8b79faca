"""What a shard set is made from: which original becomes which sample of which shard."""

from __future__ import annotations

import dataclasses
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from vaetrain.data.sharding.config import FACES, NEAR_DUPLICATES, ShardingConfig
from vaetrain.data.sharding.task import ShardTask
from vaetrain.data.sharding.val_split import groups_of, split_train_val
from vaetrain.data.sources.open_source import Faces, open_source
from vaetrain.data.sources.preprocess import Preprocessing
from vaetrain.data.sources.source import Ignored, ImageSource, Listing, SourceItem
from vaetrain.strict_json import sha256_of_json

DEFAULT_NUM_FACES = 3000
SPLIT_ORDER = ("train", "val", "test")


@dataclass(frozen=True)
class ShardingPlan:
    """Which originals become which split, in which order."""

    classes: tuple[str, ...]
    """Class names, in the order of labels."""
    recipe: Preprocessing
    """What is done to each original."""
    splits: dict[str, tuple[ImageSource, tuple[SourceItem, ...]]]
    """Per split its source and its originals in shard order."""
    digest: str
    """SHA-256 over all that decides the bytes."""
    ignored: tuple[Ignored, ...]
    """Files that are not taken."""
    notes: tuple[str, ...] = ()
    """What the sources say besides."""

    @classmethod
    def of(cls, config: ShardingConfig) -> ShardingPlan:
        """List the originals and deal them out; raises ValueError when the arguments do not fit them."""
        if config.src == FACES:
            source: ImageSource = Faces(config.num_images or DEFAULT_NUM_FACES, config.seed, config.size)
        else:
            source = open_source(config.src, config.source_options)
        listing = source.listing()
        recipe = config.recipe(source)
        own_splits = sorted({item.split for item in listing.items if item.split is not None})
        if source.may_resplit and config.val_count is not None:
            own_splits = []
        if own_splits and (config.val_count is not None or config.val_src is not None):
            asked = "--val-count" if config.val_src is None else "--val-src"
            raise ValueError(f"{config.src} has splits of its own ({', '.join(own_splits)}); leave out {asked}")
        shuffled = tuple(listing.items[i] for i in _shuffle(len(listing.items), config.seed))
        if own_splits:
            names = sorted(own_splits, key=SPLIT_ORDER.index)
            splits = {name: (source, tuple(item for item in shuffled if item.split == name)) for name in names}
        elif config.val_count is not None:
            splits = {name: (source, items) for name, items in _dealt(listing, source, recipe, config).items()}
        else:
            splits = {"train": (source, shuffled)}
        ignored, notes = listing.ignored, listing.notes
        if config.val_src is not None:
            val_source = open_source(config.val_src, config.source_options)
            val_listing = val_source.listing()
            val_items = _relabelled(val_listing, listing, config)
            splits["val"] = val_source, tuple(val_items[i] for i in _shuffle(len(val_items), config.seed))
            ignored, notes = ignored + val_listing.ignored, notes + val_listing.notes
        # What came later than other fields counts where it is used, so that the plans of older sets stay theirs.
        described = {
            name: value for name, value in dataclasses.asdict(recipe).items() if (name, value) != ("white", None)
        }
        content = described, listing.classes, config.images_per_shard, config.seed
        items = {
            name: [item if item.frame else item[: SourceItem._fields.index("frame")] for item in items]
            for name, (_, items) in splits.items()
        }
        fingerprints = [source.fingerprint for source, _ in splits.values() if source.fingerprint]
        report = [] if config.near_duplicates == NEAR_DUPLICATES else [config.near_duplicates]
        digest = sha256_of_json([content, items, *fingerprints, *report])
        return cls(listing.classes, recipe, splits, digest, ignored, notes)

    @property
    def num_images(self) -> int:
        """Images of all splits."""
        return sum(len(items) for _, items in self.splits.values())

    def tasks(self, out: Path, aside: Path, images_per_shard: int) -> Iterator[ShardTask]:
        """The shards to write, in order; see ShardTask."""
        for split, (source, items) in self.splits.items():
            for number, first in enumerate(range(0, len(items), images_per_shard)):
                chosen = items[first : first + images_per_shard]
                yield ShardTask(
                    self.digest, out, aside, split, number, first, chosen, source, self.recipe, self.classes
                )


def _shuffle(num_images: int, seed: int) -> Int64[np.ndarray, " n"]:
    # RandomState's stream is frozen (NEP 19), so that the same seed gives the same shards with any NumPy.
    return np.random.RandomState(seed).permutation(num_images)


def _dealt(
    listing: Listing, source: ImageSource, recipe: Preprocessing, config: ShardingConfig
) -> dict[str, tuple[SourceItem, ...]]:
    """`--val-count` of the shuffled items for validation, the others for training."""
    num_val = config.num_val(len(listing.items))
    order = _shuffle(len(listing.items), config.seed)
    group = groups_of(listing, source, recipe, config) if config.group_duplicates else np.arange(len(order))
    is_val = split_train_val(group[order], num_val)
    if not is_val.any():
        asked = f"{config.val_count}" if config.val_count == num_val else f"{config.val_count} ({num_val:,})"
        raise ValueError(f"every group of duplicates has more than --val-count {asked} images; raise it")
    if is_val.sum() < num_val:
        print(
            f"groups of duplicates are kept whole: {is_val.sum():,} images for validation, not {num_val:,}",
            file=sys.stderr,
        )
    return {
        name: tuple(listing.items[i] for i in order[chosen]) for name, chosen in (("train", ~is_val), ("val", is_val))
    }


def _relabelled(val: Listing, train: Listing, config: ShardingConfig) -> tuple[SourceItem, ...]:
    if any(item.split for item in val.items):
        raise ValueError(
            f"--val-src {config.val_src} has splits of its own; name a folder of one of them, or a source without"
        )
    if not val.has_class_folders and not train.has_class_folders:
        return val.items  # one class each, named after the folders
    position = {unicodedata.normalize("NFC", name): label for label, name in enumerate(train.classes)}
    labels = [position.get(unicodedata.normalize("NFC", name)) for name in val.classes]
    if unknown := [name for name, label in zip(val.classes, labels, strict=True) if label is None]:
        raise ValueError(f"--val-src {config.val_src} has classes that SRC lacks: {', '.join(unknown)}")
    return tuple(item._replace(label=label) for item in val.items if (label := labels[item.label]) is not None)
