"""What a shard set says about itself. The format: WebDataset tars, a manifest that vouches for them, an index of the images.

    FOLDER/manifest.json         what the data is: sizes, encoding, classes, splits, and the SHA-256 of everything below
    FOLDER/index.safetensors     per split: the shard, byte offset, byte size and label of each image
    FOLDER/train-000000.tar ...  KEY.jpg (or .png, .webp) followed by KEY.json, readable by webdataset without us

The manifest is written last, so a folder that has one is complete. In a folder made by tools/index_shards.py (format version 2)
there are only the first two, and the tars are somebody else's, wherever they lie. Nothing here imports torch.
"""

from __future__ import annotations

import json
import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from vaetrain.data.format.index import SplitIndex
from vaetrain.documents import parse_json
from vaetrain.files import NewerFormatError, read_bytes, replace_file
from vaetrain.strict_json import from_json, may_lack, sha256_of_json, to_json

FORMAT_VERSION = 2
"""The latest: of sets that point at tars elsewhere."""
OWN_SHARDS_VERSION = 1
"""Of sets whose tars lie beside the manifest."""
MANIFEST_NAME = "manifest.json"
INDEX_NAME = "index.safetensors"
TAR_BLOCK = 512
MAX_IMAGE_BYTES = 2**31 - 1
# 192 MiB a decoded image of colour. A reader makes room for whole batches before it sees one, so what a manifest claims is bounded.
MAX_IMAGE_SIZE = 8192
MAX_SHARD_BYTES = 2**50
MAX_MANIFEST_BYTES = 1 << 28  # about a million shards
# What Pillow raises for damaged JPEG, PNG and WebP files; a SyntaxError for a broken PNG chunk.
BROKEN_IMAGE = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
ImageFormat = Literal["jpg", "png", "webp"]
Crop = Literal["center", "pad", "none"]


@dataclass(frozen=True)
class Shard:
    """One tar file."""

    name: str
    """File name in the shard set's folder."""

    num_images: int
    """Samples in it."""

    num_bytes: int
    """Size of the file."""

    sha256: str
    """SHA-256 of the file, in hexadecimal; with a `url`, of its headers (tar_index.py)."""

    url: str | None = may_lack(None)
    """Where the file lies, of a set that only points at it: an absolute path or a URL. None: beside the manifest. It is no part of
    the fingerprint."""

    def __post_init__(self) -> None:
        """Refuse names that lead out of the folder, places that nobody reads from, and sizes that cannot be."""
        if self.url is None and not re.fullmatch(r"[A-Za-z0-9_-]+\.tar", self.name):
            raise ValueError(f"name {self.name!r} is not a plain file name ending in .tar")
        if self.url is not None:
            check_place(self.url)
            if not self.name.isprintable() or not self.name:
                raise ValueError(f"name {self.name!r} cannot be printed")
        if self.num_images < 1 or self.num_bytes < 1:
            raise ValueError(f"{self.name} is said to hold {self.num_images} images in {self.num_bytes} bytes")
        # An image and its record are a block of header and at least one of content each; a hard link is a header.
        each = 2 * TAR_BLOCK if self.url is None else TAR_BLOCK
        if self.num_bytes > MAX_SHARD_BYTES or self.num_images * each > self.num_bytes:
            raise ValueError(
                f"{self.name} cannot hold {self.num_images:,} images in {self.num_bytes:,} bytes, of {MAX_SHARD_BYTES:,} at most"
            )
        check_sha256(f"sha256 of {self.name}", self.sha256)


