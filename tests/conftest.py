"""Shard sets small enough to be made anew for every test session."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vaetrain.data.shard_plan import ShardingConfig
from vaetrain.data.sharding import make_shards


def _write_originals(folder: Path, num_images: int, channels: int) -> None:
    """Noise, so that no two images are alike, in two classes of which the first has twice the images of the second."""
    rng = np.random.default_rng(0)
    for number in range(num_images):
        pixels = rng.integers(0, 256, (16, 16, 3) if channels == 3 else (16, 16), dtype=np.uint8)
        file = folder / ("cat" if number % 3 else "dog") / f"{number:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16×16 colour JPEGs in the classes cat and dog: 100 for training in 9 shards, 23 for validation in 2. Do not write."""
    folder = tmp_path_factory.mktemp("tiny")
    _write_originals(folder / "originals", 123, channels=3)
    config = ShardingConfig(
        str(folder / "originals"), folder / "shards", size=16, val_count=23, images_per_shard=12, workers=1
    )
    make_shards(config)
    return config.out


@pytest.fixture(scope="session")
def tiny_gray_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 grayscale PNGs of 16×16 in 4 shards, for training only. Do not write."""
    folder = tmp_path_factory.mktemp("tiny_gray")
    _write_originals(folder / "originals", 40, channels=1)
    config = ShardingConfig(
        str(folder / "originals"), folder / "shards", size=16, gray=True, format="png", images_per_shard=12, workers=1
    )
    make_shards(config)
    return config.out
