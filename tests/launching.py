"""Starting commands the way a user does, from the root of the repository."""

import atexit
import contextlib
import functools
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).parents[1]
LAUNCH = ("-m", "accelerate.commands.launch", "--config_file")
TWO_PROCESSES = (*LAUNCH, "launch/cpu2.yaml")

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
"""For several processes on a machine that may have a single GPU, which NCCL does not let them share."""

TINY = (
    "--model.image-size", "16", "--model.base-channels", "16", "--model.channel-mult", "1", "2",
    "--model.num-res-blocks", "1", "--model.latent-channels", "4", "--train.global-batch-size", "20",
    "--optim.warmup-images", "40", "--log.every-steps", "2", "--log.num-pictures", "8",
)  # fmt: skip
"""A model for the 16×16 shards of conftest.py that takes a second an epoch."""


def start(
    *arguments: object,
    two_processes: bool = False,
    within: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    python: str | None = None,
) -> subprocess.Popen[str]:
    """Start `python ARGUMENTS`, or `accelerate launch` with two gloo processes, each on one thread.

    `within` is a command that runs the one that follows it, such as `ip netns exec NAME`. `python`: sys.executable, or by default
    the one that has imported everything.
    """
    # One thread each: two processes of two spinning threads on two cores take many times longer.
    variables = os.environ | {"OMP_NUM_THREADS": "1", "VAETRAIN_TRACEBACK": "1"} | dict(environment or {})
    prefix: list[str] = []
    if two_processes:
        prefix = [*TWO_PROCESSES, "--main_process_port", str(free_port())]
        variables |= NO_GPU
    return subprocess.Popen(
        [*within, python or warm_python(), *prefix, *map(str, arguments)],
        cwd=ROOT, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


WARM_PYTHON = "VAETRAIN_TESTS_WARM_PYTHON"
"""Environment variable that names it to the workers of one `make test`, for all of which one imports everything."""


def can_wait_for_forks() -> bool:
    """Whether this system has what warm_python.py waits with; some containers refuse it."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        return False
    return True


def start_warm_python() -> Path:
    """Start what warm_python.py says; returns the executable file, which is there as soon as that has imported everything."""
    folder = tempfile.TemporaryDirectory(prefix="warm-python-")
    address, file = (Path(folder.name, name) for name in ("socket", "python"))
    # The last word is one by which vaetrain knows its launchers, which all that is started here may be.
    command = [sys.executable, ROOT / "tests" / "warm_python.py", "--serve", address, file, "torch.distributed"]
    server = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True
    )
    assert server.stdin is not None
    for cleanup in (folder.cleanup, server.wait, server.stdin.close):  # done in reverse order
        atexit.register(cleanup)
    return file


@functools.cache
def warm_python() -> str:
    """An executable file that stands for sys.executable; see warm_python.py. Where forks cannot be waited for: that itself."""
    if not can_wait_for_forks():
        return sys.executable
    file = Path(os.environ[WARM_PYTHON]) if WARM_PYTHON in os.environ else start_warm_python()
    deadline = time.monotonic() + 300
    while not file.exists():
        assert time.monotonic() < deadline, f"{file} does not come"
        time.sleep(0.05)
    return str(file)


def finish(process: subprocess.Popen[str], timeout_s: float = 600) -> subprocess.CompletedProcess[str]:
    """Wait for a started command; past the timeout it is ended, with all that it started, and the test fails."""
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    except BaseException as error:  # also Ctrl-C, which no longer reaches a process in a session of its own
        stdout, stderr = end(process)
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        raise AssertionError(f"{process.args} took more than {timeout_s} s\n{stdout}\n{stderr}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def end(process: subprocess.Popen[str]) -> tuple[str, str]:
    """End a started command, if it still runs, and all that it started; returns what it had written."""
    for signal_number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            # At SIGTERM torchrun ends its workers, which are in process groups of their own.
            os.killpg(process.pid, signal_number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=60)
    raise AssertionError(f"{process.args} left processes behind that still write")


def run(*arguments: object, two_processes: bool = False, python: str | None = None) -> subprocess.CompletedProcess[str]:
    """Start a command and wait for it."""
    return finish(start(*arguments, two_processes=two_processes, python=python))


def succeed(*arguments: object, two_processes: bool = False, python: str | None = None) -> str:
    """Run a command that must exit 0; returns what it printed."""
    result = run(*arguments, two_processes=two_processes, python=python)
    assert result.returncode == 0, f"{result.args}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def run_here(script: str, *arguments: object) -> int:
    """Run a command in this process, which has paid for the imports; returns its exit code. What it prints, capsys has."""
    with patch.object(sys, "argv", [script, *map(str, arguments)]):
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as end:
            return int(end.code or 0)
    return 0


def free_port() -> int:
    """A TCP port on loopback that nobody listens on now."""
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
