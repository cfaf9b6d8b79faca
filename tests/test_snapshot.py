"""Copies made and written beside training: whole, of the right moment, and their errors heard."""

import subprocess
import sys
import threading
import time

import pytest
import torch

from launching import ROOT
from vaetrain.command_line import parse
from vaetrain.config import Config
from vaetrain.model.autoencoder import VAE
from vaetrain.training.async_writer import ALIGNMENT, SMALLEST_BUFFER, SnapshotWriter, packed


class SlowWriter(SnapshotWriter):
    """Takes its time to copy."""

    def _copy(self, key, tensor):
        time.sleep(0.05)
        return super()._copy(key, tensor)


def test_the_copy_is_of_the_moment_of_the_call():
    """Tensors may change after `wait_for_copy`; the copies are contiguous, in memory used again."""
    writer = SlowWriter()
    x, y = torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last), torch.ones(2)
    written, places = [], []
    for number in range(3):
        with torch.no_grad():
            x.fill_(number)
            y.fill_(number)
        writer.start(
            {"a": {"x": x}, "b": {"y": y}},
            lambda copies: (
                time.sleep(0.05),
                written.append((float(copies["a"]["x"].sum()), float(copies["b"]["y"].sum()))),
                places.append((copies["a"]["x"].data_ptr(), copies["a"]["x"].is_contiguous())),
            ),
        )
        writer.wait_for_copy()
    writer.finish()
    assert written == [(96.0 * number, 2.0 * number) for number in range(3)]
    assert places == [(places[0][0], True)] * 3


def test_copies_of_any_kind_lie_in_few_pieces_of_memory():
    """Whatever their dtype and shape; another layout gets memory of its own kind."""
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8)
    shapes = ((3, 5), (), (0, 4), (2, 3, 3, 3), (17,), (4096,))
    random = torch.Generator().manual_seed(0)
    for layout in (dtypes, dtypes[::-1]):
        group = {
            f"{dtype}.{shape}": torch.randint(0, 2, shape, generator=random).to(dtype)
            for dtype, shape in zip(layout * len(shapes), (shape for shape in shapes for _ in layout), strict=True)
            if dtype != torch.bfloat16  # which NumPy cannot copy, and no checkpoint of a CPU has
        }
        copies = {}
        writer = SnapshotWriter()
        writer.start({"a": group, "b": group}, lambda found, copies=copies: copies.update(found))
        writer.finish()
        for copied in (copies["a"], copies["b"]):
            assert all(torch.equal(copied[name], tensor) for name, tensor in group.items())
            assert all(copied[name].dtype == tensor.dtype for name, tensor in group.items())
        memory = {copy.untyped_storage().data_ptr(): copy.untyped_storage().nbytes() for copy in copies["a"].values()}
        memory |= {copy.untyped_storage().data_ptr(): copy.untyped_storage().nbytes() for copy in copies["b"].values()}
        total = 2 * sum(tensor.nbytes for tensor in group.values())
        assert len(memory) <= 8
        assert sum(memory.values()) <= 1.1 * total + 2 * len(group) * ALIGNMENT + SMALLEST_BUFFER


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_pinned_memory_is_little_more_than_what_is_copied(config):
    """PyTorch rounds a pinned buffer up to a power of two: one a tensor took 1.2 to 1.6 times as much, one a file up to 1.9."""
    model = parse(Config, None, ["--config", str(config), "--data.train", "x"]).model
    with torch.device("meta"):
        tensors = [tensor.nbytes for tensor in VAE(model).state_dict().values()] * 4  # weights, average, two moments
    sizes, places = packed(dict(enumerate(tensors)))
    assert all(size & (size - 1) == 0 for size in sizes)
    assert len(sizes) <= 16
    assert sum(sizes) <= 1.02 * sum(tensors)
    ends = [[0] for _ in sizes]
    for number, (buffer, offset) in sorted(places.items(), key=lambda item: item[1]):
        assert offset % ALIGNMENT == 0
        assert offset >= ends[buffer][-1], "two tensors in one place"
        ends[buffer].append(offset + tensors[number])
    assert all(of_buffer[-1] <= size for of_buffer, size in zip(ends, sizes, strict=True))


def test_nobody_waits_for_the_writing_but_the_next_snapshot():
    writer, may_end, order = SnapshotWriter(), threading.Event(), []
    x = {"a": {"x": torch.ones(1)}}
    writer.start(x, lambda _: (order.append("begun"), may_end.wait(120), order.append("written")))
    writer.wait_for_copy()
    writer.wait_for_copy()  # also when nothing is being copied any more
    assert "written" not in order
    threading.Timer(0.2, may_end.set).start()
    writer.start(x, lambda _: order.append("the next"))
    assert order[:2] == ["begun", "written"]
    writer.finish()
    assert order == ["begun", "written", "the next"]


@pytest.mark.parametrize("call", ["wait_for_copy", "start", "finish"])
def test_an_error_is_raised_by_the_next_call(call):
    def fail(_):
        raise OSError("no room")

    writer = SnapshotWriter()
    writer.start({"a": {"x": torch.ones(1)}}, fail)
    while not writer.writing.done():
        time.sleep(0.001)
    with pytest.raises(OSError, match="no room"):
        getattr(writer, call)(*(({}, lambda _: None) if call == "start" else ()))
    writer.finish()  # once


def test_an_error_while_copying_does_not_leave_training_waiting():
    writer = SnapshotWriter()
    writer._copy = lambda *_: 1 / 0
    writer.start({"a": {"x": torch.ones(1)}}, lambda _: None)
    assert writer.copied.wait(120)
    with pytest.raises(ZeroDivisionError):
        writer.finish()


def test_a_process_that_ends_still_writes(tmp_path):
    """Even when an error that nobody caught ends it."""
    code = (
        "import sys, time, torch\n"
        "from pathlib import Path\n"
        "from vaetrain.training.async_writer import SnapshotWriter\n"
        "writer = SnapshotWriter()\n"
        "writer.start({'a': {'x': torch.ones(1)}}, lambda _: (time.sleep(0.5), Path(sys.argv[1]).write_text('whole')))\n"
        "raise SystemExit(3)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path / "file")], cwd=ROOT, timeout=100)
    assert result.returncode == 3
    assert (tmp_path / "file").read_text() == "whole"
