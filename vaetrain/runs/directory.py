"""A run directory: where its files are, who made it, and its metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vaetrain.command_line import parse, to_yaml
from vaetrain.config import Config
from vaetrain.files import naming_file, replace_file
from vaetrain.runs.checkpoint_names import list_checkpoints
from vaetrain.runs.provenance import package_version, uncommitted_changes

FORMAT_VERSION = 1
"""Of a run directory; one without a version, from before it was recorded, has the same layout."""


@dataclass(frozen=True)
class RunDirectory:
    """The paths of one run; docs/runs.md says what each file holds."""

    path: Path

    @property
    def config_file(self) -> Path:
        """The resolved config; `--config` reads it back."""
        return self.path / "config.yaml"

    @property
    def provenance_file(self) -> Path:
        """What made this run: code, packages, machine, data, command; one entry more for every resume."""
        return self.path / "provenance.json"

    @property
    def patch_file(self) -> Path:
        """What the code had that its git revision has not, as `git apply` takes it; absent when there was nothing."""
        return self.path / "uncommitted.patch"

    def patch_file_at(self, step: int) -> Path:
        """The same for a start at `step`: each has its own, for the code may have changed in between."""
        return self.path / f"uncommitted-step-{step:08d}.patch" if step > 0 else self.patch_file

    @property
    def dataset_file(self) -> Path:
        """Summary of the manifests of the training and validation shard sets."""
        return self.path / "dataset.json"

    @property
    def metrics_file(self) -> Path:
        """One JSON object a line; every one carries step, images_seen, epoch and split."""
        return self.path / "metrics.jsonl"

    @property
    def trackers_file(self) -> Path:
        """What the run is called at its trackers, so that a resume continues there too."""
        return self.path / "trackers.json"

    @property
    def lock_file(self) -> Path:
        """Locked by the process that trains; see lock.py."""
        return self.path / ".lock"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def figures(self) -> Path:
        """Folder of PNG files."""
        return self.path / "figures"

    @property
    def evaluation_file(self) -> Path:
        """Scores written by evaluate.py."""
        return self.path / "evaluation.json"

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
        provenance = self.provenance()
        version = provenance.get("format_version", 1)
        if version > FORMAT_VERSION:
            last = [provenance, *provenance.get("resumes", [])][-1]
            raise ValueError(
                f"{self.path} has run format {version}, and this vaetrain ({package_version('vaetrain')}) reads up to "
                f"{FORMAT_VERSION}; use vaetrain {last['packages']['vaetrain']}, which wrote it, or a later one"
            )

    def check_resume(self, resume: str) -> None:
        """Refuse, with FileExistsError, a run directory that has a checkpoint, be it damaged, when `--resume never` was given."""
        if resume == "never" and (checkpoints := list_checkpoints(self.checkpoints)):
            raise FileExistsError(
                f"{self.path} already holds a run ({checkpoints[-1].name}); choose another --run-dir, or --resume auto"
            )

    def config(self) -> Config:
        """The resolved config the run was trained with."""
        return parse(Config, None, ["--config", str(self.config_file)])

    def provenance(self) -> dict[str, Any]:
        """The recorded provenance; {} for a run that has none yet."""
        return json.loads(self.provenance_file.read_text()) if self.provenance_file.is_file() else {}

    def write_start(
        self,
        config: Config,
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
        with naming_file(self.metrics_file), self.metrics_file.open("a") as file:
            file.write(json.dumps(record) + "\n")

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
        """All records so far, oldest first; a last line cut short by a kill is left out."""
        if not self.metrics_file.is_file():
            return []
        lines = self.metrics_file.read_text().split("\n")
        return [json.loads(line) for line in lines[:-1] if line]


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON atomically."""
    replace_file(path, (json.dumps(content, indent=2) + "\n").encode())
