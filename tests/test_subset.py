"""A choice of images belongs to the seed, and every chosen image is read once whatever the number of processes."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import pytest
import torch

from linear_gaussian import MemoryReader
from vaetrain.data.config import DataConfig
from vaetrain.data.readers import batch as batch_module
from vaetrain.data.readers import stream
from vaetrain.data.readers.order import epoch_order
from vaetrain.data.readers.reader import open_reader
from vaetrain.metrics.estimate import Estimate
from vaetrain.metrics.subset import choose_images, subset_batches


def test_a_choice_is_random_ascending_nested_and_its_own_permutation():
    some, more = choose_images(1000, 50, seed=0), choose_images(1000, 200, seed=0)
    assert (np.diff(some) > 0).all()
    assert len(some) == 50
    assert set(some) < set(more)
    assert abs(more.mean() - 500) < 70
    assert set(some) != set(choose_images(1000, 50, seed=1))
    assert set(some) != set(epoch_order(1000, 0, 0)[:50])


@pytest.mark.parametrize("num_images", [None, 10, 11])
def test_all_images_are_the_split_in_order(num_images):
    assert choose_images(10, num_images, seed=3).tolist() == list(range(10))


@pytest.mark.parametrize("num_processes", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 7, 64, 500])
@pytest.mark.parametrize("num_images", [1, 64, 65, None])
def test_every_chosen_image_is_read_once_in_whole_batches(num_images, batch_size, num_processes):
    reader = MemoryReader(torch.arange(200, dtype=torch.uint8).view(-1, 1, 1, 1))
    chosen = choose_images(200, num_images, seed=0)
    seen = []
    for rank in range(num_processes):
        batches = list(subset_batches(reader, chosen, batch_size, rank, num_processes))
        assert all(len(batch.indices) == batch_size for batch in batches[:-1])
        assert all(0 < len(batch.indices) <= batch_size for batch in batches)
        for batch in batches:
            assert batch.images.flatten().tolist() == batch.indices.tolist()
            seen += batch.indices.tolist()
    assert sorted(seen) == chosen.tolist()


@pytest.mark.parametrize("kind", ["indexed", "resident", "stream"])
def test_a_subset_is_read_and_no_other_image(kind, tiny_shards, monkeypatch):
    positions, decoded = np.array([1, 2, 30, 77]), []
    config = DataConfig(str(tiny_shards), reader=kind, num_workers=0)
    with closing(open_reader(config, "train", device=torch.device("cpu"))) as reader:
        everything = reader.first(100)
        original = batch_module.decode_image

        def counting(selection, encoded, position, out, **options):
            decoded.append(position)
            original(selection, encoded, position, out, **options)

        for module in (batch_module, stream):
            monkeypatch.setattr(module, "decode_image", counting)
        subset = reader.subset(positions)
        found = [each for rank in range(2) for each in subset.eval_batches(3, rank, 2)]
        indices = torch.cat([each.indices for each in found])
        assert sorted(indices.tolist()) == [0, 1, 2, 3]
        assert torch.equal(torch.cat([each.images for each in found]), everything.images[positions[indices]])
        assert torch.equal(torch.cat([each.labels for each in found]), everything.labels[positions[indices]])
        assert len(decoded) == (0 if kind == "resident" else 4)
        assert torch.equal(subset.subset(np.array([1, 3])).first(2).images, everything.images[[2, 77]])


def test_an_estimate_is_mean_and_standard_error_and_survives_a_large_offset(accelerator):
    scores = 1e9 + torch.arange(5, dtype=torch.float64)
    estimate = Estimate.of(scores, accelerator)
    assert estimate.mean == 1e9 + 2
    assert estimate.standard_error == pytest.approx(np.std(np.arange(5), ddof=1) / 5**0.5, rel=1e-9)
    assert estimate.num_images == 5
    with pytest.raises(ValueError, match="at least 2 images; the split has 1"):
        Estimate.of(scores[:1], accelerator)
