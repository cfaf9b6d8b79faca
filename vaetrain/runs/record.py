"""What a run directory holds, as far as it is there and can be read; what is not is said in sentences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vaetrain.documents import json_lines, read_json, read_yaml
from vaetrain.runs.directory import REMEDY, RunDirectory, read_dataset
from vaetrain.runs.recorded import MetricsRecord, Provenance
from vaetrain.strict_json import from_json


@dataclass(frozen=True)
class RunRecord:
    """A run's files, each None where it is missing or damaged."""

    run: RunDirectory
    config: dict[str, Any] | None
    provenance: dict[str, Any] | None
    dataset: dict[str, Any] | None
    evaluation: dict[str, Any] | None
    metrics: tuple[dict[str, Any], ...]
    """Oldest first."""

    faults: dict[str, str]
    """By name of the file, what is wrong with it."""

    @classmethod
    def read(cls, path: Path) -> RunRecord:
        """Read a run directory.

        Raises FileNotFoundError, saying what to name instead, when it is none, and ValueError when its format is a later one, or
        one of its files a link.
        """
        run = RunDirectory(path)
        if not run.config_file.is_file():
            raise FileNotFoundError(_no_run(path))
        faults: dict[str, str] = {}
        config = _mapping(run.config_file, faults, partial(read_yaml, remedy=REMEDY))
        provenance = _mapping(run.provenance_file, faults, partial(read_json, kind=Provenance, remedy=REMEDY))
        if provenance is not None:
            run.check_format()
        dataset = _mapping(run.dataset_file, faults, read_dataset)
        evaluation = _mapping(run.evaluation_file, faults, partial(read_json, remedy=REMEDY, nulls=True))
        return cls(run, config, provenance, dataset, evaluation, tuple(_metrics(run.metrics_file, faults)), faults)

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.run.path.resolve().name

    def split(self, name: str) -> list[dict[str, Any]]:
        """The records of a split."""
        return records_of(self.metrics, name)

    @property
    def last_validation(self) -> dict[str, Any]:
        """The last record of split val; {} before there is one."""
        return next(reversed(self.split("val")), {})

    @property
    def images_per_s(self) -> float | None:
        """Median speed of training, over its records."""
        speeds = [number(record.get("perf/images_per_s")) for record in self.metrics]
        finite = [speed for speed in speeds if math.isfinite(speed) and speed]
        return statistics.median(finite) if finite else None

    def require_whole(self) -> RunRecord:
        """Itself; raises ValueError, naming them, where files are damaged."""
        if self.faults:
            raise ValueError(f"{self.run.path}: {' '.join(self.faults.values())}")
        return self

    def why_not(self, file: Path, remedy: str) -> str:
        """A sentence about a file that could not be had."""
        return self.faults.get(file.name) or f"There is no {file.name}: {remedy}"


def records_of(metrics: Iterable[dict[str, Any]], split: str) -> list[dict[str, Any]]:
    """Those of a split: train, val or event."""
    return [record for record in metrics if record.get("split") == split]


def number(value: Any) -> float:
    """A metric as a number; NaN for null and for what is none."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def points(records: Iterable[dict[str, Any]], x: str, y: str) -> tuple[tuple[float, float], ...]:
    """(x, y) of the records that name both; NaN where a value is null."""
    return tuple((number(record[x]), number(record[y])) for record in records if x in record and y in record)


def _metrics(file: Path, faults: dict[str, str]) -> Iterator[dict[str, Any]]:
    if not file.is_file():
        return
    unreadable = 0
    for _, record in json_lines(file, remedy=REMEDY):
        try:
            yield from_json(MetricsRecord, record)
        except ValueError:
            unreadable += 1
    if unreadable:
        faults[file.name] = f"{unreadable:,} line(s) of {file.name} cannot be read and are left out."


def _mapping(file: Path, faults: dict[str, str], read: Callable[[Path], Any]) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        content = read(file)
    except (ValueError, OSError) as error:
        faults[file.name] = f"{file.name} is damaged: {error}"
        return None
    if not isinstance(content, dict):
        faults[file.name] = f"{file.name} is damaged: it holds no mapping."
        return None
    return content


def _no_run(path: Path) -> str:
    if not path.exists():
        return f"run directory {path} does not exist"
    inside = sorted(found.parent for found in path.glob("*/config.yaml")) if path.is_dir() else []
    if inside:
        shown = " ".join(map(str, inside[:3])) + (" …" if len(inside) > 3 else "")
        return f"{path} is no run directory (it has no config.yaml); it holds some, name those: {shown}"
    return f"{path} is no run directory (it has no config.yaml); name one that vaetrain/train.py made, for example runs/demo"