@dataclass(frozen=True)
class Split:
    """A part of the data, such as `train` or `val`."""

    num_images: int
    """Images over all shards."""

    class_counts: dict[str, int]
    """Images of each class, in the manifest's order of classes."""

    shards: tuple[Shard, ...]
    """Files, in reading order."""

    def __post_init__(self) -> None:
        """Hold the three counts against each other."""
        in_shards = sum(shard.num_images for shard in self.shards)
        in_classes = sum(self.class_counts.values())
        if not self.num_images == in_shards == in_classes or self.num_images < 1:
            raise ValueError(f"num_images is {self.num_images}, its shards hold {in_shards}, its classes {in_classes}")
        if min(self.class_counts.values()) < 0:
            raise ValueError(f"class_counts has a negative number, {min(self.class_counts.values())}")
        if len({shard.name for shard in self.shards}) < len(self.shards):
            raise ValueError("shards has one name twice")

    @property
    def num_bytes(self) -> int:
        """Size of all shards."""
        return sum(shard.num_bytes for shard in self.shards)

    def check(self, index: SplitIndex, name: str) -> None:
        """Raise ValueError, about the `name` split, when an index is not of these shards and classes."""
        if len(index.label) != self.num_images:
            raise ValueError(f"the {name} split has {self.num_images} images, its index another number")
        # Before they are counted, because a count takes memory for each number up to the largest.
        for what, column, end in (
            ("shard", index.shard, len(self.shards)),
            ("label", index.label, len(self.class_counts)),
        ):
            if column.min() < 0 or column.max() >= end:
                raise ValueError(f"the {name} split has an image whose {what} is not among the {end:,} there are")
        in_shards = np.bincount(index.shard, minlength=len(self.shards)).tolist()
        if in_shards != [shard.num_images for shard in self.shards]:
            raise ValueError(f"the {name} split's shards hold other numbers of images")
        if np.any(index.shard[1:] < index.shard[:-1]):
            raise ValueError(f"the {name} split's images are not in the order of its shards")
        in_classes = np.bincount(index.label, minlength=len(self.class_counts)).tolist()
        if in_classes != list(self.class_counts.values()):
            raise ValueError(f"the {name} split's classes hold other numbers of images")
        sizes = np.array([shard.num_bytes for shard in self.shards])[index.shard]
        fits = (index.offset >= TAR_BLOCK) & (index.num_bytes >= 1) & (index.num_bytes <= sizes - index.offset)
        fits &= index.num_bytes <= MAX_IMAGE_BYTES
        if not np.all(fits):
            raise ValueError(f"the {name} split has an image that lies outside its shard")


@dataclass(frozen=True)
class Encoding:
    """How originals became the images in the shards."""

    format: ImageFormat = "jpg"
    """File format of the images; png is lossless."""

    quality: int | None = 95
    """Quality setting of jpg and webp, 1 to 100; None for png."""

    subsampling: Literal["4:4:4", "4:2:0"] | None = "4:4:4"
    """Resolution of colour against brightness: 4:4:4 is full (jpg), 4:2:0 halved (webp); None for png and grayscale."""

    resize: Literal["lanczos"] = "lanczos"
    """Filter, antialiased, of images that were not already of the right size."""

    crop: Crop = "center"
    """How images that are not square became so: the central square, black bars, or none: there were no such images."""


@dataclass(frozen=True)
class Tool:
    """What wrote a shard set; not part of its fingerprint."""

    versions: dict[str, str]
    """Versions of vaetrain and of the libraries that decide the bytes."""

    arguments: dict[str, Any]
    """The command's arguments."""

    plan: str
    """SHA-256 over the arguments that decide the data and the list of originals: tells a rerun from another command."""


