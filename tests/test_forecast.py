"""The plan of a run against what its readers deliver."""

import itertools
import subprocess
import sys
from contextlib import closing

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launching import ROOT, run_here, succeed
from vaetrain.data.config import DataConfig
from vaetrain.data.format.shard_set import ShardSet
from vaetrain.data.readers import stream
from vaetrain.data.readers.order import BatchLayout
from vaetrain.data.readers.read_plan import ReadPlan
from vaetrain.data.readers.reader import open_reader
from vaetrain.data.readers.selection import Selection

CPU = torch.device("cpu")
OPEN = stream.Stream._open


def planned(shards, kind, num_processes, num_workers, global_batch_size, micro_batch_size=None, **options):
    config = DataConfig(train=str(shards), reader=kind, num_workers=num_workers, **options)
    return ReadPlan.of(
        config,
        num_processes=num_processes,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
    )


def opened(shards, kind, split="train", **options):
    return closing(open_reader(DataConfig(train=str(shards), reader=kind, num_workers=0, **options), split, device=CPU))


sizes = {
    "micro": st.integers(1, 6),
    "accum": st.integers(1, 2),
    "num_processes": st.integers(1, 4),
    "num_workers": st.integers(0, 4),
}


@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(**sizes)
@pytest.mark.parametrize("kind", ["indexed", "resident"])
@pytest.mark.parametrize("classes", [(), ("dog",)])
def test_an_epoch_is_what_indexed_and_resident_deliver(
    tiny_shards, kind, classes, micro, accum, num_processes, num_workers
):
    size = micro * accum * num_processes
    wanted = 100 if not classes else ShardSet.open(tiny_shards).manifest.splits["train"].class_counts["dog"]
    if size > wanted:
        with pytest.raises(ValueError, match=f"at most {wanted}"):
            planned(tiny_shards, kind, num_processes, num_workers, size, micro, classes=classes)
        return
    plan = planned(tiny_shards, kind, num_processes, num_workers, size, micro, classes=classes)
    assert plan.train.reader == kind
    seen = set()
    with opened(tiny_shards, kind, classes=classes) as reader:
        for rank, num_batches in enumerate(plan.train.batches_per_rank):
            batches = reader.train_batches(0, 0, BatchLayout(size, micro, rank, num_processes))
            mine = [i for batch in itertools.islice(batches, num_batches) for i in batch.indices.tolist()]
            assert len(mine) == plan.images_per_rank == plan.steps_per_epoch * size // num_processes
            assert not seen & set(mine)
            seen |= set(mine)
            assert num_batches == plan.steps_per_epoch * accum
    assert len(seen) == plan.images_per_epoch
    assert plan.images_dropped == wanted - len(seen) < size
    with opened(tiny_shards, kind, "val", classes=classes) as reader:
        assert plan.val.num_images == reader.num_images
        passes = [list(reader.eval_batches(micro, rank, num_processes)) for rank in range(num_processes)]
        assert plan.val.batches_per_rank == tuple(map(len, passes))


def test_memory_is_that_of_the_pixels_and_the_index(tiny_shards):
    plan = planned(tiny_shards, "resident", 2, 0, 20)
    with opened(tiny_shards, "resident") as reader:
        batch = next(reader.train_batches(0, 0, BatchLayout(20, 10, 0, 2)))
        index = Selection.of(ShardSet.open(tiny_shards), "train")
        columns = (index.index.shard, index.index.offset, index.index.num_bytes, index.index.label, index.within_shard)
        index_bytes = sum(column.nbytes for column in columns)
        assert plan.train.node_memory_bytes == reader._pixels.nbytes
        assert plan.train.memory_bytes == index_bytes + batch.images.nbytes
        assert "memory: 0.1 MiB on each node, 0.0 MiB in each process" in plan.describe()
    # Two workers, which share the index: four batches prefetched by each, and one in use.
    indexed = planned(tiny_shards, "indexed", 2, 2, 20)
    assert indexed.train.memory_bytes == index_bytes + (2 * 4 + 1) * batch.images.nbytes
    assert indexed.train.node_memory_bytes == 0
    assert "memory: 0.1 MiB in each process" in indexed.describe()
    with_buffer = planned(tiny_shards, "stream", 2, 2, 20).train.memory_bytes
    # 50 images for each process, in five batches of ten: 30 for the one worker, 20 for the other.
    assert with_buffer - planned(tiny_shards, "indexed", 2, 2, 20).train.memory_bytes == pytest.approx(
        2 * 30 * index.index.num_bytes.mean(), abs=2
    )


