"""Processes of a node that fill one array together; as threads where they may be, as processes where they are killed."""

import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from launching import ROOT
from vaetrain.data.config import DataConfig
from vaetrain.data.readers import shared_array as node_share
from vaetrain.data.readers.reader import open_reader
from vaetrain.machine import available_memory

CPU = torch.device("cpu")


class Exchange:
    """`gather` for ranks that are threads; one that waits minutes for the others fails."""

    def __init__(self, num_ranks):
        self.barrier = threading.Barrier(num_ranks)
        self.rows = [[] for _ in range(num_ranks)]

    def of(self, rank):
        def gather(integers):
            self.rows[rank] = [int(integer) for integer in integers]
            self.barrier.wait(120)
            everybody = [list(row) for row in self.rows]
            self.barrier.wait(120)
            return everybody

        return gather


def on_ranks(num_ranks, work):
    """work(rank, gather) on so many threads at once: the results or errors, in order of rank."""
    exchange = Exchange(num_ranks)
    with ThreadPoolExecutor(num_ranks) as threads:
        done = [threads.submit(work, rank, exchange.of(rank)) for rank in range(num_ranks)]
        return [future.exception() or future.result() for future in done]


def opened(folder, split="train"):
    config = DataConfig(train=str(folder), reader="resident")
    return lambda rank, gather: open_reader(config, split, device=CPU, rank=rank, num_processes=3, gather=gather)


def address(reader):
    return reader._pixels.data_ptr()


def test_a_node_decodes_each_image_once_into_one_array(tiny_shards, monkeypatch):
    decoded = []
    decode = "vaetrain.data.readers.resident.decode_image"
    original = sys.modules["vaetrain.data.readers.resident"].decode_image
    monkeypatch.setattr("vaetrain.data.readers.resident.IMAGES_PER_TASK", 8)
    monkeypatch.setattr(
        decode, lambda selection, encoded, at, out: (decoded.append(at), original(selection, encoded, at, out=out))
    )
    alone = open_reader(DataConfig(train=str(tiny_shards), reader="resident"), "train", device=CPU)
    assert sorted(decoded) == list(range(100))
    assert alone.description.endswith("0.1 MiB in this process")
    decoded.clear()
    readers = on_ranks(3, opened(tiny_shards))
    assert sorted(decoded) == list(range(100))
    for reader in readers:
        assert torch.equal(reader._pixels, alone._pixels)
        assert reader.description.endswith("0.1 MiB shared by the 3 processes of this node")
    # Three mappings (of one process, here) of the same memory.
    assert len({address(reader) for reader in readers}) == 3
    readers[0]._pixels[0, 0, 0, 0] ^= 1
    assert torch.equal(readers[1]._pixels, readers[0]._pixels)
    assert torch.equal(readers[2]._pixels, readers[0]._pixels)


def test_nodes_share_among_themselves(tiny_shards, monkeypatch):
    nodes = {"rank-0": 1, "rank-1": 2, "rank-2": 1}
    monkeypatch.setattr(node_share, "memory_domain", lambda: nodes[threading.current_thread().name])

    def work(rank, gather):
        threading.current_thread().name = f"rank-{rank}"
        return opened(tiny_shards)(rank, gather)

    readers = on_ranks(3, work)
    assert [reader.description.partition("MiB ")[2] for reader in readers] == [
        "shared by the 2 processes of this node", "in this process", "shared by the 2 processes of this node",
    ]  # fmt: skip
    readers[0]._pixels[0, 0, 0, 0] ^= 1
    assert torch.equal(readers[2]._pixels, readers[0]._pixels)
    assert not torch.equal(readers[1]._pixels, readers[0]._pixels)


@pytest.mark.parametrize("at_fault", ["maker", "other"])
def test_processes_that_cannot_share_say_so_and_keep_their_own(tiny_shards, monkeypatch, capfd, at_fault):
    def refuse(*_):
        raise PermissionError("no memory to share here")

    if at_fault == "maker":
        monkeypatch.setattr(node_share, "SharedMemory", refuse)
    else:
        monkeypatch.setattr(node_share.SharedMemory, "of_process", refuse)
    alone = open_reader(DataConfig(train=str(tiny_shards), reader="resident"), "train", device=CPU)
    readers = on_ranks(3, opened(tiny_shards))
    assert "shares no memory with others of its node: no memory to share here" in capfd.readouterr().err
    for reader in readers:
        assert torch.equal(reader._pixels, alone._pixels)
        assert "in each of the 3 processes of this node" in reader.description


def test_memory_of_another_process_than_the_one_meant_is_not_taken():
    memory = node_share.SharedMemory(100)
    here = os.getpid(), memory.fd
    assert node_share.SharedMemory.of_process(*here, memory.inode, 100).inode == memory.inode
    with pytest.raises(FileNotFoundError, match="another one"):
        node_share.SharedMemory.of_process(*here, memory.inode + 1, 100)
    with pytest.raises(FileNotFoundError, match="another one"):
        node_share.SharedMemory.of_process(*here, memory.inode, 200)


def test_a_split_larger_than_the_memory_is_refused(tiny_shards, monkeypatch):
    monkeypatch.setattr("vaetrain.data.readers.resident.available_memory", lambda: 76_799)
    with pytest.raises(ValueError, match=r"0\.00 GiB of memory are available; use --data\.reader indexed"):
        open_reader(DataConfig(train=str(tiny_shards), reader="resident"), "train", device=CPU)
    assert 2**20 < available_memory() < 2**50


@pytest.mark.parametrize("position", [5, 70])
def test_damage_found_by_one_process_stops_all(damaged_shards, position):
    folder, name = damaged_shards(position)
    errors = on_ranks(3, opened(folder))
    assert all(isinstance(error, ValueError) for error in errors)
    finder = position // 64
    assert f"{name} in {folder}" in str(errors[finder])
    for rank in {0, 1, 2} - {finder}:
        assert str(errors[rank]) == f"{errors[finder]} (process {finder})"


HOLD = """
import json, sys
from vaetrain.data.readers.shared_array import SharedArray

def gather(integers):
    print(json.dumps([int(integer) for integer in integers]), flush=True)
    return json.loads(input())

rank, size = map(int, sys.argv[1:])
share = SharedArray.agree(size, rank, gather)
array = share.memory_array((size,))
with share.fill_collectively():
    array[share.part :: share.num_parts] = rank + 1
print(json.dumps([int(array.sum(dtype="i8")), share.description]), flush=True)
input()
"""


def test_nothing_is_left_behind_when_all_processes_are_killed():
    size = 2**20
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", HOLD, str(rank), str(size)],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        for _ in range(4):  # domains, offer, answers, and that all is filled
            rows = [json.loads(process.stdout.readline()) for process in processes]
            for process in processes:
                process.stdin.write(json.dumps(rows) + "\n")
                process.stdin.flush()
        for process in processes:
            total, description = json.loads(process.stdout.readline())
            assert total == (1 + 2) * size // 2
            assert description == "shared by the 2 processes of this node"
            maps = [line.split(maxsplit=5) for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines()]
            shared = {fields[5] for fields in maps if fields[1] == "rw-s"}
            # Memory without a name in any file system, of which the kernel lets go with its last process.
            assert shared == {"/memfd:vaetrain (deleted)"}
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert {process.returncode for process in processes} == {-signal.SIGKILL}


def test_sharing_imports_no_torch():
    modules = "vaetrain.data.readers.shared_array, vaetrain.data.readers.worker_progress"
    code = f"import sys, {modules}; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
