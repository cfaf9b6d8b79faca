"""The work on one shard, and the pieces of it that worker processes do. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from vaetrain.data.format.manifest import TAR_BLOCK
from vaetrain.data.format.writer import Row, pack_sample
from vaetrain.data.sharding.image_hash import likenesses, thumbnail_of
from vaetrain.data.sources.preprocess import UNREADABLE, Preprocessing
from vaetrain.data.sources.source import ImageOpener, ImageSource, SourceItem

# Small enough that all workers end at about the same time, large enough that handing them out takes none.
IMAGES_PER_PIECE = 32


@dataclass(frozen=True)
class Rejected:
    """An original that could not be read."""

    source: str
    split: str
    """Empty: it was not taken, for what it is."""
    reason: str


@dataclass(frozen=True)
class MoreFrames:
    """An original that holds more pictures than the one taken."""

    source: str
    num_left_out: int


@dataclass(frozen=True)
class DeepPixels:
    """Originals of more than 8 bits."""

    num_images: int = 0
    brightest: int = 0
    """The largest value in any, of 65535."""

    def __add__(self, other: DeepPixels) -> DeepPixels:
        """Those of both."""
        return DeepPixels(self.num_images + other.num_images, max(self.brightest, other.brightest))


class ChunkTask(NamedTuple):
    """Everything a worker needs to make some samples."""

    split: str
    first: int
    """Position of the first image in the split."""
    items: tuple[SourceItem, ...]
    pictures: ImageOpener
    recipe: Preprocessing
    classes: tuple[str, ...]

    def cut(self) -> Iterator[ChunkTask]:
        """The same in pieces of IMAGES_PER_PIECE."""
        for start in range(0, len(self.items), IMAGES_PER_PIECE):
            yield self._replace(first=self.first + start, items=self.items[start : start + IMAGES_PER_PIECE])


class SampleChunk(NamedTuple):
    """Samples that follow each other in a shard."""

    samples: bytes
    """As tar members, end to end."""
    rows: tuple[Row, ...]
    """Where the image of each lies in them, and its label."""
    rejected: tuple[Rejected, ...]
    """Originals that are not among them."""
    likeness: bytes
    """Array of LIKENESS, of the samples."""
    more_frames: tuple[MoreFrames, ...] = ()
    deep: DeepPixels = DeepPixels()

    @property
    def num_originals(self) -> int:
        """Those that became samples, and those that did not."""
        return len(self.rows) + len(self.rejected)


class ShardTask(NamedTuple):
    """One shard to write."""

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
    items: tuple[SourceItem, ...]
    source: ImageSource
    recipe: Preprocessing
    classes: tuple[str, ...]

    @property
    def name(self) -> str:
        """The shard's name without .tar."""
        return f"{self.split}-{self.number:06d}"

    def pieces(self, pictures: ImageOpener) -> Iterator[ChunkTask]:
        """Its parts, in order; `pictures` opens its items."""
        return ChunkTask(self.split, self.first, self.items, pictures, self.recipe, self.classes).cut()


def make_piece(task: ChunkTask) -> SampleChunk:
    """Read, resize and encode the originals of a piece."""
    samples, rows, rejected, glimpses, more_frames, deep = bytearray(), [], [], [], [], DeepPixels()
    for position, item in enumerate(task.items, start=task.first):
        try:
            sample = task.pictures.sample(item, task.recipe)
        except UNREADABLE as error:
            rejected.append(Rejected(item.source, task.split, str(error) or type(error).__name__))
            continue
        except Exception as error:
            error.add_note(f"while reading {item.source}")
            raise
        record = {"label": item.label, "class": task.classes[item.label], "source": item.source, **sample.extra}
        rows.append(Row(len(samples) + TAR_BLOCK, len(sample.image), item.label))
        samples += pack_sample(f"{position:08d}", sample.image, task.recipe.encoding.format, record)
        glimpses.append(thumbnail_of(sample.image, sample.picture))
        if sample.num_frames > 1 and not item.source.endswith(f"#{item.frame}"):  # so called where all are taken
            more_frames.append(MoreFrames(item.source, sample.num_frames - 1))
        if sample.brightest is not None:
            deep += DeepPixels(1, sample.brightest)
    likeness = likenesses(glimpses).tobytes()
    return SampleChunk(bytes(samples), tuple(rows), tuple(rejected), likeness, tuple(more_frames), deep)


def look(task: ChunkTask) -> SampleChunk:
    """A piece without its samples, for what it says about them."""
    return make_piece(task)._replace(samples=b"")
