"""`--train.compile`: what auto means on this machine, a model that is captured once, and what is said where that fails."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import nn

from vaetrain.config import CompileMode, TrainingConfig
from vaetrain.distributed.exchange import gather_objects

C = TypeVar("C", bound=TrainingConfig)

WITH_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")
"""Modes that replay a recorded step, whose tensors the next replay overwrites."""


def resolved(config: C, accelerator: Accelerator, *, kept: CompileMode | bool | None = None) -> C:
    """The config with a mode or False where it says auto; the main process says which on a GPU. A collective.

    auto becomes `kept`, that of the run that goes on; otherwise on GPUs the default mode, if all processes find a C compiler.
    """
    if config.train.compile != "auto":
        return config
    mode, reason = gather_objects([kept], "all processes to start")[0], "as the run that goes on has it"
    if mode is None and accelerator.device.type == "cuda":
        problems = gather_objects([missing_compiler(accelerator.device)], "all processes to look for a compiler")
        problem = next(filter(None, problems), None)
        mode, reason = (False, problem) if problem else ("default", "on a GPU")
    if mode is None:
        mode = False
    elif accelerator.is_main_process:
        print(f"compile {mode}: {reason}", flush=True)
    return replace(config, train=replace(config.train, compile=mode))  # type: ignore[type-var]


def missing_compiler(device: torch.device) -> str | None:
    """What keeps torch.compile from building kernels for this device; None if nothing is known to."""
    variable, names = ("CC", ("clang", "gcc")) if device.type == "cuda" else ("CXX", ("g++", "clang++"))
    wanted = [os.environ[variable]] if os.environ.get(variable) else names
    if any(shutil.which(name.split()[0]) for name in wanted):
        return None
    return (
        f"torch.compile needs a C compiler and there is no {' or '.join(wanted)}; install one or name it in ${variable}"
    )


def compile_in_place(model: nn.Module, mode: CompileMode | bool) -> None:
    """Compile the model's own call, so that checkpoint keys stay the same; the first call captures it, as one graph.

    It takes batches of one size, and gradients: what wants neither, such as validation, calls `model.forward`, which stays
    uncompiled. Raises ValueError without a C compiler.
    """
    assert mode not in (False, "auto")
    if problem := missing_compiler(next(model.parameters()).device):
        raise ValueError(f"--train.compile {mode}: {problem}, or pass --train.compile False")
    torch.compiler.reset()  # graphs of a model before this one would count against the limit of recompilations
    model.compile(mode=mode, fullgraph=True, dynamic=False)
    if mode in WITH_CUDA_GRAPHS:
        for parameter in filter(lambda each: each.requires_grad, model.parameters()):
            # Of its own, added to by each replay. The first replay's would be overwritten by the second.
            parameter.grad = torch.zeros_like(parameter)


@contextmanager
def explaining_failure(config: TrainingConfig) -> Iterator[None]:
    """Turn a failure to compile inside into a ValueError that says how to go without."""
    from torch._dynamo.exc import TorchDynamoException  # which takes seconds to import, and the first optimizer does
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    try:
        yield
    except TorchDynamoException as error:
        cause = " ".join(str(error).splitlines()[:2]) or type(error).__name__  # which backend, and what it raised
        raise ValueError(
            f"torch.compile failed with --train.compile {config.train.compile}; pass --train.compile False to train "
            f"uncompiled, or delete {cache_dir()} if an earlier start was killed while it compiled ({cause})"
        ) from error