def delivered_by_stream(reader, monkeypatch, batches, num_parts):
    """Per worker, the batches of an iterable data set and the shards it opened for them, without starting any worker."""
    found = []
    for worker in range(num_parts):
        monkeypatch.setattr(stream, "_worker", lambda worker=worker: (worker, num_parts))
        shards_opened = []
        monkeypatch.setattr(stream.Stream, "_open", lambda *where, log=shards_opened: log.append(where) or OPEN(*where))
        found.append((list(batches(worker)), shards_opened))
    return found


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(**sizes)
def test_the_stream_opens_the_shards_and_makes_the_batches_of_the_plan(
    tiny_shards, monkeypatch, micro, accum, num_processes, num_workers
):
    size, num_parts = micro * accum * num_processes, max(1, num_workers)
    plan = planned(tiny_shards, "stream", num_processes, num_workers, size, micro)
    with opened(tiny_shards, "stream") as reader, opened(tiny_shards, "stream", "val") as val_reader:
        for rank in range(num_processes):
            layout = BatchLayout(size, micro, rank, num_processes)
            num_batches = plan.train.batches_per_rank[rank]

            def train(worker, layout=layout, num_batches=num_batches):
                batches = iter(stream._TrainBatches(reader._stream, 0, 0, layout))
                return itertools.islice(batches, len(range(worker, num_batches, num_parts)))

            workers = delivered_by_stream(reader, monkeypatch, train, num_parts)
            images = {i for batches, _ in workers for batch in batches for i in batch.indices.tolist()}
            assert len(images) == plan.images_per_rank
            # All of a worker's shards are opened before its last batch, and none of another epoch.
            assert tuple(len(opened) for _, opened in workers) == plan.train.shards_per_worker[rank]

            def val(worker, rank=rank):
                return iter(stream._EvalBatches(val_reader._stream, micro, rank, num_processes))

            workers = delivered_by_stream(val_reader, monkeypatch, val, num_parts)
            assert sum(len(batches) for batches, _ in workers) == plan.val.batches_per_rank[rank]
            assert tuple(len(opened) for _, opened in workers) == plan.val.shards_per_worker[rank]


def test_fewer_shards_than_stream_workers_are_warned_about_and_would_be_read_whole(tiny_shards, monkeypatch):
    plan = planned(tiny_shards, "stream", 4, 4, 20)
    (warning,) = plan.warnings
    assert "9 shards are fewer than 4 × 4 stream workers" in warning
    assert planned(tiny_shards, "stream", 4, 2, 20).warnings == []
    assert planned(tiny_shards, "indexed", 4, 4, 20).warnings == []
    with opened(tiny_shards, "stream") as reader:
        images = []
        for rank in range(4):
            layout = BatchLayout(20, 1, rank, 4)
            workers = delivered_by_stream(
                reader,
                monkeypatch,
                lambda worker, layout=layout: itertools.islice(
                    stream._TrainBatches(reader._stream, 0, 0, layout), len(range(worker, 25, 4))
                ),
                4,
            )
            images += [i for batches, _ in workers for batch in batches for i in batch.indices.tolist()]
    assert sorted(images) == list(range(100))


def test_auto_gives_the_reason_that_the_reader_gives(tiny_shards):
    for gib in (4.0, 1e-6):
        split = planned(tiny_shards, "auto", 1, 0, 20, resident_gib=gib).train
        with opened(tiny_shards, "auto", resident_gib=gib) as reader:
            assert reader.description.startswith(split.reader)
            assert f"({split.reason})" in reader.description


def test_the_tool_prints_the_plan(tiny_shards, tiny_gray_shards, capsys):
    printed = succeed(
        "tools/verify_shards.py",
        tiny_shards,
        "--plan",
        2,
        1,
        "--global-batch-size",
        16,
        "--micro-batch-size",
        4,
        python=sys.executable,
    )
    for part in (
        "plan for 2 process(es) of 1 worker(s), global batch 16: 2 micro-batch(es) of 4 in each process",
        "train: resident (--data.reader auto, 0.00 GiB decoded, within --data.resident-gib 4), 100 images in 9 shards",
        "6 steps, 96 of 100 images, 48 in each process, 4 dropped",
        "23 images, none dropped, 3 batches in each process",
        "OK: ",
    ):
        assert part in printed
    assert "warning" not in printed
    plan = ("--plan", 1, 0, "--reader", "stream", "--global-batch-size", 16)
    assert run_here("tools/verify_shards.py", tiny_gray_shards, *plan) == 0
    printed = capsys.readouterr().out
    assert "4 in all" in printed
    assert "warning: there is no val split" in printed
    assert run_here("tools/verify_shards.py", tiny_shards, "--plan", 3, 1, "--global-batch-size", 16) == 1
    assert "16 does not divide among 3 processes" in capsys.readouterr().err


def test_the_plans_own_batch_divides_among_the_processes_and_fits_the_split(tiny_shards, tiny_gray_shards, capsys):
    for folder, num_processes, batch in ((tiny_shards, 3, 63), (tiny_gray_shards, 1, 40)):
        assert run_here("tools/verify_shards.py", folder, "--plan", num_processes, 1) == 0
        said = f"plan for {num_processes} process(es) of 1 worker(s), global batch {batch}: "
        assert said in capsys.readouterr().out


def test_planning_imports_no_torch():
    code = "import sys, vaetrain.data.readers.read_plan; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
