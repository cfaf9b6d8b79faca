"""Exact and near duplicates among images, from their likenesses.

Two images are exact duplicates when their files in the shards are the same. They are near duplicates when their
perceptual hashes differ in few bits and their gray thumbnails agree: the same picture encoded, scaled, brightened or cropped a
little differently. What is a duplicate of a duplicate is in the same group.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64, UInt8

DUPLICATES_NAME = "duplicates.jsonl"
BANDS, BYTES_PER_BAND = 4, 2
MAX_BITS = 4
# Levels of 255 between the thumbnails: leaves room for 5 % in brightness, not for another sky of the same gradient.
MAX_DIFFERENCE = 10
# Below this standard deviation, in levels, a picture shows next to nothing and its hash is noise.
MIN_DEVIATION = 2
# Where many hashes share a band, each is compared with so many others, those next to it in order.
MAX_NEIGHBOURS = 100
PAIRS_AT_A_TIME = 1 << 10


@dataclass(frozen=True)
class DuplicateGroup:
    """Images that are duplicates of each other."""

    kind: Literal["exact", "near"]
    """exact: all of them are the same file in the shards."""

    images: tuple[tuple[str, str], ...]
    """Split and source of each."""

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that they are in."""
        return tuple(dict.fromkeys(split for split, _ in self.images))

    def to_json(self) -> dict[str, Any]:
        """As a line of duplicates.jsonl says it."""
        images = [{"split": split, "source": source} for split, source in self.images]
        return {"kind": self.kind, "splits": list(self.splits), "images": images}


def find_groups(likeness: np.ndarray, similarity: float) -> Int64[np.ndarray, " n"]:
    """For each image the position of the first one of its group, which is its own where it has no duplicate.

    `similarity`: the correlation of two thumbnails from which on they may be near duplicates.
    """
    _, first, exact = np.unique(likeness["digest"], return_index=True, return_inverse=True)
    group = _components(len(first), _near_pairs(likeness[first], similarity))[exact]
    _, first, group = np.unique(group, return_index=True, return_inverse=True)
    return first[group]


def duplicate_groups(
    likeness: np.ndarray, images: Sequence[tuple[str, str]], similarity: float
) -> Iterator[DuplicateGroup]:
    """The groups of more than one image, in the order of their first ones; `images`: split and source of each."""
    group = find_groups(likeness, similarity)
    order = np.argsort(group, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(group[order])) + 1):
        if len(members) > 1:
            is_exact = bool(np.all(likeness["digest"][members] == likeness["digest"][members[0]]))
            yield DuplicateGroup("exact" if is_exact else "near", tuple(images[member] for member in members))


def duplicates_jsonl(groups: Sequence[DuplicateGroup]) -> bytes:
    """The content of duplicates.jsonl."""
    lines = (json.dumps(group.to_json(), ensure_ascii=False) + "\n" for group in groups)
    return "".join(lines).encode(errors="backslashreplace")


def num_groups_in(folder: Path) -> int:
    """How many groups of duplicates a shard set has."""
    file = folder / DUPLICATES_NAME
    return len(file.read_bytes().splitlines()) if file.exists() else 0


def _near_pairs(likeness: np.ndarray, similarity: float) -> Int64[np.ndarray, "2 pairs"]:
    """Pairs of near duplicates. Of two hashes that differ in at most three bits, one of four bands is the same in both."""
    mean, variance = _moments(likeness["thumbnail"])
    candidates = np.flatnonzero(variance >= MIN_DEVIATION**2)
    looks = _Looks(likeness["thumbnail"][candidates], mean[candidates], variance[candidates])
    hash_bytes = likeness["phash"][candidates].view(np.uint8).reshape(-1, BANDS * BYTES_PER_BAND)
    found = [np.zeros((2, 0), dtype=np.int64)]
    for band in range(BANDS):
        # With the band in front, equal bands lie side by side, and within them equal hashes.
        rotated = np.roll(hash_bytes, -band * BYTES_PER_BAND, axis=1).copy().view(">u8")[:, 0].astype(np.uint64)
        order = np.argsort(rotated, kind="stable")
        rotated = rotated[order]
        bands = rotated >> np.uint64(64 - 8 * BYTES_PER_BAND)
        left = np.arange(len(order))
        for step in range(1, MAX_NEIGHBOURS + 1):
            left = left[: np.searchsorted(left, len(order) - step)]
            left = left[bands[left] == bands[left + step]]
            if len(left) == 0:
                break
            near = left[np.bitwise_count(rotated[left] ^ rotated[left + step]) <= MAX_BITS]
            a, b = order[near], order[near + step]
            alike = looks.are_alike(a, b, similarity)
            found.append(np.stack([a[alike], b[alike]]))
    return candidates[np.concatenate(found, axis=1)]


class _Looks(NamedTuple):
    thumbnail: UInt8[np.ndarray, "n pixels"]
    mean: Float64[np.ndarray, " n"]
    variance: Float64[np.ndarray, " n"]

    def are_alike(
        self, a: Int64[np.ndarray, " pairs"], b: Int64[np.ndarray, " pairs"], similarity: float
    ) -> Bool[np.ndarray, " pairs"]:
        """Whether the thumbnails of each pair correlate, and differ in few levels (root mean square)."""
        near = np.abs(self.mean[a] - self.mean[b]) <= MAX_DIFFERENCE
        a, b = a[near], b[near]
        covariance = self._mean_products(a, b) - self.mean[a] * self.mean[b]
        squares = self.variance[a] + self.variance[b] - 2 * covariance + (self.mean[a] - self.mean[b]) ** 2
        correlates = covariance >= similarity * np.sqrt(self.variance[a] * self.variance[b])
        near[near] = correlates & (squares <= MAX_DIFFERENCE**2)
        return near

    def _mean_products(
        self, a: Int64[np.ndarray, " pairs"], b: Int64[np.ndarray, " pairs"]
    ) -> Float64[np.ndarray, " pairs"]:
        means = np.zeros(len(a))
        for start in range(0, len(a), PAIRS_AT_A_TIME):
            part = slice(start, start + PAIRS_AT_A_TIME)
            # 256 · 255² is below 2²⁴, so that these sums are exact, in whatever order they are taken.
            x, y = self.thumbnail[a[part]].astype(np.float32), self.thumbnail[b[part]].astype(np.float32)
            means[part] = np.einsum("np,np->n", x, y) / self.thumbnail.shape[1]
        return means


def _moments(thumbnail: UInt8[np.ndarray, "n pixels"]) -> tuple[Float64[np.ndarray, " n"], Float64[np.ndarray, " n"]]:
    """Mean and variance of each."""
    mean = thumbnail.mean(axis=1, dtype=np.float64)
    squares = np.einsum("np,np->n", thumbnail, thumbnail, dtype=np.int64) / thumbnail.shape[1]
    return mean, squares - mean**2


def _components(num_images: int, pairs: Int64[np.ndarray, "2 pairs"]) -> Int64[np.ndarray, " n"]:
    """For each image the least one that a chain of pairs leads to."""
    least = np.arange(num_images)
    while True:
        linked = least.copy()
        np.minimum.at(linked, pairs[0], least[pairs[1]])
        np.minimum.at(linked, pairs[1], least[pairs[0]])
        linked = linked[linked]
        if np.array_equal(linked, least):
            return least
        least = linked
