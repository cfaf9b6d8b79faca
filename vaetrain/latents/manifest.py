"""What a latent set says about itself. The format: the posteriors of a shard set's images, and a manifest that vouches for them.

    FOLDER/manifest.json                      encoder, data, precision, statistics, and the SHA-256 of everything below

    layout webdataset, readable by webdataset without us:
    FOLDER/train-000000.tar ...               KEY.safetensors (mean, logvar, mean_flip, logvar_flip), then KEY.json
    FOLDER/index.safetensors                  per split: the shard, byte offset, byte size and label of each latent

    layout safetensors, as LightningDiT's trainers read a split's folder:
    FOLDER/train/latents-000000.safetensors   latents, latents_flip (posterior means), labels; and logvar, logvar_flip, index
    FOLDER/train/latents_stats.pt             mean and std of `latents` over all training images, (1, c, 1, 1) each

The manifest is written last, so a folder that has one is complete. Nothing here imports torch.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vaetrain.data.format.manifest import MANIFEST_NAME, Shard, Split, Tool, check_sha256
from vaetrain.documents import read_json
from vaetrain.files import NewerFormatError, replace_file
from vaetrain.strict_json import from_json, sha256_of_json, to_json

FORMAT_VERSION = 1
KIND: Literal["latent set"] = "latent set"
STATS_NAME = "latents_stats.pt"
Layout = Literal["webdataset", "safetensors"]
LatentDtype = Literal["fp32", "bf16", "fp16"]


AGAIN = "write the set again with vaetrain/encode.py"


@dataclass(frozen=True)
class LatentFile(Shard):
    """A tar, or a safetensors file in the folder of its split."""

    def __post_init__(self) -> None:
        """Refuse names that lead out of the folder, and sizes that cannot be."""
        if self.url is not None:
            raise ValueError(f"{self.name} is said to lie at {self.url}; latents lie beside their manifest")
        if self.name.endswith(".tar"):
            return super().__post_init__()
        if not re.fullmatch(r"[A-Za-z0-9_-]+/[A-Za-z0-9_-]+\.safetensors", self.name):
            raise ValueError(f"name {self.name!r} is neither NAME.tar nor SPLIT/NAME.safetensors")
        if not 1 <= self.num_images <= self.num_bytes:
            raise ValueError(f"{self.name} is said to hold {self.num_images} latents in {self.num_bytes} bytes")
        return check_sha256(f"sha256 of {self.name}", self.sha256)


@dataclass(frozen=True)
class LatentSplit(Split):
    """The latents of a split's images, in the order of its image readers."""

    shards: tuple[LatentFile, ...]
    """Files, in reading order."""

    source_fingerprint: str
    """Of the shard set that the images are from."""


@dataclass(frozen=True)
class Encoder:
    """What encoded the images."""

    checkpoint: str
    """Its folder in the run."""

    weights: Literal["ema", "raw"]
    """The moving average, or what the optimizer left."""

    sha256: str
    """Of the file of these weights."""


@dataclass(frozen=True)
class LatentStatistics:
    """Per channel, over all positions of the latents of all training images as they are stored, twins left out.

    Sums are taken in float64; those of the files are added without rounding.
    """

    num_images: int
    """Images summed over."""

    mean: tuple[float, ...]
    """Of z ~ q(z|x), which is that of the posterior means."""

    std: tuple[float, ...]
    """Of z ~ q(z|x): the variance of the posterior means plus the mean posterior variance, square root."""

    std_of_means: tuple[float, ...]
    """Of the posterior means alone."""


