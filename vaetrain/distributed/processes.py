"""Who am I among the processes, and sums over them."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
import torch.distributed.nn.functional
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs, PartialState
from jaxtyping import Int64, Shaped
from torch import Tensor
from torch import distributed as dist

from vaetrain.distributed import arithmetic, exchange
from vaetrain.distributed.exchange import TIMEOUT_S
from vaetrain.distributed.launcher import PortHolder, holder_of_port, launch_key
from vaetrain.distributed.launcher_environment import LauncherEnvironment
from vaetrain.distributed.network import set_gloo_interface
from vaetrain.machine import num_cores
from vaetrain.upload import upload

# torch.distributed.nn keeps the process group that exists when it is imported, as the default of its arguments, and the first
# optimizer imports it. Gloo's threads would then outlive the group's end, and abort a process that ends under them while they
# free their last tensors (torch 2.15). So it is imported above, before there is a group; tests/test_exit.py.

Precision = Literal["fp32", "tf32", "bf16", "fp16"]


def join(timeout_s: float = TIMEOUT_S, timeout_option: str = "") -> PartialState:
    """Join the processes that `accelerate launch` (or torchrun) started, or run alone.

    Whoever waits for another longer than `timeout_s`, which `timeout_option` sets, gives up, in a collective too. On a machine
    without a GPU the processes talk through gloo.
    Raises ValueError when the launcher announced more processes than joined, which Accelerate would pass over in silence,
    every process believing it is alone.
    """
    exchange.PATIENCE.seconds, exchange.PATIENCE.option = timeout_s, timeout_option
    timeout = timedelta(seconds=timeout_s)
    set_gloo_interface(os.environ.get("MASTER_ADDR", ""))
    join_launch(timeout)
    # Without cpu=True a machine that has no GPU starts every process as "rank 0 of 1" (accelerate 1.15).
    processes = PartialState(cpu=not torch.cuda.is_available(), timeout=timeout)
    announced = LauncherEnvironment.read().num_processes
    if announced != processes.num_processes:
        raise ValueError(
            f"the launcher announced {announced} processes (WORLD_SIZE) but {processes.num_processes} joined; start with "
            "`accelerate launch --config_file launch/cpu2.yaml …` (or gpu1, node8, multinode) or `torchrun`"
        )
    return processes


def start(
    precision: Precision = "fp32",
    *,
    log_with: Sequence[str] = (),
    project_dir: Path | None = None,
    timeout_s: float = TIMEOUT_S,
    timeout_option: str = "",
    deterministic: bool = False,
) -> Accelerator:
    """`join` the others and compute in this arithmetic; call once, first. For one that fits the machine see precision.start.

    `deterministic`: with algorithms only that give the same bits every time.
    """
    join(timeout_s, timeout_option)
    arithmetic.set_tf32(precision == "tf32")
    if deterministic:
        arithmetic.be_deterministic()
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="no" if precision in ("fp32", "tf32") else precision,
        log_with=list(log_with) or None,
        project_dir=project_dir,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_s)),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # one copy of the gradients instead of two
        ],
    )
    if accelerator.is_main_process and accelerator.device.type == "cpu":
        cores, used = num_cores(), torch.get_num_threads() * processes_per_node()
        if used < cores:  # accelerate launch sets OMP_NUM_THREADS=1 where the user has not
            threads = cores // processes_per_node()
            print(
                f"note: computing on {used} of {cores} cores; OMP_NUM_THREADS={threads} uses them all", file=sys.stderr
            )
    return accelerator


@contextmanager
def finishing(accelerator: Accelerator) -> Iterator[None]:
    """Leave the process group in order when the work inside is done.

    After an exception it is left alone: the other processes may be inside a collective, and waiting for them here would
    keep the launcher from seeing the failure and ending them. Let models wrapped for DDP go first: they keep the group.
    """
    yield
    exchange.meet("all processes to finish")
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize(accelerator.device)  # sums with the others may still be under way
    exchange.leave()
    accelerator.free_memory()
    gc.collect()  # a wrapped model refers to itself, and Accelerate collects before it lets go
    accelerator.end_training()


def in_use(accelerator: Accelerator) -> Precision:
    """The arithmetic that an accelerator computes in."""
    if accelerator.mixed_precision == "no":
        return "tf32" if arithmetic.tf32_is_set() else "fp32"
    name: Precision = accelerator.mixed_precision
    return name


def control_group(timeout_s: float = TIMEOUT_S) -> dist.ProcessGroup | None:
    """A gloo group of all processes, for small CPU tensors that no device has to wait for; None when alone. A collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    assert isinstance(group, dist.ProcessGroup), "every process is a member"
    return group


