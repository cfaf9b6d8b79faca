"""Who the processes are, and how they reach each other."""

import pytest
import torch

from together import succeed_together
from vaetrain.distributed import exchange, processes
from vaetrain.distributed.launcher import launcher


def test_alone_there_is_no_group_and_no_store(accelerator):
    assert accelerator.num_processes == 1
    assert processes.control_group() is None
    assert exchange.shared_store() is None


def test_only_processes_that_a_launcher_started_have_one(monkeypatch):
    for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    assert launcher() is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    assert launcher() is not None


def test_one_process_alone_joins_nobody(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    processes.join_launch(processes.timedelta(seconds=1))
    assert not torch.distributed.is_initialized()


def fail_in_turn():
    """Rank 0 fails at the first work, both at the second, nobody at the third; at the fourth rank 0 never learns of rank 1."""
    accelerator = processes.start()
    with processes.finishing(accelerator):
        rank = accelerator.process_index
        first = exchange.problems_of_all("a bad file" if rank == 0 else "")
        second = exchange.problems_of_all(f"bad on {rank}")
        third = exchange.problems_of_all("")
        if rank == 0:
            with pytest.raises(TimeoutError, match="alone with it"):
                exchange.problems_of_all("alone with it", patience_s=1)
        print([first, second, third])


def test_a_failure_on_one_process_is_known_to_all():
    expected = [["a bad file", ""], ["bad on 0", "bad on 1"], ["", ""]]
    assert succeed_together(fail_in_turn).count(str(expected)) == 2
