"""Masks and label maps among pictures: told by what they are called and by what they look like, both."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from PIL import Image

from vaetrain.data.sources.preprocess import STUMBLES, UNREADABLE, decode_picture
from vaetrain.data.sources.split_names import words

K = TypeVar("K", bound=tuple)
MASK_WORDS = frozenset(
    [
        "mask", "masks", "trimap", "trimaps", "seg", "segs", "segm", "segmentation", "segmentations",
        "segmented", "annot", "annotation", "annotations", "label", "labels", "labelmap", "labelmaps", "lbl",
        "lbls", "gt", "gts", "truth", "groundtruth", "instance", "instances", "semantic", "panoptic", "matte",
        "mattes",
    ]
)  # fmt: skip
NUM_LOOKED_AT = 5
MAX_COLOURS = 64
"""In a label map. A photograph in 256 greys has more."""


def find_masks(pictures: Sequence[tuple[K, tuple[str, ...]]], peek: Callable[[Sequence[K]], Iterable[bytes]]) -> set[K]:
    """Which of some pictures, given with their paths, are masks of others.

    Those with a word for masks in a folder's or their own name, if the ones looked at have few colours, and the others have not:
    classes may be called with_mask and without_mask, and drawings have few colours, too.
    """
    called: dict[str, list[K]] = defaultdict(list)
    others: list[K] = []
    for key, parts in pictures:
        word = next((word.lower() for part in parts for word in words(part) if word.lower() in MASK_WORDS), None)
        (called[word] if word else others).append(key)
    if not called or not others or all(_are_label_maps(others, peek)):
        return set()
    return {key for keys in called.values() if all(_are_label_maps(keys, peek)) for key in keys}


def _are_label_maps(keys: list[K], peek: Callable[[Sequence[K]], Iterable[bytes]]) -> Iterator[bool]:
    step = max(1, len(keys) // NUM_LOOKED_AT)
    return (is_label_map(content) for content in peek(keys[::step][:NUM_LOOKED_AT]))


def is_label_map(content: bytes) -> bool:
    """Whether a picture has at most MAX_COLOURS colours, or, blurred by JPEG, hardly more than black and white."""
    try:
        picture = decode_picture(content)
        if picture.mode.startswith(("I", "F")):
            picture = picture.convert("F")
        if picture.getcolors(MAX_COLOURS) is not None:
            return True
        histogram = picture.convert("L").histogram()
    except (*UNREADABLE, *STUMBLES, Image.DecompressionBombError):
        return False
    dark, light, num_pixels = sum(histogram[:16]), sum(histogram[240:]), sum(histogram)
    return dark + light > 0.97 * num_pixels and min(dark, light) > 0.003 * num_pixels
