"""What a sample set says about itself: the same whether sample.py made it or evaluate.py kept what it scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from vaetrain.command_line import plain
from vaetrain.export import TrainedModel, weights_sha256
from vaetrain.priors.config import FlowSettings, PriorName
from vaetrain.priors.saved import SavedPrior


class SampledModel(TypedDict):
    """Of a model's config, what its images are like."""

    image_size: int
    in_channels: int


class SampledConfig(TypedDict):
    """Of a run's config."""

    model: SampledModel


class SampledTraining(TypedDict):
    """What made the model."""

    config: SampledConfig


class SampledManifest(TypedDict):
    """What a reader of a sample set relies on."""

    run: str
    checkpoint: str
    checkpoint_sha256: str
    count: int
    shards: list[dict[str, Any]]
    training: SampledTraining


PIXELS = "decoder mean, rounded to the nearest of 256 levels, halves to the even one"


def content_of(
    run: Path,
    trained: TrainedModel,
    prior: PriorName,
    saved: SavedPrior | None,
    *,
    temperature: float,
    seed: int,
    count: int,
    batch_size: int,
    flow: FlowSettings | None = None,
) -> dict[str, Any]:
    """All that decides the pixels of a sample set, for its manifest and for the score of its samples."""
    fitted = _fitted(prior, saved)
    return {
        "run": str(run),
        "checkpoint": str(trained.checkpoint),
        "checkpoint_sha256": weights_sha256(run, trained),
        "prior": prior,
        "prior_sha256": fitted.sha256 if fitted else None,
        "temperature": temperature,
        "seed": seed,
        "count": count,
        "pixels": PIXELS,
        "batch_size": batch_size,
        **(flow or FlowSettings()).record(prior),
    }


def manifest_of(
    content: Mapping[str, Any],
    saved: SavedPrior | None,
    trained: TrainedModel,
    made_by: Mapping[str, Any],
    shards: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The whole manifest: `content`, the facts of the prior, the shards, and what made model and samples."""
    saved = _fitted(content["prior"], saved)
    return {
        "format_version": 1,
        "kind": "sample set",
        **content,
        "prior_facts": plain(saved.facts) if saved else None,
        "shards": list(shards),
        "training": {"config": trained.config, "provenance": trained.provenance, "dataset": trained.dataset},
        "provenance": dict(made_by),
    }


def _fitted(prior: PriorName, saved: SavedPrior | None) -> SavedPrior | None:
    """The standard normal is the same for every model, whether or not a table of priors has a file of it."""
    return None if prior == "standard" else saved
