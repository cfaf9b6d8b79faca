"""Shards behind URLs and commands: a server that misbehaves costs time or ends in an error, never in wrong images."""

import itertools
import re
import shutil
import tarfile
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.registry import known_implementations

from rude_server import CONTENT, Server
from vaetrain.data.config import DataConfig
from vaetrain.data.format.shard_set import ShardSet
from vaetrain.data.readers import stream
from vaetrain.data.readers.order import BatchLayout
from vaetrain.data.readers.read_plan import ReadPlan
from vaetrain.data.readers.reader import Reader, open_reader
from vaetrain.data.remote import cache as shard_cache
from vaetrain.data.remote import connection, remote
from vaetrain.data.remote.remote import RemoteShards
from vaetrain.data.remote.remote_file import Persistence, RemoteFile
from vaetrain.data.remote.url import remote_folder
from vaetrain.files import READ_BYTES

CPU = torch.device("cpu")
HASTY = Persistence(attempts=3, first_wait_s=0.01, longest_wait_s=0.02)
IMPATIENT = replace(HASTY, give_up_s=0.6)
LAYOUT = BatchLayout(20, 10, 0, 1)


def file_on(folder: str, name: str, **options: Any) -> RemoteFile:
    return RemoteFile(
        folder + name, **{"stop": len(CONTENT), "num_bytes": len(CONTENT), "persistence": HASTY} | options
    )


def everything(file: RemoteFile) -> bytes:
    with file:
        return file.readall()


def opened(location: str, **options: Any) -> closing[Reader]:
    return closing(open_reader(DataConfig(train=location, num_workers=0, **options), "train", device=CPU))


def impatient(reader: Reader) -> Reader:
    reader._stream = replace(reader._stream, remote=replace(reader._stream.remote, persistence=IMPATIENT))
    return reader


def served(server: Server, folder: Path, **behaviour: Any) -> str:
    """The URL under which the files of a folder are; the behaviour is that of its shards."""
    for file in folder.iterdir():
        server.add(f"set/{file.name}", content=file.read_bytes(), **(behaviour if file.suffix == ".tar" else {}))
    return f"{server.url}set"


def shard_requests(server: Server) -> list[dict[str, str]]:
    return [request for path in server.paths if path.endswith(".tar") for request in server.requests(path)]


@pytest.mark.parametrize("drops", [[1_000_000], [1_000_000, 100, 1_500_000, 0]])
def test_a_connection_that_drops_is_taken_up_where_it_was(server: Server, drops: list[int]) -> None:
    server.add("a.tar", drop_after=list(drops))
    assert everything(file_on(server.url, "a.tar")) == CONTENT
    starts = [0, *itertools.accumulate(drops)]
    asked = [request["Range"] for request in server.requests("a.tar")]
    assert asked == [f"bytes={start}-{len(CONTENT) - 1}" for start in starts]


def test_without_ranges_it_starts_over_and_reads_on(server: Server) -> None:
    server.add("a.tar", drop_after=[1_000_000, 2_000_000], ranges=False)
    assert everything(file_on(server.url, "a.tar")) == CONTENT
    assert len(server.requests("a.tar")) == 3
    assert everything(file_on(server.url, "a.tar", start=2_000_000)) == CONTENT[2_000_000:]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_server_that_never_gets_further_is_given_up(server: Server, ranges: bool) -> None:
    server.add("a.tar", drop_after=[1_000_000] + ([0] if ranges else [1_000_000]) * 50, ranges=ranges)
    with pytest.raises(ValueError, match=r"ended at byte 1,000,000 of 3.* \(given up after 3 attempt\(s\)\)"):
        everything(file_on(server.url, "a.tar"))


def test_an_answer_without_a_length_is_whole_only_when_all_has_come(server: Server) -> None:
    server.add("a.tar", has_length=False, ranges=False, drop_after=[1_000_000])
    assert everything(file_on(server.url, "a.tar")) == CONTENT
    assert len(server.requests("a.tar")) == 2


def test_a_busy_server_is_asked_again_and_a_missing_file_is_not(server: Server) -> None:
    server.add("a.tar", statuses=[503, 500])
    assert everything(file_on(server.url, "a.tar")) == CONTENT
    server.add("b.tar", status=503)
    with pytest.raises(ValueError, match=r"answers 503 .*given up after 3"):
        everything(file_on(server.url, "b.tar"))
    for status in (403, 404):
        server.add("c.tar", status=status)
        with pytest.raises(ValueError, match=f"answers {status} "):
            everything(file_on(server.url, "c.tar"))
        assert len(server.requests("c.tar")) == 1


