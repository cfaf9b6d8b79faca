"""Decoding workers where the system is short of what they need: /dev/shm, open files."""

import ctypes
import multiprocessing.context
import multiprocessing.spawn
import os
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch

from vaetrain.data.config import DataConfig
from vaetrain.data.readers import loader_workers
from vaetrain.data.readers.batch import Batch
from vaetrain.data.readers.order import BatchLayout
from vaetrain.data.readers.reader import open_reader

LAYOUT = BatchLayout(16, 8, 0, 1)


def opened(shards, kind="indexed", num_workers=2):
    config = DataConfig(train=str(shards), reader=kind, num_workers=num_workers)
    return closing(open_reader(config, "train", device=torch.device("cpu")))


@pytest.mark.parametrize("kind", ["indexed", "stream"])
def test_a_small_dev_shm_is_refused_before_workers_start(tiny_shards, kind, monkeypatch):
    of_64_kib = os.statvfs_result((4096, 4096, 16, 15, 15, 0, 0, 0, 0, 255))
    monkeypatch.setattr(loader_workers.os, "statvfs", lambda path: {"/dev/shm": of_64_kib}[path])
    with pytest.raises(ValueError, match=r"2 .*need 72 KiB in /dev/shm, which has 64 KiB, 60 .*--data.num-workers 0"):
        opened(tiny_shards, kind).__enter__()
    for num_workers in (0, 1):
        with opened(tiny_shards, kind, num_workers):
            pass


@contextmanager
def small_dev_shm() -> Iterator[Path]:
    """A /dev/shm of 128 KiB that this thread alone sees."""
    libc = ctypes.CDLL(None)
    assert libc.unshare(0x20000) == 0  # CLONE_NEWNS
    assert libc.mount(b"none", b"/", None, (1 << 14) | (1 << 18), None) == 0  # MS_REC | MS_PRIVATE
    assert libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size=128k") == 0
    yield Path("/dev/shm")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_dev_shm_that_others_fill_is_named(tiny_shards):
    said: list[str] = []

    def read() -> None:
        with small_dev_shm() as shm, opened(tiny_shards) as reader:
            (shm / "of others").write_bytes(bytes((128 - 20) << 10))  # room for 5 semaphores
            with pytest.raises(ValueError, match="no room") as raised:
                reader.train_batches(0, 0, LAYOUT)
            said.append(str(raised.value))

    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    (message,) = said
    assert "in /dev/shm, which has 128 KiB, 0 of them free" in message
    assert "--data.num-workers 0" in message


@contextmanager
def free_descriptors(number: int) -> Iterator[int]:
    """So many, and no more, are left of the limit that is given."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = max(map(int, os.listdir("/proc/self/fd"))) + 10
    taken: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limits[1]))
    try:
        with suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(number):
            os.close(taken.pop())
        yield limit
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("number", [0, 3, 8])
def test_too_few_descriptors_are_named_with_the_remedy(tiny_shards, number):
    with (
        opened(tiny_shards) as reader,
        free_descriptors(number) as limit,
        pytest.raises(ValueError, match=rf"the {limit:,} that a process .*ulimit -n.*--data.num-workers 0"),
    ):
        reader.train_batches(0, 0, LAYOUT)


def test_a_worker_does_not_run_the_script_of_the_training_again(monkeypatch):
    told = []
    monkeypatch.setattr(
        multiprocessing.context.ForkServerProcess, "_Popen",
        staticmethod(lambda worker: told.append(multiprocessing.spawn.get_preparation_data(worker.name))),
    )  # fmt: skip
    main = sys.modules["__main__"]
    loader_workers._Worker._Popen(loader_workers._worker_context().Process(name="worker"))
    assert sys.modules["__main__"] is main
    (prepared,) = told
    assert prepared["name"] == "worker"
    assert not {"init_main_from_name", "init_main_from_path"} & prepared.keys()


def test_what_a_worker_cannot_send_reaches_the_training_process():
    results = loader_workers._worker_context().Queue()
    results.put((3, lambda: "cannot be pickled"))
    number, error = results.get(timeout=60)
    assert number == 3
    assert isinstance(error, ValueError)
    assert "could not hand over a batch" in str(error)
    results.put((4, "next"))
    assert results.get(timeout=60) == (4, "next")


@pytest.mark.parametrize("channels", [1, 3])
def test_a_batch_handed_over_is_the_same_and_does_not_lie_in_dev_shm(channels, monkeypatch):
    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", lambda *_: pytest.fail("it lies in /dev/shm"))
    monkeypatch.setattr(loader_workers, "get_worker_info", lambda: "this is a worker")
    images = torch.randint(256, (3, 5, 7, channels), dtype=torch.uint8).permute(0, 3, 1, 2)
    batch = Batch(images, torch.tensor([1, 0, 1]), torch.tensor([7, 8, 9]))
    received = ForkingPickler.loads(ForkingPickler.dumps(loader_workers._hand_over(batch)))
    assert isinstance(received, Batch)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(received, batch, strict=True))
    assert received.images.permute(0, 2, 3, 1).is_contiguous()
