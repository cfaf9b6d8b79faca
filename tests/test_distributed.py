"""Who the processes are, and how they reach each other."""

import sys

import pytest
import torch

from vaetrain import distributed


@pytest.mark.skipif(sys.platform != "linux", reason="other systems are not asked")
def test_the_interface_towards_a_host():
    """tests/test_launch.py trains over it between two hosts."""
    assert distributed.interface_to("127.0.0.1") == "lo"


@pytest.mark.parametrize("host", ["", "there.is.no.such.host.invalid"])
def test_no_interface_towards_nowhere(host):
    assert distributed.interface_to(host) is None


def test_alone_there_is_no_group_and_no_store(accelerator):
    assert accelerator.num_processes == 1
    assert distributed.control_group() is None
    assert distributed.shared_store() is None


def test_only_processes_that_a_launcher_started_have_one(monkeypatch):
    for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.launcher() is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    assert distributed.launcher() is not None


def test_the_first_attempt_is_left_to_accelerate(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    distributed.join_another_attempt(distributed.timedelta(seconds=1))
    assert not torch.distributed.is_initialized()
