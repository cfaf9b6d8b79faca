"""Nobody is left behind by a launcher that dies, and no launch meets another's processes."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launching import NO_GPU, ROOT, TINY, free_port
from vaetrain.distributed.launcher import holder_of_port
from vaetrain.distributed.launcher_environment import LauncherEnvironment
from vaetrain.distributed.processes import check_port

LAUNCHER = """
import os, subprocess, sys, time
ranks = [
    subprocess.Popen([sys.executable, *sys.argv[1:]], env=os.environ | {"RANK": rank, "LOCAL_RANK": rank}, start_new_session=True)
    for rank in os.environ["STARTED"].split()
]
print(*(rank.pid for rank in ranks), flush=True)
if os.environ.get("WAIT"):
    [rank.wait() for rank in ranks]
else:
    time.sleep(300)
"""
"""Starts the processes of these ranks as torchrun does, without the seconds it takes; it keeps no store."""

SECONDS_TO_END = 30.0


def environment(**more: str) -> dict[str, str]:
    launched = {
        "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_USE_AGENT_STORE": "True", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return os.environ | NO_GPU | launched | more


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_idle(pid: int) -> None:
    """Until a process has used next to no time for a second: it has imported everything and waits."""
    used, deadline = 0, time.monotonic() + 200  # in hundredths of a second
    while time.monotonic() < deadline:
        before, used = used, sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
        if used > 200 and used - before <= 2:
            return
        time.sleep(1)
    raise AssertionError("it never comes to wait")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_ends_whenever_its_launcher_is_killed(tiny_shards: Path, tmp_path: Path) -> None:
    """While Python starts, options are read, torch is imported, and while it waits for a store that nobody keeps."""
    command = ["vaetrain/train.py", "--data.train", str(tiny_shards), "--run-dir", str(tmp_path / "run"), *TINY]
    for moment in (0.0, 0.1, 0.5, 1.5, None):
        launcher = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, *command], cwd=ROOT, env=environment(STARTED="0"), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        assert launcher.stdout is not None
        pid = int(launcher.stdout.readline())
        try:
            time.sleep(moment or 0.0)
            if moment is None:
                wait_until_idle(pid)
            assert is_alive(pid)
            launcher.kill()
            launcher.wait()
            deadline = time.monotonic() + SECONDS_TO_END
            while is_alive(pid) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert not is_alive(pid), f"killed after {moment} s, the launcher left its process behind"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            launcher.kill()
            launcher.communicate()


def test_the_processes_of_a_launch_have_a_key_that_no_other_has() -> None:
    code = 'import os; from vaetrain.distributed.launcher import launch_key; os.write(1, f"{launch_key()}\\n".encode())'
    keys = []
    for _ in range(2):
        result = subprocess.run(
            [sys.executable, "-c", LAUNCHER, "-c", code], cwd=ROOT, env=environment(STARTED="0 1", WAIT="1"), text=True,
            capture_output=True, timeout=120, check=True,
        )  # fmt: skip
        keys.append(result.stdout.splitlines()[1:])
    (first, second), (third, fourth) = keys
    assert first == second != third == fourth


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_who_holds_the_port_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        found = holder_of_port(port)
        assert found is not None
        assert found.pid == os.getpid()
        here = LauncherEnvironment(0, 2, 0, 2, main_port=port, launcher_keeps_store=True)
        with pytest.raises(
            ValueError, match=rf"port {port}, .* is held by process {os.getpid()} .*--main_process_port"
        ):
            check_port(here)
        monkeypatch.setattr(os, "getppid", os.getpid)  # it is the launcher's own
        check_port(here)
    assert holder_of_port(port) is None
