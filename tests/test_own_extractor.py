"""The network whose features stand in for Inception's: it learns what it says, the same way each time, and evaluate.py takes it."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from launching import run, run_here
from vaetrain.data.config import DataConfig
from vaetrain.data.readers.reader import open_reader
from vaetrain.data.sharding.config import ShardingConfig
from vaetrain.data.sharding.make_shards import make_shards
from vaetrain.metrics.config import FidConfig
from vaetrain.metrics.extractor import FeatureExtractor
from vaetrain.metrics.own_extractor import train_own_extractor

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shards_of(tmp_path_factory):
    """Shard sets of 16×16 images that are dark below and, in class "red", red above."""

    def make(*classes):
        folder = tmp_path_factory.mktemp("stripes")
        rng = np.random.default_rng(0)
        for number in range(240):
            kind = classes[number % len(classes)]
            pixels = rng.integers(0, 60, (16, 16, 3), dtype=np.uint8)
            pixels[:8, :, 0 if kind == "red" else 1] += 150
            file = folder / "originals" / kind / f"{number:03d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file)
        options = {"size": 16, "val_count": 40, "workers": 1}
        make_shards(ShardingConfig(str(folder / "originals"), folder / "shards", **options))
        return folder / "shards"

    return make


def train(shards, out, **options):
    def open_split(split):
        return open_reader(DataConfig(train=str(shards), horizontal_flip=False), split, device=CPU)

    options = {"num_images": 1200, "batch_size": 40, "seed": 0, **options}
    return train_own_extractor(open_split, out, device=CPU, **options)


def test_it_tells_classes_apart_and_one_class_by_which_way_is_up(shards_of, tmp_path):
    two = train(shards_of("red", "green"), tmp_path / "two.pt")
    assert (two.task, two.num_outputs) == ("classes", 2)
    assert two.accuracy > 0.95
    one = train(shards_of("red"), tmp_path / "one.pt")
    assert (one.task, one.num_outputs) == ("rotations", 4)
    assert one.accuracy > 0.95
    untrained = train(shards_of("red"), tmp_path / "untrained.pt", num_images=40)
    assert untrained.accuracy < 0.8


def test_the_same_seed_gives_the_same_network_and_another_seed_another(shards_of, tmp_path):
    shards = shards_of("red", "green")
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)

    def features(name, seed):
        train(shards, tmp_path / name, num_images=200, seed=seed)
        return FeatureExtractor(FidConfig(extractor=str(tmp_path / name)), CPU)(images).features

    first = features("a.pt", 0)
    assert first.shape == (5, 128)
    assert torch.equal(first, features("b.pt", 0))
    assert not torch.allclose(first, features("c.pt", 1))
    other = torch.randint(0, 256, (2, 1, 24, 24), dtype=torch.uint8)  # gray and of another size
    assert FeatureExtractor(FidConfig(extractor=str(tmp_path / "a.pt")), CPU)(other).features.shape == (2, 128)


def test_the_command_says_how_well_it_does(shards_of, tmp_path, capsys):
    result = run(
        "tools/train_extractor.py",
        shards_of("red", "green"),
        tmp_path / "x.pt",
        "--num-images",
        1200,
        "--batch-size",
        40,
        python=sys.executable,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "x.pt.json").read_text())
    assert f"{report['accuracy']:.2%} of the val split right (classes, 2)" in result.stdout
    assert run_here("tools/train_extractor.py", tmp_path / "nothing", tmp_path / "y.pt") == 1
    assert "nothing" in capsys.readouterr().err
    assert not (tmp_path / "y.pt").exists()
