"""The shard sets that the lecture's experiments read, and how each is made."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vaetrain.sweeps.jobs import Job

Scale = Literal["small", "full"]


@dataclass(frozen=True)
class Sources:
    """Where the originals are; None: not given."""

    mnist: Path | None
    afhq: Path | None
    afhq_val_count: int | None
    """Images held out of originals that have no val split of their own."""


@dataclass(frozen=True)
class DataSet:
    """A shard set by the name of its folder below `datasets`, as the configs name it."""

    name: str
    source: Literal["mnist", "afhq", "faces"]
    options: tuple[str, ...]
    """Of tools/make_shards.py."""

    @property
    def folder(self) -> Path:
        """Relative to the root of the project."""
        return Path("datasets") / self.name

    def job(self, sources: Sources, jobs: Path, root: Path) -> Job | None:
        """What makes it; None when it is there.

        Raises FileNotFoundError, saying how to get it, when its originals were not named.
        """
        if (root / self.folder / "manifest.json").is_file():
            return None
        original = {"mnist": sources.mnist, "afhq": sources.afhq, "faces": Path("faces")}[self.source]
        if original is None:
            raise FileNotFoundError(
                f"{self.folder} is missing; name the originals with --{self.source} PATH (python tools/fetch_{self.source}.py "
                f"{self.source} fetches them), or make it yourself: python tools/make_shards.py {self.source} {self.folder} "
                f"{' '.join(self.options)}"
            )
        if self.source != "faces":
            original = original.absolute()
        held_out = (
            ["--val-count", str(sources.afhq_val_count)] if self.source == "afhq" and sources.afhq_val_count else []
        )
        return Job(
            f"data {self.name}",
            (sys.executable, "tools/make_shards.py", str(original), str(self.folder), *self.options, *held_out),
            record_file=jobs / f"data-{self.name}.json", log_file=jobs / f"data-{self.name}.log",
        )  # fmt: skip

    def classes(self, root: Path) -> list[str]:
        """Of the shard set, which is there."""
        return list(json.loads((root / self.folder / "manifest.json").read_text())["classes"])


DATASETS = {
    dataset.name: dataset
    for dataset in (
        DataSet("mnist", "mnist", ("--size", "28", "--gray")),
        DataSet("cats64", "afhq", ("--size", "64")),
        DataSet("cats64gray", "afhq", ("--size", "64", "--gray")),
        DataSet("afhq128", "afhq", ("--size", "128")),
        DataSet("afhq128gray", "afhq", ("--size", "128", "--gray")),
        DataSet("faces64", "faces", ("--size", "64", "--num-images", "3000", "--val-count", "300")),
    )
}