@dataclass(frozen=True)
class LatentManifest:
    """What a latent set holds, and a fingerprint over it."""

    format_version: int
    """Version of this format."""

    kind: Literal["latent set"]
    """Tells this manifest from that of a shard set or a sample set."""

    layout: Layout
    """How the files are laid out."""

    dtype: LatentDtype
    """In which numbers are stored; they are computed in fp32."""

    latent_shape: tuple[int, ...]
    """Of one latent: (channels, height, width), or (channels,) of a vector."""

    variational: bool
    """False: a deterministic encoder's, whose latents have no log-variance."""

    flipped: bool
    """Whether each image's mirrored twin is there, too."""

    encoder: Encoder
    """What encoded the images."""

    image_size: int
    """Height and width of the images, in pixels."""

    batch_size: int
    """Images encoded at a time, on which a convolution's rounding may depend."""

    device: str
    """Kind of device that encoded, on which rounding depends."""

    classes: tuple[str, ...]
    """Class names of the shard set; a latent's label is a position in here."""

    kept_classes: tuple[str, ...]
    """Of which the images are; empty: all. `index` counts these images alone, as --data.classes does."""

    splits: dict[str, LatentSplit]
    """Splits by name."""

    index_sha256: str | None
    """SHA-256 of index.safetensors; None where the layout has none."""

    statistics: LatentStatistics
    """By which latents are normalised."""

    tool: Tool
    """What wrote the latents; its `plan` is the SHA-256 of what was asked for."""

    fingerprint: str = ""
    """SHA-256 over all fields above but `tool`; empty: computed here."""

    def __post_init__(self) -> None:
        """Refuse what no reader could read; fill in the fingerprint, or hold the given one against the fields."""
        if len(self.latent_shape) not in (1, 3) or min(self.latent_shape) < 1:
            raise ValueError(f"latent_shape is {list(self.latent_shape)}; it has 1 or 3 sizes of at least 1")
        for name, split in self.splits.items():
            if tuple(split.class_counts) != self.classes:
                raise ValueError(
                    f"splits.{name}.class_counts names {list(split.class_counts)}, not {list(self.classes)}"
                )
        for name in ("mean", "std", "std_of_means"):
            if len(getattr(self.statistics, name)) != self.latent_shape[0]:
                raise ValueError(f"statistics.{name} is not of {self.latent_shape[0]} channels")
        if (self.index_sha256 is None) != (self.layout == "safetensors"):
            raise ValueError(f"index_sha256 is {self.index_sha256}; it belongs to the layout webdataset")
        determining = {name: value for name, value in self.to_json().items() if name not in ("tool", "fingerprint")}
        fingerprint = sha256_of_json(determining)
        if self.fingerprint not in ("", fingerprint):
            raise ValueError(
                "fingerprint does not match the other fields, one of which was changed after it was written"
            )
        object.__setattr__(self, "fingerprint", fingerprint)

    @classmethod
    def read(cls, path: Path) -> LatentManifest:
        """Read a manifest.json; raises ValueError naming the file and the field that is wrong."""
        try:
            content = read_json(path, remedy=AGAIN)
            if content.get("kind") != KIND:
                raise ValueError(f"it is not of a {KIND}")
            version = content.get("format_version")
            if isinstance(version, int) and version > FORMAT_VERSION:
                raise NewerFormatError(
                    f"{path} has format_version {version}, this vaetrain reads {FORMAT_VERSION}; update it"
                )
            manifest: LatentManifest = from_json(cls, content)
            if not content["fingerprint"]:
                raise ValueError("fingerprint is empty")
        except NewerFormatError:
            raise
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is no valid manifest: {error}; {AGAIN}") from error
        return manifest

    def write(self, folder: Path) -> None:
        """Write manifest.json into `folder`, atomically."""
        content = json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n"
        replace_file(folder / MANIFEST_NAME, content.encode(errors="backslashreplace"))

    def summary(self) -> dict[str, Any]:
        """Without the lists of files, as the record of a run has it."""
        content = self.to_json()
        splits = {name: {**split, "shards": len(split["shards"])} for name, split in content["splits"].items()}
        return content | {"splits": splits, "channels": self.latent_shape[0]}

    def to_json(self) -> dict[str, Any]:
        """All fields as plain mappings, lists, strings and numbers."""
        content: dict[str, Any] = to_json(self)
        return content


def manifest_file(path: str | Path) -> Path:
    """That of a folder of latents, or the file itself; raises FileNotFoundError when there is none."""
    folder = Path(path).parent if Path(path).name == MANIFEST_NAME else Path(path)
    if not (folder / MANIFEST_NAME).is_file():
        state = f"has no {MANIFEST_NAME}" if folder.is_dir() else "does not exist"
        raise FileNotFoundError(f"latent set {folder} {state}; vaetrain/encode.py --run RUN --out {folder} makes one")
    return folder / MANIFEST_NAME


def is_latent_set(path: str | Path) -> bool:
    """Whether a folder, or its manifest.json, is that of a latent set, be it damaged."""
    file = Path(path) if Path(path).name == MANIFEST_NAME else Path(path, MANIFEST_NAME)
    try:
        content = read_json(file, remedy=AGAIN)
    except (OSError, ValueError):
        return False
    return bool(content.get("kind") == KIND)