@pytest.mark.parametrize("stall_s", [30.0, 0.05], ids=["silent", "trickling"])
def test_a_stalling_server_is_given_up_in_the_time_stated(server: Server, stall_s: float) -> None:
    """All of the file would take hours, and so many attempts as well: it is the time that ends it."""
    server.add("a.tar", stall_s=stall_s)
    with pytest.raises(ValueError, match="given up after"):
        everything(file_on(server.url, "a.tar", persistence=Persistence(give_up_s=1.0, attempts=10**6)))


@pytest.mark.parametrize(
    ("first", "again"),
    [
        (b"HTTP/1.1 200 OK\r\n", b"x"),
        (b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;", b"x"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n", b"A: b\r\n"),
    ],
    ids=["header", "headers", "continue", "chunk size", "chunks", "trailers"],
)
def test_a_server_that_trickles_anything_is_given_up(server: Server, first: bytes, again: bytes) -> None:
    """Each byte comes in time. Without a deadline over all of them this ends when http.client has counted its fill, or never."""
    server.add("a.tar", raw=(first, again))
    with pytest.raises(ValueError, match=r"too long|brought \d+ bytes in 0.2 s|timed out") as told:
        everything(file_on(server.url, "a.tar", persistence=Persistence(give_up_s=5.0, timeout_s=0.2, attempts=2)))
    assert "given up after 2 attempt(s)" in str(told.value)


@pytest.mark.parametrize("target", ["ftp://127.0.0.1:9/a", "file:///etc/passwd", "data:,x"])
def test_a_redirect_leads_to_http_alone(server: Server, target: str) -> None:
    server.add("a.tar", redirect=target)
    with pytest.raises(ValueError, match=r"answers 302 (it leads to|Found - Redirection to) .*not"):
        everything(file_on(server.url, "a.tar"))
    server.add("b.tar", redirect=f"{server.url}c.tar")
    server.add("c.tar")
    assert everything(file_on(server.url, "b.tar")) == CONTENT


def test_redirects_without_end_are_given_up(server: Server) -> None:
    server.add("a.tar", redirect=f"{server.url}a.tar")
    with pytest.raises(ValueError, match="answers 302"):
        everything(file_on(server.url, "a.tar"))


def test_the_default_persistence_is_well_below_thirty_seconds() -> None:
    assert Persistence().timeout_s < Persistence().give_up_s < shard_cache.STUCK_S < 25


def test_a_file_of_another_size_and_a_wrong_range_are_refused(server: Server) -> None:
    server.add("a.tar", content=CONTENT[:-1])
    with pytest.raises(ValueError, match=f"has {len(CONTENT) - 1:,} bytes, not {len(CONTENT):,}"):
        everything(file_on(server.url, "a.tar"))
    server.add("b.tar", wrong_range=True)
    with pytest.raises(ValueError, match="another range of bytes"):
        everything(file_on(server.url, "b.tar"))


