"""Faults of the machine, tried on trainings of a tiny model: full disks, a small /dev/shm, few descriptors, storms of signals.

python tools/try_faults.py [NAME ...]

--list True prints the names. Each fault is tried on commands in forks of this process, which has imported everything. Their small
and full disks are tmpfs in a mount namespace of this process's own: that needs root, and without it those faults are skipped,
which is said. Exit code 1: something ended otherwise than docs/reliability.md says, printed a traceback, or hung.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch starts threads, which no fork would have

import contextlib
import ctypes
import faulthandler
import importlib
import inspect
import json
import pickle
import re
import resource
import runpy
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro

from vaetrain.command_line import parse, user_errors

HANGS_S = 900
"""Nothing here takes this long, not even where others use the machine, too."""

MOST_GROWTH_MIB = 16
"""Of resident memory from the tenth validation of `long` to its last."""

MOST_MORE_DESCRIPTORS = 4
"""The same; a batch in the making and a checkpoint being written have some."""

ROOT = Path(__file__).parents[1]

IMPORTED = (
    "vaetrain.train", "vaetrain.evaluate", "vaetrain.sample", "vaetrain.data.readers.indexed", "vaetrain.data.readers.stream",
    "torch._dynamo",  # which the first optimizer would import
)  # fmt: skip

TINY = (
    "--model.kind", "dense", "--model.image-size", "16", "--model.channel-mult", "1", "--model.hidden-features", "4",
    "--model.latent", "vector", "--model.latent-channels", "2", "--train.precision", "fp32", "--train.global-batch-size", "20",
    "--optim.warmup-images", "40", "--log.every-steps", "2", "--log.num-pictures", "4",
)  # fmt: skip


@dataclass(frozen=True)
class FaultsConfig:
    """Which faults."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Faults to try; none named: all."""

    list: bool = False
    """Print the names, and try nothing."""


@dataclass(frozen=True)
class Ending:
    """How a command ended."""

    exit_code: int | None
    """None: it hung, and was ended."""
    printed: str
    seconds: float

    def should(self, exit_code: int, says: str) -> bool:
        """Print a line; whether the command ended with this exit code, no traceback, and words that match `says`."""
        is_right = self.exit_code == exit_code and re.search(says, self.printed) is not None
        is_right &= "Traceback" not in self.printed
        last = self.printed.strip().rpartition("\n")[2]
        ended = "hung" if self.exit_code is None else f"exit {self.exit_code}"
        print(f"    {'as said' if is_right else 'WRONG'}: {ended}, {self.seconds:.0f} s: {last[:400]}", flush=True)
        if not is_right:
            print("".join(f"      | {line}\n" for line in self.printed.splitlines()[-30:]))
        return is_right


Argv = list[object]


