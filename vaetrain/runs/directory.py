"""A run directory: where its files are, who made it, and its metrics."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vaetrain.command_line import read_config, to_yaml
from vaetrain.config import Config, TrainingConfig
from vaetrain.documents import json_lines, read_json
from vaetrain.files import append_to, inside, naming_file, replace_file
from vaetrain.runs.checkpoint_names import NONE_YET, list_checkpoints
from vaetrain.runs.provenance import package_version, uncommitted_changes
from vaetrain.runs.recorded import Dataset, MetricsRecord, Provenance
from vaetrain.strict_json import from_json

FORMAT_VERSION = 1
"""Of a run directory; one without a version, from before it was recorded, has the same layout."""

REMEDY = "bring it back from a copy, or take another run"


@dataclass(frozen=True)
class RunDirectory:
    """The paths of one run; docs/runs.md says what each file holds.

    It may be somebody else's: a path of it that is a link, or lies beyond one, is refused by name (ValueError).
    """

    path: Path

    @property
    def config_file(self) -> Path:
        """The resolved config; `--config` reads it back."""
        return inside(self.path, "config.yaml")

    @property
    def provenance_file(self) -> Path:
        """What made this run: code, packages, machine, data, command; one entry more for every resume."""
        return inside(self.path, "provenance.json")

    @property
    def patch_file(self) -> Path:
        """What the code had that its git revision has not, as `git apply` takes it; absent when there was nothing."""
        return inside(self.path, "uncommitted.patch")

    def patch_file_at(self, step: int) -> Path:
        """The same for a start at `step`: each has its own, for the code may have changed in between."""
        return inside(self.path, f"uncommitted-step-{step:08d}.patch") if step > 0 else self.patch_file

    @property
    def dataset_file(self) -> Path:
        """Summary of the manifests of the training and validation shard sets."""
        return inside(self.path, "dataset.json")

    @property
    def metrics_file(self) -> Path:
        """One JSON object a line; every one carries step, images_seen, epoch and split."""
        return inside(self.path, "metrics.jsonl")

    @property
    def trackers_file(self) -> Path:
        """What the run is called at its trackers, so that a resume continues there too."""
        return inside(self.path, "trackers.json")

    @property
    def lock_file(self) -> Path:
        """Locked by the process that trains; see lock.py."""
        return inside(self.path, ".lock")

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return inside(self.path, "checkpoints")

    @property
    def figures(self) -> Path:
        """Folder of PNG files."""
        return inside(self.path, "figures")

    @property
    def evaluation_file(self) -> Path:
        """Scores written by evaluate.py."""
        return inside(self.path, "evaluation.json")

    @classmethod
    def open(cls, path: str | Path) -> RunDirectory:
        """An existing run; FileNotFoundError says what makes one."""
        run = cls(Path(path))
        if not run.config_file.is_file():
            raise FileNotFoundError(f"{path} is no run directory (it has no config.yaml); vaetrain/train.py makes one")
        run.check_format()
        return run

    def check_format(self) -> None:
        """Refuse, with ValueError, a run directory of a later format than this vaetrain knows."""
        if not self.provenance_file.exists():
            return
        recorded = read_json(self.provenance_file, remedy=REMEDY)  # of a later format other keys may be wanted
        version = recorded.get("format_version", 1)
        if not isinstance(version, int):
            raise ValueError(f"{self.provenance_file} is damaged: format_version is {version!r}; {REMEDY}")
        if version > FORMAT_VERSION:
            resumes = recorded.get("resumes")
            last = resumes[-1] if isinstance(resumes, list) and resumes else recorded
            packages = last.get("packages") if isinstance(last, dict) else None
            writer = packages.get("vaetrain") if isinstance(packages, dict) else "(unknown)"
            raise ValueError(
                f"{self.path} has run format {version}, and this vaetrain ({package_version('vaetrain')}) reads up to "
                f"{FORMAT_VERSION}; use vaetrain {writer}, which wrote it, or a later one"
            )

    def check_resume(self, resume: str) -> None:
        """Refuse to train over what is there.

        Raises FileExistsError for a run directory that has a checkpoint, be it damaged, when `--resume never` was given, and
        ValueError for records of a training whose checkpoints are gone: one that has had none says so (`NONE_YET`).
        """
        checkpoints = list_checkpoints(self.checkpoints)
        if resume == "never" and checkpoints:
            raise FileExistsError(
                f"{self.path} already holds a run ({checkpoints[-1].name}); choose another --run-dir, or --resume auto"
            )
        records = [file for file in self._records() if file.is_file() and file.stat().st_size > 0]
        if records and not checkpoints and not self.no_checkpoint_file.exists():
            raise ValueError(
                f"{self.path} holds records of a training ({', '.join(file.name for file in records)}), and its checkpoints are "
                f"gone; bring {self.checkpoints} back from a copy, delete {self.path} to train from the start again, or choose "
                "another --run-dir"
            )

    def _records(self) -> Iterator[Path]:
        yield from (self.metrics_file, self.provenance_file, self.dataset_file, self.evaluation_file)

    @property
    def no_checkpoint_file(self) -> Path:
        """See `NONE_YET`."""
        return inside(self.checkpoints, NONE_YET)

    def config(self) -> Config:
        """The resolved config the run was trained with."""
        return read_config(Config, self.config_file)

    def provenance(self) -> dict[str, Any]:
        """The recorded provenance; {} for a run that has none yet."""
        file = self.provenance_file
        provenance: dict[str, Any] = read_json(file, Provenance, remedy=REMEDY) if file.exists() else {}
        return provenance

    def dataset(self) -> dict[str, Any]:
        """The summaries of the manifests of the training and validation shard sets."""
        return read_dataset(self.dataset_file)

    def write_start(
        self,
        config: TrainingConfig,
        provenance: Mapping[str, Any],
        dataset: Mapping[str, Any],
        *,
        step: int,
        validated_at: int = 0,
    ) -> None:
        """Record what starts now, at `step`, the last validation being that at `validated_at` images seen.

        Later records are dropped, they will be written again.

        A resume keeps the first start's provenance and adds its own under `resumes`.
        """
        self.figures.mkdir(parents=True, exist_ok=True)
        self.checkpoints.mkdir(exist_ok=True)
        if not list_checkpoints(self.checkpoints):
            replace_file(self.no_checkpoint_file, b"")  # before there is any record
        earlier = self.provenance() if step > 0 else {}
        if earlier:
            earlier.setdefault("resumes", []).append({"step": step, **provenance})
        replace_file(self.config_file, to_yaml(config).encode())
        write_json(self.provenance_file, {**(earlier or provenance), "format_version": FORMAT_VERSION})
        write_json(self.dataset_file, dataset)
        if patch := uncommitted_changes(Path(__file__).parents[2]):
            replace_file(self.patch_file_at(step if earlier else 0), patch)
        if step > 0:
            self.drop_metrics_after(step, validated_at)
        else:
            replace_file(self.metrics_file, b"")

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl; it is on disk when this returns from the operating system's point of view."""
        with naming_file(self.metrics_file), append_to(self.metrics_file) as file:
            file.write((json.dumps(record) + "\n").encode())

    def drop_metrics_after(self, step: int, validated_at: int) -> None:
        """Delete the records after `step`, which will be written again; events stay: they did happen."""
        kept = [
            record
            for record in self.metrics()
            if record["split"] == "event"
            or (
                record["step"] <= step
                # Saved before the validation of its step, a checkpoint has that validation still to come.
                and not (record["split"] == "val" and record["images_seen"] > validated_at)
            )
        ]
        replace_file(self.metrics_file, "".join(json.dumps(record) + "\n" for record in kept).encode())

    def metrics(self) -> list[dict[str, Any]]:
        """All records so far, oldest first; a last line cut short by a kill is left out.

        Raises ValueError, naming it, for a line that holds no record.
        """
        file = self.metrics_file
        if not file.exists():
            return []
        records: list[dict[str, Any]] = []
        for number, record in json_lines(file, remedy=REMEDY):
            try:
                records.append(from_json(MetricsRecord, record, "it"))
            except ValueError as error:
                raise ValueError(
                    f"{file} is damaged: line {number:,} is no record ({error}); delete that line, or bring the file back from a "
                    "copy"
                ) from error
        return records


def read_dataset(file: Path) -> dict[str, Any]:
    """A dataset.json; raises FileNotFoundError, and ValueError naming the file where it is damaged."""
    dataset: dict[str, Any] = read_json(file, Dataset, remedy=REMEDY)
    for split in ("train", "val"):
        if dataset[split]["splits"].get(split, {}).get("num_images", 0) < 1:
            raise ValueError(f"{file} is damaged: {split} has no images in its split {split}; {REMEDY}")
    return dataset


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON atomically."""
    replace_file(path, (json.dumps(content, indent=2) + "\n").encode())
