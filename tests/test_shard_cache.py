"""The cache of shards: bounded at every moment, right whoever dies, and one download for all who want a shard."""

import contextlib
import errno
import hashlib
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rude_server import CONTENT, Server
from vaetrain.data.config import DataConfig
from vaetrain.data.format.manifest import Shard
from vaetrain.data.remote import cache as shard_cache
from vaetrain.data.remote.cache import ShardCache
from vaetrain.data.remote.remote import RemoteShards
from vaetrain.data.remote.remote_file import Persistence, RemoteFile

HASTY = Persistence(attempts=3, first_wait_s=0.01, longest_wait_s=0.02)
SIZE = 200_000
# The threads of the server, and torch if it was imported, rule out fork.
processes = multiprocessing.get_context("spawn")


def content_of(number: int, size: int = SIZE) -> bytes:
    return random.Random(number).randbytes(size)


def shard_of(number: int, content: bytes | None = None) -> Shard:
    content = content_of(number) if content is None else content
    return Shard(f"train-{number:06d}.tar", 1, len(content), hashlib.sha256(content).hexdigest())


def read(remote: RemoteShards, shard: Shard) -> bytes:
    with remote.open(shard, 0, shard.num_bytes) as file:
        return file.read()


def read_all(remote: RemoteShards, numbers: list[int]) -> None:
    """In another process: read shards, each of which must be right."""
    for number in numbers:
        if read(remote, shard_of(number)) != content_of(number):
            sys.exit(1)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def disk_usage(folder: Path) -> int:
    """Bytes of all files in a folder that others write into."""
    total = 0
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):
            total += entry.stat().st_size
    return total


@pytest.fixture
def remote(server: Server, tmp_path: Path) -> Callable[..., RemoteShards]:
    """Shards on a server, through a cache with room for some of them."""

    def make(num_shards: float = 10, **options: Any) -> RemoteShards:
        for number in range(10):
            if f"train-{number:06d}.tar" not in server.paths:
                server.add(f"train-{number:06d}.tar", content=content_of(number))
        cache = ShardCache(tmp_path / "cache", int(num_shards * SIZE), **options)
        cache.prepare()
        return RemoteShards(server.url, cache, HASTY)

    return make


def test_a_shard_is_fetched_once_and_kept_under_its_checksum(
    remote: Callable[..., RemoteShards], server: Server, tmp_path: Path
) -> None:
    shards = remote()
    for _ in range(3):
        assert read(shards, shard_of(1)) == content_of(1)
    assert names(tmp_path / "cache") == [f"{shard_of(1).sha256}.tar"]
    assert len(server.requests(shard_of(1).name)) == 1


def test_what_was_not_used_for_longest_makes_room_and_other_files_stay(
    remote: Callable[..., RemoteShards], tmp_path: Path
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "notes.tar").write_bytes(bytes(5 * SIZE))
    shards = remote(3)
    for number in (1, 2, 3, 1, 4):
        read(shards, shard_of(number))
    assert names(tmp_path / "cache") == sorted([*(f"{shard_of(n).sha256}.tar" for n in (1, 3, 4)), "notes.tar"])
    remote(1.5)  # a smaller bound holds from the start
    assert names(tmp_path / "cache") == sorted([f"{shard_of(4).sha256}.tar", "notes.tar"])


def test_a_shard_that_makes_room_while_it_is_read_is_read_to_its_end(remote: Callable[..., RemoteShards]) -> None:
    shards = remote(1)
    with shards.open(shard_of(1), 0, SIZE) as file:
        begun = file.read(10)
        read(shards, shard_of(2))
        assert begun + file.read() == content_of(1)


def test_processes_that_want_all_at_once_stay_within_the_bound(
    remote: Callable[..., RemoteShards], server: Server, tmp_path: Path
) -> None:
    shards = remote(2.5)  # two can be on their way, or whole: three readers must wait for each other
    orders = [random.Random(seed).sample(range(10), 10) for seed in range(3)]
    readers = [processes.Process(target=read_all, args=(shards, order)) for order in orders]
    for reader in readers:
        reader.start()
    highest = 0
    while any(reader.is_alive() for reader in readers):
        highest = max(highest, disk_usage(tmp_path / "cache"))
    assert [reader.exitcode for reader in readers] == [0, 0, 0]
    assert SIZE < highest <= 2.5 * SIZE


def test_those_who_want_the_same_shard_share_one_download(
    remote: Callable[..., RemoteShards], server: Server, tmp_path: Path
) -> None:
    server.add(shard_of(1).name, content=content_of(1), stall_s=1e-5)
    shards = remote()
    with ThreadPoolExecutor(3) as readers:
        found = [readers.submit(read, shards, shard_of(1)) for _ in range(3)]
        while not list((tmp_path / "cache").glob("*.part")):
            time.sleep(0.01)
        assert not any(future.done() for future in found)
    assert [future.result() for future in found] == [content_of(1)] * 3
    assert len(server.requests(shard_of(1).name)) == 1


