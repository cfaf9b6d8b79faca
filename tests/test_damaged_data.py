"""Training on two processes when an image turns out to be damaged: all stop, soon, and say which image it was."""

import time

from launching import TINY, finish, start

from vaetrain.data.order import BatchLayout, epoch_order
from vaetrain.data.selection import Selection
from vaetrain.data.shards import ShardSet

SECONDS_TO_STOP = 30


def train_two(folder, run_dir, *arguments):
    """Train on two processes; the run must fail. Starting two takes some 20 s when the cores are busy."""
    process = start(
        "vaetrain/train.py", "--data.train", folder, *TINY, "--train.epochs", 1, "--run-dir", run_dir, *arguments,
        two_processes=True,
    )  # fmt: skip
    result = finish(process, timeout_s=120)
    assert result.returncode != 0
    return result.stderr


def test_a_worker_that_meets_a_damaged_image_stops_all_processes(damaged_shards, tiny_shards, tmp_path):
    selection = Selection.of(ShardSet.open(tiny_shards), "train")
    layout = BatchLayout(20, 10, rank=1, num_processes=2)
    # Process 1's part of step 4 of 5: process 0 is fine, and waits for it.
    position = int(epoch_order(100, 0, 0)[layout.positions(60)[0]][5])
    folder, name = damaged_shards(position)
    said = train_two(folder, tmp_path / "run", "--data.reader", "indexed", "--data.num-workers", 1)
    stopped = time.time()
    assert f"error: {name} in {folder}, sample {selection.within_shard[position]} " in said
    assert "run tools/verify_shards.py" in said
    # The last sign of life: the record of step 2.
    assert stopped - (tmp_path / "run" / "metrics.jsonl").stat().st_mtime < SECONDS_TO_STOP


def test_damage_found_while_the_resident_reader_decodes_stops_all_processes(damaged_shards, tmp_path):
    folder, name = damaged_shards(70)
    began = time.monotonic()
    said = train_two(folder, tmp_path / "run", "--data.reader", "resident")
    assert f"error: {name} in {folder}, sample 10 " in said
    assert time.monotonic() - began < 2 * SECONDS_TO_STOP
    assert not (tmp_path / "run").exists()
