"""Features of real images: found again under everything that decides them, and nothing else is taken for them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from torchscript_extractor import write_torchscript_extractor
from vaetrain.data.config import DataConfig
from vaetrain.data.readers.reader import open_reader
from vaetrain.metrics.config import FidConfig
from vaetrain.metrics.extractor import FeatureExtractor
from vaetrain.metrics.reference import RealFeatures, cache_folder

CPU = torch.device("cpu")
POSITIONS = np.array([0, 3, 4, 50, 99])


@pytest.fixture
def fid(tmp_path) -> FidConfig:
    return FidConfig(extractor=str(write_torchscript_extractor(tmp_path / "mine.pt")), cache_dir=tmp_path / "cache")


@pytest.fixture
def features(tiny_shards, accelerator, fid):
    """Features of chosen training images, under changed data or options."""

    def of(positions=POSITIONS, data=None, split="train", **options):
        config = replace(fid, **options)
        real = RealFeatures(data or DataConfig(str(tiny_shards)), split, config)
        return real.features(np.asarray(positions), FeatureExtractor(config, CPU), accelerator)

    return of


def test_features_are_those_of_the_chosen_images_in_order(features, fid, tiny_shards):
    found = features()
    everything = open_reader(DataConfig(str(tiny_shards)), "train", device=CPU).first(100)
    expected = FeatureExtractor(fid, CPU)(everything.images[torch.from_numpy(POSITIONS)]).features
    torch.testing.assert_close(found.features, expected)
    torch.testing.assert_close(found.statistics.sum, expected.double().sum(0))
    assert found.statistics.count == 5


def test_the_cache_gives_back_what_was_extracted(features, fid, capsys, monkeypatch):
    first = features()
    [path] = fid.cache_dir.iterdir()
    with safe_open(path, "pt") as file:
        key = json.loads(file.metadata()["key"])
    assert (key["split"], key["count"], key["seed"], key["extractor"]) == ("train", 5, 0, fid.extractor)
    assert key.keys() >= {"fingerprint", "classes", "positions", "weights_sha256", "preprocessing", "layer"}
    monkeypatch.setattr(FeatureExtractor, "__call__", None)
    second = features()
    assert f"5 read from {path}" in capsys.readouterr().out
    assert torch.equal(first.features, second.features)
    assert torch.equal(first.statistics.sum, second.statistics.sum)
    assert torch.equal(first.statistics.outer, second.statistics.outer)


def test_other_images_classes_seeds_and_weights_are_other_features(features, fid, tiny_shards, tmp_path):
    features()
    num_files = 1
    other_weights = write_torchscript_extractor(tmp_path / "other.pt", num_features=4)
    for change in (
        {"positions": [0, 2, 4, 50, 99]},
        {"positions": [0, 1], "split": "val"},
        {"seed": 1},
        {"data": DataConfig(str(tiny_shards), classes=("cat",)), "positions": [0, 3, 4, 50]},
        {"extractor": str(other_weights)},
    ):
        features(**change)
        num_files += 1
        assert len(list(fid.cache_dir.iterdir())) == num_files, change


def test_a_damaged_or_exchanged_file_is_extracted_again_saying_why(features, fid, capsys):
    right = features()
    [path] = fid.cache_dir.iterdir()
    features([7, 8, 9, 10, 11])
    [other] = set(fid.cache_dir.iterdir()) - {path}
    for content, reason in (
        (path.read_bytes()[:-100], "is damaged"),
        (b"", "is damaged"),
        (other.read_bytes(), "holds those of other images or weights"),
    ):
        path.write_bytes(content)
        capsys.readouterr()
        assert torch.equal(features().features, right.features)
        assert f"{path} {reason}" in capsys.readouterr().out
        assert torch.equal(features().features, right.features)
        assert f"5 read from {path}" in capsys.readouterr().out
    assert len(list(fid.cache_dir.iterdir())) == 2


def test_a_folder_that_cannot_be_written_costs_a_note_and_not_the_scores(features, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert len(features(cache_dir=tmp_path / "file" / "cache").features) == 5
    assert "are not kept for the next evaluation" in capsys.readouterr().err


def test_the_cache_lies_where_the_desktop_rules_say(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(FidConfig()) == tmp_path / "vaetrain" / "reference"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder(FidConfig()) == Path.home() / ".cache" / "vaetrain" / "reference"
    assert cache_folder(FidConfig(cache_dir=tmp_path / "mine")) == tmp_path / "mine"
