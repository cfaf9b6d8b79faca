"""Commands as processes, some at a time: each after those it needs, resumable, stoppable, with a record of how it ended."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from vaetrain.documents import read_json
from vaetrain.exit_codes import EXIT_STOPPED
from vaetrain.files import append_to, replace_file
from vaetrain.machine import num_cores, visible_gpus

POLL_S = 0.2
TIME_TO_STOP_S = 120
"""For jobs that are told to stop, before they are killed."""

MAX_WORDS = 200
"""Characters of the reason why a job failed; its log has the rest."""
ERROR_LINE = re.compile(
    r"^(error: .*)$"  # ours (command_line.py)
    r"|^╭─ .*╮\n((?:│.*\n)+?)│ ─+ *│$"  # tyro's: a frame, its first paragraph
    r"|^ \w.*\n -{5,} *\n((?: .*\n)+?) +-{5,} *$",  # the same where the log is not UTF-8
    re.MULTILINE,
)
EXCEPTION = re.compile(r"^(?:\[rank\d+\]: )?((?:\w+\.)*\w+(?:Error|Exception|Interrupt)(?:: .*)?)$", re.MULTILINE)
LAUNCHER_TRACEBACK = re.compile(
    r"^Traceback \(most recent call last\):\n(?:[ ].*\n)+"
    r"(?:subprocess\.CalledProcessError: Command|torch\.distributed\.elastic\.\S*ChildFailedError:)(?:.|\n)*",
    re.MULTILINE,
)
LAUNCHER_LINE = re.compile(r"[EWI]\d{4} .*torch/distributed/")
SIGNAL = re.compile(r"died with <Signals\.(\w+)|Signal \d+ \((\w+)\) received by PID")

State = Literal["waiting", "running", "finished", "failed", "stopped"]


class JobRecord(TypedDict):
    """What is relied on of a record."""

    state: str
    command: NotRequired[list[str]]
    seconds: NotRequired[float | None]


@dataclass(eq=False)
class Job:
    """One command and what became of it."""

    name: str
    command: tuple[str, ...]
    record_file: Path
    """Says how it ended."""
    log_file: Path
    """What it printed."""
    after: tuple[Job, ...] = ()
    """Jobs that must have finished before."""
    variables: dict[str, str] = field(default_factory=dict)
    """Of its environment, besides this process's."""
    about: dict[str, Any] = field(default_factory=dict)
    """What else the record holds."""
    state: State = "waiting"
    reason: str = ""
    """Why it failed."""
    seconds: float | None = None
    """That it ran, the last time."""
    log_start: int = 0
    """Bytes that earlier starts had left in the log."""

    def read_record(self) -> None:
        """Take over that it finished, if its record says so of this very command."""
        if self.record_file.is_file():
            record = read_json(self.record_file, JobRecord, remedy="delete it to run the job again")
            if record["state"] == "finished" and record.get("command", list(self.command)) == list(self.command):
                self.state, self.seconds = "finished", record.get("seconds")

    def write(self) -> None:
        """Record the state."""
        content = {
            **self.about, "command": list(self.command), "state": self.state, "reason": self.reason,
            "seconds": self.seconds,
        }  # fmt: skip
        replace_file(self.record_file, (json.dumps(content, indent=2) + "\n").encode())


