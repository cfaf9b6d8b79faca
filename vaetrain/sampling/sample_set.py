"""A sample set in the making: what was asked for, the shards that are already whole, and where to go on.

OUT/request.json stands there from the first shard to the manifest, so that a killed command, started again, goes on
with what it had begun and nothing else.
"""

from __future__ import annotations

import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vaetrain.data.format.manifest import MANIFEST_NAME, Shard
from vaetrain.data.format.tar_headers import members_of, open_tar
from vaetrain.documents import read_json
from vaetrain.files import inside, sha256_of_file
from vaetrain.runs.directory import write_json
from vaetrain.strict_json import differences

REQUEST_NAME = "request.json"


@dataclass(frozen=True)
class RankShard:
    """The images of a sample set that one process makes, in the order in which it makes them."""

    rank: int
    num_processes: int
    num_images: int
    """Of the whole set."""
    batch_size: int
    images_per_shard: int

    @property
    def prefix(self) -> str:
        """How the names of its shards begin."""
        return f"rank-{self.rank:04d}"

    def indices(self) -> list[int]:
        """Its image numbers: the blocks of `batch_size` images that `vaetrain.sampling.generate.generate` gives it."""
        starts = range(self.rank * self.batch_size, self.num_images, self.num_processes * self.batch_size)
        return [index for start in starts for index in range(start, min(start + self.batch_size, self.num_images))]

    def whole_shards(self, out: Path) -> list[Shard]:
        """Its first shards that are there and hold the right images; what a kill left half-written is deleted."""
        for leftover in out.glob(f".{self.prefix}-*"):
            leftover.unlink()
        indices = self.indices()
        shards: list[Shard] = []
        for start in range(0, len(indices), self.images_per_shard):
            expected = indices[start : start + self.images_per_shard]
            file = inside(out, f"{self.prefix}-{len(shards):06d}.tar")
            if images_in(file) != expected:
                break
            shards.append(Shard(file.name, len(expected), file.stat().st_size, sha256_of_file(file)))
        return shards


def images_in(shard: Path) -> list[int] | None:
    """The image numbers in a shard of samples, None when it is absent or cut short."""
    try:
        with shard.open("rb") as plain, open_tar(plain) as tar:  # never compressed
            return [int(Path(member.name).stem) for member in members_of(tar) if member.name.endswith(".png")]
    except (FileNotFoundError, tarfile.TarError, ValueError, EOFError, OverflowError):
        return None


def is_finished(out: Path, content: Mapping[str, Any]) -> bool:
    """Whether `out` already holds the whole sample set of this content, as a job that is started again finds it.

    Raises FileExistsError when it holds another one.
    """
    if not (out / MANIFEST_NAME).is_file():
        return False
    found = read_json(inside(out, MANIFEST_NAME), remedy="choose another --out")
    if changes := differences(found, content):
        raise FileExistsError(f"{out} already holds a sample set ({changes}); choose another --out")
    return True


def refuse_other_content(out: Path, request: Mapping[str, Any]) -> None:
    """Raise FileExistsError unless `out` is free for this request, or holds the beginning of the very same."""
    if not (out / REQUEST_NAME).is_file():
        if any(out.glob("rank-*.tar")):
            raise FileExistsError(
                f"{out} holds shards of which no request.json says what they are; choose another --out"
            )
        return
    begun = read_json(inside(out, REQUEST_NAME), remedy="choose another --out")
    if changes := differences(begun, request):
        raise FileExistsError(
            f"{out} holds the beginning of another sample set ({changes}); repeat that command to finish it, delete it, or "
            "choose another --out"
        )


def write_request(out: Path, request: Mapping[str, Any]) -> None:
    """Record what is being made. For the main process alone."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / REQUEST_NAME, request)


def write_manifest(out: Path, manifest: Mapping[str, Any]) -> None:
    """Declare the set complete, with provenance.json beside it. For the main process alone."""
    write_json(out / "provenance.json", {**manifest["provenance"], "training": manifest["training"]["provenance"]})
    write_json(out / MANIFEST_NAME, manifest)
    (out / REQUEST_NAME).unlink(missing_ok=True)  # kept samples have none
