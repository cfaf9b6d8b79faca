"""Some images of a split: found in its index, read alone, and described so that anyone finds them."""

from __future__ import annotations

import tarfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from jaxtyping import Int64

from vaetrain.data.config import DataConfig
from vaetrain.data.format.manifest import TAR_BLOCK
from vaetrain.data.readers.indexed import IndexedReader
from vaetrain.data.readers.loader_workers import choose_num_workers
from vaetrain.data.readers.reader import Reader, open_selection
from vaetrain.data.readers.selection import Selection
from vaetrain.data.readers.stream import StreamReader
from vaetrain.data.remote.remote import RemoteShards
from vaetrain.documents import MAX_LINE_BYTES, parse_json
from vaetrain.strict_json import from_json


class SampleRecord(TypedDict):
    """What make_shards writes beside an image, as far as it is needed here."""

    source: str


@dataclass(frozen=True)
class Subset:
    """Some images of a split, in shard order."""

    selection: Selection
    remote: RemoteShards | None
    """Where the shards are when they are not local."""
    config: DataConfig

    @classmethod
    def all_of(cls, config: DataConfig, split: Literal["train", "val"]) -> Subset:
        """All images of a split that `config` keeps; raises FileNotFoundError or ValueError as `open_reader` does."""
        return cls(*open_selection(config, split), config)

    def at(self, positions: Int64[np.ndarray, " n"]) -> Subset:
        """The images at `positions`, which ascend; image i of the result is image positions[i] of these."""
        return replace(self, selection=self.selection.at(positions))

    def open_reader(self, device: torch.device, processes_per_node: int) -> Reader:
        """A reader of these images and no others: by offset from local shards, from front to back behind a URL."""
        num_workers = self.config.num_workers
        if num_workers is None:
            num_workers = choose_num_workers(device, processes_per_node)
        selection, reason, timeout_s = self.selection, "chosen images", self.config.timeout_s
        if self.remote is None:
            return IndexedReader(selection, num_workers=num_workers, device=device, reason=reason, timeout_s=timeout_s)
        self.remote.prepare(selection.shard_set.manifest.splits[selection.split])
        return StreamReader(
            selection, remote=self.remote, num_workers=num_workers, device=device, reason=reason, timeout_s=timeout_s
        )

    def describe(self) -> list[dict[str, Any]]:
        """Where each image lies, and of which class and original it is: all one needs to take it out of its shard.

        The original's name, `source`, is read from the shard, and absent for shards behind a URL.
        """
        selection, index = self.selection, self.selection.index
        images = []
        for position in range(selection.num_images):
            record: dict[str, Any] = {
                "shard": selection.shard_of(position).name,
                "offset": int(index.offset[position]),
                "num_bytes": int(index.num_bytes[position]),
                "class": selection.shard_set.manifest.classes[int(index.label[position])],
            }
            if self.remote is None:
                record["source"] = _source(selection, position)
            images.append(record)
        return images


def _source(selection: Selection, position: int) -> str:
    index, shard = selection.index, selection.shard_of(position)
    if shard.url:  # somebody else's tar, where anything may follow an image
        with Path(shard.url).open("rb") as file:
            file.seek(int(index.offset[position]) - TAR_BLOCK)
            return f"{shard.name}/{tarfile.TarInfo.frombuf(file.read(TAR_BLOCK), 'utf-8', 'replace').name}"
    # A sample's JSON follows its image: one header block, then the text.
    header = int(index.offset[position]) + -(-int(index.num_bytes[position]) // TAR_BLOCK) * TAR_BLOCK
    path = selection.shard_set.path(shard)
    with path.open("rb") as file:
        file.seek(header)
        try:
            member = tarfile.TarInfo.frombuf(file.read(TAR_BLOCK), "utf-8", "strict")
            record: SampleRecord = from_json(SampleRecord, parse_json(file.read(min(member.size, MAX_LINE_BYTES))))
        except (ValueError, tarfile.TarError) as error:
            raise ValueError(
                f"{path} has no record of its image {position} ({error}); make the shards again"
            ) from error
    return record["source"]
