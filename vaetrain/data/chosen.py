"""Chosen images of a split: found in its index, and read alone."""

from __future__ import annotations

import json
import tarfile
from dataclasses import fields, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int64

from vaetrain.data.choice import remote_folder
from vaetrain.data.config import DataConfig
from vaetrain.data.indexed import IndexedReader
from vaetrain.data.reader import Reader
from vaetrain.data.selection import Selection
from vaetrain.data.shards import TAR_BLOCK, ShardSet, SplitIndex
from vaetrain.data.stream import StreamReader, fetch_selection
from vaetrain.data.workers import choose_num_workers


def select(config: DataConfig, split: Literal["train", "val"]) -> Selection:
    """All images of a split that `config` keeps; raises FileNotFoundError or ValueError as `open_reader` does."""
    location = config.location(split)
    url = remote_folder(location)
    if url:
        return fetch_selection(url, split, config.classes)
    shard_set = ShardSet.open(location)
    shard_set.verify()
    return Selection.of(shard_set, split, config.classes)


def subset(selection: Selection, positions: Int64[np.ndarray, " n"]) -> Selection:
    """The images at `positions`, which ascend; image i of the result is image positions[i] of `selection`."""
    assert np.all(np.diff(positions) > 0), "a selection is in shard order"
    index = SplitIndex(*(getattr(selection.index, field.name)[positions] for field in fields(SplitIndex)))
    return replace(selection, index=index, within_shard=selection.within_shard[positions])


def open_subset(selection: Selection, *, num_workers: int | None, device: torch.device, processes: int) -> Reader:
    """A reader of these images and no others: by offset from local shards, from front to back behind a URL.

    `processes` processes of this machine share its cores.
    """
    if num_workers is None:
        num_workers = choose_num_workers(device, processes)
    url = remote_folder(selection.source)
    if url:
        return StreamReader(selection, url=url, num_workers=num_workers, device=device, reason="chosen images")
    return IndexedReader(selection, num_workers=num_workers, device=device, reason="chosen images")


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
