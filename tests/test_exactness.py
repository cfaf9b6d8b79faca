"""What readers deliver from real shards, over shard sizes, ranks, workers, batch sizes, epochs and resume points."""

import itertools
from contextlib import closing
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vaetrain.data.config import DataConfig
from vaetrain.data.readers import stream
from vaetrain.data.readers.order import BatchLayout, epoch_order
from vaetrain.data.readers.reader import open_reader
from vaetrain.data.sharding.make_shards import make_shards
from vaetrain.data.sharding.plan import ShardingConfig

NUM_TRAIN, NUM_VAL = 29, 13
SHARD_SIZES = (1, 4, 7, 50)
KINDS = ("indexed", "resident", "stream")
sizes = {
    "shard_size": st.sampled_from(SHARD_SIZES),
    "micro": st.integers(1, 5),
    "accum": st.integers(1, 2),
    "num_processes": st.integers(1, 3),
    "num_workers": st.integers(1, 3),
    "seed": st.integers(0, 99),
}


@pytest.fixture(scope="module")
def shard_sets(tmp_path_factory):
    """Shard sets of the same images, no two of them alike, in shards of different sizes."""
    folder = tmp_path_factory.mktemp("exactness")
    (folder / "originals").mkdir()
    rng = np.random.default_rng(0)
    for number in range(NUM_TRAIN + NUM_VAL):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(
            folder / "originals" / f"{number:02d}.png"
        )
    for size in SHARD_SIZES:
        out = folder / str(size)
        make_shards(
            ShardingConfig(
                str(folder / "originals"),
                out,
                size=8,
                images_per_shard=size,
                val_count=NUM_VAL,
                workers=1,
                format="png",
            )
        )
    return folder


def opened(shard_sets, shard_size, kind, split="train"):
    config = DataConfig(train=str(shard_sets / str(shard_size)), reader=kind, num_workers=0)
    return closing(open_reader(config, split, device=torch.device("cpu")))


def by_workers(batches_of, num_workers):
    """The batches of an iterable data set as DataLoader collects them from its workers in turn, without starting any."""

    def of_worker(number):
        batches = None
        while True:
            with patch.object(stream, "_worker", lambda: (number, num_workers)):
                batches = batches or iter(batches_of())
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    workers = [of_worker(number) for number in range(num_workers)]
    while workers:
        for worker in list(workers):
            if (batch := next(worker, None)) is None:
                workers.remove(worker)
            else:
                yield batch


def train_batches(reader, kind, seed, images_seen, layout, num_workers):
    if kind != "stream":
        return reader.train_batches(seed, images_seen, layout)
    return by_workers(lambda: stream._TrainBatches(reader._stream, seed, images_seen, layout), num_workers)


def eval_batches(reader, kind, batch_size, rank, num_processes, num_workers):
    if kind != "stream":
        return reader.eval_batches(batch_size, rank, num_processes)
    return by_workers(lambda: stream._EvalBatches(reader._stream, batch_size, rank, num_processes), num_workers)


def pictures(batches):
    """The images themselves, whatever the reader says they are, for each batch."""
    return [[image.numpy().tobytes() for image in batch.images] for batch in batches]


def all_of(batches):
    return list(itertools.chain.from_iterable(batches))


@settings(deadline=None, max_examples=25)
@given(**sizes, resumed_at=st.integers(0, 8))
@pytest.mark.parametrize("kind", KINDS)
def test_training(shard_sets, kind, shard_size, micro, accum, num_processes, num_workers, seed, resumed_at):
    size = micro * accum * num_processes
    layouts = [BatchLayout(size, micro, rank, num_processes) for rank in range(num_processes)]
    num_steps = NUM_TRAIN // size
    per_rank = num_steps * accum
    with opened(shard_sets, shard_size, kind) as reader:
        if num_steps == 0:
            with pytest.raises(ValueError, match=f"at most {NUM_TRAIN}"):
                reader.train_batches(seed, 0, layouts[0])
            return
        split = [image.numpy().tobytes() for image in reader.first(NUM_TRAIN).images]
        assert len(set(split)) == NUM_TRAIN
        ranks = [
            pictures(itertools.islice(train_batches(reader, kind, seed, 0, layout, num_workers), 3 * per_rank))
            for layout in layouts
        ]
        # As many steps, and as many images in each of them, on every rank.
        assert {tuple(map(len, batches)) for batches in ranks} == {(micro,) * (3 * per_rank)}
        for epoch in range(3):
            read = all_of(all_of(batches[epoch * per_rank : (epoch + 1) * per_rank]) for batches in ranks)
            assert len(set(read)) == len(read) == num_steps * size
            assert set(read) <= set(split)
            if kind != "stream":
                # A function of (seed, epoch), whatever reads it.
                order = [split[image] for image in epoch_order(NUM_TRAIN, seed, epoch)]
                at = [epoch * per_rank + step * accum for step in range(num_steps)]
                assert order[: len(read)] == all_of(
                    all_of(batches[start : start + accum]) for start in at for batches in ranks
                )
        # Going on from a checkpoint; with the same workers, as the stream needs it.
        done = min(resumed_at, 3 * num_steps - 1) * accum
        for layout, batches in zip(layouts, ranks, strict=True):
            resumed = train_batches(reader, kind, seed, done // accum * size, layout, num_workers)
            assert pictures(itertools.islice(resumed, min(4, 3 * per_rank - done))) == batches[done:][:4]


@settings(deadline=None, max_examples=15)
@given(
    shard_size=sizes["shard_size"], seed=sizes["seed"], step=st.integers(0, 8), first=st.sampled_from([1, 2, 3, 4]),
    then=st.sampled_from([1, 2, 3, 4]),
)  # fmt: skip
@pytest.mark.parametrize("kind", ["indexed", "resident"])
def test_going_on_with_another_number_of_processes(shard_sets, kind, shard_size, seed, step, first, then):
    def steps(reader, num_processes, images_seen, count):
        ranks = [
            pictures(itertools.islice(reader.train_batches(seed, images_seen, layout), count))
            for layout in (BatchLayout(12, 12 // num_processes, rank, num_processes) for rank in range(num_processes))
        ]
        return [all_of(batches[number] for batches in ranks) for number in range(count)]

    with opened(shard_sets, shard_size, kind) as reader:
        assert steps(reader, first, 0, step + 3)[step:] == steps(reader, then, step * 12, 3)


@settings(deadline=None, max_examples=25)
@given(
    shard_size=sizes["shard_size"], batch_size=st.integers(1, 15), num_processes=sizes["num_processes"],
    num_workers=sizes["num_workers"],
)  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_validation_drops_none(shard_sets, kind, shard_size, batch_size, num_processes, num_workers):
    with opened(shard_sets, shard_size, kind, "val") as reader:
        split = [image.numpy().tobytes() for image in reader.first(NUM_VAL).images]
        read = [
            picture
            for rank in range(num_processes)
            for batch in pictures(eval_batches(reader, kind, batch_size, rank, num_processes, num_workers))
            for picture in batch
        ]
    assert sorted(read) == sorted(split)
    assert len(set(read)) == NUM_VAL