class Tries:
    """Commands on shards of noise in a folder of their own, and a run trained on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards, self.run = folder / "shards", folder / "run"
        make_shards(folder)

    def train(self, run: Path, *more: object, epochs: int = 2, shards: Path | None = None) -> Argv:
        """The command of a training; an epoch has five steps."""
        data = ("--data.train", shards or self.shards, "--run-dir", run, "--train.epochs", epochs)
        return ["vaetrain/train.py", *TINY, *data, *more]

    def evaluate(self, run: Path, *more: object) -> Argv:
        """The command of a scoring."""
        return ["vaetrain/evaluate.py", "--run", run, *(more or ("--scores", "elbo"))]

    def end_of(
        self,
        argv: Argv,
        *,
        before: Callable[[], object] = lambda: None,
        meanwhile: Callable[[int], object] = lambda _: None,
    ) -> Ending:
        """Run a command in a fork, which calls `before` first, while `meanwhile` is called here with its process id."""
        out, began = self.folder / "printed", time.monotonic()
        pid = os.fork()
        if pid == 0:
            _become(argv, out, before)
        meanwhile(pid)
        status = None
        while status is None:
            ended, found = os.waitpid(pid, os.WNOHANG)
            status = found if ended else None
            if time.monotonic() - began > HANGS_S:
                break
            time.sleep(0.05)
        if status is None:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        exit_code = None if status is None else os.waitstatus_to_exitcode(status)
        return Ending(exit_code, out.read_text(errors="replace"), time.monotonic() - began)


def _become(argv: Argv, out: Path, before: Callable[[], object]) -> None:
    os.setsid()
    file = os.open(out, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(file, 1), os.dup2(file, 2), os.close(file)
    faulthandler.dump_traceback_later(HANGS_S - 5, file=2)
    exit_code: object = 0
    try:
        before()
        sys.argv = [str(word) for word in argv]
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as error:
        exit_code = error.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        exit_code = 99
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(exit_code if isinstance(exit_code, int) else 1)


def make_shards(folder: Path) -> None:
    """100 images of noise for training and 23 for validation, in shards of 12, written by a fork."""
    import numpy as np
    from PIL import Image

    from vaetrain.data.sharding.config import ShardingConfig
    from vaetrain.data.sharding.make_shards import make_shards

    rng = np.random.default_rng(0)
    for number in range(123):
        file = folder / "originals" / ("cat" if number % 3 else "dog") / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file)
    pid = os.fork()
    if pid == 0:  # its pool of processes is not to be forked again
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            options = {"size": 16, "images_per_shard": 12, "workers": 1, "val_count": 23}
            make_shards(ShardingConfig(str(folder / "originals"), folder / "shards", **options))
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0


# mount(2), sched.h
CLONE_NEWNS, MS_RDONLY, MS_REMOUNT, MS_REC, MS_PRIVATE = 0x20000, 1, 32, 1 << 14, 1 << 18


def own_mounts() -> bool:
    """Let what this process mounts be seen by its children alone; False where it may not."""
    if sys.platform != "linux" or _libc().unshare(CLONE_NEWNS) != 0:
        return False
    return _libc().mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) == 0


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _mount(folder: Path, flags: int, options: str) -> None:
    if _libc().mount(b"tmpfs", os.fsencode(folder), b"tmpfs", flags, options.encode()) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))


@contextlib.contextmanager
def disk(folder: Path, size: str) -> Iterator[Path]:
    """An empty file system of so many bytes (64k, 9m) in place of a folder."""
    folder.mkdir(exist_ok=True)
    _mount(folder, 0, f"size={size}")
    try:
        yield folder
    finally:
        _libc().umount2(os.fsencode(folder), 2)  # MNT_DETACH


def make_read_only(folder: Path) -> None:
    """From now on nobody writes to a disk."""
    _mount(folder, MS_REMOUNT | MS_RDONLY, "")


def fill(folder: Path) -> Path:
    """Leave no room on a disk, by a file that is returned."""
    filler = folder / "filler"
    with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return filler


def wait_for(found: Callable[[], bool], pid: int) -> None:
    """Wait until something is there, or the process has ended, or hangs."""
    began = time.monotonic()
    while not found() and time.monotonic() - began < HANGS_S:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.02)


def trained_steps(run: Path) -> int:
    """The step of the newest record of a run; 0 before it has one."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"])
    return 0


def read_only(tries: Tries) -> Iterator[bool]:
    """Read-only run directory: training, resume, evaluate."""
    with disk(tries.folder / "disk", "20m") as folder:
        shutil.copytree(tries.run, folder / "run")
        make_read_only(folder)
        for argv in (
            tries.train(folder / "new"),
            tries.train(folder / "run", epochs=3),
            tries.evaluate(folder / "run"),
        ):
            yield tries.end_of(argv).should(1, rf"error: .*Read-only file system: '{folder}/")


def deleted(tries: Tries) -> Iterator[bool]:
    """Run directory deleted in training."""
    run = tries.folder / "deleted"

    def delete(pid: int) -> None:
        wait_for(lambda: trained_steps(run) > 5, pid)
        shutil.rmtree(run, ignore_errors=True)

    yield tries.end_of(tries.train(run, epochs=400), meanwhile=delete).should(1, rf"error: .*{run}/")


def shards_changed(tries: Tries) -> Iterator[bool]:
    """Shards overwritten in training, indexed and stream reader."""
    for reader in ("indexed", "stream"):
        run, shards = tries.folder / f"changed_{reader}", tries.folder / f"shards_{reader}"
        shutil.copytree(tries.shards, shards)

        def change(pid: int, run: Path = run, shards: Path = shards) -> None:
            wait_for(lambda: trained_steps(run) > 5, pid)
            for shard in shards.glob("train-*.tar"):
                with shard.open("r+b") as file:
                    file.seek(600)
                    file.write(bytes(shard.stat().st_size - 600))

        reading = ("--data.reader", reader, "--data.num-workers", 0)
        argv = tries.train(run, *reading, epochs=400, shards=shards)
        says = rf"error: train-\d+\.tar in {shards}, sample .*verify_shards"
        yield tries.end_of(argv, meanwhile=change).should(1, says)


