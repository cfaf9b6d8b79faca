"""Train a small feature extractor on a shard set, for `evaluate.py --fid.extractor` where Inception's weights cannot be had.

python tools/train_extractor.py SHARDS OUT.pt      with two classes or more it learns them, with one which way up images are
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from vaetrain.command_line import parse, user_errors
from vaetrain.data.config import DataConfig


@dataclass(frozen=True)
class ExtractorArguments:
    """On which images, and how long."""

    shards: tyro.conf.Positional[str]
    """Shard set with a train and a val split."""

    out: tyro.conf.Positional[Path]
    """TorchScript file to write; OUT.json beside it says what was trained and how well it does."""

    num_images: int = 120_000
    """Images to train on, repeats included."""

    batch_size: int = 128
    """Images per step."""

    seed: int = 0
    """Of weights, order and turns."""

    def __post_init__(self) -> None:
        """Refuse to train on nothing."""
        for name in ("num_images", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; give at least 1")


if __name__ == "__main__":
    ARGUMENTS = parse(ExtractorArguments, __doc__, flags=True)  # before the imports below, which take seconds

    from vaetrain.preflight import check_split

    with user_errors():
        check_split(DataConfig(train=ARGUMENTS.shards), "train")
        check_split(DataConfig(train=ARGUMENTS.shards), "val")

import torch

from vaetrain.command_line import plain
from vaetrain.data.readers.reader import open_reader
from vaetrain.metrics.own_extractor import train_own_extractor
from vaetrain.runs.directory import write_json


def main(arguments: ExtractorArguments) -> None:
    """Train, write both files, say how well it does."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = DataConfig(train=arguments.shards, horizontal_flip=False)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    report = train_own_extractor(
        lambda split: open_reader(data, split, device=device), arguments.out, num_images=arguments.num_images,
        batch_size=arguments.batch_size, seed=arguments.seed, device=device,
    )  # fmt: skip
    write_json(arguments.out.with_name(f"{arguments.out.name}.json"), plain(report))
    print(
        f"{report.accuracy:.2%} of the val split right ({report.task}, {report.num_outputs}); written to {arguments.out}"
    )


if __name__ == "__main__":
    with user_errors():
        main(ARGUMENTS)
