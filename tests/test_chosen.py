"""Chosen images are read alone and described so that they can be found in their shards."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from vaetrain.data.config import DataConfig
from vaetrain.data.readers.indexed import IndexedReader
from vaetrain.data.readers.reader import open_reader
from vaetrain.data.readers.stream import StreamReader
from vaetrain.data.readers.subset import Subset

CPU = torch.device("cpu")
POSITIONS = np.array([1, 2, 30, 31, 77, 98])


@pytest.fixture
def remote(tiny_shards, server):
    """tiny_shards behind a URL."""
    for file in tiny_shards.iterdir():
        server.add(f"shards/{file.name}", content=file.read_bytes())
    return DataConfig(f"{server.url}shards/")


@pytest.fixture(params=["local", "url", "url with a cache"])
def data(request, tiny_shards, tmp_path):
    if request.param == "local":
        return DataConfig(str(tiny_shards))
    remote = request.getfixturevalue("remote")
    return replace(remote, cache_dir=tmp_path / "cache") if request.param.endswith("cache") else remote


def test_chosen_images_are_read_and_no_others(data, tiny_shards):
    chosen = Subset.all_of(data, "train").at(POSITIONS)
    everything = open_reader(DataConfig(str(tiny_shards)), "train", device=CPU).first(100)
    reader = chosen.open_reader(CPU, 1)
    assert isinstance(reader, IndexedReader if data.train == str(tiny_shards) else StreamReader)
    found: dict[int, torch.Tensor] = {}
    for rank in range(2):
        for batch in reader.eval_batches(2, rank, 2):
            found |= dict(zip(batch.indices.tolist(), batch.images, strict=True))
    reader.close()
    assert sorted(found) == list(range(6))
    for number, position in enumerate(POSITIONS):
        assert torch.equal(found[number], everything.images[position])
    assert len(chosen.describe()) == 6


def test_a_description_finds_the_image_and_its_original(tiny_shards):
    chosen = Subset.all_of(DataConfig(str(tiny_shards), classes=("dog",)), "train").at(np.array([0, 5, 20]))
    reader = chosen.open_reader(CPU, 1)
    images = reader.first(3).images
    for image, pixels in zip(chosen.describe(), images, strict=True):
        assert image["class"] == "dog"
        with (tiny_shards / image["shard"]).open("rb") as file:
            file.seek(image["offset"])
            encoded = file.read(image["num_bytes"])
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(encoded))), pixels.permute(1, 2, 0))
        with tarfile.open(tiny_shards / image["shard"]) as tar:
            [member] = [member for member in tar if member.offset_data == image["offset"]]
            record = json.load(tar.extractfile(member.name.replace(".jpg", ".json")))
        assert image["source"] == record["source"]
        assert "dog" in image["source"]


def test_behind_a_url_the_original_is_not_looked_up(remote):
    chosen = Subset.all_of(remote, "train").at(POSITIONS)
    [first, *_] = chosen.describe()
    assert first.keys() == {"shard", "offset", "num_bytes", "class"}