def environment(tries: Tries) -> Iterator[bool]:
    """No HOME; HOME that cannot be written; TMPDIR that is not there."""

    def without_tmpdir() -> None:
        os.environ["TMPDIR"] = "/nonexistent"
        tempfile.tempdir = None

    for name, before in (
        ("no_home", lambda: os.environ.pop("HOME", None)),
        ("home", lambda: os.environ.update(HOME="/proc/nonexistent")),
        ("tmpdir", without_tmpdir),
    ):
        yield tries.end_of(tries.train(tries.folder / name), before=before).should(0, "200 images trained")


class Stranger:
    """What runs a command where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        """Unpickle by running a command."""
        return os.system, (f"touch {self.file}",)


def pickles(tries: Tries) -> Iterator[bool]:
    """Python pickles as --fid.weights, --lpips.backbone, --init-from, plain and by torch.save."""
    import torch

    ran, plain, saved = (tries.folder / name for name in ("ran", "plain.pth", "saved.pth"))
    plain.write_bytes(pickle.dumps({"weights": Stranger(ran)}))
    torch.save({"weights": Stranger(ran)}, saved)
    for file in (plain, saved):
        for argv in (
            tries.evaluate(tries.run, "--scores", "fid", "--fid.weights", file),
            tries.evaluate(tries.run, "--scores", "lpips", "--lpips.backbone", file, "--lpips.heads", file),
            tries.train(tries.folder / "init", "--init-from", file),
        ):
            yield tries.end_of(argv).should(1, rf"error: .*{file}") and not ran.exists()


def sigterms(tries: Tries) -> Iterator[bool]:
    """2,000 SIGTERMs in a second."""
    run = tries.folder / "sigterms"

    def storm(pid: int) -> None:
        wait_for(lambda: trained_steps(run) > 5, pid)
        for _ in range(2000):
            os.kill(pid, signal.SIGTERM)  # a zombie, too, takes it
            time.sleep(0.0005)

    ending = tries.end_of(tries.train(run, epochs=4000), meanwhile=storm)
    yield ending.should(75, "saved and stopped by SIGTERM") and ending.printed.count("stopped by SIGTERM") == 1


def full_disk(tries: Tries) -> Iterator[bool]:
    """Evaluate and sample on a full disk."""
    with disk(tries.folder / "disk", "20m") as folder:
        shutil.copytree(tries.run, folder / "run")
        filler = fill(folder)
        yield tries.end_of(tries.evaluate(folder / "run")).should(1, rf"error: .*No space left.*'{folder}/run/")
        filler.unlink()
    with disk(tries.folder / "disk", "300k") as folder:
        draw = ["vaetrain/sample.py", "--run", tries.run, "--num-images", 3000, "--out", folder / "samples"]
        yield tries.end_of(draw).should(1, rf"error: .*No space left.*'{folder}/samples/")
        yield not list((folder / "samples").glob("*.partial"))


def full_metrics(tries: Tries) -> Iterator[bool]:
    """Metrics append on a full disk, then a resume with room."""
    with disk(tries.folder / "disk", "20m") as folder:
        run, recorded = folder / "run", []
        argv = tries.train(run, "--train.val-every-epochs", 100, epochs=40)  # no checkpoint in between
        yield tries.end_of(tries.train(run, epochs=2)).should(0, "200 images trained")

        def fill_and_note(pid: int) -> None:
            wait_for(lambda: trained_steps(run) > 20, pid)
            fill(folder)
            recorded.extend((run / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:-1])

        yield tries.end_of(argv, meanwhile=fill_and_note).should(1, rf"error: .*No space left.*'{run}/metrics.jsonl'")
        yield (run / "metrics.jsonl").read_bytes().startswith(b"".join(recorded))
        (folder / "filler").unlink()
        yield tries.end_of(argv).should(0, "4,000 images trained")
        steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        yield steps == sorted(steps) and steps[-1] == 200


def shm(tries: Tries) -> Iterator[bool]:
    """/dev/shm of 64 KB, of 1 MB, and of 1 MB that others fill, with 2 workers; indexed and stream reader."""
    shm, where = Path("/dev/shm"), r"in /dev/shm, which has {} KiB, .*--data.num-workers 0"
    for reader in ("indexed", "stream"):
        run, reading = tries.folder / f"shm_{reader}", ("--data.reader", reader, "--data.num-workers", 2)
        with disk(shm, "64k"):
            yield tries.end_of(tries.train(run, *reading)).should(1, "error: .*" + where.format(64))
        with disk(shm, "1m"):
            yield tries.end_of(tries.train(run, *reading)).should(0, "200 images trained")

            def fill_in_training(pid: int, run: Path = run) -> None:
                wait_for(lambda: trained_steps(run) > 11, pid)
                fill(shm)

            # Batches go on without it; the validation at the end starts workers of its own.
            argv = tries.train(run, *reading, "--train.val-every-epochs", 100, epochs=40)
            yield tries.end_of(argv, meanwhile=fill_in_training).should(1, "error: .*" + where.format("1,024"))


def descriptors(tries: Tries) -> Iterator[bool]:
    """64 descriptors with 2 workers, indexed and stream reader."""

    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

    for reader in ("indexed", "stream"):
        argv = tries.train(tries.folder / f"few_{reader}", "--data.reader", reader, "--data.num-workers", 2)
        yield tries.end_of(argv, before=few).should(0, "200 images trained")


def long(tries: Tries) -> Iterator[bool]:
    """Memory and descriptors over 2,000 steps and 50 validations, with no worker and with 2."""
    for workers in (0, 2):
        run, rows = tries.folder / f"long_{workers}", list[Held]()

        def watch(pid: int, run: Path = run, rows: list[Held] = rows) -> None:
            def look() -> bool:
                step = trained_steps(run)
                if step >= 40 * (len(rows) + 1):
                    rows.append(Held.by(pid, step))
                return False

            wait_for(look, pid)

        reading = ("--data.reader", "indexed", "--data.num-workers", workers)
        argv = tries.train(run, *reading, "--train.val-every-epochs", 8, epochs=400)
        yield tries.end_of(argv, meanwhile=watch).should(0, "40,000 images trained")
        for row in (rows[0], *rows[4::5]):
            print(f"    {row}")
        first, last = rows[10], rows[-2]  # the last one may be of a process that is at its end
        yield max(last.mib - first.mib, last.workers_mib - first.workers_mib) <= MOST_GROWTH_MIB
        before, after = (max(row.descriptors for row in some) for some in (rows[5:10], rows[10:]))
        yield after <= before + MOST_MORE_DESCRIPTORS


@dataclass(frozen=True)
class Held:
    """What a training holds after a step."""

    step: int
    mib: int
    """Resident, of the training process."""
    workers_mib: int
    """Of its workers, of which each counts what they share."""
    descriptors: int
    threads: int

    @classmethod
    def by(cls, pid: int, step: int) -> Held:
        """Look at a process, which leads its session, and at the others of that."""
        others = 0
        for process in filter(str.isdecimal, os.listdir("/proc")):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if int(process) != pid and os.getsid(int(process)) == pid:
                    others += _resident_mib(int(process))
        descriptors, threads = (len(os.listdir(f"/proc/{pid}/{name}")) for name in ("fd", "task"))
        return cls(step, _resident_mib(pid), others, descriptors, threads)


def _resident_mib(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20


FAULTS: dict[str, Callable[[Tries], Iterator[bool]]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        read_only, deleted, shards_changed, environment, pickles, sigterms, full_disk, full_metrics, shm, descriptors, long,
    )
}  # fmt: skip
MOUNTING = {"read-only", "full-disk", "full-metrics", "shm"}


def main(config: FaultsConfig) -> int:
    """Try the faults, print what became of them, return the exit code."""
    if unknown := set(config.names) - FAULTS.keys():
        raise ValueError(f"no such fault: {', '.join(sorted(unknown))}; there are {', '.join(FAULTS)}")
    if config.list:
        for name, fault in FAULTS.items():
            print(f"{name}: {inspect.getdoc(fault)}")
        return 0
    for module in IMPORTED:
        importlib.import_module(module)
    assert threading.active_count() == 1  # a fork has no other thread, and would wait for what they had locked
    os.chdir(ROOT)
    may_mount, num_right, num_tried = own_mounts(), 0, 0
    with tempfile.TemporaryDirectory(prefix="vaetrain-faults-") as folder:
        tries = Tries(Path(folder))
        print("a training with no fault", flush=True)
        assert tries.end_of(tries.train(tries.run)).should(0, "200 images trained")
        for name in config.names or FAULTS:
            if name in MOUNTING and not may_mount:
                print(f"{name}: skipped, for it mounts file systems; run it as root", flush=True)
                continue
            print(f"{name}: {inspect.getdoc(FAULTS[name])}", flush=True)
            results = list(FAULTS[name](tries))
            num_tried, num_right = num_tried + len(results), num_right + sum(results)
    print(f"{num_right} of {num_tried} as docs/reliability.md says")
    return 0 if num_right == num_tried else 1


if __name__ == "__main__":
    with user_errors():
        sys.exit(main(parse(FaultsConfig, __doc__)))
