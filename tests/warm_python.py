"""A `python` that has imported everything: what it is told to run is run by a fork of a process that waits for such orders.

Importing torch and vaetrain takes eight seconds of a core, and `accelerate launch` of two processes does it three times. The file
that `warm_python()` names takes the place of `sys.executable`, in what it starts, too: `-u`, `-m MODULE` or a script, arguments,
environment, folder and open streams are handed to the fork, signals are passed on, and it ends as the fork ends. Anything
else, such as `-c CODE`, is run by the ordinary Python. With that is proven what the start of a process itself shows, such
as that a script imports all it needs: by test_launch.py, test_launcher.py, test_layout.py, test_demo.py and the one start of
each tool in its test.
"""

import contextlib
import marshal
import os
import select
import shlex
import signal
import socket
import struct
import sys

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
ALSO_IMPORTED = ("accelerate.commands.launch", "torch.distributed.run", "vaetrain.report.document")


def receive(connection: socket.socket, size: int) -> bytes:
    """So many bytes; raises EOFError where the other end is gone."""
    content = b""
    while len(content) < size:
        piece = connection.recv(size - len(content))
        if not piece:
            raise EOFError
        content += piece
    return content


def parsed(arguments: list[str]) -> tuple[bool, bool, list[str]] | None:
    """Whether -u, whether -m, and the module or script with its arguments; None for what is not run by a fork."""
    unbuffered = arguments[:1] == ["-u"]
    rest = arguments[unbuffered:]
    is_module = rest[:1] == ["-m"]
    rest = rest[is_module:]
    return (unbuffered, is_module, rest) if rest and not rest[0].startswith("-") else None


def ask(address: str, arguments: list[str]) -> None:
    """Have a fork run this, and end as it ends."""
    order = parsed(arguments)
    if order is None:
        os.execv(sys.executable, [sys.executable, *arguments])
    early: list[int] = []
    for number in PASSED_ON:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, _: early.append(number))
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    content = marshal.dumps((*order, os.getcwd(), os.getppid(), dict(os.environb)))
    socket.send_fds(connection, [struct.pack("<I", len(content))], [0, 1, 2])
    connection.sendall(content)
    (pid,) = struct.unpack("<i", receive(connection, 4))

    def pass_on(number: int, _: object = None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    for number in PASSED_ON:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, pass_on)
    for number in early:
        pass_on(number)
    (status,) = struct.unpack("<i", receive(connection, 4))
    if os.WIFSIGNALED(status):
        with contextlib.suppress(OSError):  # SIGKILL, which nobody handles
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.WEXITSTATUS(status))


def serve(address: str, executable: str) -> None:
    """Import everything, then fork for whoever asks, until the process that started this one closes its standard input."""
    import gc
    import importlib

    gc.disable()
    from together import IMPORTED

    for module in (*IMPORTED, *ALSO_IMPORTED):
        importlib.import_module(module)
    assert sys.platform != "linux" or len(os.listdir("/proc/self/task")) == 1, (
        "a process with threads must not be forked"
    )
    gc.collect()
    gc.freeze()
    gc.enable()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        write_executable(address, executable)
        while True:
            readable, _, _ = select.select([listener, 0], [], [])
            if 0 in readable:
                os._exit(0)
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _supervise(connection, executable)
            connection.close()


def write_executable(address: str, executable: str) -> None:
    """The file that stands for `python`; there when orders are taken."""
    aside = executable + ".new"
    with open(aside, "w") as file:
        file.write(f'#!/bin/sh\nexec {shlex.join([sys.executable, "-IS", os.path.abspath(__file__), address])} "$@"\n')
    os.chmod(aside, 0o755)
    os.rename(aside, executable)


def _supervise(connection: socket.socket, executable: str) -> None:
    """Fork the process that was asked for, say how it ended, and end it where nobody waits for it any more."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, streams, _, _ = socket.recv_fds(connection, 4, 3)
    order = marshal.loads(receive(connection, struct.unpack("<I", size)[0]))
    pid = os.fork()
    if pid == 0:
        connection.close()
        _run(streams, executable, *order)
    for stream in (0, 1, 2, *streams):
        os.close(stream)
    with contextlib.suppress(OSError):
        connection.sendall(struct.pack("<i", pid))
    ended = os.pidfd_open(pid)
    readable, _, _ = select.select([connection, ended], [], [])
    if ended not in readable:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(OSError):
        connection.sendall(struct.pack("<i", status))
    os._exit(0)


def _run(
    streams: list[int], executable: str, unbuffered: bool, is_module: bool, words: list[str], folder: str,
    parent: int, environment: dict[bytes, bytes],
) -> None:  # fmt: skip
    """Be the process that was asked for."""
    import atexit
    import io
    import random
    import runpy
    import threading
    import traceback

    import numpy as np
    import torch

    os.setsid()
    for target, stream in enumerate(streams):
        os.dup2(stream, target)
        os.close(stream)
    os.chdir(folder)
    os.environb.clear()
    os.environb.update(environment)
    for number, name, errors in ((1, "stdout", "strict"), (2, "stderr", "backslashreplace")):
        binary = io.FileIO(number, "w", closefd=False) if unbuffered else open(number, "wb", closefd=False)  # noqa: SIM115
        text = io.TextIOWrapper(binary, errors=errors, line_buffering=name == "stderr", write_through=unbuffered)
        setattr(sys, name, text), setattr(sys, f"__{name}__", text)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    torch.seed(), np.random.seed(), random.seed()
    # Of the process that was asked for, and not of this fork: vaetrain asks whether its launcher lives.
    os.getppid = lambda: parent if os.path.exists(f"/proc/{parent}") else 1
    sys.executable, sys.argv = executable, words
    sys.path[0] = folder if is_module else os.path.dirname(os.path.abspath(words[0]))
    code = 0
    try:
        if is_module:
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        traceback.print_exc()
        code = 130
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code & 0xFF)


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(*sys.argv[2:4])
    else:
        ask(sys.argv[1], sys.argv[2:])
