"""Training on two processes when an image turns out to be damaged or a worker dies: all stop by themselves and say where it was.

No launcher ends anybody here, and it is over before --train.timeout-s (600 s) would have ended it: see together.HANGS_S.
"""

import re

import pytest

from fault_scenarios import train_together
from launching import TINY
from vaetrain.data.format.shard_set import ShardSet
from vaetrain.data.readers.order import BatchLayout, epoch_order
from vaetrain.data.readers.selection import Selection


@pytest.fixture
def train_two(tmp_path):
    """Train on two processes, which must both end unsuccessfully, and not be killed; returns what they printed."""

    def run(folder, fault, *arguments):
        own = ("--data.train", folder, "--train.epochs", 1, "--run-dir", tmp_path / "run")
        outcome = train_together(tmp_path / "out", fault, *TINY, *own, *arguments)
        assert outcome.exit_codes == [1, 1], outcome.printed
        return "".join(outcome.printed)

    return run


def test_a_worker_that_meets_a_damaged_image_stops_all_processes(damaged_shards, tiny_shards, train_two):
    selection = Selection.of(ShardSet.open(tiny_shards), "train")
    layout = BatchLayout(20, 10, rank=1, num_processes=2)
    # Process 1's part of step 4 of 5: process 0 is fine, and waits for it.
    position = int(epoch_order(100, 0, 0)[layout.positions(60)[0]][5])
    folder, name = damaged_shards(position)
    said = train_two(folder, "none", "--data.reader", "indexed", "--data.num-workers", 1)
    assert f"error: {name} in {folder}, sample {selection.within_shard[position]} " in said
    assert "run tools/verify_shards.py" in said


def test_damage_found_while_the_resident_reader_decodes_stops_all_processes(damaged_shards, train_two, tmp_path):
    folder, name = damaged_shards(70)
    said = train_two(folder, "none", "--data.reader", "resident")
    assert f"error: {name} in {folder}, sample 10 " in said
    assert not (tmp_path / "run").exists()


def test_a_worker_killed_by_the_system_stops_all_processes(tiny_shards, train_two):
    said = train_two(
        tiny_shards, "worker killed", "--data.reader", "indexed", "--data.num-workers", 1, "--train.epochs", 10**6,
        "--train.val-every-epochs", 10**6,
    )  # fmt: skip
    (victim,) = re.findall(r"^killed worker (\d+)$", said, re.MULTILINE)
    assert f"error: a decoding worker (process {victim}) was killed by SIGKILL; it was at train-00000" in said
    assert "lower --data.num-workers (now 1)" in said
