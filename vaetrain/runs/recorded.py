"""The forms of what a run records of itself, which whoever reads a record can rely on; other keys may stand beside these."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict


class Start(TypedDict):
    """What made a start: see provenance.py."""

    git_revision: str | None
    git_dirty: bool | None
    packages: dict[str, str | None]
    python: str
    platform: str
    device: str
    num_processes: int
    command: list[str]
    cpu: NotRequired[str | None]
    precision: NotRequired[str]
    processes_per_node: NotRequired[int]
    num_cores: NotRequired[int]
    omp_num_threads: NotRequired[str | None]
    dataset_fingerprint: NotRequired[str | None]
    started: NotRequired[str]


class Provenance(Start):
    """provenance.json: the first start, and every resume."""

    format_version: NotRequired[int]
    resumes: NotRequired[list[Start]]


class SplitCounts(TypedDict):
    """Of a split in a manifest's summary."""

    num_images: int
    class_counts: dict[str, int]


class Summary(TypedDict):
    """A manifest without its lists of shards."""

    image_size: int
    channels: int
    classes: list[str]
    splits: dict[str, SplitCounts]
    fingerprint: str


class Dataset(TypedDict):
    """dataset.json."""

    train: Summary
    val: Summary


class MetricsRecord(TypedDict):
    """A line of metrics.jsonl."""

    step: int
    images_seen: int
    split: str


class SavedProgress(TypedDict):
    """The part of state.json's progress that checkpoints of all formats have."""

    step: int
    images_seen: int
    best_step: int | None


class SavedState(TypedDict):
    """state.json of a checkpoint."""

    format_version: int
    progress: SavedProgress
    optimizer: list[dict[str, Any]]
    vaetrain: NotRequired[str | None]
    reading: NotRequired[dict[str, Any] | None]
    loss_terms: NotRequired[dict[str, dict[str, str]]]
    scaler: NotRequired[dict[str, Any] | None]


class Exported(TypedDict):
    """config.json of an export, as far as loading it goes."""

    format_version: int
    model: dict[str, Any]


class ExportRecord(Exported):
    """All of it."""

    training: dict[str, Any]
    checkpoint: str
    progress: SavedProgress
    dataset: Dataset
    provenance: Provenance
    scores: dict[str, Any] | None


class Training(TypedDict):
    """What made a model, as sample sets and scores carry it."""

    config: dict[str, Any]
    provenance: Provenance
    dataset: Dataset


class SampledRecord(TypedDict):
    """manifest.json of a sample set, as far as a comparison goes."""

    prior: str
    temperature: float
    seed: int
    count: int
    checkpoint_sha256: str
    training: Training
