"""A finished sample set, read back shard by shard, each process some of them."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import UInt8
from torch import Tensor

from vaetrain.data.format.decode import decode_into
from vaetrain.data.format.manifest import MANIFEST_NAME, MAX_IMAGE_SIZE, Shard
from vaetrain.data.format.tar_headers import members_of, open_tar
from vaetrain.documents import read_json
from vaetrain.files import inside, sha256_of_file
from vaetrain.sampling.manifest import SampledManifest
from vaetrain.strict_json import from_json

MAX_PNG_BYTES = 1 << 28
"""An image of the largest size is 192 MiB as it is decoded."""

AGAIN = "draw the samples again"


@dataclass(frozen=True)
class SampleReader:
    """The images of a sample set under their numbers."""

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> SampleReader:
        """Raises FileNotFoundError or ValueError when there is no finished sample set."""
        file = inside(folder, MANIFEST_NAME)
        if not file.is_file():
            raise FileNotFoundError(
                f"{folder} holds no finished sample set: it has no {MANIFEST_NAME}, which sample.py writes last"
            )
        manifest = read_json(file, remedy=AGAIN)
        if manifest.get("kind") != "sample set":
            raise ValueError(f"{file} is not the manifest of a sample set, which vaetrain/sample.py writes")
        found = cls(folder, read_json(file, SampledManifest, remedy=AGAIN))
        try:
            shards = found.shards
            found.image_shape()
        except ValueError as error:
            raise ValueError(f"{file} is damaged: {error}; {AGAIN}") from error
        if found.num_images != sum(shard.num_images for shard in shards):
            raise ValueError(
                f"{file} is damaged: its shards do not hold the {found.num_images} images it counts; {AGAIN}"
            )
        return found

    @property
    def shards(self) -> list[Shard]:
        """Its tars; ValueError where one is described otherwise than a tar of the folder can be."""
        described = enumerate(self.manifest["shards"])
        shards: list[Shard] = [from_json(Shard, content, f"shards[{number}]") for number, content in described]
        if elsewhere := next((shard for shard in shards if shard.url is not None), None):
            raise ValueError(f"{elsewhere.name} is said to lie at {elsewhere.url}; samples lie beside their manifest")
        return shards

    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels; ValueError where the manifest has none that can be."""
        size, channels = (self.manifest["training"]["config"]["model"][name] for name in ("image_size", "in_channels"))
        if not 1 <= size <= MAX_IMAGE_SIZE or channels not in (1, 3):
            raise ValueError(f"its images have {size} pixels and {channels} channels")
        return (size, size, channels)

    @property
    def num_images(self) -> int:
        """Images of the set."""
        return int(self.manifest["count"])

    def batches(
        self, accelerator: Accelerator, num_images: int, batch_size: int
    ) -> Iterator[tuple[list[int], UInt8[Tensor, "b c h w"]]]:
        """This process's part of images 0 … `num_images` − 1; process r reads shards r, r + number of processes, …

        Raises ValueError for a shard that is damaged.
        """
        shape = self.image_shape()
        for shard in self.shards[accelerator.process_index :: accelerator.num_processes]:
            indices: list[int] = []
            images: list[Tensor] = []
            for index, encoded in self._pictures(shard):
                if index >= num_images:
                    continue
                pixels = np.empty(shape, np.uint8)
                decode_into(encoded, pixels)
                indices.append(index)
                images.append(torch.from_numpy(pixels).permute(2, 0, 1))
                if len(images) == batch_size:
                    yield indices, torch.stack(images)
                    indices, images = [], []
            if images:
                yield indices, torch.stack(images)

    def _pictures(self, shard: Shard) -> Iterator[tuple[int, bytes]]:
        path = inside(self.folder, shard.name)
        if not path.is_file() or path.stat().st_size != shard.num_bytes or sha256_of_file(path) != shard.sha256:
            raise ValueError(f"{path} is missing or not the file that {MANIFEST_NAME} lists; {AGAIN}")
        try:
            with (
                path.open("rb") as plain,
                open_tar(plain) as tar,
            ):  # never compressed, so that it is no larger than its file
                for member in members_of(tar):
                    if member.name.endswith(".png") and (file := tar.extractfile(member)) is not None:
                        if member.size > MAX_PNG_BYTES:
                            raise ValueError(f"{member.name} has {member.size:,} bytes")
                        yield int(Path(member.name).stem), file.read()
        except (tarfile.TarError, ValueError, EOFError, OverflowError) as error:
            raise ValueError(f"{path} is damaged: {error}; {AGAIN}") from error
