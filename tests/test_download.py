import errno
import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest

from rude_server import CONTENT, HASTY, Server
from vaetrain.data.remote.download import download
from vaetrain.data.remote.remote_file import Persistence
from vaetrain.files import readable_disk_errors

SHA256 = hashlib.sha256(CONTENT).hexdigest()
LIMIT = 1 << 24


def get(path: Path, *urls: str, sha256: str | None = SHA256, max_bytes: int = LIMIT) -> str:
    return download(urls, path, max_bytes=max_bytes, sha256=sha256, persistence=HASTY)


def leftovers(path: Path) -> list[str]:
    return sorted(file.name for file in path.parent.iterdir() if file != path)


def test_a_file_arrives_whole_and_is_kept(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    url = server.add("file")
    assert get(path, url) == SHA256
    assert path.read_bytes() == CONTENT
    assert leftovers(path) == []
    assert get(path, url) == SHA256
    assert len(server.requests("file")) == 1


@pytest.mark.parametrize("sha256", [SHA256, None])
def test_dropped_connections_are_resumed(server: Server, tmp_path: Path, sha256: str | None) -> None:
    url = server.add("file", drop_after=[1_100_000, 1_200_000])
    get(tmp_path / "file", url, sha256=sha256)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert [r.get("Range") for r in server.requests("file")] == [None, "bytes=1100000-", "bytes=2300000-"]
    assert leftovers(tmp_path / "file") == []


def test_a_killed_download_is_resumed_by_the_next_run(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "file"
    url = server.add("file", drop_after=[500_000, 0, 0])
    with pytest.raises(ValueError, match=r"ended at byte 500,000 of 3,145,984 .*\(given up after 3 attempt\(s\)\)"):
        get(path, url)
    assert not path.exists()
    assert (tmp_path / "file.part").stat().st_size == 500_000
    get(path, url)
    assert path.read_bytes() == CONTENT
    assert server.requests("file")[-1]["Range"] == "bytes=500000-"


def test_a_complete_part_needs_only_its_name(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(CONTENT)
    get(tmp_path / "file", server.add("file"))
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert len(server.requests("file")) == 1


def test_a_part_longer_than_the_file_starts_over(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(CONTENT + b"more")
    get(tmp_path / "file", server.add("file"))
    assert (tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize("sha256", [SHA256, None])
def test_a_server_that_ignores_ranges_starts_over(server: Server, tmp_path: Path, sha256: str | None) -> None:
    url = server.add("file", drop_after=[1_500_000], ranges=False)
    get(tmp_path / "file", url, sha256=sha256)
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_server_that_ignores_ranges_and_always_drops_is_given_up(server: Server, tmp_path: Path) -> None:
    url = server.add("file", drop_after=[1_500_000, 2_700_000] * 20, ranges=False)
    with pytest.raises(ValueError, match="given up after 3"):
        get(tmp_path / "file", url)


def test_a_wrong_range_is_not_appended(server: Server, tmp_path: Path) -> None:
    url = server.add("file", drop_after=[1_500_000], wrong_range=True)
    get(tmp_path / "file", url, sha256=None)
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_weak_etag_does_not_vouch_for_bytes(server: Server, tmp_path: Path) -> None:
    url = server.add("file", drop_after=[1_500_000], etag='W/"one"')
    get(tmp_path / "file", url, sha256=None)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert ["Range" in request for request in server.requests("file")] == [False, False]


def test_a_server_that_names_no_version_and_always_drops_is_given_up(server: Server, tmp_path: Path) -> None:
    url = server.add("file", drop_after=[1_500_000] * 20, etag='W/"one"')
    with pytest.raises(ValueError, match=r"nothing would show that .* \(given up after 3"):
        get(tmp_path / "file", url, sha256=None)
    assert len(server.requests("file")) == 3


def test_a_short_range_is_asked_for_again(server: Server, tmp_path: Path) -> None:
    """Some servers bring less of a file at a time than was asked for, and say so."""
    url = server.add("file", drop_after=[1_000_000], longest_range=500_000)
    get(tmp_path / "file", url)
    assert (tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize("etag", ['"two"', 'W/"two"', None])
def test_halves_of_two_files_are_never_joined(server: Server, tmp_path: Path, etag: str | None) -> None:
    (tmp_path / "file.part").write_bytes(b"old" * 100)
    (tmp_path / "file.part.version").write_text('"one"' if etag else "")
    get(tmp_path / "file", server.add("file", etag=etag), sha256=None)
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_damaged_part_is_fetched_anew(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(b"damaged")
    get(tmp_path / "file", server.add("file"))
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_wrong_bytes_are_set_aside_and_the_next_mirror_is_asked(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "file"
    get(path, server.add("bad", content=b"evil"), server.add("good"))
    assert path.read_bytes() == CONTENT
    assert leftovers(path) == ["file.wrong"]


def test_wrong_bytes_everywhere_are_never_used(server: Server, tmp_path: Path) -> None:
    evil = hashlib.sha256(b"evil").hexdigest()
    with pytest.raises(ValueError, match=rf"cannot download file:\n.*SHA-256 is {evil}, not {SHA256}.*file\.wrong"):
        get(tmp_path / "file", server.add("bad", content=b"evil"))
    assert leftovers(tmp_path / "file") == ["file.wrong"]


def test_a_wrong_file_that_is_there_is_named_and_not_replaced(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"file has SHA-256 [0-9a-f]{64}, not .*; delete it"):
        get(tmp_path / "file", server.add("file"))
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_mirrors_are_tried_in_order_and_each_failure_is_told(server: Server, tmp_path: Path) -> None:
    absent, good = server.add("absent", status=404), server.add("good")
    get(tmp_path / "file", absent, good)
    assert len(server.requests("absent")) == 1  # a 404 stays one
    busy = server.add("busy", status=503)
    with pytest.raises(
        ValueError, match=r"(?s)cannot download other:\n.*404 Not Found\n.*503 .*3 attempt.*run the same"
    ):
        get(tmp_path / "other", absent, busy)
    assert len(server.requests("busy")) == 3


def test_nobody_there(server: Server, tmp_path: Path) -> None:
    server.close()
    with pytest.raises(ValueError, match=r"no answer \(.*refused.*given up after 3"):
        get(tmp_path / "file", server.url + "file")


@pytest.mark.parametrize("stall_s", [0.01, 5.0])
def test_a_server_that_stalls_or_trickles_is_given_up(server: Server, tmp_path: Path, stall_s: float) -> None:
    with pytest.raises(ValueError, match="given up after"):
        get(tmp_path / "file", server.add("file", stall_s=stall_s))  # all of it would take half an hour, or days


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ({"content_type": "text/html"}, "web page"),
        ({"has_length": False}, "how long"),
    ],
)
def test_answers_that_are_no_file(server: Server, tmp_path: Path, behaviour: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get(tmp_path / "file", server.add("file", **behaviour), sha256=None)
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize("has_length", [True, False])
def test_endless_files_are_cut_off(server: Server, tmp_path: Path, has_length: bool) -> None:
    with pytest.raises(ValueError, match="more than"):
        get(tmp_path / "file", server.add("file", has_length=has_length), max_bytes=1_000_000)
    assert not (tmp_path / "file").exists()


def test_a_file_without_a_length_is_taken_on_its_checksum(server: Server, tmp_path: Path) -> None:
    assert get(tmp_path / "file", server.add("file", has_length=False)) == SHA256


def test_a_full_disk_is_told_before_and_while_writing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match=r"file needs 3,145,984 bytes in .*, which has 1,000; free some space"):
        get(tmp_path / "file", server.add("file"))
    message = r"cannot write .*file: No space left.*free some space, then run it again"
    with pytest.raises(ValueError, match=message), readable_disk_errors(tmp_path / "file"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_file_in_place_of_the_folder_is_told(server: Server, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(ValueError, match=r"cannot write .*out/file: .*choose a folder"):
        get(tmp_path / "out" / "file", server.add("file"))


@pytest.mark.parametrize("fault", [{"timeout_s": 0.0}, {"attempts": 0}, {"first_wait_s": -1.0}])
def test_persistence_must_mean_something(fault: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no attempt"):
        Persistence(**fault)
