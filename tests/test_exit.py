"""No thread of gloo's is left when the interpreter ends: it would free its last tensors without Python, and abort."""

from __future__ import annotations

import sys

import pytest

from launching import NO_GPU, TINY, finish, free_port, start

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the names of native threads are read from /proc")


def leftovers(folder, script, *options):
    """The threads of gloo's that two processes which ran the script had left."""
    group = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        **NO_GPU,
    }
    processes = [
        start(
            "tests/exit_scenario.py", folder, script, *options, environment={**group, "RANK": rank, "LOCAL_RANK": rank}
        )
        for rank in ("0", "1")
    ]
    for result in [finish(process) for process in processes]:
        assert result.returncode == 0, result.stderr
    return [
        name for rank in range(2) for name in (folder / f"threads-{rank}").read_text().split("\n") if "gloo" in name
    ]


def test_the_processes_have_left_their_group_when_they_end(tiny_shards, tmp_path):
    quick = ("--phases", "probe", "noise", "--probe.largest", 2, "--noise.num-steps", 4, "--noise.skip-steps", 0)
    command = ("vaetrain/scale.py", *TINY, "--data.train", tiny_shards, "--train.epochs", 1, *quick)
    assert leftovers(tmp_path, *command, "--out", tmp_path / "scaling") == []
