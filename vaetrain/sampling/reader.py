"""A finished sample set, read back shard by shard, each process some of them."""

from __future__ import annotations

import json
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
from vaetrain.data.format.manifest import MANIFEST_NAME
from vaetrain.files import sha256_of_file


@dataclass(frozen=True)
class SampleReader:
    """The images of a sample set under their numbers."""

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> SampleReader:
        """Raises FileNotFoundError or ValueError when there is no finished sample set."""
        file = folder / MANIFEST_NAME
        if not file.is_file():
            raise FileNotFoundError(
                f"{folder} holds no finished sample set: it has no {MANIFEST_NAME}, which sample.py writes last"
            )
        manifest = json.loads(file.read_text())
        if manifest.get("kind") != "sample set":
            raise ValueError(f"{file} is not the manifest of a sample set, which vaetrain/sample.py writes")
        return cls(folder, manifest)

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
        model = self.manifest["training"]["config"]["model"]
        shape = (model["image_size"], model["image_size"], model["in_channels"])
        for shard in self.manifest["shards"][accelerator.process_index :: accelerator.num_processes]:
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

    def _pictures(self, shard: dict[str, Any]) -> Iterator[tuple[int, bytes]]:
        path = self.folder / shard["name"]
        if not path.is_file() or sha256_of_file(path) != shard["sha256"]:
            raise ValueError(f"{path} is missing or not the file that {MANIFEST_NAME} lists; draw the samples again")
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".png") and (file := tar.extractfile(member)) is not None:
                    yield int(Path(member.name).stem), file.read()
