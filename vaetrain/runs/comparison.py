"""Runs, exports and sample sets held against each other: what made them, and what came of it. Without importing torch."""

from __future__ import annotations

import json
import math
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from vaetrain.command_line import flatten, plain, printable
from vaetrain.documents import read_json
from vaetrain.files import inside
from vaetrain.runs.directory import RunDirectory
from vaetrain.runs.provenance import is_revision
from vaetrain.runs.record import RunRecord, number
from vaetrain.runs.recorded import ExportRecord, SampledRecord

SECTIONS = ("config", "data", "code", "packages", "machine", "results")
"""In the order of the table."""

MEASURED_BY_A_CLOCK = ("perf/",)
"""Beginnings of the names of metrics that differ between equal runs."""

Facts = dict[str, dict[str, Any]]
"""By section and name."""


@dataclass(frozen=True)
class Result:
    """What one run, export or sample set records about itself."""

    path: Path
    facts: Facts
    metrics: tuple[dict[str, Any], ...] | None
    """The records of a run; None for what has none."""

    @classmethod
    def read(cls, path: Path) -> Result:
        """Read a run directory, an export or a sample set.

        Raises FileNotFoundError when `path` is none of these, and ValueError naming the file that cannot be read.
        """
        if (path / "config.yaml").is_file():
            return cls._of_run(RunDirectory.open(path))
        if (file := path / "config.json").is_file():
            content = read_json(file, ExportRecord, remedy="export the run again", nulls=True)
            results = {"images_seen": content["progress"]["images_seen"], **_scores(content["scores"] or {})}
            return cls._of(file, content["training"], content["dataset"], content["provenance"], results)
        if (file := inside(path, "manifest.json")).is_file():
            content = read_json(file, remedy="draw the samples again")
            if content.get("kind") == "sample set":
                content = read_json(file, SampledRecord, remedy="draw the samples again")
                training = content["training"]
                results = {
                    name: content[name] for name in ("prior", "temperature", "seed", "count", "checkpoint_sha256")
                }
                return cls._of(file, training["config"], training["dataset"], training["provenance"], results)
        raise FileNotFoundError(
            f"{path} is no run directory (config.yaml), export (config.json) or sample set (manifest.json)"
        )

    @classmethod
    def _of_run(cls, run: RunDirectory) -> Result:
        for file in (run.provenance_file, run.dataset_file):
            if not file.is_file():
                raise FileNotFoundError(f"{run.path} has no {file.name}, so nobody knows what made this run")
        provenance, recorded = run.provenance(), RunRecord.read(run.path)
        metrics, validations = tuple(run.metrics()), recorded.split("val")
        results: dict[str, Any] = {}
        if metrics:
            results |= {"step": metrics[-1]["step"], "images_seen": metrics[-1]["images_seen"]}
        if validations:
            results |= {name: value for name, value in recorded.last_validation.items() if name.startswith("val/")}
            elbos = [elbo for record in validations if math.isfinite(elbo := number(record.get("val/elbo_nats")))]
            results |= {"best val/elbo_nats": max(elbos)} if elbos else {}
        if run.evaluation_file.is_file():
            evaluation = read_json(run.evaluation_file, remedy="run evaluate.py again", nulls=True)
            results |= {f"evaluation {name}": value for name, value in _scores(evaluation).items()}
        if recorded.images_per_s is not None:
            results["median perf/images_per_s"] = recorded.images_per_s
        return cls._of(run.dataset_file, plain(run.config()), run.dataset(), provenance, results, metrics)

    @classmethod
    def _of(
        cls,
        file: Path,
        config: Mapping[str, Any],
        dataset: Mapping[str, Any],
        provenance: Mapping[str, Any],
        results: dict[str, Any],
        metrics: tuple[dict[str, Any], ...] | None = None,
    ) -> Result:
        starts = [provenance, *provenance.get("resumes", [])]
        data: dict[str, Any] = {}
        for split in ("train", "val"):
            counts = dataset[split]["splits"].get(split)
            if counts is None:
                raise ValueError(f"{file} is damaged: it has no counts of the {split} split; bring it back from a copy")
            data |= {
                f"{split} fingerprint": dataset[split]["fingerprint"],
                f"{split} images": counts["num_images"],
                f"{split} classes": counts["class_counts"],
                f"{split} size": [dataset[split]["channels"], *[dataset[split]["image_size"]] * 2],
            }
        machine = (
            "cpu",
            "device",
            "num_processes",
            "processes_per_node",
            "num_cores",
            "omp_num_threads",
            "python",
            "platform",
        )
        facts: Facts = {
            "config": dict(flatten(config)),
            "data": data,
            "code": {
                "git_revision": provenance.get("git_revision"),
                "git_dirty": provenance.get("git_dirty"),
                "revisions of resumes": [start.get("git_revision") for start in starts[1:]],
            },
            "packages": dict(provenance.get("packages", {})),
            "machine": {name: provenance.get(name) for name in machine} | {"starts": len(starts)},
            "results": results,
        }
        return cls(file.parent, facts, metrics)


