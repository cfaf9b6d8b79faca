"""A disk that is full while samples or records are written: the kernel refuses to write a file beyond a size."""

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from vaetrain.data.format.writer import ShardWriter
from vaetrain.runs.directory import RunDirectory


@contextmanager
def no_file_beyond(num_bytes: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("at_the_end", [False, True], ids=["while-it-writes", "at-the-end"])
def test_samples_that_do_not_fit_name_the_file_and_leave_whole_shards(tmp_path, at_the_end):
    image = bytes(6000 if at_the_end else 30_000)  # less and more than what is buffered
    with ShardWriter(tmp_path, "rank-0000", 1) as writer:
        writer.write("00000000", image, "png", {"index": 0})
    with (
        no_file_beyond(5000),
        pytest.raises(OSError, match=rf"'{tmp_path}/\.rank-0000-000001\.tar\.\w+\.partial'") as raised,
        ShardWriter(tmp_path, "rank-0000", 2, first_shard=1) as writer,
    ):
        writer.write("00000001", image, "png", {"index": 1})
    assert raised.value.errno == errno.EFBIG
    assert [path.name for path in tmp_path.iterdir()] == ["rank-0000-000000.tar"]


def test_a_record_that_does_not_fit_names_metrics_and_loses_none_before_it(tmp_path):
    run = RunDirectory(tmp_path)
    records = [{"step": step, "images_seen": 20 * step, "epoch": 0.1 * step, "split": "train"} for step in range(5)]
    for record in records[:3]:
        run.append_metrics(record)
    size = run.metrics_file.stat().st_size
    with no_file_beyond(size + 10), pytest.raises(OSError, match=rf"'{run.metrics_file}'"):
        run.append_metrics(records[3])
    assert run.metrics_file.stat().st_size == size + 10
    assert run.metrics() == records[:3]
    run.drop_metrics_after(2, 0)  # as a resume does
    run.append_metrics(records[3])
    assert run.metrics() == records[:4]