def test_a_killed_download_is_taken_up_and_never_taken_for_a_shard(
    remote: Callable[..., RemoteShards], server: Server, tmp_path: Path
) -> None:
    big = shard_of(99, CONTENT)
    server.add(big.name, stall_s=2e-5)
    shards = remote(20)
    reader = processes.Process(target=read, args=(shards, big))
    reader.start()
    part = tmp_path / "cache" / f"{big.sha256}.{len(CONTENT)}.part"
    while reader.is_alive() and not (part.exists() and part.stat().st_size):
        time.sleep(0.01)
    os.kill(reader.pid, signal.SIGKILL)
    reader.join()
    assert names(tmp_path / "cache") == [part.name]
    arrived = part.stat().st_size
    assert 0 < arrived < len(CONTENT)
    server.paths[big.name].stall_s = 0
    assert read(shards, big) == CONTENT
    assert server.requests(big.name)[-1]["Range"] == f"bytes={arrived}-{len(CONTENT) - 1}"
    assert names(tmp_path / "cache") == [f"{big.sha256}.tar"]


def test_what_a_dead_process_left_makes_room_too(remote: Callable[..., RemoteShards], tmp_path: Path) -> None:
    shards = remote(1.5)
    (tmp_path / "cache" / f"{shard_of(2).sha256}.{SIZE}.part").write_bytes(b"begun")
    assert read(shards, shard_of(1)) == content_of(1)
    assert names(tmp_path / "cache") == [f"{shard_of(1).sha256}.tar"]


@pytest.mark.parametrize("begun", [b"", b"wrong from the start", bytes(SIZE + 5)])
def test_what_is_not_the_shard_is_refused_and_not_kept(
    remote: Callable[..., RemoteShards], server: Server, tmp_path: Path, begun: bytes
) -> None:
    part = tmp_path / "cache" / f"{shard_of(1).sha256}.{SIZE}.part"
    shards = remote()
    part.write_bytes(begun)
    assert read(shards, shard_of(1)) == content_of(1)  # whatever there was before
    server.add(shard_of(2).name, content=content_of(3))
    with pytest.raises(ValueError, match=r"SHA-256 is \w+, not the manifest's"):
        read(shards, shard_of(2))
    assert f"{shard_of(2).sha256}.tar" not in names(tmp_path / "cache")
    server.add(shard_of(2).name, content=content_of(2))
    assert read(shards, shard_of(2)) == content_of(2)


def test_a_server_that_fails_leaves_what_has_come(
    remote: Callable[..., RemoteShards], server: Server, tmp_path: Path
) -> None:
    server.add(shard_of(1).name, content=content_of(1), drop_after=[150_000, 0, 0, 0])
    shards = remote()
    with pytest.raises(ValueError, match="given up after"):
        read(shards, shard_of(1))
    assert disk_usage(tmp_path / "cache") == 150_000
    assert read(shards, shard_of(1)) == content_of(1)
    server.add(shard_of(2).name, status=404)
    with pytest.raises(ValueError, match="answers 404"):
        read(shards, shard_of(2))


def test_a_shard_that_lost_its_end_is_fetched_again(
    remote: Callable[..., RemoteShards], server: Server, tmp_path: Path
) -> None:
    shards = remote()
    read(shards, shard_of(1))
    (tmp_path / "cache" / f"{shard_of(1).sha256}.tar").write_bytes(content_of(1)[:-1])
    assert read(shards, shard_of(1)) == content_of(1)


def test_full_verification_takes_the_checksum_of_what_lies_there(
    remote: Callable[..., RemoteShards], server: Server, tmp_path: Path
) -> None:
    read(remote(), shard_of(1))
    (tmp_path / "cache" / f"{shard_of(1).sha256}.tar").write_bytes(content_of(2))
    assert read(remote(), shard_of(1)) == content_of(2)
    assert read(remote(recheck=True), shard_of(1)) == content_of(1)
    assert read(remote(recheck=True), shard_of(1)) == content_of(1)
    assert len(server.requests(shard_of(1).name)) == 2


def test_a_process_that_holds_a_shard_without_moving_does_not_block_others_for_ever(
    remote: Callable[..., RemoteShards], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_cache, "STUCK_S", 0.3)
    shards = remote(1)
    for held, wanted in ((1, 1), (1, 2)):  # the shard itself, and all the room
        file = shards.cache._claim(shard_of(held))
        with file, pytest.raises(ValueError, match=r"without moving; .* another --data.cache-dir"):
            read(shards, shard_of(wanted))
    assert read(shards, shard_of(2)) == content_of(2)


def test_a_cache_smaller_than_a_shard_and_one_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    config = DataConfig(train="http://127.0.0.1:9/", cache_dir=tmp_path / "file" / "x", cache_gib=2**-13)
    remote = RemoteShards.of(config, config.train)
    with pytest.raises(
        ValueError, match=r"cache-gib 0.00012207 is 131,072 bytes, and train-000001.tar alone has 200,000"
    ):
        remote.cache.check_fits((shard_of(1),))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot write .*file/x"):
        remote.cache.prepare()
    with pytest.raises(ValueError, match=r"--data.cache-gib is 0"):
        DataConfig(train="x", cache_gib=0.0)


def test_a_full_disk_is_one_readable_line(
    remote: Callable[..., RemoteShards], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    shards = remote()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"cannot write .*No space left on device; free some space"):
        read(shards, shard_of(1))
    assert names(tmp_path / "cache") == [f"{shard_of(1).sha256}.{SIZE}.part"]


def test_bytes_that_arrive_are_the_files(server: Server) -> None:
    """What the tests above rest on: without a cache, the same reading."""
    server.add("a.tar", content=content_of(1))
    with RemoteFile(f"{server.url}a.tar", persistence=HASTY) as file:
        assert file.readall() == content_of(1)
