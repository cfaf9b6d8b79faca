"""Chosen images of a split: found in its index, and read alone."""

from __future__ import annotations

import json
import tarfile
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int64

from vaetrain.data.choice import remote_folder
from vaetrain.data.config import DataConfig
from vaetrain.data.indexed import IndexedReader
from vaetrain.data.reader import Reader
from vaetrain.data.remote import RemoteShards
from vaetrain.data.selection import Selection
from vaetrain.data.shards import TAR_BLOCK, ShardSet
from vaetrain.data.stream import StreamReader
from vaetrain.data.workers import choose_num_workers


def select(config: DataConfig, split: Literal["train", "val"]) -> Selection:
    """All images of a split that `config` keeps; raises FileNotFoundError or ValueError as `open_reader` does."""
    location = config.location(split)
    remote = RemoteShards.of(config, location)
    if remote:
        return Selection.of(remote.shard_set(), split, config.classes, source=remote.folder)
    shard_set = ShardSet.open(location)
    shard_set.verify()
    return Selection.of(shard_set, split, config.classes)


def subset(selection: Selection, positions: Int64[np.ndarray, " n"]) -> Selection:
    """The images at `positions`, which ascend; image i of the result is image positions[i] of `selection`."""
    assert np.all(np.diff(positions) > 0), "a selection is in shard order"
    return replace(selection, index=selection.index.rows(positions))


def open_subset(config: DataConfig, selection: Selection, *, device: torch.device, processes: int) -> Reader:
    """A reader of these images and no others: by offset from local shards, from front to back behind a URL.

    `config` is the one that they were selected with; `processes` processes of this machine share its cores.
    """
    num_workers = choose_num_workers(device, processes) if config.num_workers is None else config.num_workers
    remote = RemoteShards.of(config, config.location("val" if selection.split == "val" else "train"))
    if remote:
        return StreamReader(
            selection, remote=remote, num_workers=num_workers, device=device, reason="chosen images",
            timeout_s=config.timeout_s,
        )  # fmt: skip
    return IndexedReader(
        selection, num_workers=num_workers, device=device, reason="chosen images", timeout_s=config.timeout_s
    )


def describe_images(selection: Selection) -> list[dict[str, Any]]:
    """Where each image lies, and of which class and original it is: all one needs to take it out of its shard.

    The original's name, `source`, is read from the shard, and absent for shards behind a URL.
    """
    manifest, index = selection.shard_set.manifest, selection.index
    remote = remote_folder(selection.source) is not None
    images = []
    for position in range(selection.num_images):
        record: dict[str, Any] = {
            "shard": selection.shard_of(position).name,
            "offset": int(index.offset[position]),
            "num_bytes": int(index.num_bytes[position]),
            "class": manifest.classes[int(index.label[position])],
        }
        if not remote:
            record["source"] = _source(selection, position)
        images.append(record)
    return images


def _source(selection: Selection, position: int) -> str:
    # A sample's JSON follows its image: one header block, then the text.
    index = selection.index
    header = int(index.offset[position]) + -(-int(index.num_bytes[position]) // TAR_BLOCK) * TAR_BLOCK
    with selection.shard_set.path(selection.shard_of(position)).open("rb") as file:
        file.seek(header)
        member = tarfile.TarInfo.frombuf(file.read(TAR_BLOCK), "utf-8", "strict")
        source: str = json.loads(file.read(member.size))["source"]
    return source
