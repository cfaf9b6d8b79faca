"""Which images validate: the end of a shuffle, taken in whole groups."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int64

from vaetrain.data.sharding.config import ShardingConfig
from vaetrain.data.sharding.duplicates import find_groups
from vaetrain.data.sharding.image_hash import IMAGE_HASH
from vaetrain.data.sharding.process_map import map_in_order
from vaetrain.data.sharding.task import ChunkTask, look
from vaetrain.data.sources.preprocess import Preprocessing
from vaetrain.data.sources.source import ImageOpener, ImageSource, Listing
from vaetrain.machine import num_cores
from vaetrain.progress_bar import ProgressBar


def split_train_val(group: Int64[np.ndarray, " n"], num_val: int) -> Bool[np.ndarray, " n"]:
    """Whether each of n shuffled images is for validation, given the number of its group.

    Of the groups, from the end of the shuffle, the first among which some have `num_val` images together; where no groups of
    all have, as many images less as need be. If each image is a group of its own, these are the last `num_val` images.
    """
    _, first, member, size = np.unique(group[::-1], return_index=True, return_inverse=True, return_counts=True)
    reached = np.zeros(num_val + 1, dtype=bool)
    reached[0] = True
    last_group = np.zeros(num_val + 1, dtype=np.int64)  # the one that completed each sum when it was first reached
    for candidate in np.argsort(first):
        if size[candidate] <= num_val:
            sums = np.flatnonzero(reached[: -size[candidate]] & ~reached[size[candidate] :]) + size[candidate]
            reached[sums] = True
            last_group[sums] = candidate
        if reached[num_val]:
            break
    left = int(np.flatnonzero(reached)[-1])
    chosen = []
    while left > 0:
        chosen.append(last_group[left])
        left -= size[chosen[-1]]
    return np.isin(member, chosen)[::-1]


def groups_of(
    listing: Listing, source: ImageSource, recipe: Preprocessing, config: ShardingConfig
) -> Int64[np.ndarray, " n"]:
    """The number of the group of duplicates of each item, found by making all samples once and keeping none.

    Items that cannot be read are in groups of their own. Says on stderr how far it is.
    """
    if isinstance(source, ImageOpener):
        return _groups_among(listing, source, recipe, config)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=config.out.parent, prefix=f".{config.out.name}-") as folder:
        return _groups_among(listing, source.staged(Path(folder) / "originals", listing.items), recipe, config)


def _groups_among(
    listing: Listing, pictures: ImageOpener, recipe: Preprocessing, config: ShardingConfig
) -> Int64[np.ndarray, " n"]:
    pieces = list(ChunkTask("", 0, listing.items, pictures, recipe, listing.classes).cut())
    num_workers = min(config.workers or num_cores(), len(pieces))
    with ProgressBar("looking for duplicates", len(listing.items)) as progress:
        looked = map_in_order(look, pieces, num_workers)
        looks = list(progress.counting(looked, size=lambda each: each.num_originals))
    rejected = {original.source for each in looks for original in each.rejected}
    readable = np.flatnonzero([item.source not in rejected for item in listing.items])
    group = np.arange(len(listing.items))
    likeness = np.frombuffer(b"".join(each.likeness for each in looks), IMAGE_HASH)
    group[readable] = readable[find_groups(likeness, config.near_duplicates)]
    return group
