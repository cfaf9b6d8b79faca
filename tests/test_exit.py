"""No thread of gloo's is left when the interpreter ends: it would free its last tensors without Python, and abort."""

from __future__ import annotations

import sys

import pytest
from launching import TINY, run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the names of native threads are read from /proc")


def leftovers(folder, script, *options, exit_code=0):
    """The threads of gloo's that two processes which ran the script, and ended with the code, had left."""
    for file in folder.glob("threads-*"):
        file.unlink()
    result = run("tests/exit_scenario.py", folder, script, *options, two_processes=True)
    assert (result.returncode == 0) == (exit_code == 0), result.stderr
    assert exit_code == 0 or f"exitcode  : {exit_code} " in result.stderr, result.stderr
    files = list(folder.glob("threads-*"))  # torchrun may end the other process when one of them ends with a code
    assert len(files) == 2 or exit_code != 0
    assert files
    return [name for file in files for name in file.read_text().split("\n") if "gloo" in name]


def test_the_processes_have_left_their_group_when_they_end(tiny_shards, tmp_path):
    data = (*TINY, "--data.train", tiny_shards, "--train.epochs", 1)
    stopped = ("--run-dir", tmp_path / "run", "--train.max-hours", 1e-6)
    assert leftovers(tmp_path, "vaetrain/train.py", *data, *stopped, exit_code=75) == []
    quick = ("--phases", "probe", "noise", "--probe.largest", 2, "--noise.num-steps", 4, "--noise.skip-steps", 0)
    assert leftovers(tmp_path, "vaetrain/scale.py", *data, *quick, "--out", tmp_path / "scaling") == []
