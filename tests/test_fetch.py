"""tools/fetch_mnist.py and tools/fetch_afhq.py, against a server on this machine and with tiny archives."""

import gzip
import hashlib
import importlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from launching import ROOT
from rude_server import HASTY, Server

SHARED_MNIST = Path(__file__).parents[2] / "shared" / "data" / "mnist"
COUNTS = {"train": {"cat": 3, "dog": 2, "wild": 1}, "val": {"cat": 1, "dog": 1, "wild": 1}}


@pytest.fixture
def fetch_mnist(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("fetch_mnist")


@pytest.fixture
def fetch_afhq(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("fetch_afhq")


def afhq_zip(file: Path, counts: dict[str, dict[str, int]] = COUNTS, **more: bytes) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        for split, classes in counts.items():
            for name, count in classes.items():
                for i in range(count):
                    archive.writestr(f"afhq/{split}/{name}/flickr_{name}_{i:06d}.jpg", f"{split} {name} {i}" * 1000)
        for name, content in more.items():
            archive.writestr(name, content)
    return file


@pytest.fixture
def fetch(fetch_afhq: ModuleType, tmp_path: Path) -> Callable[..., str]:
    def run(url: str = "http://127.0.0.1:9/", sha256: str | None = None, version: str = "v1", **options: Any) -> str:
        release = fetch_afhq.Release(url, sha256, COUNTS, 1 << 20)
        return fetch_afhq.fetch(
            fetch_afhq.FetchAfhqConfig(tmp_path / "afhq", version=version, **options), release, HASTY
        )

    return run


def here(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_mnist_comes_from_the_first_mirror_that_has_it(
    server: Server, fetch_mnist: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {name: hashlib.sha256(name.encode()).hexdigest() for name in fetch_mnist.FILES}
    for name in files:
        server.add(f"b/{name}", content=name.encode())
    server.add("a/train-images-idx3-ubyte.gz", content=b"wrong")
    line = fetch_mnist.fetch(tmp_path / "mnist", [server.url + "a/", server.url + "b/"], files, HASTY)
    assert line.endswith(f"next: python tools/make_shards.py {tmp_path / 'mnist'} datasets/mnist --size 28 --gray")
    assert {name: (tmp_path / "mnist" / name).read_text() for name in files} == {name: name for name in files}
    said = capsys.readouterr().err
    assert "a/train-images-idx3-ubyte.gz: its SHA-256 is" in said
    assert "a/t10k-labels-idx1-ubyte.gz: the server answers 404" in said


def test_the_pinned_files_are_the_four_that_make_shards_looks_for(fetch_mnist: ModuleType) -> None:
    from vaetrain.data.sources.idx import PARTS, idx_name

    assert set(fetch_mnist.FILES) == {f"{idx_name(part, dimensions)}.gz" for part in PARTS for dimensions in (1, 3)}
    assert all(len(bytes.fromhex(sha256)) == 32 for sha256 in fetch_mnist.FILES.values())
    assert all(mirror.startswith("https://") and mirror.endswith("/") for mirror in fetch_mnist.MIRRORS)


def test_the_official_counts(fetch_afhq: ModuleType) -> None:
    totals = {
        version: [sum(counts.values()) for counts in release.images.values()]
        for version, release in fetch_afhq.RELEASES.items()
    }
    assert totals == {"v1": [14_630, 1_500], "v2": [14_336, 1_467]}


def test_afhq_is_resumed_checked_unpacked_and_noted(server: Server, fetch: Callable[..., str], tmp_path: Path) -> None:
    content = afhq_zip(tmp_path / "a.zip").read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    url = server.add("afhq.zip", content=content, drop_after=[20_000, 0, 0])
    with pytest.raises(ValueError, match="given up after 3 attempt"):
        fetch(url, sha256)
    assert here(tmp_path) == ["a.zip", "afhq.partial"]  # nothing looks finished
    line = fetch(url, sha256)
    assert server.requests("afhq.zip")[-1]["Range"] == "bytes=20000-"
    assert "CC BY-NC 4.0" in line
    assert line.endswith(f"python tools/make_shards.py {tmp_path / 'afhq'} datasets/afhq128 --size 128")
    assert here(tmp_path) == ["a.zip", "afhq"]
    assert here(tmp_path / "afhq") == ["source.json", "train", "val"]
    assert len(list((tmp_path / "afhq" / "train" / "cat").iterdir())) == 3
    note = json.loads((tmp_path / "afhq" / "source.json").read_text())
    assert note["archive_sha256"] == sha256
    assert note["archive_is_official"] is True
    assert note["images"] == COUNTS
    num_requests = len(server.requests("afhq.zip"))
    assert fetch(url, sha256) == line  # the second time there is nothing to do
    assert len(server.requests("afhq.zip")) == num_requests


def test_the_zip_of_the_user_is_read_and_left_alone(
    fetch: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = afhq_zip(tmp_path / "mine.zip")
    fetch(sha256="0" * 64, archive=archive)
    assert here(tmp_path) == ["afhq", "mine.zip"]
    assert json.loads((tmp_path / "afhq" / "source.json").read_text())["archive_is_official"] is False
    assert "not the archive the authors give out" in capsys.readouterr().err


def test_what_was_unpacked_by_a_killed_run_is_unpacked_again(fetch: Callable[..., str], tmp_path: Path) -> None:
    stray = tmp_path / "afhq.partial" / "unpacked" / "train" / "cat" / "stray.jpg"
    stray.parent.mkdir(parents=True)
    stray.touch()
    fetch(archive=afhq_zip(tmp_path / "a.zip"))
    assert not list(tmp_path.rglob("stray.jpg"))


def test_other_counts_are_refused(server: Server, fetch: Callable[..., str], tmp_path: Path) -> None:
    short = afhq_zip(tmp_path / "a.zip", {"train": {"cat": 3, "dog": 1, "wild": 1}, "val": COUNTS["val"]})
    with pytest.raises(ValueError, match="wrong number of images: 1 in train/dog, not 2; is --version right"):
        fetch(archive=short)
    assert here(tmp_path) == ["a.zip"]
    with pytest.raises(ValueError, match=r"set aside as .*afhq_v1.zip.wrong"):
        fetch(server.add("afhq.zip", content=short.read_bytes()))
    assert here(tmp_path / "afhq.partial") == ["afhq_v1.zip.wrong"]
    fetch(server.add("afhq.zip", content=afhq_zip(tmp_path / "b.zip").read_bytes()))
    assert here(tmp_path) == ["a.zip", "afhq", "b.zip"]


def test_wrong_bytes_are_never_unpacked(server: Server, fetch: Callable[..., str], tmp_path: Path) -> None:
    url = server.add("afhq.zip", content=afhq_zip(tmp_path / "a.zip").read_bytes())
    with pytest.raises(ValueError, match=f"not {'0' * 64}; the file is set aside"):
        fetch(url, "0" * 64)
    assert here(tmp_path / "afhq.partial") == ["afhq_v1.zip.wrong"]


def test_a_hostile_zip_leaves_nothing(fetch: Callable[..., str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reaches out"):
        fetch(archive=afhq_zip(tmp_path / "a.zip", **{"../evil.jpg": b"x"}))
    assert here(tmp_path) == ["a.zip"]


def test_a_folder_that_holds_something_else_is_left_alone(fetch: Callable[..., str], tmp_path: Path) -> None:
    archive = afhq_zip(tmp_path / "a.zip")
    (tmp_path / "afhq").mkdir()
    (tmp_path / "afhq" / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="holds no AFHQ"):
        fetch(archive=archive)
    (tmp_path / "afhq" / "thesis.tex").unlink()
    fetch(archive=archive)  # an empty one is taken
    with pytest.raises(FileExistsError, match="holds AFHQ v1, not AFHQ v2"):
        fetch(archive=archive, version="v2")
    next((tmp_path / "afhq").rglob("*.jpg")).unlink()
    with pytest.raises(ValueError, match="no longer has all"):
        fetch(archive=archive)


def test_an_absent_archive_is_told(fetch: Callable[..., str], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="leave --archive out"):
        fetch(archive=tmp_path / "none.zip")


def test_the_command_line_tells_a_user_what_is_wrong(tmp_path: Path) -> None:
    command = [sys.executable, "tools/fetch_afhq.py", tmp_path / "afhq", "--archive", afhq_zip(tmp_path / "a.zip")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1
    assert "error: " in result.stderr
    assert "3 in train/cat, not 5,153" in result.stderr
    assert "Traceback" not in result.stderr
    assert here(tmp_path) == ["a.zip"]


@pytest.mark.shared_data
def test_mnist_here_is_the_mnist_of_the_pinned_files() -> None:
    """These were compressed anew; the SHA-256 of what is inside is as published with the pinned ones."""
    if not SHARED_MNIST.is_dir():
        pytest.skip(f"{SHARED_MNIST} is absent")
    content = gzip.decompress((SHARED_MNIST / "t10k-labels-idx1-ubyte.gz").read_bytes())
    assert hashlib.sha256(content).hexdigest() == "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"