def test_seeking_reads_over_what_is_near_and_asks_anew_for_what_is_far(server: Server) -> None:
    server.add("a.tar")
    with file_on(server.url, "a.tar") as file:
        for position in (0, 200_000, 200_000 + READ_BYTES // 2):
            file.seek(position)
            assert file.read(10) == CONTENT[position:][:10]
        assert len(server.requests("a.tar")) == 1
        far = file.seek(READ_BYTES + READ_BYTES // 2, 1)
        assert file.read(10) == CONTENT[far:][:10]
        file.seek(5)
        assert file.read(10) == CONTENT[5:15]
    assert [request["Range"].partition("-")[0] for request in server.requests("a.tar")] == [
        "bytes=0", f"bytes={far}", "bytes=5"
    ]  # fmt: skip


@pytest.fixture
def copies(tmp_path: Path) -> Iterator[list[str]]:
    """CONTENT as a.tar behind two schemes of fsspec."""
    (tmp_path / "a.tar").write_bytes(CONTENT)
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/copies/a.tar", CONTENT)
    yield [f"file://{tmp_path}/", "memory://copies/"]
    memory.store.clear()


def test_fsspec_reads_the_same_bytes(copies: list[str]) -> None:
    for folder in copies:
        assert everything(file_on(folder, "a.tar")) == CONTENT
        with file_on(folder, "a.tar", start=1_234_567) as file:
            assert file.read(10) == CONTENT[1_234_567:][:10]
            file.seek(3_000_000)
            assert file.read(10) == CONTENT[3_000_000:][:10]
        with pytest.raises(ValueError, match="FileNotFoundError"):
            everything(file_on(folder, "b.tar"))
        with pytest.raises(ValueError, match=f"has {len(CONTENT):,} bytes, not 7"):
            everything(file_on(folder, "a.tar", num_bytes=7))


def test_fsspec_that_fails_is_asked_again_and_one_that_stalls_is_given_up(
    copies: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failures = connection._open_with_fsspec, [ConnectionError("reset"), OSError("busy")]

    def failing(*arguments: Any) -> Any:
        if failures:
            raise failures.pop()
        return real(*arguments)

    monkeypatch.setattr(connection, "_open_with_fsspec", failing)
    assert everything(file_on(copies[1], "a.tar")) == CONTENT
    ending = threading.Event()
    monkeypatch.setattr(connection, "_open_with_fsspec", lambda *_: ending.wait(600))
    with pytest.raises(ValueError, match=r"it took over .* \(given up"):
        everything(file_on(copies[1], "a.tar", persistence=IMPATIENT))
    ending.set()


def test_a_scheme_without_its_package_and_an_unknown_one_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(known_implementations, "cloud", {"class": "cloudfs.Cloud", "err": "Install cloudfs"})
    with (
        pytest.raises(FileNotFoundError, match=r"no shard set at cloud://b/x/: .*Install cloudfs.* pip install"),
        opened("cloud://b/x"),
    ):
        pass
    with (
        pytest.raises(FileNotFoundError, match=r"no shard set at .*Protocol not known: nowhere"),
        opened("nowhere://x"),
    ):
        pass


def test_a_url_is_told_from_a_path_and_a_command_is_refused() -> None:
    assert remote_folder("a/folder") is None
    assert remote_folder("s3://bucket/set/manifest.json") == "s3://bucket/set/"
    with pytest.raises(
        ValueError, match=r"pipe:cat \{\} would run a shell command, which vaetrain does not; give .* URL"
    ):
        remote_folder("pipe:cat {}")
    assert remote_folder("http://[::1]:80/set") == "http://[::1]:80/set/"
    for chain in ("simplecache::s3://b/x", "zip://set::file:///home/me/x.zip", "zip://x::filecache::s3://b/x.zip"):
        with pytest.raises(ValueError, match="chains file systems, some of which write"):
            remote_folder(chain)


@pytest.mark.parametrize("kind", ["http", "http through a cache", "file", "memory"])
@pytest.mark.parametrize("classes", [(), ("dog",)])
def test_all_ways_bring_the_batches_of_the_folder(
    kind: str, classes: tuple[str, ...], tiny_shards: Path, server: Server, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"classes": classes}
    if kind.startswith("http"):
        location = served(server, tiny_shards, drop_after=[4000])
        options["cache_dir"] = tmp_path / "cache" if kind.endswith("cache") else None
    elif kind == "file":
        location = f"file://{tiny_shards}"
    else:
        location = "memory://tiny"
        for file in tiny_shards.iterdir():
            fsspec.filesystem("memory").pipe_file(f"/tiny/{file.name}", file.read_bytes())
    with opened(location, **options) as there, opened(str(tiny_shards), reader="stream", classes=classes) as here:
        assert there.description.startswith("stream (--data.reader auto, the shards are behind a URL): ")
        assert ("through" in there.description) == ("cache" in kind)
        assert there.manifest == here.manifest
        pairs = zip(there.train_batches(0, 20, LAYOUT), here.train_batches(0, 20, LAYOUT), strict=True)
        for a, b in itertools.islice(pairs, 8):
            assert torch.equal(a.images, b.images)
            assert torch.equal(a.indices, b.indices)


def test_another_shard_of_the_same_size_is_noticed_at_its_first_image(tiny_shards: Path, server: Server) -> None:
    url = served(server, tiny_shards)
    first, second = sorted(path.name for path in tiny_shards.glob("train-*.tar"))[:2]
    content = server.paths[f"set/{second}"].content
    size = len(server.paths[f"set/{first}"].content)
    server.paths[f"set/{first}"].content = (content + bytes(size))[:size]
    with (
        opened(url) as reader,
        pytest.raises(ValueError, match=rf"{first} in {url}/, sample \d .*: this is not where the image begins"),
    ):
        list(reader.eval_batches(8, 0, 1))


def test_a_damaged_header_is_noticed(tiny_shards: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_shards, tmp_path / "damaged")
    shard_set = ShardSet.open(folder)
    with shard_set.path(shard_set.manifest.splits["train"].shards[0]).open("r+b") as file:
        file.seek(int(shard_set.index("train").offset[3]) - 512)
        file.write(b"X")
    with (
        opened(str(folder), reader="stream") as reader,
        pytest.raises(ValueError, match=r"^train-000000.tar in .*, sample 3 .*tar header is damaged"),
    ):
        list(reader.eval_batches(8, 0, 1))


def test_a_link_in_a_shard_is_no_image(tiny_shards: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_shards, tmp_path / "damaged")
    shard_set = ShardSet.open(folder)
    with shard_set.path(shard_set.manifest.splits["train"].shards[0]).open("r+b") as file:
        file.seek(int(shard_set.index("train").offset[3]) - 512)
        header = bytearray(file.read(512))
        header[156:157] = tarfile.SYMTYPE
        header[148:156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 8 * ord(" "))
        file.seek(-512, 1)
        file.write(header)
    with (
        opened(str(folder), reader="stream") as reader,
        pytest.raises(ValueError, match=r"^train-000000.tar in .*, sample 3 .*a link or device in the shard"),
    ):
        list(reader.eval_batches(8, 0, 1))


def test_a_server_that_stalls_ends_the_run_naming_shard_and_sample(tiny_shards: Path, server: Server) -> None:
    url = served(server, tiny_shards, stall_s=0.05)
    with (
        opened(url) as reader,
        pytest.raises(
            ValueError, match=rf"^train-0.*tar in {url}/, sample \d+ .*given up after .*copy the shard again"
        ),
    ):
        next(impatient(reader).train_batches(0, 0, LAYOUT))


@pytest.mark.parametrize("name", ["manifest.json", "index.safetensors"])
def test_a_damaged_manifest_or_index_names_the_url(tiny_shards: Path, server: Server, name: str) -> None:
    url = served(server, tiny_shards)
    server.paths[f"set/{name}"].content = b"{}"
    with pytest.raises(ValueError, match=f"^{url}/{name} is no"), opened(url):
        pass


def test_a_manifest_that_trickles_is_given_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "LISTING_S", -1.0)
    server.add("set/manifest.json")
    with pytest.raises(FileNotFoundError, match=r"manifest.json: .* bytes of it came in"):
        RemoteShards(f"{server.url}set/").shard_set()


def test_an_endless_manifest_does_not_fill_the_memory(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vaetrain.data.remote.remote.MAX_MANIFEST_BYTES", 100_000)
    server.add("set/manifest.json")
    with pytest.raises(FileNotFoundError, match="longer than 100,000 bytes"), opened(f"{server.url}set"):
        pass


def test_resuming_asks_only_for_what_was_not_trained_on(
    tiny_shards: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "SHUFFLE_BUFFER", 4)
    url = served(server, tiny_shards)
    with opened(url) as reader:
        whole = [batch.indices.tolist() for batch in itertools.islice(reader.train_batches(0, 0, LAYOUT), 10)]
        for behaviour in server.paths.values():
            behaviour.requests.clear()
        resumed = [batch.indices.tolist() for batch in itertools.islice(reader.train_batches(0, 60, LAYOUT), 4)]
    assert resumed == whole[6:]
    shards = shard_requests(server)
    assert len(shards) <= 5  # of nine; 40 of 100 images are left
    starts = [int(re.findall(r"\d+", request["Range"])[0]) for request in shards]
    assert sum(start > 0 for start in starts) >= 1


def test_the_plan_of_a_url_is_that_of_the_folder(tiny_shards: Path, server: Server) -> None:
    sizes = {"num_processes": 2, "global_batch_size": 20, "micro_batch_size": None}
    there = ReadPlan.of(DataConfig(train=served(server, tiny_shards), num_workers=2), **sizes)
    here = ReadPlan.of(DataConfig(train=str(tiny_shards), num_workers=2, reader="stream"), **sizes)
    assert there.train.reader == there.val.reader == "stream"
    assert (there.train.shards_per_worker, there.val.batches_per_rank) == (
        here.train.shards_per_worker, here.val.batches_per_rank
    )  # fmt: skip
    assert shard_requests(server) == []


def test_what_only_local_shards_can_do_is_refused_before_anything_is_fetched() -> None:
    for options in ({"reader": "indexed"}, {"verify": "full"}):
        with pytest.raises(ValueError, match="is a URL"):
            RemoteShards.of(DataConfig(train="x", **options), "s3://bucket/set")