@dataclass(frozen=True)
class Manifest:
    """What a shard set holds: everything that decides the training data, and a fingerprint over it."""

    format_version: int
    """Version of this format."""

    image_size: int
    """Height and width of every image, in pixels; 0: each has its own (version 2)."""

    channels: int
    """3 for RGB, 1 for grayscale."""

    encoding: Encoding
    """How the images are stored."""

    classes: tuple[str, ...]
    """Class names; an image's label is a position in here."""

    splits: dict[str, Split]
    """Splits by name."""

    index_sha256: str
    """SHA-256 of index.safetensors."""

    tool: Tool
    """What wrote the shard set."""

    fingerprint: str = ""
    """SHA-256 over all other fields but `tool` and places, so that the same data has the same one; empty: computed here."""

    resized: Literal["shorter-side"] | None = may_lack(None)
    """What readers make images of `image_size` with as they read, of stored ones of other sizes; None: they are stored so."""

    def __post_init__(self) -> None:
        """Refuse what no reader could read; fill in the fingerprint, or hold the given one against the fields."""
        if not 1 <= self.format_version <= FORMAT_VERSION:
            raise ValueError(f"format_version is {self.format_version}, this vaetrain reads {FORMAT_VERSION}")
        if self.format_version == 1 and any(shard.url for split in self.splits.values() for shard in split.shards):
            raise ValueError("it points at shards elsewhere, which is of format_version 2")
        if not (1 if self.format_version == 1 else 0) <= self.image_size <= MAX_IMAGE_SIZE:
            raise ValueError(f"image_size is {self.image_size}; it must be 1 to {MAX_IMAGE_SIZE:,} pixels")
        if self.channels not in (1, 3):
            raise ValueError(f"channels is {self.channels}; it must be 1 (grayscale) or 3 (RGB)")
        if not self.classes or len(set(self.classes)) < len(self.classes):
            raise ValueError(f"classes is {list(self.classes)}; there must be at least one, and none twice")
        if not self.splits:
            raise ValueError("splits is empty")
        for name, split in self.splits.items():
            if tuple(split.class_counts) != self.classes:
                raise ValueError(
                    f"splits.{name}.class_counts names {list(split.class_counts)}, not {list(self.classes)}"
                )
        check_sha256("index_sha256", self.index_sha256)
        determining = {name: value for name, value in self.to_json().items() if name not in ("tool", "fingerprint")}
        for split in determining["splits"].values():
            for shard in split["shards"]:
                shard.pop("url", None)
        fingerprint = sha256_of_json(determining)
        if self.fingerprint not in ("", fingerprint):
            raise ValueError(
                "fingerprint does not match the other fields, one of which was changed after it was written"
            )
        object.__setattr__(self, "fingerprint", fingerprint)

    @classmethod
    def read(cls, path: str | Path) -> Manifest:
        """Read a manifest.json; raises ValueError naming the file and the field that is wrong."""
        try:
            content = parse_json(read_bytes(Path(path), MAX_MANIFEST_BYTES, "name another shard set"))
            version = content.get("format_version") if isinstance(content, dict) else None
            if isinstance(version, int) and version > FORMAT_VERSION:
                tool = content.get("tool")
                raise NewerFormatError(
                    f"{path} has format_version {version}, this vaetrain reads {FORMAT_VERSION}; update vaetrain "
                    f"(the file was written with {tool.get('versions') if isinstance(tool, dict) else 'a newer one'})"
                )
            manifest: Manifest = from_json(cls, content)
            if not content["fingerprint"]:
                raise ValueError("fingerprint is empty")
        except NewerFormatError:
            raise
        except ValueError as error:
            raise ValueError(
                f"{path} is no valid manifest: {error}; write it again with tools/make_shards.py"
            ) from error
        return manifest

    def write(self, folder: Path) -> None:
        """Write manifest.json into `folder`, atomically."""
        content = json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n"
        # A file name in the arguments may be no Unicode; a lone surrogate's backslashreplace is its escape in JSON.
        replace_file(folder / MANIFEST_NAME, content.encode(errors="backslashreplace"))

    def to_json(self) -> dict[str, Any]:
        """All fields as plain mappings, lists, strings and numbers."""
        content: dict[str, Any] = to_json(self)
        return content

    def summary(self) -> dict[str, Any]:
        """What a checkpoint carries: everything but the shards and the tool."""
        content = {name: value for name, value in self.to_json().items() if name not in ("index_sha256", "tool")}
        splits = {
            name: {"num_images": split.num_images, "class_counts": split.class_counts}
            for name, split in self.splits.items()
        }
        return content | {"classes": list(self.classes), "splits": splits}


def check_place(url: str) -> None:
    """Raise ValueError unless `url` is an absolute path or a URL that is only read from."""
    scheme = url.partition("://")[0].lower() if "://" in url else ""
    is_url = re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme) and scheme not in ("file", "local", "pipe")
    if not url.isprintable() or not (is_url or url.startswith("/")):
        raise ValueError(f"{url!r} is neither an absolute path nor the URL of a file")


def check_sha256(what: str, value: str) -> None:
    """Raise ValueError unless `value` is a SHA-256 in hexadecimal."""
    if not re.fullmatch(r"[0-9a-f]{64}", value):
        raise ValueError(f"{what} is {value!r}, not 64 hexadecimal digits")
