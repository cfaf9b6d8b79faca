"""Which images validate: the end of a shuffle, taken in whole groups."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Int64


def deal(group: Int64[np.ndarray, " n"], num_val: int) -> Bool[np.ndarray, " n"]:
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
