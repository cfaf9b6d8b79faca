"""The real images' features: extracted once for an extractor and a choice of images, and then read from a cache.

A cache file is named after the hash of what decides its content, which it also holds: data, split, classes, images, network,
weights. It is written whole or not at all, and one that is damaged or of other content is replaced, saying so.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
from accelerate import Accelerator
from jaxtyping import Int64
from safetensors import SafetensorError, safe_open

from vaetrain.data.config import DataConfig
from vaetrain.data.format.manifest import Manifest
from vaetrain.data.readers.subset import Subset
from vaetrain.distributed import exchange, processes
from vaetrain.documents import parse_json
from vaetrain.files import fresh_name
from vaetrain.metrics.config import FidConfig
from vaetrain.metrics.extractor import FeatureExtractor
from vaetrain.metrics.features import FeatureSet, extract
from vaetrain.metrics.fidelity import FeatureStatistics
from vaetrain.strict_json import sha256_of_json

PREPROCESSING = "uint8, gray repeated to 3 channels, resized by the extractor; cache format 1"
"""What happens to an image before the network sees it; a change makes every cache file another one."""


class RealFeatures:
    """A split of real images, and their features."""

    def __init__(self, data: DataConfig, split: Literal["train", "val"], fid: FidConfig) -> None:
        self.images = Subset.all_of(data, split)
        self.split = split
        self._data = data
        self._fid = fid

    @property
    def num_images(self) -> int:
        """Images of the split after the class filter."""
        return self.images.selection.num_images

    @property
    def manifest(self) -> Manifest:
        """What the shard set says about itself."""
        return self.images.selection.shard_set.manifest

    def features(
        self, positions: Int64[np.ndarray, " n"], extractor: FeatureExtractor, accelerator: Accelerator
    ) -> FeatureSet:
        """Features of the images at `positions`, which ascend, from the cache or extracted and cached. A collective."""
        key = {
            "fingerprint": self.manifest.fingerprint,
            "split": self.split,
            "classes": list(self._data.classes),
            "count": len(positions),
            "positions": sha256_of_json(positions.tolist()),
            "seed": self._fid.seed if len(positions) < self.num_images else None,
            **extractor.describe(),
            "preprocessing": PREPROCESSING,
        }
        path = cache_folder(self._fid) / f"{sha256_of_json(key)[:32]}.safetensors"
        known = load(path, key) if accelerator.is_main_process else None
        shared = _shared(known, accelerator)
        if shared is not None:
            return shared
        extracted = self._extract(positions, extractor, accelerator)
        if accelerator.is_main_process:
            save(path, key, extracted)
        exchange.meet("the main process to keep the features of real images")
        return extracted

    def _extract(
        self, positions: Int64[np.ndarray, " n"], extractor: FeatureExtractor, accelerator: Accelerator
    ) -> FeatureSet:
        reader = self.images.at(positions).open_reader(accelerator.device, processes.processes_per_node())
        batch_size = self._fid.batch_size
        batches = reader.eval_batches(batch_size, accelerator.process_index, accelerator.num_processes)
        try:
            return extract(
                extractor, ((batch.indices, batch.images) for batch in batches), len(positions), accelerator,
                batch_size=batch_size, what=f"real images ({self.split})",
            )  # fmt: skip
        finally:
            reader.close()


def cache_folder(config: FidConfig) -> Path:
    """Where features of real images are kept."""
    if config.cache_dir is not None:
        return config.cache_dir
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vaetrain" / "reference"


def save(path: Path, key: dict[str, Any], features: FeatureSet) -> None:
    """Write features and their key as safetensors, whole or not at all; a folder that cannot be written is said, no error."""
    tensors = {
        "features": features.features,
        "sum": features.statistics.sum,
        "outer": features.statistics.outer,
    }
    aside = fresh_name(path)  # two evaluations may write the same file at once
    content = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(content, aside, metadata={"key": json.dumps(key)})
        aside.replace(path)
    except (OSError, SafetensorError) as error:  # the scores are worth more than the time their next computation takes
        with suppress(OSError):
            aside.unlink()
        print(f"note: the features of real images are not kept for the next evaluation: {error}", file=sys.stderr)


def load(path: Path, key: dict[str, Any]) -> FeatureSet | None:
    """The features that `save` wrote under `key`; None, with the reason printed, where there is no such file."""
    if not path.is_file():
        print(f"features of real images: none in {path}, they are extracted now")
        return None
    try:
        with safe_open(path, "pt") as file:
            found = parse_json((file.metadata() or {}).get("key", "null"))
            features, total, outer = (file.get_tensor(name) for name in ("features", "sum", "outer"))
        if features.ndim != 2 or total.shape != features.shape[1:] or outer.shape != (*total.shape, *total.shape):
            raise ValueError(f"features of shape {tuple(features.shape)}")
    except (OSError, SafetensorError, ValueError) as error:
        print(f"features of real images: {path} is damaged ({error}), they are extracted again")
        return None
    if found != key or len(features) != key["count"]:
        print(f"features of real images: {path} holds those of other images or weights, they are extracted again")
        return None
    print(f"features of real images: {key['count']:,} read from {path}")
    return FeatureSet(features, FeatureStatistics(len(features), total, outer))


def _shared(known: FeatureSet | None, accelerator: Accelerator) -> FeatureSet | None:
    """What the main process knows, on every process: its cache may lie on a disk that others do not see."""
    shape = exchange.decided_by_main(
        accelerator, lambda: None if known is None else tuple(known.features.shape), "read the features of real images"
    )
    if shape is None:
        return None
    num_images, width = shape
    device = accelerator.device
    if known is None:
        known = FeatureSet(torch.zeros(num_images, width), FeatureStatistics.empty(width))
    features, total, outer = (
        processes.sum_over_processes(accelerator, tensor.to(device))  # zero in all processes but the main one
        for tensor in (known.features, known.statistics.sum, known.statistics.outer)
    )
    return FeatureSet(features, FeatureStatistics(num_images, total, outer))
