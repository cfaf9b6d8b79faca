"""An array that the processes of a node fill together and then all read, without importing torch.

One of them makes the memory, the others open it by that one's process id and file descriptor. Where they cannot reach it (another
user, another container) each keeps an array of its own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from vaetrain.data.readers.shared_memory import SharedMemory, memory_domain

Gather = Callable[[Sequence[int]], list[list[int]]]
"""Hands in integers and gives those of all processes, in order of rank; every process calls it as often."""


@dataclass(frozen=True)
class SharedArray:
    """What this process does for an array, and where the array lies."""

    part: int
    """Which part of the array this process fills..."""

    num_parts: int
    """...of how many."""

    memory: SharedMemory | None
    """What the processes of the node share; None: this process fills an array of its own."""

    gather: Gather | None
    """None: there is only this process."""

    description: str
    """Who has it, after its size."""

    @classmethod
    def agree(cls, num_bytes: int, rank: int, gather: Gather | None) -> SharedArray:
        """Find the processes of this node and share memory with them; a collective of all processes of the run."""
        alone = cls(part=0, num_parts=1, memory=None, gather=gather, description="in this process")
        if gather is None:
            return alone
        mine = memory_domain()
        node = [other for other, (domain,) in enumerate(gather([mine])) if domain == mine]
        # Every process takes part in every exchange, also one that is alone on its node.
        memory, why_not = None, ""
        if len(node) > 1 and rank == node[0]:
            try:
                memory = SharedMemory(num_bytes)
            except OSError as error:
                why_not = str(error)
        offers = gather([os.getpid(), memory.fd, memory.inode] if memory else [0, 0, 0])
        pid, fd, inode = offers[node[0]]
        if pid and memory is None:
            try:
                memory = SharedMemory.of_process(pid, fd, inode, num_bytes)
            except OSError as error:
                why_not = str(error)
        answers = gather([memory is not None])
        if len(node) == 1:
            return alone
        if all(answers[other][0] for other in node):
            return cls(node.index(rank), len(node), memory, gather, f"shared by the {len(node)} processes of this node")
        if why_not:
            print(f"note: process {rank} shares no memory with others of its node: {why_not}", file=sys.stderr)
        return cls(
            0, 1, None, gather, f"in each of the {len(node)} processes of this node, which could not share memory"
        )

    def memory_array(self, shape: tuple[int, ...]) -> UInt8[np.ndarray, "..."]:
        """The array, not yet filled."""
        return np.empty(shape, np.uint8) if self.memory is None else self.memory.array(shape, np.uint8)

    @contextmanager
    def fill_collectively(self) -> Iterator[None]:
        """Fill this process's part inside; at the end all parts are filled, and a failure of one is a failure of all.

        Raises ValueError with that one's message in the processes whose own part went well: whichever ends first, and has
        the launcher end the others, says what was wrong.
        """
        problem = None
        try:
            yield
        except Exception as error:
            problem = error
        if self.gather:
            said = b"" if problem is None else (str(problem) or type(problem).__name__).encode(errors="replace")
            lengths = [length for (length,) in self.gather([len(said)])]
            if any(lengths) and problem is None:
                rank = lengths.index(max(lengths))
                messages = self.gather([0] * max(lengths))
                raise ValueError(f"{bytes(messages[rank]).decode(errors='replace')} (process {rank})")
            if any(lengths):
                self.gather([*said.ljust(max(lengths))])
        if problem is not None:
            raise problem
