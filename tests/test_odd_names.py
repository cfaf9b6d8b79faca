"""File names that are long, strange, or no Unicode, from the disk and archives into the shards."""

import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from launching import ROOT
from test_sources import write_image
from vaetrain.data.sharding.config import ShardingConfig
from vaetrain.data.sharding.make_shards import make_shards
from vaetrain.data.sources.open_source import open_source

LATIN = b"caf\xe9 \xff.png"  # no UTF-8
ODD_NAMES = [
    os.fsdecode(LATIN),
    "e\u0301\u0327 \U0001f408\u200d\u2b1b \u202e gnp.png",
    "line\nbreak\ttab \x1b[31m.png",
    "' \" \\ $(rm) ;&.png",
    "x" * 251 + ".png",
    " .png",
    "-rf.png",
]


@pytest.mark.parametrize("kind", ["folder", "gnu", "pax", "gz"])
def test_names_that_are_odd_or_no_unicode_survive(tmp_path: Path, kind: str) -> None:
    for number, name in enumerate(ODD_NAMES):
        write_image(tmp_path / "pets" / ("deep" * 50) / name, (number, 0, 0))
    src = tmp_path / "pets"
    if kind != "folder":
        src = tmp_path / f"pets.tar.{kind}" if kind == "gz" else tmp_path / f"{kind}.tar"
        tar_format = tarfile.PAX_FORMAT if kind == "pax" else tarfile.GNU_FORMAT
        with tarfile.open(src, "w:gz" if kind == "gz" else "w", format=tar_format) as tar:
            tar.add(tmp_path / "pets", "pets")
    out = tmp_path / "out"
    make_shards(ShardingConfig(str(src), out, size=8, workers=1, format="png"))
    found = reds_by_source(out)
    assert found == {f"{'deep' * 50}/{name}": number for number, name in enumerate(ODD_NAMES)}
    assert LATIN in {os.path.basename(os.fsencode(name)) for name in found}  # the very bytes on the disk
    make_shards(ShardingConfig(str(out), tmp_path / "again", size=4, workers=1, format="png"))
    assert reds_by_source(tmp_path / "again").keys() == found.keys()


def reds_by_source(out: Path) -> dict[str, int]:
    """From a shard set of one split: the red of each image by the source that its record names."""
    found = {}
    (shard,) = out.glob("*.tar")
    with tarfile.open(shard) as tar:
        contents = [tar.extractfile(info).read() for info in tar]
    for image, record in zip(contents[::2], contents[1::2], strict=True):
        found[json.loads(record.decode("utf-8"))["source"]] = Image.open(io.BytesIO(image)).getpixel((0, 0))[0]
    return found


def test_names_that_are_no_unicode_are_reported(tmp_path: Path) -> None:
    """By the command itself, whose stdout and stderr are not pytest's."""
    name = os.fsdecode(LATIN)
    folder, out = tmp_path / "pets", tmp_path / f"out {name}"
    for copy in ("a", "b"):
        write_image(folder / "cat" / f"{copy}{name}")
    (folder / "cat" / name).write_text("no picture")
    (folder / "cat" / f"{name}.txt").write_text("ignored")
    Image.effect_noise((12, 10), 90).save(folder / "cat" / f"c{name}")
    command = [sys.executable, "tools/make_shards.py", folder, out, "--size", "8", "--workers", "1", "--val-count", "2"]
    failed = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=300)
    assert failed.returncode == 1
    assert rb"1 image(s) cannot be read, first cat/caf\udce9 \udcff.png: it is none of JPEG" in failed.stderr
    assert rb"such as cat/caf\udce9 \udcff.png.txt" in failed.stderr
    done = subprocess.run(
        [*command, "--max-rejected", "1", "--group-duplicates"], cwd=ROOT, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    said = f"1 rejected, 1 ignored (1 that are no images), 1 groups of duplicates, written to {out}\n"
    assert done.stdout.endswith(said.encode(errors="backslashreplace"))
    rejected, ignored = (out / "rejected.jsonl").read_text("utf-8").splitlines()
    assert json.loads(rejected)["source"] == f"cat/{name}"
    assert json.loads(ignored)["source"] == f"cat/{name}.txt"
    (group,) = (out / "duplicates.jsonl").read_text("utf-8").splitlines()
    assert sorted(image["source"] for image in json.loads(group)["images"]) == [f"cat/a{name}", f"cat/b{name}"]


def test_names_in_zips(tmp_path: Path) -> None:
    for name, old, new in (("ASCII", b"caf?", b"caf\xe9"), ("café", b"\xc3\xa9", b"\xff\xfe")):
        write_image(tmp_path / "0.png")
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            archive.write(tmp_path / "0.png", "cat/caf?.png" if name == "ASCII" else f"cat/{name}.png")
            archive.write(tmp_path / "0.png", f"cat/{'x' * 5000}.png")
        content = (tmp_path / f"{name}.zip").read_bytes()
        assert content.count(old) == 2
        (tmp_path / f"{name}.zip").write_bytes(content.replace(old, new))
    source = open_source(str(tmp_path / "ASCII.zip"))
    items = source.listing().items
    assert [item.source for item in items] == ["cat/caf\u0398.png", f"cat/{'x' * 5000}.png"]  # zip's code page 437
    for item in items:
        assert source.open(item)[0].size == (12, 10)
    with pytest.raises(ValueError, match=r"café\.zip is damaged or no archive: 'utf-8' codec"):
        open_source(str(tmp_path / "café.zip")).listing()


def test_classes_that_are_no_unicode_are_refused(tmp_path: Path) -> None:
    for name in ("dog", os.fsdecode(b"caf\xe9")):
        write_image(tmp_path / name / "0.png")
    with pytest.raises(ValueError, match=r"has a class whose name is no UTF-8, 'caf\\udce9'; rename its folder"):
        open_source(str(tmp_path)).listing()
