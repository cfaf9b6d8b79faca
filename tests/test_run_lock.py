"""The lock of a run directory: who holds it, and that a dead process does not."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launching import ROOT
from vaetrain.runs.lock import hold

HOLDER = """
import os, subprocess, sys, time
from pathlib import Path
from vaetrain.runs.lock import hold
assert "torch" not in sys.modules
with hold(Path(sys.argv[1])):
    forked = os.fork() or time.sleep(60)
    started = subprocess.Popen(["sleep", "60"], close_fds=False)
    print(forked, started.pid, flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path: Path):
    """Killed with SIGKILL, it leaves children of both kinds alive, and they hold nothing."""
    lock = tmp_path / "new" / "run" / ".lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    children = [int(child) for child in holder.stdout.readline().split()]
    try:
        with (
            pytest.raises(ValueError, match=rf"run is in use by process {holder.pid} on .*, started 20.*--run-dir"),
            hold(lock),
        ):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        for child in children:
            os.kill(child, 0)  # still there
        with hold(lock):
            assert lock.read_text().startswith(f"process {os.getpid()} on ")
    finally:
        holder.kill()
        for child in children:
            os.kill(child, signal.SIGKILL)


def test_the_lock_ends_with_the_block(tmp_path: Path):
    lock = tmp_path / ".lock"
    for _ in range(2):
        with hold(lock), pytest.raises(ValueError, match=f"in use by process {os.getpid()}"), hold(lock):
            pass
    with pytest.raises(ZeroDivisionError), hold(lock):
        _ = 1 / 0
    with hold(lock):
        pass


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    with hold(tmp_path / ".lock"):
        assert "has no locks (Operation not supported)" in capsys.readouterr().err
