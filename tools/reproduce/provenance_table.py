"""Where numbers come from, for the foot of a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from reproduce.tables import Table
from vaetrain.runs.directory import RunDirectory


def provenance_table(runs: Sequence[Path], out: Path) -> Table:
    """A row a run: where it lies, and the commit, machine, data and time that made it."""
    rows = []
    for run in runs:
        directory = RunDirectory(run)
        if not directory.provenance_file.is_file():
            continue
        made_by = directory.provenance()
        revision = (made_by.get("git_revision") or "unknown")[:10] + (" + changes" if made_by.get("git_dirty") else "")
        config = directory.config()
        rows.append(
            (
                run.relative_to(out).as_posix(), revision, str(made_by.get("device")), str(made_by.get("num_processes")),
                str(made_by.get("omp_num_threads")), (made_by.get("dataset_fingerprint") or "")[:10], str(config.seed),
                str(made_by.get("started")),
            )
        )  # fmt: skip
    header = ("run", "commit", "device", "processes", "threads", "data", "seed", "started (UTC)")
    return Table(header, tuple(rows), "Runs: each folder holds config.yaml, provenance.json and metrics.jsonl")
