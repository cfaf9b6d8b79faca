"""Training that is killed and started again, in forks of one process that has imported everything: a start costs no torch.

python tests/killed_training.py FOLDER SHARDS, by test_resume.py.
It leaves runs in FOLDER and prints how many kills left half a checkpoint.
"""

import contextlib
import gc
import json
import math
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "VAETRAIN_TRACEBACK": "1", "HF_HUB_OFFLINE": "1"}

import numpy as np
import torch
import torch._dynamo  # the first optimizer step would import it, which takes seconds

import vaetrain.train
import vaetrain.training.step
from launching import TINY, free_port
from vaetrain.command_line import parse
from vaetrain.config import Config
from vaetrain.runs.lock import hold
from vaetrain.training.figures import RunFigures

STEPS = 60
NUM_KILLS = {1: 20, 2: 4}


class Runs:
    """Runs of the same training in one folder, by name."""

    def __init__(self, folder: Path, shards: Path) -> None:
        self.folder = folder
        self.shards = shards
        self.random = random.Random(0)
        self.kills_during_a_save = 0

    def start(self, name: str, num_processes: int) -> list[int]:
        """Fork the processes of a training; returns their ids."""
        port = free_port()
        return [self.fork(name, rank, num_processes, port) for rank in range(num_processes)]

    def fork(self, name: str, rank: int, num_processes: int, port: int) -> int:
        """Fork one process, which ends with the exit code of a training command."""
        child = os.fork()
        if child:
            return child
        code = 1
        try:
            with (self.folder / f"{name}.{rank}.log").open("a") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            if num_processes > 1:
                os.environ |= {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes),
                    "LOCAL_WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                }  # fmt: skip
            scramble_global_generators()
            vaetrain.train.main(self.config(name))
            code = 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # past the handlers and buffers that belong to the process it was forked from

    def config(self, name: str) -> Config:
        """Checkpoints, records and validations at steps that have little in common."""
        return parse(
            Config, None,
            [
                *TINY, "--data.train", str(self.shards), "--run-dir", str(self.folder / name), "--model.kind", "dense",
                "--model.hidden-features", "32", "--train.num-images", str(20 * STEPS), "--train.val-every-epochs", "4",
                "--log.every-steps", "5", "--checkpoint.every-steps", "3",
            ],
        )  # fmt: skip

    def finish(self, name: str, num_processes: int) -> None:
        """Train to the end."""
        for process in self.start(name, num_processes):
            _, status = os.waitpid(process, 0)
            if status:
                raise SystemExit(f"{name} ended with {status}\n{self.logs(name)}")

    def logs(self, name: str) -> str:
        """What the processes of a run have printed."""
        return "".join(log.read_text() for log in self.folder.glob(f"{name}.*.log"))

    def kill(self, name: str, num_processes: int, until: Callable[[], bool], delay_s: float) -> bool:
        """Train until `until` holds, and a random part of `delay_s` longer; then SIGKILL all processes. False: it was over."""
        processes = self.start(name, num_processes)
        deadline = time.monotonic() + 300
        while not until() and os.waitid(os.P_PID, processes[0], os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            assert time.monotonic() < deadline, f"{name} does not come to where it is to be killed"
            time.sleep(0.001)
        time.sleep(self.random.uniform(0, delay_s))
        for process in processes:
            os.kill(process, signal.SIGKILL)
        statuses = [os.waitpid(process, 0)[1] for process in processes]
        failed = [status for status in statuses if status and not os.WIFSIGNALED(status)]
        if failed:
            raise SystemExit(f"{name} ended with {failed} before it was killed\n{self.logs(name)}")
        return all(statuses)

    def kill_often(self, name: str, num_processes: int) -> None:
        """Kill while it starts, during a save, and anywhere in the steps after one. A busy machine may be at the end before."""
        two_steps_s = 2 * self.seconds_per_step(f"whole{num_processes}")
        for number in range(NUM_KILLS[num_processes]):
            newest = self.newest_step(name)
            if number % 4 == 0:
                start_until = time.monotonic() + self.random.uniform(0, 1)
                killed = self.kill(name, num_processes, partial(self.has_saved_after, name, newest, start_until), 0)
            elif number % 4 == 1:
                before = self.asides(name)
                killed = self.kill(name, num_processes, partial(self.is_saving, name, before), 0.004)
                self.kills_during_a_save += bool(self.asides(name) - before)  # unless the save was over by then
            else:
                killed = self.kill(name, num_processes, partial(self.has_saved_after, name, newest), two_steps_s)
            if not killed:
                assert number >= NUM_KILLS[num_processes] / 2, f"{name} was over after {number} kills"
                return

    def has_saved_after(self, name: str, step: int, or_at: float = math.inf) -> bool:
        """Whether there is a checkpoint of a step after `step`, or the clock is past `or_at`."""
        return self.newest_step(name) > step or time.monotonic() > or_at

    def is_saving(self, name: str, leftovers: set[Path]) -> bool:
        """Whether a checkpoint is being written now."""
        return bool(self.asides(name) - leftovers)

    def seconds_per_step(self, name: str) -> float:
        """As the records of a run have it."""
        records = map(json.loads, (self.folder / name / "metrics.jsonl").read_text().splitlines())
        return 20 / statistics.median(r["perf/images_per_s"] for r in records if r["split"] == "train")

    def newest_step(self, name: str) -> int:
        """Step of the newest checkpoint, 0 before there is one."""
        return max((int(path.name[-8:]) for path in (self.folder / name / "checkpoints").glob("step-*")), default=0)

    def asides(self, name: str) -> set[Path]:
        """Checkpoints that are being written, or were."""
        return set((self.folder / name / "checkpoints").glob(".step-*"))


def scramble_global_generators() -> None:
    """Leave all global generators in another state at every step: nothing may draw from them."""
    original = vaetrain.training.step.noise_of_training

    def scrambled(*arguments: object) -> object:
        seed = int.from_bytes(os.urandom(4))
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        return original(*arguments)

    vaetrain.training.step.noise_of_training = scrambled


def main(folder: Path, shards: Path) -> None:
    """Make the runs that test_resume.py compares."""
    RunFigures.draw = lambda *_, **__: None  # two seconds each time
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads must not be forked"
    gc.freeze()  # each training collects garbage, and need not look at all that was imported
    runs = Runs(folder, shards)
    for num_processes in (1, 2):
        runs.finish(f"whole{num_processes}", num_processes)
        runs.kill_often(f"killed{num_processes}", num_processes)
        runs.finish(f"killed{num_processes}", num_processes)
    for before, after in ((1, 2), (2, 1)):
        name = f"from{before}to{after}"
        runs.kill(name, before, partial(runs.has_saved_after, name, STEPS // 3), runs.seconds_per_step("whole1"))
        runs.finish(name, after)
    with hold(folder / "locked" / ".lock"):
        ends = [os.waitpid(process, 0)[1] for process in runs.start("locked", 2)]
        assert all(map(os.WIFEXITED, ends)), ends
        assert all(map(os.WEXITSTATUS, ends)), "a run that another process has locked was trained"
    print(runs.kills_during_a_save)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main(Path(sys.argv[1]), Path(sys.argv[2]))
