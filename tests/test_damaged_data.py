"""Training on two processes when an image turns out to be damaged or a worker dies: all stop, soon, and say where it was."""

import contextlib
import time

import psutil
from launching import TINY, end, finish, start

from vaetrain.data.order import BatchLayout, epoch_order
from vaetrain.data.selection import Selection
from vaetrain.data.shards import ShardSet

SECONDS_TO_STOP = 30


def start_two(folder, run_dir, *arguments):
    """Start training on two processes, which takes some 20 s when the cores are busy."""
    return start(
        "vaetrain/train.py", "--data.train", folder, *TINY, "--train.epochs", 1, "--run-dir", run_dir, *arguments,
        two_processes=True,
    )  # fmt: skip


def train_two(folder, run_dir, *arguments):
    """Train on two processes; the run must fail."""
    result = finish(start_two(folder, run_dir, *arguments), timeout_s=120)
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


def test_a_worker_killed_by_the_system_stops_all_processes(tiny_shards, tmp_path):
    process = start_two(
        tiny_shards, tmp_path / "run", "--data.reader", "indexed", "--data.num-workers", 1, "--train.epochs", 10**6,
        "--train.val-every-epochs", 10**6,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not workers_of(process) or not (tmp_path / "run" / "metrics.jsonl").is_file():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        ranks = [
            child for child in psutil.Process(process.pid).children(recursive=True) if "train.py" in child.cmdline()[-1]
        ]
        victim = workers_of(process)[0]
        victim.kill()
        began = time.monotonic()
        result = finish(process, timeout_s=60)
    finally:
        end(process)
    assert time.monotonic() - began < SECONDS_TO_STOP
    assert result.returncode != 0
    assert (
        f"error: a decoding worker (process {victim.pid}) was killed by SIGKILL; it was at train-00000" in result.stderr
    )
    assert "lower --data.num-workers (now 1)" in result.stderr
    psutil.wait_procs(ranks, timeout=10)
    assert not any(rank.is_running() for rank in ranks)


def workers_of(process):
    """The decoding workers under a started command, by the name that PyTorch gives them."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [child] if child.name() == "pt_data_worker" else []
    return found
