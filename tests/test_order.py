import subprocess
import sys
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vaetrain.data.config import DataConfig
from vaetrain.data.readers.order import BatchLayout, epoch_order, eval_indices, train_indices

PINNED = [6, 1, 0, 5, 3, 8, 7, 9, 2, 4]
sizes = st.integers(1, 4)


@st.composite
def runs(draw):
    """(num_images, micro_batch_size, grad_accum_steps, num_processes) with at least one global batch."""
    micro, accum, processes = draw(st.integers(1, 5)), draw(sizes), draw(sizes)
    num_images = draw(st.integers(micro * accum * processes, 150))
    return num_images, micro, accum, processes


def layouts(micro, accum, processes):
    return [BatchLayout(micro * accum * processes, micro, rank, processes) for rank in range(processes)]


def global_batches(num_images, seed, images_seen, ranks, count):
    """The first `count` global batches, each put together again from what the ranks read."""
    streams = [train_indices(num_images, seed, images_seen, layout) for layout in ranks]
    accum = ranks[0].grad_accum_steps
    return [np.concatenate([np.concatenate(list(islice(stream, accum))) for stream in streams]) for _ in range(count)]


def test_the_order_of_an_epoch_is_pinned():
    # A change of these numbers changes what every resumed run trains on.
    assert epoch_order(10, seed=0, epoch=0).tolist() == PINNED
    assert epoch_order(10, seed=0, epoch=1).tolist() != PINNED
    assert epoch_order(10, seed=1, epoch=0).tolist() != PINNED


@given(runs(), st.integers(0, 5))
def test_an_epoch_reads_every_image_once_but_those_after_the_last_global_batch(run, seed):
    num_images, micro, accum, processes = run
    ranks = layouts(micro, accum, processes)
    steps = ranks[0].images_per_epoch(num_images) // ranks[0].global_batch_size
    read = np.concatenate(global_batches(num_images, seed, 0, ranks, steps))
    assert len(set(read.tolist())) == len(read) == ranks[0].images_per_epoch(num_images)
    assert num_images - len(read) < ranks[0].global_batch_size


def test_epochs_drop_different_images():
    layout = BatchLayout(32, 32, 0, 1)
    stream = train_indices(100, 0, 0, layout)
    dropped = [frozenset(range(100)) - set(np.concatenate(list(islice(stream, 3))).tolist()) for _ in range(8)]
    assert all(len(images) == 4 for images in dropped)
    assert len(set(dropped)) == 8


