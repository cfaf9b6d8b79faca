"""Readers whose workers die or whose storage no longer answers: an error that says where."""

import contextlib
import itertools
import multiprocessing
import multiprocessing.synchronize
import os
import shutil
import signal
import sys
from contextlib import closing

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from vaetrain.data.config import DataConfig
from vaetrain.data.format.shard_set import ShardSet
from vaetrain.data.readers import selection
from vaetrain.data.readers import worker_progress as progress
from vaetrain.data.readers.loader_workers import WorkerPool
from vaetrain.data.readers.order import BatchLayout
from vaetrain.data.readers.reader import open_reader
from vaetrain.data.readers.worker_progress import ReaderProgress, StallDetector, mark_idle, note_reading

CPU = torch.device("cpu")
LAYOUT = BatchLayout(16, 8, 0, 1)


def opened(folder, kind, **options):
    return closing(open_reader(DataConfig(train=str(folder), reader=kind, **options), "train", device=CPU))


@pytest.fixture
def stuck_shards(tiny_shards, tmp_path):
    """Make the first training shard of a copy hang whoever opens it, as a file on a dead server does; give the shard's name."""
    folder = shutil.copytree(tiny_shards, tmp_path / "stuck")

    def hang():
        shard = ShardSet.open(folder).manifest.splits["train"].shards[0]
        (folder / shard.name).unlink()
        os.mkfifo(folder / shard.name)
        return shard.name

    return folder, hang


@pytest.mark.parametrize("kind", ["indexed", "stream"])
def test_a_worker_killed_by_the_system_is_an_error_that_says_what_it_was_at(tiny_shards, kind):
    with opened(tiny_shards, kind, num_workers=1) as reader:
        batches = reader.train_batches(0, 0, LAYOUT)
        next(batches)
        (worker,) = multiprocessing.active_children()
        worker.kill()
        with pytest.raises(
            ValueError, match=r"SIGKILL; it was at train-00000\d\.tar in .*, sample.*runs out"
        ) as raised:
            list(itertools.islice(batches, 100))
        assert f"(process {worker.pid})" in str(raised.value)
        assert "lower --data.num-workers (now 1)" in str(raised.value)


class DiesWithTheLocksOfDataLoader(Dataset):
    """Kills its worker while that asks whether it shall end."""

    def __getitems__(self, positions):
        frame = sys._getframe()
        while "done_event" not in frame.f_locals:
            frame = frame.f_back
        event = frame.f_locals["done_event"]
        if isinstance(event, multiprocessing.synchronize.Event):
            event._cond.acquire()
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_worker_had_locked_locks_nobody_out():
    workers = WorkerPool(1, CPU, lambda *_: "train-000000.tar", timeout_s=60.0)
    with pytest.raises(ValueError, match=r"was killed by SIGKILL"):
        list(workers.train_iter(DiesWithTheLocksOfDataLoader(), [[1], [2]]))


def test_a_worker_whose_storage_does_not_answer_is_given_up(stuck_shards):
    folder, hang = stuck_shards
    with opened(folder, "indexed", num_workers=1, timeout_s=2.0) as reader:
        name = hang()
        batches = reader.eval_batches(8, 0, 1)
        (worker,) = multiprocessing.active_children()
        with pytest.raises(ValueError, match=rf"for 2 s \(--data.timeout-s\) .* at {name} in .*, sample \d+ .*storage"):
            list(batches)
        # In no way that it could put off, or the end of this process would wait for it.
        worker.join(120)
        assert worker.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("kind", ["indexed", "resident", "stream"])
def test_a_process_that_hangs_in_a_read_of_its_own_ends(stuck_shards, kind, monkeypatch, capfd):
    folder, hang = stuck_shards
    ended = []

    def end(status):
        ended.append(status)
        # Instead of the end: somebody opens the other end of the pipe and closes it, and the read is over.
        with contextlib.suppress(OSError):
            os.close(os.open(folder / name, os.O_WRONLY | os.O_NONBLOCK))

    monkeypatch.setattr(progress.os, "_exit", end)
    # resident reads everything when it is opened.
    monkeypatch.setattr(ShardSet, "verify", lambda *_: None)
    name = hang()
    selection.open_shard.cache_clear()
    with (
        pytest.raises(ValueError, match=name),
        opened(folder, kind, num_workers=0, timeout_s=1.0) as reader,
    ):
        list(reader.eval_batches(8, 0, 1))
    assert set(ended) == {1}
    said = capfd.readouterr().err
    assert "error: reading hangs: for 1 s (--data.timeout-s) there was no progress at train-000000.tar in " in said
    assert f"sample{'s 0 to' if kind == 'stream' else ' 0 ('}" in said


def test_a_shard_that_is_gone_names_the_image(tiny_shards, tmp_path):
    folder = shutil.copytree(tiny_shards, tmp_path / "gone")
    with opened(folder, "indexed", num_workers=0) as reader:
        (folder / "train-000002.tar").unlink()
        with pytest.raises(ValueError, match=r"train-000002\.tar in .*, sample \d+ .*No such file.*is the storage"):
            list(reader.eval_batches(8, 0, 1))


def test_workers_of_a_pass_given_up_are_not_asked_for_the_next(tiny_shards):
    with opened(tiny_shards, "indexed", num_workers=1) as reader:
        begun = reader.eval_batches(8, 0, 1)
        next(begun)
        again = reader.eval_batches(8, 0, 1)
        assert np.concatenate([batch.indices for batch in again]).tolist() == list(range(100))
        assert next(begun).indices.tolist() == list(range(8, 16))


def test_a_pass_begins_anew_before_its_workers_have_started(tiny_shards):
    # As on a rank that has no batch in a pass. The workers take seconds to start, and longer on a busy machine.
    with opened(tiny_shards, "indexed", num_workers=1) as reader:
        for _ in range(3):
            assert list(reader.eval_batches(100, 1, 2)) == []


def test_patience_ends_with_a_reader_that_makes_no_progress():
    watched = ReaderProgress(2)
    with watched.reader(1):
        note_reading(5, 5)
        detector = StallDetector(watched, timeout_s=3.0, every_s=1.0)
        for _ in range(2):
            detector.look()
        assert detector.stuck() == []
        note_reading(5, 5)  # the same image once more is progress, too
        for _ in range(3):
            detector.look()
            assert detector.stuck() == []
        detector.look()
        assert detector.stuck() == [1]
        mark_idle()
        assert detector.stuck() == []
        assert watched.images_of(1) == (5, 5)
    assert watched.images_of(0) is None
    assert watched.reader_of(os.getpid()) == 1
    assert watched.reader_of(1) is None


def test_notes_of_passes_that_take_turns_in_one_process_do_not_mix():
    outer, inner = ReaderProgress(1), ReaderProgress(1)
    with outer.reader(0):
        note_reading(1, 2)
        with inner.reader(0):
            note_reading(3, 3)
        note_reading(1, 2)
    note_reading(9, 9)  # nobody watches
    assert (outer.notes().tolist(), outer.images_of(0)) == ([2], (1, 2))
    assert (inner.notes().tolist(), inner.images_of(0)) == ([1], (3, 3))
    assert not outer.busy().any()