def run_jobs(jobs: Sequence[Job], *, processes: int, root: Path) -> None:
    """Run the jobs in the folder `root`, `processes` at a time, in their order; each says afterwards how it ended.

    A job whose record says finished is not run again. One that needs a job which failed fails too. SIGINT and SIGTERM are passed
    on as SIGTERM, at which trainings save and stop; then this raises KeyboardInterrupt. Where there are GPUs and `processes` is
    more than one, each job at a time sees its own share of them alone.
    """
    for job in jobs:
        job.record_file.parent.mkdir(parents=True, exist_ok=True)
        job.read_record()
    told: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: told.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    gpus = visible_gpus() if processes > 1 else []
    alive: dict[int, tuple[Job, subprocess.Popen[bytes], float]] = {}  # by place, of `processes`
    try:
        waiting = [job for job in jobs if job.state != "finished"]
        while (waiting and not told) or alive:
            waiting = [job for job in waiting if not _fails_with_another(job)]
            ready = [job for job in waiting if all(other.state == "finished" for other in job.after)]
            while ready and not told and len(alive) < processes:
                job = ready.pop(0)
                waiting.remove(job)
                place = min(set(range(processes)) - alive.keys())
                share = gpus[place::processes] or gpus[place % len(gpus) :][:1] if gpus else []
                process = _start(job, processes, share, root)
                alive[place] = job, process, time.monotonic()
            for place, (job, process, start) in list(alive.items()):
                if process.poll() is not None:
                    del alive[place]
                    job.seconds = round(time.monotonic() - start, 1)
                    _note_end(job, process.returncode, was_told=bool(told))
            if told and alive:
                _stop([process for _, process, _ in alive.values()])
            if alive:
                time.sleep(POLL_S)
    finally:
        _stop([process for _, process, _ in alive.values()])
        for number, handler in before.items():
            signal.signal(number, handler)
    if told:
        raise KeyboardInterrupt


def _fails_with_another(job: Job) -> bool:
    failed = next((other for other in job.after if other.state in ("failed", "stopped")), None)
    if failed is None:
        return False
    job.state, job.reason = "failed", f"{failed.name} did not finish"
    job.write()
    print(f"failed    {job.name}: {job.reason}", flush=True)
    return True


def _start(job: Job, processes: int, gpus: Sequence[str], root: Path) -> subprocess.Popen[bytes]:
    variables = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}), **job.variables}
    variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{variables.get('PATH', '')}"
    variables.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // processes)))
    job.state = "running"
    job.write()
    print(f"started   {job.name}", flush=True)
    with append_to(job.log_file) as log:
        job.log_start = log.tell()
        # A session of its own: Ctrl-C reaches this command alone, which tells the jobs in order.
        return subprocess.Popen(
            job.command, cwd=root, env=variables, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def _note_end(job: Job, code: int, *, was_told: bool) -> None:
    # Told to stop, a launcher dies of the signal while its training saves; see preemption.py.
    stopped = code == EXIT_STOPPED or (was_told and code != 0)
    job.state = "finished" if code == 0 else "stopped" if stopped else "failed"
    if job.state == "failed":
        log = job.log_file.read_bytes()[job.log_start :].decode(errors="replace")
        job.reason = f"{error_summary(log)} (exit code {code}; {job.log_file})"
    job.write()
    print(f"{job.state:9s} {job.name}{f': {job.reason}' if job.reason else ''}", flush=True)


def error_summary(log: str) -> str:
    """What a log says went wrong, on one line of at most `MAX_WORDS` characters.

    The last `error: …` or message of the option parser; else the last exception, else the last line. What a launcher
    (accelerate, torchrun) adds about its child says only that it failed, unless a signal ended it.
    """
    told = [found[1] or found[2] or found[3] for found in ERROR_LINE.finditer(log)]
    own = LAUNCHER_TRACEBACK.sub("", log)
    exceptions = EXCEPTION.findall(own)
    lines = [line for line in own.splitlines() if line.strip() and not LAUNCHER_LINE.match(line)]
    if told:
        words = told[-1]
    elif exceptions:
        words = exceptions[-1]
    elif killed := SIGNAL.search(log):
        words = f"ended by {killed[1] or killed[2]}"
    else:
        words = lines[-1] if lines else "it said nothing"
    words = " ".join(words.replace("│", " ").split())
    return words if len(words) <= MAX_WORDS else f"{words[: MAX_WORDS - 1]}…"


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Tell running jobs to save and stop, wait, and kill what has not."""
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
