"""The generated images behind a score, kept as a sample set while their features are extracted."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from vaetrain.data.format.writer import ShardWriter
from vaetrain.distributed.exchange import decided_by_main, gather_objects, meet
from vaetrain.documents import read_json
from vaetrain.metrics.features import NumberedImages
from vaetrain.sampling.encode import with_png
from vaetrain.sampling.sample_set import write_manifest
from vaetrain.strict_json import differences, to_json


def check_free(folder: Path, content: Mapping[str, Any]) -> bool:
    """Whether `folder` is free for the sample set that `content` describes; False when it already holds that very set.

    Raises FileExistsError when it holds anything else.
    """
    manifest = folder / "manifest.json"
    if manifest.is_file() and not differences(read_json(manifest, remedy="name another folder"), content):
        return False
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"--keep-samples {folder} holds something else; delete it or name another folder")
    return True


def keep(
    images: Iterable[NumberedImages],
    folder: Path,
    content: Mapping[str, Any],
    manifest: Callable[[list[dict[str, Any]]], dict[str, Any]],
    accelerator: Accelerator,
) -> Iterable[NumberedImages]:
    """This process's images, each written as a PNG of the sample set on its way. A collective.

    `content` decides the images (seed, prior, …), and `manifest` makes the whole manifest from the list of shards. The set
    is written into FOLDER.partial and renamed when it is whole; what an earlier process left there is deleted. Raises
    FileExistsError, at once, when `folder` holds anything but this very set, which is then left as it is.
    """
    free = decided_by_main(accelerator, lambda: check_free(folder, content), f"look into {folder}")
    return _writing(images, folder, content["seed"], manifest, accelerator) if free else images


def _writing(
    images: Iterable[NumberedImages],
    folder: Path,
    seed: int,
    manifest: Callable[[list[dict[str, Any]]], dict[str, Any]],
    accelerator: Accelerator,
) -> Iterator[NumberedImages]:
    aside = folder.with_name(f"{folder.name}.partial")
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    meet(f"the main process to make {aside}")
    with ShardWriter(aside, f"rank-{accelerator.process_index:04d}") as writer:
        for indices, block, files in with_png(images):
            for index, file in zip(indices, files, strict=True):
                writer.write(f"{int(index):08d}", file, "png", {"index": int(index), "seed": seed})
            yield indices, block
    shards = gather_objects([to_json(shard) for shard in writer.shards], "all processes to write their samples")
    if accelerator.is_main_process:
        write_manifest(aside, manifest(shards))
        aside.replace(folder)
    meet(f"the main process to write the manifest of {folder}")