@dataclass(frozen=True)
class Agreement:
    """How far the records of two runs are equal to the bit, leaving out what a clock measured."""

    num_equal: int
    """Records that agree, from the first on."""

    num_records: int
    """Of the longer of the two."""

    last_step: int
    """Of the last record that agrees; 0 when none does."""

    parted_at: str
    """Where the first difference is; empty when there is none."""

    @property
    def is_whole(self) -> bool:
        """All records agree, and there are some."""
        return self.num_equal == self.num_records > 0

    @classmethod
    def of(cls, first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]) -> Agreement:
        """Compare record by record."""
        num_equal, last_step = 0, 0
        num_records = max(len(first), len(second))
        for mine, other in zip_longest(first, second):
            if mine is None or other is None:
                longer = "second" if mine is None else "first"
                return cls(num_equal, num_records, last_step, f"only the {longer} goes on after step {last_step}")
            for name in (*mine, *(name for name in other if name not in mine)):
                if not name.startswith(MEASURED_BY_A_CLOCK) and mine.get(name) != other.get(name):
                    where = f"step {mine['step']}, {name}: {mine.get(name)} and {other.get(name)}"
                    return cls(num_equal, num_records, last_step, where)
            num_equal, last_step = num_equal + 1, mine["step"]
        return cls(num_equal, num_records, last_step, "")

    def describe(self) -> str:
        """One sentence."""
        if self.is_whole:
            return f"the {self.num_records:,} records are equal, bit for bit, up to step {self.last_step:,}"
        if not self.num_records:
            return "there are no records"
        if self.parted_at.startswith("only"):
            return f"{self.num_equal:,} of {self.num_records:,} records are equal, bit for bit; {self.parted_at}"
        return (
            f"{self.num_equal:,} of {self.num_records:,} records are equal, bit for bit; they part at {self.parted_at}"
        )


@dataclass(frozen=True)
class Comparison:
    """Several results side by side."""

    results: tuple[Result, ...]

    def differing(self, section: str) -> list[str]:
        """Names in a section whose values are not the same in all."""
        return [name for name in self.names(section) if len({_key(value) for value in self.row(section, name)}) > 1]

    @property
    def agreements(self) -> list[Agreement]:
        """Of the first run's records with those of each other run, where they have some."""
        first, *others = (result.metrics for result in self.results)
        return [Agreement.of(first, other) for other in others if first is not None and other is not None]

    def headline(self) -> str:
        """What is the same and what is not, in a sentence for each section."""
        said = []
        same = [section for section in SECTIONS[:-1] if not self.differing(section)]
        if same:
            said.append(f"same {', '.join(same)}")
        for section in SECTIONS[:-1]:
            if names := [name for name in self.differing(section) if (section, name) != ("config", "run_dir")]:
                shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
                said.append(f"{section} differs: {shown}")
            elif section not in same:
                said.append(f"same {section} but for the run directory")
        said += [
            f"{result.path}: {agreement.describe()}"
            for result, agreement in zip(self.results[1:], self.agreements, strict=False)
        ]
        return "\n".join(said)

    def table(self, *, everything: bool = False) -> str:
        """A column for each result; of configuration, packages and machine only what differs unless `everything`."""
        rows: list[tuple[str, ...]] = [("", *(str(result.path) for result in self.results))]
        for section in SECTIONS:
            names = self.names(section) if everything or section == "results" else self.differing(section)
            if names:
                rows += [(), (section.upper(),)]
                rows += [(f"  {name}", *map(shown, self.row(section, name))) for name in names]
        widths = [max(len(row[column]) for row in rows if len(row) > 1) for column in range(len(rows[0]))]
        lines = (
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows
        )
        return "\n".join(lines)

    def code_between(self, checkout: Path) -> str:
        """What changed between the first two revisions, when `checkout` knows both; else empty."""
        revisions = [result.facts["code"]["git_revision"] for result in self.results[:2]]
        if None in revisions or revisions[0] == revisions[1]:
            return ""
        if not all(map(is_revision, revisions)):  # they come from files, and git would take --output=FILE for an option
            return "one of the two revisions is none of git's"
        span = f"{revisions[0]}..{revisions[1]}"
        counted = _git(checkout, "rev-list", "--count", "--end-of-options", span)
        changed = _git(checkout, "diff", "--shortstat", "--end-of-options", span, "--", "vaetrain")
        if counted is None or changed is None:
            return "the two revisions are not both in this checkout"
        return (
            f"{counted.strip()} commit(s) from the first to the second; in vaetrain/: {changed.strip() or 'no change'}"
        )

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return {
            "paths": [str(result.path) for result in self.results],
            "differing": {section: self.differing(section) for section in SECTIONS},
            "facts": [result.facts for result in self.results],
            "records": [{"equal": agreement.is_whole, "says": agreement.describe()} for agreement in self.agreements],
        }

    def names(self, section: str) -> list[str]:
        """All names of a section, in the order of the runs."""
        return list(dict.fromkeys(name for result in self.results for name in result.facts[section]))

    def row(self, section: str, name: str) -> list[Any]:
        """The value in each result, None where it has none."""
        return [result.facts[section].get(name) for result in self.results]


def _scores(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of an evaluation, FIDs under the name of their protocol."""
    described = evaluation.get("fid_protocol")
    protocol = described.get("name") if isinstance(described, Mapping) else None
    return {
        f"{name} ({protocol})" if protocol and name.startswith("eval/fid") else name: value
        for name, value in evaluation.items()
        if "/" in name and isinstance(value, int | float)
    }


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def shown(value: Any) -> str:
    """A value in a cell: six digits of a number, the beginning of a hash."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", value):  # a revision or a SHA-256
        return value[:12]
    return "–" if value is None else printable(str(value) if not isinstance(value, dict) else json.dumps(value))


def _git(checkout: Path, *arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(checkout), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
