"""A sweep's trials as jobs, each in a run directory of its own below the sweep's folder."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vaetrain.documents import MAX_YAML_BYTES
from vaetrain.files import read_bytes
from vaetrain.runs.directory import RunDirectory
from vaetrain.sweeps.jobs import Job, run_jobs
from vaetrain.sweeps.sweep_file import Sweep, Trial


@dataclass(frozen=True)
class TrialRun:
    """One trial and what became of it."""

    parameters: Trial
    folder: Path
    """Its run directory."""
    job: Job

    def metrics(self) -> list[dict[str, Any]]:
        """The records of its run so far."""
        return RunDirectory(self.folder).metrics()


def trial_name(sweep: Sweep, parameters: Trial, extra: Sequence[str], root: Path) -> str:
    """What a trial's folder is called: what it varies, and a hash over its command and the config files that this names.

    So a sweep or config that was edited trains anew, in folders of its own, instead of going on with what another trained.
    """
    command = [*sweep.command_of(parameters, "${interpreter}"), *extra]
    files = [root / word.rpartition("=")[2] for word in command if word.endswith(".yaml")]
    contents = [
        read_bytes(file, MAX_YAML_BYTES, "mend it").decode(errors="replace") for file in files if file.is_file()
    ]
    digest = hashlib.sha256(json.dumps([command, contents]).encode()).hexdigest()[:8]
    values = "_".join(f"{name.rpartition('.')[2]}={parameters[name]}" for name in sweep.varied)
    return f"{re.sub(r'[^A-Za-z0-9=._+-]', '-', values)[:100]}_{digest}"


def trial_runs(
    sweep: Sweep, trials: Sequence[Trial], out: Path, *, extra: Sequence[str] = (), root: Path
) -> list[TrialRun]:
    """The trials as jobs below `out`, to be run in `root`; record and log lie beside the run, which is train.py's to write."""
    runs = []
    for parameters in trials:
        folder = out / trial_name(sweep, parameters, extra, root)
        # Later arguments win: the folder and the silence of W&B are ours.
        own = ["--run-dir", str(folder.absolute()), "--log.wandb", "disabled"]
        job = Job(
            folder.name, (*sweep.command_of(parameters, sys.executable), *extra, *own),
            record_file=folder.with_name(f"{folder.name}.trial.json"), log_file=folder.with_name(f"{folder.name}.log"),
            variables={"WANDB_RUN_ID": folder.name[-8:]}, about={"parameters": parameters},
        )  # fmt: skip
        runs.append(TrialRun(parameters, folder, job))
    return runs


def run_sweep(
    sweep: Sweep, trials: Sequence[Trial], out: Path, *, processes: int, extra: Sequence[str], root: Path
) -> list[TrialRun]:
    """Run the trials below `out`, `processes` at a time, and return how each ended.

    A trial whose record says finished is not run again; others resume by themselves where their run directory left off.
    Raises KeyboardInterrupt when told to stop (jobs.py).
    """
    runs = trial_runs(sweep, trials, out, extra=extra, root=root)
    for run in runs:
        run.job.read_record()
    finished = sum(run.job.state == "finished" for run in runs)
    print(f"{len(runs)} trials, {finished} of them finished already, {processes} at a time, below {out}", flush=True)
    run_jobs([run.job for run in runs], processes=processes, root=root)
    return runs
