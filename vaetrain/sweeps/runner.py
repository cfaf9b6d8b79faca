"""Trials as processes, some at a time: started, resumed, stopped, and each with a record of how it ended."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vaetrain.files import replace_file
from vaetrain.machine import num_cores
from vaetrain.run import RunDirectory
from vaetrain.sweeps.sweep_file import Sweep, Trial

POLL_S = 0.2
EXIT_STOPPED = 75
"""Of a training that was told to stop and saved; vaetrain/preemption.py."""
TIME_TO_STOP_S = 120
"""For trials that are told to stop, before they are killed."""

State = Literal["waiting", "running", "finished", "failed", "stopped"]


@dataclass
class TrialRun:
    """One trial and what became of it."""

    parameters: Trial
    folder: Path
    """Its run directory."""
    state: State = "waiting"
    reason: str = ""
    """Why it failed."""

    @property
    def record_file(self) -> Path:
        """Says how it ended; beside the run, which is train.py's to write."""
        return self.folder.with_name(f"{self.folder.name}.trial.json")

    @property
    def log_file(self) -> Path:
        """What it printed."""
        return self.folder.with_name(f"{self.folder.name}.log")

    def write(self) -> None:
        """Record the state."""
        content = {"parameters": self.parameters, "state": self.state, "reason": self.reason}
        replace_file(self.record_file, (json.dumps(content, indent=2) + "\n").encode())

    def metrics(self) -> list[dict[str, Any]]:
        """The records of its run so far."""
        return RunDirectory(self.folder).metrics()


def trial_name(sweep: Sweep, parameters: Trial, extra: Sequence[str]) -> str:
    """What a trial's folder is called: what it varies, and a hash over all parameters and the extra arguments."""
    digest = hashlib.sha256(json.dumps([parameters, list(extra)], sort_keys=True).encode()).hexdigest()[:8]
    values = "_".join(f"{name.rpartition('.')[2]}={parameters[name]}" for name in sweep.varied)
    return f"{re.sub(r'[^A-Za-z0-9=._+-]', '-', values)[:100]}_{digest}"


def run_sweep(
    sweep: Sweep, trials: Sequence[Trial], out: Path, *, processes: int, extra: Sequence[str], root: Path
) -> list[TrialRun]:
    """Run the trials below `out`, `processes` at a time, and return how each ended.

    A trial whose record says finished is not run again; others resume by themselves where their run directory left off. SIGINT
    and SIGTERM are passed on as SIGTERM, at which trials save and stop.
    """
    out.mkdir(parents=True, exist_ok=True)
    runs = [TrialRun(parameters, out / trial_name(sweep, parameters, extra)) for parameters in trials]
    for run in runs:
        if run.record_file.is_file() and json.loads(run.record_file.read_text())["state"] == "finished":
            run.state = "finished"
    finished = sum(run.state == "finished" for run in runs)
    print(f"{len(runs)} trials, {finished} of them finished already, {processes} at a time, below {out}", flush=True)
    told: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: told.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    alive: dict[int, tuple[TrialRun, subprocess.Popen[bytes]]] = {}
    try:
        waiting = [run for run in runs if run.state != "finished"]
        while (waiting and not told) or alive:
            while waiting and not told and len(alive) < processes:
                run = waiting.pop(0)
                process = _start(sweep, run, processes, extra, root)
                alive[process.pid] = run, process
            for pid, (run, process) in list(alive.items()):
                if process.poll() is not None:
                    del alive[pid]
                    _note_end(run, process.returncode, was_told=bool(told))
            if told and alive:
                _stop([process for _, process in alive.values()])
            time.sleep(POLL_S)
    finally:
        _stop([process for _, process in alive.values()])
        for number, handler in before.items():
            signal.signal(number, handler)
    if told:
        raise KeyboardInterrupt
    return runs


def _start(sweep: Sweep, run: TrialRun, processes: int, extra: Sequence[str], root: Path) -> subprocess.Popen[bytes]:
    # Later arguments win: the folder and the silence of W&B are this command's.
    own = ["--run-dir", str(run.folder.absolute()), "--log.wandb", "disabled"]
    command = [*sweep.command_of(run.parameters, sys.executable), *extra, *own]
    variables = dict(os.environ)
    variables["WANDB_RUN_ID"] = run.folder.name[-8:]
    variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{variables.get('PATH', '')}"
    variables.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // processes)))
    run.state = "running"
    run.write()
    print(f"started   {run.folder.name}", flush=True)
    with run.log_file.open("ab") as log:
        # A session of its own: Ctrl-C reaches this command alone, which tells the trials in order.
        return subprocess.Popen(
            command, cwd=root, env=variables, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def _note_end(run: TrialRun, code: int, *, was_told: bool) -> None:
    # Told to stop, a launcher dies of the signal while its training saves; see preemption.py.
    stopped = code == EXIT_STOPPED or (was_told and code != 0)
    run.state = "finished" if code == 0 else "stopped" if stopped else "failed"
    if run.state == "failed":
        run.reason = f"{last_words(run.log_file.read_text(errors='replace'))} (exit code {code}; {run.log_file})"
    run.write()
    print(f"{run.state:9s} {run.folder.name}{f': {run.reason}' if run.reason else ''}", flush=True)


def last_words(log: str) -> str:
    """The line of a log that says what went wrong: its last `error: …`, else the last with words in it."""
    lines = [line.strip("╭╮╰╯─│ ") for line in log.splitlines()]  # without the frame that tyro draws
    errors = [line for line in lines if line.startswith("error: ")]
    others = [line for line in lines if line and not line.startswith("For full helptext")]
    return (errors or others or ["it said nothing"])[-1]


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Tell running trials to save and stop, wait, and kill what has not."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + TIME_TO_STOP_S
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
