"""Work on several processes that talk through gloo, without a launcher: forks of one process that has imported everything.

`accelerate launch` spends five seconds of a core on importing torch in each process that it starts, itself among them; a fork
takes milliseconds. What the launchers do is proven with real ones, by test_launch.py and test_launcher.py; that each script
starts as a process of its own, by test_demo.py and the one start of each tool in its test (`python=sys.executable`).
"""

import functools
import gc
import multiprocessing
import multiprocessing.context
import multiprocessing.forkserver
import os
import runpy
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from launching import ROOT, free_port

HANGS_S = 300
"""A bound against hanging and no stopwatch: this long nothing here takes, not even on a machine that is busy with others."""

IMPORTED = [
    *(f"vaetrain.{name}" for name in ("train", "evaluate", "sample", "scale", "encode", "priors.fit")),
    *(f"vaetrain.data.readers.{name}" for name in ("indexed", "stream")),
    "torch._dynamo",  # which the first optimizer would import
]  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What became of the processes, by rank."""

    pids: list[int]
    exit_codes: list[int]
    printed: list[str]


@functools.cache
def fork_server() -> multiprocessing.context.ForkServerContext:
    """The process that has imported everything."""
    multiprocessing.forkserver._forkserver._stop()  # a reader's, which has imported less
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    first = context.Process(target=check_that_it_may_be_forked)
    first.start()
    first.join()
    assert first.exitcode == 0
    return context


def check_that_it_may_be_forked() -> None:
    """A fork has no other thread than the one that forked, and waits for ever for what the others had locked."""
    if sys.platform == "linux":
        assert len(os.listdir(f"/proc/{os.getppid()}/task")) == 1


def run_together(
    act: Callable[..., object], *arguments: object, num_processes: int = 2, within_s: float = HANGS_S
) -> Outcome:
    """Call `act(*arguments)` on each of several processes, which find each other as under a launcher; no launcher ends anybody.

    `act` is a function of a module, such as a command's `main`; it joins the others with `distributed.start()`.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, str(rank)) for rank in range(num_processes)]
        processes = [
            fork_server().Process(target=_run_rank, args=(act, arguments, file, rank, num_processes, port))
            for rank, file in enumerate(files)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + within_s
        try:
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
            printed = [file.read_text() if file.exists() else "" for file in files]
            codes = [process.exitcode for process in processes]
            assert None not in codes, f"not all had ended within {within_s} s: {codes}\n" + "\n".join(printed)
        finally:
            for process in processes:
                process.kill()
                process.join()
    return Outcome([process.pid for process in processes], codes, printed)


def succeed_together(act: Callable[..., object], *arguments: object, num_processes: int = 2) -> str:
    """Run what must succeed on every process; returns what they printed, in order of rank."""
    outcome = run_together(act, *arguments, num_processes=num_processes)
    assert set(outcome.exit_codes) == {0}, "\n".join(outcome.printed)
    return "".join(outcome.printed)


def run_script(script: str, *arguments: object, num_processes: int = 1) -> Outcome:
    """Run a command as `python SCRIPT ARGUMENTS` would on each of so many processes, which have paid for the imports."""
    return run_together(_as_main, script, [*map(str, arguments)], num_processes=num_processes)


def script_succeeds(script: str, *arguments: object, num_processes: int = 1) -> str:
    """Run a command that must exit 0 on each of so many processes; returns what they printed, in order of rank."""
    return succeed_together(_as_main, script, [*map(str, arguments)], num_processes=num_processes)


def _as_main(script: str, arguments: list[str]) -> None:
    os.chdir(ROOT)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def _run_rank(
    act: Callable[..., object], arguments: tuple[object, ...], printed: Path, rank: int, num_processes: int, port: int
) -> None:
    gc.freeze()  # Accelerate collects garbage often, and need not look at all that was imported
    output = os.open(printed, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # A reader's workers are forks of the process that this one is a fork of; it would start a server of its own.
    multiprocessing.forkserver._forkserver.ensure_running = lambda: None
    if num_processes > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1",
            "LOCAL_WORLD_SIZE": str(num_processes), "MASTER_PORT": str(port),
        }  # fmt: skip
    act(*arguments)
