"""Stacks are written, or it is said why not, always in time."""

import os
import threading

import vaetrain.distributed.stacks
from vaetrain.distributed.stacks import write_stacks


def test_they_name_the_function_that_runs(tmp_path):
    assert write_stacks(tmp_path / "stacks.txt") is None
    assert "test_they_name_the_function_that_runs" in (tmp_path / "stacks.txt").read_text()
    assert write_stacks(tmp_path / "absent" / "stacks.txt") is None  # a run that has not begun


def test_a_file_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "stacks.txt").mkdir()
    assert "Is a directory" in write_stacks(tmp_path / "stacks.txt")


def test_a_pipe_in_its_place_is_replaced_unopened(tmp_path):
    """One that nobody reads would block whoever opens it."""
    os.mkfifo(tmp_path / "stacks.txt")
    assert write_stacks(tmp_path / "stacks.txt") is None
    assert "test_a_pipe_in_its_place" in (tmp_path / "stacks.txt").read_text()


def test_a_write_that_blocks_is_given_up(tmp_path, monkeypatch):
    """As on a dead file server."""
    answer = threading.Event()
    monkeypatch.setattr(vaetrain.distributed.stacks, "replace_file", lambda *_: answer.wait(120))
    assert write_stacks(tmp_path / "stacks.txt", within_s=0.2) == "no answer for 0.2 s"
    answer.set()
