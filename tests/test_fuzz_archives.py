"""Archives with any bytes wrong list and open their images, or say what is the matter; in bounded memory."""

from __future__ import annotations

import io
import shutil
import tarfile
import tracemalloc
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from test_fuzz import edits, mutated, quickly
from vaetrain.data.sharding.make_shards import make_shards
from vaetrain.data.sharding.plan import ShardingConfig
from vaetrain.data.sources.open_source import open_source
from vaetrain.data.sources.preprocess import UNREADABLE

BOUND_BYTES = 64 << 20
"""That a few kilobytes of archive may take, whatever they claim; tarfile's own reading of long names included."""


def picture(shade: int) -> bytes:
    encoded = io.BytesIO()
    Image.new("RGB", (12, 10), (shade, 100, 50)).save(encoded, "PNG")
    return encoded.getvalue()


def archive(suffix: str) -> bytes:
    """Two classes, one file with a name that needs an extended header."""
    names = ["cat/0.png", f"cat/{'long' * 40}.png", "dog/1.png"]
    packed = io.BytesIO()
    if suffix == ".zip":
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
            for shade, name in enumerate(names):
                file.writestr(name, picture(shade))
        return packed.getvalue()
    with tarfile.open(fileobj=packed, mode="w:gz" if suffix == ".tar.gz" else "w", format=tarfile.PAX_FORMAT) as file:
        for shade, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = len(picture(shade))
            file.addfile(info, io.BytesIO(picture(shade)))
    return packed.getvalue()


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz"])
@quickly
@given(changes=edits)
def test_damaged_archives(suffix: str, changes: list[tuple[float, str, bytes]], tmp_path_factory) -> None:
    file = tmp_path_factory.mktemp("archive") / f"pets{suffix}"
    file.write_bytes(mutated(archive(suffix), changes))
    tracemalloc.start()
    try:
        with suppress(ValueError, FileNotFoundError):  # said to the user; anything else is a crash
            source = open_source(str(file))
            items = source.listing().items
            pictures = source.staged(file.with_name("staged"), items)
            for item in items:
                with suppress(*UNREADABLE):  # the original is rejected
                    pictures.open(item)
        assert tracemalloc.get_traced_memory()[1] < BOUND_BYTES
    finally:
        tracemalloc.stop()
        shutil.rmtree(file.parent)


@pytest.fixture(scope="module")
def whole_set(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "set"
    make_shards(ShardingConfig("faces", folder, size=16, num_images=8, images_per_shard=4, workers=1))
    return folder


@quickly
@given(changes=edits, shard=st.sampled_from(["train-000000.tar", "train-000001.tar"]))
def test_damaged_shards_as_a_source(changes, shard, whole_set, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("set")
    shutil.copytree(whole_set, folder / "set")
    (folder / "set" / shard).write_bytes(mutated((folder / "set" / shard).read_bytes(), changes))
    with suppress(ValueError, FileNotFoundError):
        again = ShardingConfig(str(folder / "set"), folder / "again", size=8, workers=1, max_rejected=8)
        make_shards(again)
    shutil.rmtree(folder)


def test_the_archives_are_whole_before_they_are_damaged(tmp_path: Path) -> None:
    for suffix in (".zip", ".tar", ".tar.gz"):
        file = tmp_path / f"pets{suffix}"
        file.write_bytes(archive(suffix))
        source = open_source(str(file))
        items = source.listing().items
        assert len([source.staged(tmp_path / "staged", items).open(item) for item in items]) == 3
