"""Whether advice came true: what finished trainings gave beside what scale.py's numbers predict of them.

A learning-rate grid says how far the suggested rate is from the best. Trainings of several lengths at a small batch say what a
number of images is worth; with McCandlish et al. 2018, Eq. 2.11, that predicts what a larger batch reaches with the same images.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vaetrain.data.readers.order import BatchLayout
from vaetrain.runs.directory import RunDirectory
from vaetrain.runs.record import RunRecord, records_of
from vaetrain.training.noise_scale import NOISE_METERS, NoiseScale, by_progress, small_batch

SCORE = "val/elbo_nats"


@dataclass(frozen=True)
class SeedGroup:
    """Trainings that differ in their seed alone."""

    x: float
    """The rate, the batch or the number of images."""
    scores: tuple[float, ...]
    """Validation ELBO at the end of each, nats per image."""

    @property
    def mean(self) -> float:
        """Over seeds."""
        return statistics.fmean(self.scores)

    @property
    def error(self) -> float | None:
        """Standard error of the mean; None with one seed."""
        return statistics.stdev(self.scores) / math.sqrt(len(self.scores)) if len(self.scores) > 1 else None


@dataclass(frozen=True)
class Run:
    """What a run directory says of itself."""

    lr: float
    batch: int
    images: int
    seed: int
    score: float

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Raises ValueError, naming the folder, when it holds no run that has been validated."""
        try:
            recorded = RunRecord.read(folder).require_whole()
        except FileNotFoundError as error:
            raise ValueError(str(error)) from error
        config = recorded.config or {}
        validation = next((each for each in reversed(recorded.split("val")) if each.get(SCORE) is not None), None)
        if validation is None:
            raise ValueError(f"{folder} has no validation with {SCORE}")
        return cls(
            float(config["optim"]["lr"]), int(config["train"]["global_batch_size"]), int(validation["images_seen"]),
            int(config["seed"]), float(validation[SCORE]),
        )  # fmt: skip


def runs_below(folder: Path) -> list[Run]:
    """All runs of a sweep's folder that were validated, or the one run that the folder is."""
    files = sorted(folder.rglob("metrics.jsonl"))
    if not files:
        raise ValueError(f"there is no run below {folder}")
    return [Run.read(file.parent) for file in files]


def critical_batches(folder: Path) -> tuple[NoiseScale, NoiseScale]:
    """Adam's noise scale and the simple one over a whole training with `--log.noise-scale True`, counted by progress.

    Raises ValueError, naming the run, when it logged none.
    """
    run = RunDirectory(folder)
    # The record of the first step alone would count as much as those of whole intervals.
    records = [record for record in records_of(run.metrics(), "train") if record["step"] > 1]
    known = [record for record in records if all(record.get(f"train/{name}") is not None for name in NOISE_METERS)]
    if not known:
        raise ValueError(f"{folder} has no gradient norms; train with --log.noise-scale True")
    train, num_processes = run.config().train, run.provenance()["num_processes"]
    layout = BatchLayout.of(train.global_batch_size, train.micro_batch_size, 0, num_processes)

    def of(small: str, whole: str) -> NoiseScale:
        small_sq, big_sq = ([record[f"train/{name}"] for record in known] for name in (small, whole))
        return NoiseScale.of(
            *by_progress(small_sq, big_sq), small_batch(layout, num_processes), layout.global_batch_size
        )

    return of("adam_small_grad_sq", "adam_grad_sq"), of("small_grad_sq", "grad_sq")


def points(runs: Sequence[Run], x: Callable[[Run], float | int]) -> list[SeedGroup]:
    """Runs by what they vary, ascending."""
    groups: dict[float, list[float]] = {}
    for run in runs:
        groups.setdefault(float(x(run)), []).append(run.score)
    return [SeedGroup(at, tuple(scores)) for at, scores in sorted(groups.items())]


def images_worth(lengths: Sequence[SeedGroup], images: float | int) -> float:
    """The score after so many images at the small batch, from trainings of several lengths: linear in log(images).

    Beyond the first and the last length the nearest two go on.
    """
    assert len(lengths) > 1
    at = next((n for n, point in enumerate(lengths) if point.x >= images), len(lengths) - 1)
    low, high = lengths[max(1, at) - 1], lengths[max(1, at)]
    share = math.log(images / low.x) / math.log(high.x / low.x)
    return low.mean + share * (high.mean - low.mean)


def predicted(
    lengths: Sequence[SeedGroup], images: float | int, small_batch: float | int, batch: float | int, critical: float
) -> float:
    """The score at `batch` after `images`: that of the `small_batch` of `lengths` after the images that these are worth to it."""
    return images_worth(lengths, images * (1 + small_batch / critical) / (1 + batch / critical))


def score_gap(score: float, best: float) -> float:
    """How far a score lies below the best, as a share of the best's size."""
    return (best - score) / abs(best)
