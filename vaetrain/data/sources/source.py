"""Originals: what a source lists, and what opens them one by one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import Image

from vaetrain.data.format.manifest import ImageFormat
from vaetrain.data.sources.preprocess import NUM_FRAMES, Preprocessing, brightest


class SourceItem(NamedTuple):
    """One original."""

    source: str
    """Its name, as the shards record it. Bytes of a file name that are no UTF-8 are lone surrogates in it, as in all of
    Python (PEP 383), and escapes in JSON (`\\udce9`); os.fsencode turns it back into the name on disk."""

    label: int
    """Position in the listing's classes."""

    split: str | None
    """The split it belongs to, in a source that has splits."""

    member: str | int
    """How its source finds it: a path inside, a byte offset, or a number."""

    num_bytes: int
    """Size of the original, or 0 where that is not known before it is opened."""

    frame: int = 0
    """Which of the pictures in it."""


class Ignored(NamedTuple):
    """A file that is not taken."""

    source: str
    """Its name, as that of an original."""

    reason: str
    """What it is, in the plural, so that such files can be counted."""


@dataclass(frozen=True)
class SourceOptions:
    """How a source is read."""

    image_column: str | None = None
    """Parquet's column of images; None: the one that can be."""

    label_column: str | None = None
    """Parquet's column of classes; None: the one that is said or called to be."""

    splits: Literal["auto", "none"] = "auto"
    """auto: names of folders and files say what is for validation. none: they do not."""

    frames: Literal["first", "all"] = "first"
    """Pictures taken of a file that holds several."""


AS_IT_IS = SourceOptions()


@dataclass(frozen=True)
class Listing:
    """All originals of a source, sorted by name."""

    classes: tuple[str, ...]
    """Class names, sorted."""

    items: tuple[SourceItem, ...]
    """The originals."""

    has_class_folders: bool = True
    """False: nothing tells classes apart, and their one class is named after the source."""

    ignored: tuple[Ignored, ...] = ()
    """Files that are not taken."""

    notes: tuple[str, ...] = ()
    """What whoever reads it should be told."""


class Sample(NamedTuple):
    """One original after the recipe."""

    image: bytes
    """The encoded image."""

    picture: Image.Image
    """Its pixels before they were encoded."""

    extra: dict[str, Any]
    """What its record says besides label, class and source."""

    num_frames: int = 1
    """Pictures in its file."""

    brightest: int | None = None
    """Its largest value, of 65535, where it had more than 8 bits."""


class ImageOpener(ABC):
    """Originals that any process opens by item, in any order.

    It holds a path and no open file, so that it travels to worker processes; what each process opens stays open in caches.
    """

    @abstractmethod
    def open(self, item: SourceItem) -> tuple[Image.Image, dict[str, Any]]:
        """The picture, and what else its record should say; raises one of UNREADABLE when it is damaged."""

    def sample(self, item: SourceItem, recipe: Preprocessing) -> Sample:
        """The original after `recipe`; raises as `open` and Preprocessing.prepare do."""
        picture, extra = self.open(item)
        frames, level = picture.info.get(NUM_FRAMES, 1), brightest(picture)  # before `prepare` empties `info`
        prepared = recipe.prepare(picture)
        return Sample(recipe.encode(prepared), prepared, extra, frames, level)


class ImageSource(ABC):
    """Where originals come from: lists them, once, in the process that plans."""

    channels: int = 3
    """What is made of them unless told: 3 for RGB, 1 for grayscale."""
    format: ImageFormat = "jpg"
    """File format that is made of them unless told."""
    fingerprint: str = ""
    """Of the originals' content, where that is known without reading them."""
    may_resplit: bool = False
    """Whether --val-count overrides splits of its own."""

    @abstractmethod
    def listing(self) -> Listing:
        """All originals; raises ValueError when there are none or when they are not laid out as the source demands."""

    @abstractmethod
    def staged(self, file: Path, items: Sequence[SourceItem]) -> ImageOpener:
        """What opens `items` of this source; `file`, and one of that name with another suffix, may be written for it."""


class DirectSource(ImageSource, ImageOpener):
    """A source whose originals are opened where they lie."""

    def staged(self, file: Path, items: Sequence[SourceItem]) -> ImageOpener:
        """Itself."""
        return self
