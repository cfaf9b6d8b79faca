"""What the launcher says about this process and the others, in its environment; nobody else reads RANK or WORLD_SIZE.

Without importing torch: preflight.py asks before that.
"""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class LauncherEnvironment:
    """Of a process that no launcher started: the only one."""

    rank: int = 0
    """This process among all, counted from 0."""

    num_processes: int = 1
    """All of them, on all machines."""

    local_rank: int = 0
    """This process among those of its machine, counted from 0."""

    processes_per_node: int = 1
    """Processes on this machine."""

    node_rank: int = 0
    """This machine among all, counted from 0."""

    main_host: str = ""
    """Where the store is by which all meet."""

    main_port: int = 0
    """Its TCP port; 0 where nobody has named one."""

    attempt: int = 0
    """Times that torchrun has started all processes anew."""

    launcher_keeps_store: bool = False
    """Otherwise the process of rank 0 does."""

    @classmethod
    def read(cls) -> LauncherEnvironment:
        """As it is now."""
        return cls(
            rank=int(os.environ.get("RANK", "0")),
            num_processes=int(os.environ.get("WORLD_SIZE", "1")),
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            processes_per_node=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            node_rank=int(os.environ.get("GROUP_RANK", "0")),
            main_host=os.environ.get("MASTER_ADDR", ""),
            main_port=int(os.environ.get("MASTER_PORT", "0")),
            attempt=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
            launcher_keeps_store=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )
