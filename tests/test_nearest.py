import math

import numpy as np
import pytest
import torch
from PIL import Image

from vaetrain.data.config import DataConfig
from vaetrain.data.format.decode import decode_into
from vaetrain.data.readers.reader import open_reader
from vaetrain.data.readers.subset import Subset
from vaetrain.evaluation import memorization as nearest
from vaetrain.evaluation.memorization import (
    describe_neighbours,
    draw_images,
    encoder_features,
    memorisation,
    nearest_images,
    pixels,
    probability_of_less,
)
from vaetrain.model.autoencoder import VAE
from vaetrain.model.config import ModelConfig


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    config = ModelConfig(image_size=16, base_channels=8, channel_mult=(1, 2), num_res_blocks=1, latent_channels=4)
    return VAE(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def readers(tiny_shards):
    return [open_reader(DataConfig(str(tiny_shards)), split, device=torch.device("cpu")) for split in ("train", "val")]


@pytest.mark.parametrize("max_distances", [2**24, 40])
def test_nearest_is_that_of_brute_force(vae, readers, accelerator, monkeypatch, max_distances):
    """In one block, and with queries cut into blocks of two."""
    monkeypatch.setattr(nearest, "MAX_DISTANCES", max_distances)
    train, val = (reader.first(1000).images.contiguous() for reader in readers)
    spaces = {"pixel": pixels, "feature": encoder_features(vae)}
    found = nearest_images(val, readers[0], accelerator, spaces, num_shown=7, batch_size=16)
    for space, features in spaces.items():
        distances = torch.cdist(features(val).double(), features(train).double())
        expected, index = distances.min(1)
        assert torch.equal(found[space].index, index)
        assert found[space].distance == pytest.approx(expected.numpy(), rel=1e-4)
        assert torch.equal(found[space].image, train[index[:7]])


def test_copies_are_found_and_the_first_of_equals_is_taken(readers, accelerator):
    train = readers[0].first(1000).images.contiguous()
    found = nearest_images(train[[5, 99, 0]], readers[0], accelerator, {"pixel": pixels}, num_shown=3)["pixel"]
    assert found.index.tolist() == [5, 99, 0]
    assert found.distance.tolist() == [0, 0, 0]
    constant = nearest_images(
        train[:4], readers[0], accelerator, {"nothing": lambda images: torch.zeros(len(images), 1)}, batch_size=16
    )
    assert constant["nothing"].index.tolist() == [0, 0, 0, 0]


def test_scores_tell_copies_from_new_images(vae, readers, accelerator, tmp_path):
    train, val = (reader.first(1000).images.contiguous() for reader in readers)
    copies = memorisation(vae, train[40:60], *readers, accelerator, num_shown=6)
    copies.save_picture(tmp_path / "copies.png")
    copies = copies.scores
    new = memorisation(vae, val, *readers, accelerator)
    new.save_picture(tmp_path / "new.png")
    new = new.scores
    for space in ("pixel", "feature"):
        assert copies[f"eval/nearest_{space}_distance_ratio"] == pytest.approx(0, abs=1e-3)
        assert copies[f"eval/nearest_{space}_closer_than_val"] == 1
        assert new[f"eval/nearest_{space}_distance_ratio"] == 1
        assert new[f"eval/nearest_{space}_closer_than_val"] == 0.5
        assert 0 < new[f"eval/nearest_{space}_distance_ratio_to_recon"] < math.inf
    # 16 pixels are enlarged fivefold; four triples a row, of the six samples only the first four fill one.
    with Image.open(tmp_path / "copies.png") as picture:
        assert 12 * 80 < picture.width < 12 * 80 + 120
        assert 80 < picture.height < 80 + 120
    with Image.open(tmp_path / "new.png") as picture:
        assert 4 * 80 < picture.height < 4 * 80 + 180


def test_features_that_are_known_are_not_computed_again(vae, readers, accelerator, tmp_path):
    train = readers[0].first(1000).images.contiguous()
    seen = []

    def features(images):
        seen.append(len(images))
        return pixels(images)

    found = memorisation(vae, train[40:60], *readers, accelerator, features=features, known=pixels(train))
    assert sum(seen) == 3 * 20  # samples, validation images, reconstructions
    assert found.neighbours["feature"].index.tolist() == found.neighbours["pixel"].index.tolist() == [*range(40, 60)]


def test_a_neighbour_is_described_so_that_anyone_finds_it(tiny_shards, vae, readers, accelerator, tmp_path):
    train = readers[0].first(1000).images.contiguous()
    found = memorisation(vae, train[[99, 3, 99]], *readers, accelerator).neighbours
    lines = describe_neighbours(found, Subset.all_of(DataConfig(str(tiny_shards)), "train"))
    assert [line["sample"] for line in lines] == [0, 1, 2]
    assert [line["pixel"]["index"] for line in lines] == [99, 3, 99]
    assert lines[0]["pixel"] == lines[2]["pixel"]
    for line, position in zip(lines, (99, 3, 99), strict=True):
        place = line["feature"]
        content = (tiny_shards / place["shard"]).read_bytes()[place["offset"] :][: place["num_bytes"]]
        pixels_found = np.empty((16, 16, 3), np.uint8)
        decode_into(content, pixels_found)
        assert torch.equal(torch.from_numpy(pixels_found).permute(2, 0, 1), train[position])
        assert line["pixel"]["distance"] == 0


def test_probability_of_less_counts_ties_half():
    a, b = torch.tensor([1.0, 2.0]).double(), torch.tensor([2.0, 3.0, 0.0]).double()
    assert probability_of_less(a, b) == pytest.approx((1 + 1 + 0 + 0.5 + 1 + 0) / 6)


def test_drawn_images_depend_on_the_seed_alone(readers, accelerator):
    images, labels = draw_images(readers[0], 30, accelerator)
    everything = readers[0].first(1000)
    which = (everything.images.flatten(1).int()[None] == images.flatten(1).int()[:, None]).all(2).int().argmax(1)
    assert (which.diff() > 0).all()
    assert torch.equal(everything.labels[which], labels)
    assert torch.equal(draw_images(readers[0], 30, accelerator)[0], images)
    assert not torch.equal(draw_images(readers[0], 30, accelerator, seed=1)[0], images)
    assert len(draw_images(readers[1], 1000, accelerator)[0]) == 23
