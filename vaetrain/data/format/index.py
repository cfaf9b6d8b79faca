"""Where each image of a shard set lies: the content of index.safetensors. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, Int64
from safetensors.numpy import load, save

INDEX_TYPES = {"shard": np.int32, "offset": np.int64, "num_bytes": np.int64, "label": np.int64}


@dataclass(frozen=True)
class SplitIndex:
    """Where each image of a split lies, in shard order."""

    shard: Int32[np.ndarray, " n"]
    """Position in `Split.shards`."""

    offset: Int64[np.ndarray, " n"]
    """First byte of the encoded image in its tar."""

    num_bytes: Int64[np.ndarray, " n"]
    """Length of the encoded image."""

    label: Int64[np.ndarray, " n"]
    """Position in `Manifest.classes`."""


def pack_index(indices: dict[str, SplitIndex]) -> bytes:
    """The content of index.safetensors: tensors `SPLIT.shard`, `SPLIT.offset`, `SPLIT.num_bytes` and `SPLIT.label`."""
    return save(
        {
            f"{split}.{field.name}": getattr(index, field.name)
            for split, index in indices.items()
            for field in dataclasses.fields(SplitIndex)
        }
    )


def unpack_index(content: bytes, splits: Iterable[str]) -> dict[str, SplitIndex]:
    """The index of each of `splits`; raises ValueError, KeyError or SafetensorError when it holds no such columns."""
    tensors = load(content)
    indices = {}
    for name in splits:
        columns = {field: tensors[f"{name}.{field}"] for field in INDEX_TYPES}
        for field, column in columns.items():
            if column.dtype != INDEX_TYPES[field] or column.ndim != 1:
                raise ValueError(f"{name}.{field} is {column.dtype} of shape {column.shape}")
        if len({len(column) for column in columns.values()}) > 1:
            raise ValueError(f"the {name} split's columns are of several lengths")
        indices[name] = SplitIndex(**columns)
    return indices
