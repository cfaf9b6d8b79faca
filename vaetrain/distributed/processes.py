"""Who am I among the processes, and sums over them."""

from __future__ import annotations

import gc
import json
import os
import socket
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Literal, TypeVar

import torch
import torch.distributed.nn.functional
from accelerate import Accelerator, InitProcessGroupKwargs, PartialState
from accelerate.utils import broadcast_object_list
from jaxtyping import Int64, Shaped
from torch import Tensor
from torch import distributed as dist
from torch.distributed.distributed_c10d import Store, _get_default_store

from vaetrain.distributed.launcher_environment import LauncherEnvironment
from vaetrain.machine import num_cores
from vaetrain.upload import upload

# torch.distributed.nn keeps the process group that exists when it is imported, as the default of its arguments, and the first
# optimizer imports it. Gloo's threads would then outlive the group's end, and abort a process that ends under them while they
# free their last tensors (torch 2.15). So it is imported above, before there is a group; tests/test_exit.py.

T = TypeVar("T")
Precision = Literal["fp32", "bf16", "fp16"]

TIMEOUT_S = 600.0
"""A collective that waits longer ends the command: the other side is dead or stuck."""


def join(timeout_s: float = TIMEOUT_S) -> PartialState:
    """Join the processes that `accelerate launch` (or torchrun) started, or run alone.

    A collective that waits longer than `timeout_s` fails. On a machine without a GPU the processes talk through gloo.
    Raises ValueError when the launcher announced more processes than joined, which Accelerate would pass over in silence,
    every process believing it is alone.
    """
    timeout = timedelta(seconds=timeout_s)
    interface = interface_to(os.environ.get("MASTER_ADDR", ""))
    if interface is not None:
        # gloo would ask for the address of the host's own name, which on many machines is loopback: other hosts wait.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    join_another_attempt(timeout)
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
) -> Accelerator:
    """`join` the others and compute in this arithmetic; call once, first. For one that fits the machine see precision.start."""
    join(timeout_s)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="no" if precision == "fp32" else precision,
        log_with=list(log_with) or None,
        project_dir=project_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_s))],
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
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    gc.collect()  # a wrapped model refers to itself, and Accelerate collects before it lets go
    accelerator.end_training()


def in_use(accelerator: Accelerator) -> Precision:
    """The arithmetic that an accelerator computes in."""
    name: Precision = "fp32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision
    return name


def control_group(timeout_s: float = TIMEOUT_S) -> dist.ProcessGroup | None:
    """A gloo group of all processes, for small CPU tensors that no device has to wait for; None when alone. A collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    assert isinstance(group, dist.ProcessGroup), "every process is a member"
    return group


def shared_store() -> Store | None:
    """A connection of one's own to the launcher's key-value store, which no collective uses; None when alone."""
    return _get_default_store().clone() if dist.is_initialized() and dist.get_world_size() > 1 else None


def launcher() -> int | None:
    """Process id of the `accelerate launch` or torchrun that started this process, None if nothing of that kind did."""
    launched = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
    return os.getppid() if launched else None


def join_another_attempt(timeout: timedelta) -> None:
    """Join the others when torchrun has started all again (`--max-restarts`), before Accelerate would.

    The launcher keeps its key-value store, and with it the addresses of the attempt before (torch 2.15): under the same keys
    the processes would wait for those, for ever.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or dist.is_initialized() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    store = dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout
    )
    here = LauncherEnvironment.read()
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        store=dist.PrefixStore(f"vaetrain/attempt-{attempt}", store),  # type: ignore[attr-defined]
        rank=here.rank,
        world_size=here.num_processes,
        timeout=timeout,
    )


def interface_to(host: str) -> str | None:
    """The network interface (such as "eth0") whose IPv4 address this machine uses towards `host`; None if unknown."""
    if sys.platform != "linux" or not host:
        return None
    import fcntl  # not on Windows

    get_address = 0x8915  # SIOCGIFADDR, see netdevice(7)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # sends nothing: connecting a datagram socket only chooses the route
        except OSError:
            return None
        own = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, get_address, struct.pack("256s", name.encode()))
            except OSError:  # an interface without an IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == own:
                return name
    return None


def processes_per_node() -> int:
    """Training processes on this machine, which share its cores and memory."""
    return LauncherEnvironment.read().processes_per_node


def decided_by_main(accelerator: Accelerator, decide: Callable[[], T]) -> T:
    """What `decide` returns on the main process, on every process; what it raises there is raised on all. A collective."""
    decision: list[T | None] = [None]
    problem: list[Exception | None] = [None]
    if accelerator.is_main_process:
        try:
            decision = [decide()]
        except Exception as error:
            problem = [error]
    if accelerator.num_processes > 1:
        decision, problem = broadcast_object_list([decision, problem])
    if problem[0] is not None:
        raise problem[0]
    return decision[0]  # type: ignore[return-value]  # None only where `decide` returned it


def problems_of_all(problem: str, *, patience_s: float = 60.0) -> list[str]:
    """What kept each process from finishing some work ("": nothing), in order of rank; every process calls this after it.

    Not a collective but through the launcher's store: whoever failed inside the work may have left the others in one that waits for
    him. He waits `patience_s` for them to fail as well, or to finish; then TimeoutError ends him, and the launcher the others.
    """
    store = shared_store()
    if store is None:
        return [problem]
    rank, size = dist.get_rank(), dist.get_world_size()
    number = store.add(f"vaetrain/problems/{rank}", 1)  # the same on all: they do the same work in the same order
    keys = [f"vaetrain/problems/{number}/{each}" for each in range(size)]
    store.set(keys[rank], json.dumps(problem))
    try:
        store.wait(keys, timedelta(seconds=patience_s if problem else TIMEOUT_S))
    except (dist.DistError, RuntimeError) as error:
        raise TimeoutError(problem or "other processes have not finished in time") from error
    return [json.loads(store.get(key)) for key in keys]


def sum_over_processes(accelerator: Accelerator, values: Tensor) -> Tensor:
    """Elementwise sum over all processes, the same on each; a collective: every process must call it, in the same order."""
    return accelerator.reduce(values, reduction="sum") if accelerator.num_processes > 1 else values


def max_over_processes(accelerator: Accelerator, values: Sequence[float]) -> list[float]:
    """The largest over all processes of each number; a collective."""
    mine = upload(torch.tensor([list(values)], dtype=torch.float64), accelerator.device)
    return accelerator.gather(mine).amax(dim=0).tolist()


def gather_integers(accelerator: Accelerator, integers: Sequence[int]) -> list[list[int]]:
    """The integers of each process, as many from all, in order of rank; a collective."""
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