@given(st.integers(24, 150), st.integers(0, 5), st.sampled_from([1, 2, 3, 4, 6]), st.sampled_from([1, 2, 4]))
def test_any_number_of_processes_reads_the_same_global_batches(num_images, seed, micro, processes):
    single = layouts(24, 1, 1)
    several = layouts(micro, 24 // (micro * processes), processes) if 24 % (micro * processes) == 0 else single
    for alone, together in zip(
        global_batches(num_images, seed, 0, single, 10), global_batches(num_images, seed, 0, several, 10), strict=True
    ):
        assert alone.tolist() == together.tolist()


@given(runs(), st.integers(0, 5), st.integers(0, 12))
def test_resuming_continues(run, seed, steps):
    num_images, *rest = run
    ranks = layouts(*rest)
    through = global_batches(num_images, seed, 0, ranks, steps + 3)[steps:]
    resumed = global_batches(num_images, seed, steps * ranks[0].global_batch_size, ranks, 3)
    assert np.array_equal(through, resumed)


@given(
    st.integers(24, 150),
    st.integers(0, 5),
    st.integers(0, 12),
    st.sampled_from([1, 2, 3, 4, 6]),
    st.sampled_from([1, 2]),
)
def test_resuming_continues_on_another_number_of_processes(num_images, seed, steps, processes, accum):
    through = global_batches(num_images, seed, 0, layouts(24, 1, 1), steps + 3)[steps:]
    resumed = global_batches(num_images, seed, steps * 24, layouts(24 // processes // accum, accum, processes), 3)
    assert np.array_equal(through, resumed)


@given(runs(), st.integers(0, 5), st.integers(0, 12))
def test_all_ranks_take_equally_many_images_at_every_step(run, seed, steps):
    num_images, micro, accum, processes = run
    for layout in layouts(micro, accum, processes):
        batches = train_indices(num_images, seed, steps * layout.global_batch_size, layout)
        # Three epochs: no batch is cut short at an epoch's end.
        assert {len(batch) for batch in islice(batches, 3 * layout.micro_batches_per_epoch(num_images))} == {micro}


@given(st.integers(5, 150), st.integers(2, 40), st.integers(0, 99))
def test_the_images_dropped_change_from_epoch_to_epoch(num_images, size, seed):
    size = min(size, num_images)
    layout = BatchLayout(size, size, 0, 1)
    kept = layout.images_per_epoch(num_images)
    dropped = [frozenset(epoch_order(num_images, seed, epoch)[kept:].tolist()) for epoch in range(12)]
    # Twelve draws that are all alike have a probability below 5⁻¹¹.
    assert kept == num_images or len(set(dropped)) > 1


def test_a_position_inside_a_global_batch_is_refused():
    with pytest.raises(ValueError, match=r"48 images.*--train.global-batch-size 32"):
        train_indices(100, 0, 48, BatchLayout(32, 32, 0, 1))


@given(st.integers(0, 60), st.integers(1, 20), st.integers(1, 5))
def test_evaluation_reads_every_image_once_in_the_same_blocks(num_images, batch_size, processes):
    blocks = [
        block.tolist() for rank in range(processes) for block in eval_indices(num_images, batch_size, rank, processes)
    ]
    assert sorted(image for block in blocks for image in block) == list(range(num_images))
    assert sorted(blocks) == [block.tolist() for block in eval_indices(num_images, batch_size, 0, 1)]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ((33, 16, 0, 2), r"--train.global-batch-size 33 .* 2 processes .* nearest that work are 32 and 64"),
        ((7, 16, 0, 2), r"--train.global-batch-size 7 .* nearest that work are 32$"),
        (
            (96, 20, 0, 2),
            r"--train.micro-batch-size 20 .* 48 images per process .* are 16 and 24, or .*size 80 and 120",
        ),
        ((16, 64, 0, 1), r"--train.micro-batch-size 64 .* nearest that work are 16, or --train.global-batch-size 64$"),
        ((0, 64, 0, 1), r"--train.global-batch-size is 0"),
        ((64, 0, 0, 1), r"--train.micro-batch-size is 0"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_with_the_nearest_that_do(layout, message):
    with pytest.raises(ValueError, match=message):
        BatchLayout(*layout)


@given(st.integers(1, 200), st.integers(1, 40), sizes)
def test_the_suggested_sizes_work(global_batch_size, micro, processes):
    try:
        BatchLayout(global_batch_size, micro, 0, processes)
    except ValueError as error:
        for size in str(error).rpartition("--train.global-batch-size")[2].rpartition("are ")[2].split(" and "):
            BatchLayout(int(size), micro, 0, processes)


def test_a_split_smaller_than_a_global_batch_is_refused():
    with pytest.raises(ValueError, match=r"23 images.*--train.global-batch-size to at most 23"):
        BatchLayout(32, 32, 0, 1).images_per_epoch(23)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"train": ""}, "--data.train is empty"),
        ({"classes": ("cat", "cat")}, "--data.classes cat cat"),
        ({"num_workers": -1}, "--data.num-workers is -1"),
        ({"timeout_s": 0.0}, "--data.timeout-s is 0"),
        ({"resident_gib": -0.5}, "--data.resident-gib is -0.5"),
    ],
)
def test_a_data_configuration_that_no_reader_can_honour_is_refused(field, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**{"train": "shards", **field})


def test_configuration_and_order_do_not_import_torch():
    script = "import sys, vaetrain.data.config, vaetrain.data.readers.order; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
