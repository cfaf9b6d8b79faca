"""The same training once more, from what a run recorded of itself. Without importing torch before it must."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from vaetrain.command_line import to_yaml
from vaetrain.config import Config, RfidConfig
from vaetrain.documents import shorten
from vaetrain.machine import cpu_model, num_cores, visible_gpus
from vaetrain.runs.comparison import Agreement
from vaetrain.runs.directory import RunDirectory
from vaetrain.runs.provenance import RECORDED_PACKAGES, git_state, is_revision, package_version

ROOT = Path(__file__).parents[2]

MOST_PROCESSES = 16
"""That a file makes a rerun start, on a machine of fewer cores and GPUs."""

ONE_NODE = """\
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
num_machines: 1
num_processes: {num_processes}
machine_rank: 0
main_training_function: main
mixed_precision: 'no'
use_cpu: false
"""
"""Accelerate's file for several processes; see launch/cpu2.yaml for why MULTI_GPU also without one."""


def recorded_start(run: RunDirectory) -> dict[str, Any]:
    """The provenance of `run`; raises FileNotFoundError where there is none."""
    if not run.provenance_file.is_file():
        raise FileNotFoundError(f"{run.provenance_file} does not exist, so nobody knows what made this run")
    return run.provenance()


def differences(run: RunDirectory) -> Iterator[str]:
    """What is not as it was when `run` was trained, of what can move numbers."""
    recorded = recorded_start(run)
    revision, dirty = git_state(ROOT)
    if (was := recorded["git_revision"]) != revision:
        found = was is not None and is_revision(was)  # it comes from a file, and this is a command to copy
        how = f"; `git worktree add ../again {was}` checks it out beside this one" if found else ""
        yield f"code: the run's revision is {was if found else 'unknown'}, this is {revision}{how}"
    if recorded["git_dirty"]:
        kept = f"{run.patch_file} has them, for `git apply`" if run.patch_file.is_file() else "and nobody kept them"
        yield f"code: the run's checkout had uncommitted changes; {kept}"
    if dirty:
        yield "code: this checkout has uncommitted changes (`git status`)"
    for name in RECORDED_PACKAGES:
        was, now = recorded["packages"].get(name), package_version(name)
        if name in recorded["packages"] and was != now:
            yield f"package {name}: {was or 'absent'} then, {now or 'absent'} now"
    if recorded["python"] != platform.python_version():
        yield f"python: {recorded['python']} then, {platform.python_version()} now"
    if recorded["platform"] != platform.platform():
        yield f"machine: {recorded['platform']} then, {platform.platform()} now"
    if "cpu" in recorded and recorded["cpu"] != cpu_model():
        yield f"processor: {recorded['cpu']} then, {cpu_model()} now"
    then, now = re.sub(r"^cpu \(.*", "cpu", recorded["device"]), device_of_a_start()  # its threads will be as they were
    if then != now:
        yield f"device: {then} then, {now} now"


def device_of_a_start() -> str:
    """What a training started here computes on: the GPU's name, or "cpu"."""
    import torch  # takes seconds, and does not matter here: a training follows, or an error

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def caveats(run: RunDirectory) -> Iterator[str]:
    """What in the history of `run` no single start repeats exactly."""
    recorded, config = recorded_start(run), run.config()
    resumes = recorded.get("resumes", [])
    if any(start["num_processes"] != recorded["num_processes"] for start in resumes):
        yield "it was resumed on another number of processes: the images are the same, losses agree to about 1e-5"
    if any(start["git_revision"] != recorded["git_revision"] for start in resumes):
        yield "it was resumed with another revision of the code"
    if len({tuple(start["command"]) for start in [recorded, *resumes]}) > 1:
        yield "it was resumed with another command; config.yaml holds the options of the last start, which are taken"
    if not recorded["device"].startswith("cpu") and not config.train.deterministic:
        yield "it ran on a GPU without --train.deterministic, where sums come in another order each time: losses agree nearly"
    if config.resume not in ("auto", "never"):
        yield f"it went on from {config.resume}, and so does this"
    if config.train.rfid.every_epochs is not None:
        yield "it computed val/rfid, and this does not: its extractor may be a file of code, which only a user names"
    if config.init_from is not None:
        yield f"it started from the weights of {config.init_from}, which are taken as they are now"


