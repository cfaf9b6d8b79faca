"""Starting commands the way a user does, from the root of the repository."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TWO_PROCESSES = ("-m", "accelerate.commands.launch", "--config_file", "launch/cpu2.yaml")


def start(*arguments: object, two_processes: bool = False) -> subprocess.Popen[str]:
    """Start `python ARGUMENTS`, or `accelerate launch` with two gloo processes, each on one thread."""
    # One thread each: two processes of two spinning threads on two cores take many times longer.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "VAETRAIN_TRACEBACK": "1"}
    prefix = [*TWO_PROCESSES, "--main_process_port", str(free_port())] if two_processes else []
    return subprocess.Popen(
        [sys.executable, *prefix, *map(str, arguments)],
        cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], timeout_s: float = 150) -> subprocess.CompletedProcess[str]:
    """Wait for a started command; past the timeout it is ended and the test fails."""
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        stdout, stderr = process.communicate()
        raise AssertionError(f"{process.args} took more than {timeout_s} s\n{stdout}\n{stderr}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def run(*arguments: object, two_processes: bool = False) -> subprocess.CompletedProcess[str]:
    """Start a command and wait for it."""
    return finish(start(*arguments, two_processes=two_processes))


def succeed(*arguments: object, two_processes: bool = False) -> str:
    """Run a command that must exit 0; returns what it printed."""
    result = run(*arguments, two_processes=two_processes)
    assert result.returncode == 0, f"{result.args}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def free_port() -> int:
    """A TCP port on loopback that nobody listens on now."""
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