def join_launch(timeout: timedelta) -> None:
    """Join the processes of this very launch, and of this attempt, before Accelerate would join whoever is there.

    The keys of the store have the launch in them, so that nobody waits for the addresses of another's processes, nor for those of
    an attempt before (torchrun --max-restarts keeps its store; torch 2.15). Raises ValueError, naming who holds it, where the
    port is another's.
    """
    here = LauncherEnvironment.read()
    if here.num_processes == 1 or not here.main_port or dist.is_initialized():
        return  # without a port nobody has launched anything, which Accelerate says
    check_port(here)
    try:
        store, rank, num_processes = next(iter(dist.rendezvous("env://", timeout=timeout)))  # type: ignore[attr-defined]
    except dist.DistNetworkError as error:
        holder = holder_of_port(here.main_port)
        if holder is None or holder.pid == os.getpid():
            raise
        raise ValueError(port_is_taken(here.main_port, holder)) from error
    attempt = f"attempt-{here.attempt}"
    if here.num_processes == here.processes_per_node:
        key = f"vaetrain/{launch_key()}/{attempt}"
    else:  # of several launchers each process knows its own
        key = f"vaetrain/several machines/{attempt}"
        first = store.compare_set(f"{key}/launcher-{here.node_rank}", "", launch_key()).decode()
        if first != launch_key():
            raise ValueError(
                f"processes of another launch have joined by port {here.main_port} of {here.main_host}, on this machine those of "
                f"the launcher {first}; end them, or give another --main_process_port"
            )
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        store=dist.PrefixStore(key, store),  # type: ignore[attr-defined]
        rank=rank, world_size=num_processes, timeout=timeout,
    )  # fmt: skip


def check_port(here: LauncherEnvironment) -> None:
    """Raise ValueError where the launcher, which is to hold the port of this machine's processes, does not, but somebody does."""
    if here.launcher_keeps_store and here.num_processes == here.processes_per_node:
        holder = holder_of_port(here.main_port)
        if holder is not None and holder.pid != os.getppid():
            raise ValueError(port_is_taken(here.main_port, holder))


def port_is_taken(port: int, holder: PortHolder) -> str:
    """For messages."""
    return (
        f"port {port}, by which these processes were to meet, is held by process {holder.pid} ({holder.command}); end that, or "
        "give another --main_process_port"
    )


def processes_per_node() -> int:
    """Training processes on this machine, which share its cores and memory."""
    return LauncherEnvironment.read().processes_per_node


def sum_over_processes(accelerator: Accelerator, values: Tensor) -> Tensor:
    """Elementwise sum over all processes, the same on each; a collective: every process must call it, in the same order."""
    return accelerator.reduce(values, reduction="sum") if accelerator.num_processes > 1 else values


def max_over_processes(accelerator: Accelerator, values: Sequence[float]) -> list[float]:
    """The largest over all processes of each number; a collective."""
    mine = upload(torch.tensor([list(values)], dtype=torch.float64), accelerator.device)
    return accelerator.gather(mine).amax(dim=0).tolist()


def gather_integers(accelerator: Accelerator, integers: Sequence[int]) -> list[list[int]]:
    """The integers of each process, as many from all, in order of rank; those who have theirs early wait as in `meet`."""
    exchange.meet("all processes to read their part of the data")
    mine = upload(torch.tensor([list(integers)], dtype=torch.int64), accelerator.device)
    return accelerator.gather(mine).tolist()


def device_name(device: torch.device) -> str:
    """The accelerator's product name, or "cpu" with the number of threads PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"


def gather_by_index(
    accelerator: Accelerator, indices: Int64[Tensor, " b"], values: Shaped[Tensor, "b ..."]
) -> Shaped[Tensor, "n ..."]:
    """The rows of all processes in the order of their (different) indices, on every process's CPU; a collective.

    A process may have none. Bits are moved, never computed with: the result is exact.
    """
    if accelerator.num_processes > 1:
        longest = int(max_over_processes(accelerator, [len(indices)])[0])
        # Every process sends equally many rows; -1 marks the padding.
        padded_indices = torch.full((longest,), -1, dtype=torch.int64)
        padded_indices[: len(indices)] = indices
        padded = torch.zeros((longest, *values.shape[1:]), dtype=values.dtype)
        padded[: len(values)] = values
        indices = accelerator.gather(padded_indices.to(accelerator.device)).cpu()
        values = accelerator.gather(padded.to(accelerator.device)).cpu()
        values, indices = values[indices >= 0], indices[indices >= 0]
    return values.cpu()[indices.cpu().argsort()]
