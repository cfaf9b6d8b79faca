"""Stacks are written, or it is said why not, always in time."""

import os

from vaetrain.distributed.stacks import write_stacks


def test_they_name_the_function_that_runs(tmp_path):
    assert write_stacks(tmp_path / "stacks.txt") is None
    assert "test_they_name_the_function_that_runs" in (tmp_path / "stacks.txt").read_text()
    assert write_stacks(tmp_path / "absent" / "stacks.txt") is None  # a run that has not begun


def test_a_file_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "stacks.txt").mkdir()
    assert "Is a directory" in write_stacks(tmp_path / "stacks.txt")


def test_a_file_that_blocks_is_given_up(tmp_path):
    """A pipe that nobody reads blocks whoever opens it, as a dead file server does."""
    os.mkfifo(tmp_path / "stacks.txt")
    assert write_stacks(tmp_path / "stacks.txt", within_s=0.2) == "no answer for 0.2 s"
    os.close(os.open(tmp_path / "stacks.txt", os.O_RDONLY | os.O_NONBLOCK))  # lets the writer go