def check_data(run: RunDirectory) -> None:
    """Raise ValueError when the shard sets that the config names are not those the run was trained on."""
    from vaetrain.data.readers.reader import open_selection

    config, dataset = run.config(), run.dataset()
    for split in ("train", "val"):
        selection, _ = open_selection(config.data, split)
        found, wanted = selection.shard_set.manifest.fingerprint, dataset[split]["fingerprint"]
        if found != wanted:
            raise ValueError(
                f"{config.data.location(split)} is another shard set than {run.path} was trained on: its fingerprint is "
                f"{found}, not {wanted}; make that one again, with the arguments in its own manifest.json"
            )


def config_of_rerun(run: RunDirectory, out: Path) -> Config:
    """The run's own config, into another folder, from the start, and without trackers, whose ids are the run's.

    What it says of other folders to write in is not taken: it may be somebody else's.
    """
    config = run.config()
    log, data = replace(config.log, wandb="disabled", tensorboard=False), config.data.as_recorded()
    resume = "never" if config.resume == "auto" else config.resume
    best_by = "elbo" if config.train.best_by == "rfid" else config.train.best_by
    train = replace(config.train, rfid=RfidConfig(), best_by=best_by)  # which may name a file of code
    return replace(config, run_dir=out, log=log, data=data, resume=resume, train=train)


def start(config: Config, recorded: dict[str, Any]) -> int:
    """Train in processes of their own, as many and on as many threads as were recorded; returns the exit code.

    Raises ValueError for numbers of these that cannot be meant, for they come from a file.
    """
    most = max(MOST_PROCESSES, num_cores(), len(visible_gpus()))
    if not 1 <= recorded["num_processes"] <= most:
        raise ValueError(
            f"it is said to be trained on {recorded['num_processes']} processes; {most} at most are started here"
        )
    threads = recorded.get("omp_num_threads")
    if threads is not None and not re.fullmatch(r"\d{1,4}(,\d{1,4}){0,7}", threads):
        raise ValueError(f"its OMP_NUM_THREADS is said to be {shorten(threads)!r}, which is no number of threads")
    if recorded.get("processes_per_node", recorded["num_processes"]) < recorded["num_processes"]:
        raise ValueError(
            f"it was trained on {recorded['num_processes']} processes on several machines; start it there with "
            "launch/multinode.yaml or launch/slurm.sbatch and --config RUN/config.yaml --run-dir NEW, then compare the two "
            "with tools/compare_runs.py"
        )
    variables = dict(os.environ)
    variables.pop("OMP_NUM_THREADS", None)
    if threads:
        variables["OMP_NUM_THREADS"] = threads
    with tempfile.TemporaryDirectory() as folder:
        config_file, launch_file = Path(folder) / "config.yaml", Path(folder) / "launch.yaml"
        config_file.write_text(to_yaml(config))
        launcher: list[str] = []
        if recorded["num_processes"] > 1:
            launch_file.write_text(ONE_NODE.format(num_processes=recorded["num_processes"]))
            launcher = [
                "-m",
                "accelerate.commands.launch",
                "--config_file",
                str(launch_file),
                "--main_process_port",
                "0",
            ]
        command = [sys.executable, *launcher, str(ROOT / "vaetrain" / "train.py"), "--config", str(config_file)]
        command += ["--run-dir", str(config.run_dir)]
        if config.data.cache_dir is not None:
            command += ["--data.cache-dir", str(config.data.cache_dir)]
        return subprocess.run(command, env=variables, check=False).returncode


def agreement(run: RunDirectory, again: RunDirectory) -> Agreement:
    """Of the records, leaving out events, which tell of a run's fate and not of its training."""
    first, second = (
        [record for record in directory.metrics() if record["split"] != "event"] for directory in (run, again)
    )
    return Agreement.of(first, second)
