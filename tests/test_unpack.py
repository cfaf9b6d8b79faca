import io
import random
import stat
import zipfile
from pathlib import Path

import pytest

from vaetrain.data.remote import unzip as unpack
from vaetrain.data.remote.unzip import UnusableArchiveError, unpack_images

SPLITS, CLASSES = ("train", "val"), ("cat", "dog")
LIMIT = 1 << 20


def make_zip(file: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file


def unpacked(archive: Path, folder: Path, max_bytes: int = LIMIT) -> dict[str, dict[str, int]]:
    return unpack_images(archive, folder, SPLITS, CLASSES, max_bytes=max_bytes)


@pytest.mark.parametrize("wrapper", ["", "afhq/"])
def test_images_are_unpacked_and_counted_and_the_rest_is_left_out(tmp_path: Path, wrapper: str) -> None:
    members = {
        f"{wrapper}train/cat/1.jpg": b"one",
        f"{wrapper}train/cat/2.PNG": b"two",
        f"{wrapper}val/dog/1.jpg": b"three",
        f"{wrapper}train/cat/.DS_Store": b"x",
        f"{wrapper}train/cat/run.sh": b"x",
        f"{wrapper}train/cow/1.jpg": b"x",
        f"{wrapper}deep/er/train/cat/9.jpg": b"x",
        f"__MACOSX/{wrapper}train/cat/._1.jpg": b"x",
        f"{wrapper}train/dog/": b"",
    }
    counts = unpacked(make_zip(tmp_path / "a.zip", members), tmp_path / "out")
    assert counts == {"train": {"cat": 2, "dog": 0}, "val": {"cat": 0, "dog": 1}}
    files = {str(p.relative_to(tmp_path / "out")): p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert files == {"train/cat/1.jpg": b"one", "train/cat/2.PNG": b"two", "val/dog/1.jpg": b"three"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/train/cat/1.jpg", "is an absolute path"),
        ("C:/train/cat/1.jpg", "is an absolute path"),
        ("afhq/../../train/cat/1.jpg", "reaches out"),
        ("..\\..\\train\\cat\\1.jpg", "reaches out"),
        ("train/cat/..", "reaches out"),
    ],
)
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: str, message: str) -> None:
    archive = make_zip(tmp_path / "a.zip", {"train/cat/0.jpg": b"fine", name: b"evil"})
    with pytest.raises(UnusableArchiveError, match=message):
        unpacked(archive, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zip"]


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_links_and_devices_are_refused(tmp_path: Path, kind: int) -> None:
    info = zipfile.ZipInfo("train/cat/1.jpg")
    info.external_attr = (kind | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(UnusableArchiveError, match="is a link or a device"):
        unpacked(tmp_path / "a.zip", tmp_path / "out")


def test_bombs_are_refused_by_what_they_declare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = make_zip(tmp_path / "a.zip", {f"train/cat/{i}.jpg": bytes(400_000) for i in range(3)})
    assert archive.stat().st_size < 5000
    with pytest.raises(UnusableArchiveError, match=r"would unpack to 1,200,000 bytes, more than the 1,048,576"):
        unpacked(archive, tmp_path / "out")
    monkeypatch.setattr(unpack, "MAX_UNZIPPED_BYTES", 100_000)
    with pytest.raises(UnusableArchiveError, match=r"'train/cat/0.jpg' is declared as 400,000 bytes"):
        unpacked(archive, tmp_path / "out")
    monkeypatch.setattr(unpack, "MAX_MEMBERS", 2)
    with pytest.raises(UnusableArchiveError, match="has 3 members"):
        unpacked(archive, tmp_path / "out")


def test_a_bomb_that_lies_about_its_size_stays_small(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", {"train/cat/1.jpg": bytes(5_000_000)})
    declared = (5_000_000).to_bytes(4, "little")
    content = archive.read_bytes()
    assert content.count(declared) == 2
    archive.write_bytes(content.replace(declared, (1000).to_bytes(4, "little")))
    with pytest.raises(UnusableArchiveError, match="Bad CRC"):
        unpacked(archive, tmp_path / "out")
    assert (tmp_path / "out/train/cat/1.jpg").stat().st_size <= 1000


def test_encrypted_and_repeated_members_are_refused(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", {"train/cat/1.jpg": b"one"})
    content = bytearray(archive.read_bytes())
    content[content.index(b"PK\1\2") + 8] |= 1
    archive.write_bytes(content)
    with pytest.raises(UnusableArchiveError, match="is encrypted"):
        unpacked(archive, tmp_path / "out")
    twice = make_zip(tmp_path / "b.zip", {"afhq/train/cat/1.jpg": b"one", "other/train/cat/1.jpg": b"two"})
    with pytest.raises(UnusableArchiveError, match="is there twice"):
        unpacked(twice, tmp_path / "out")


def test_damage_is_always_a_readable_error(tmp_path: Path) -> None:
    """Any byte of the archive may be wrong: it unpacks, or raises ValueError, and writes nowhere else."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(2):
            archive.writestr(f"train/cat/{i}.jpg", bytes(range(60)))
    intact, rng, num_refused = buffer.getvalue(), random.Random(0), 0
    for number in range(400):
        content = bytearray(intact)
        for _ in range(rng.choice((1, 1, 3))):
            content[rng.randrange(len(content))] = rng.randrange(256)
        (tmp_path / "a.zip").write_bytes(content[: rng.choice((len(content), rng.randrange(len(content))))])
        try:
            unpacked(tmp_path / "a.zip", tmp_path / "outs" / str(number))
        except ValueError:
            num_refused += 1
    assert num_refused > 200
    assert {p.name for p in tmp_path.iterdir()} == {"a.zip", "outs"}
