"""AdamW, what it decays, and its state as tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vaetrain.config import OptimConfig

MOMENTS = {"step", "exp_avg", "exp_avg_sq"}
"""What AdamW remembers of each parameter."""


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW (CPU and CUDA) of the parameters that are trained; weight decay only on matrices and kernels."""
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim >= 2]
    others = [p for p in trained if p.ndim < 2]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def split_optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """An optimizer's state as its own tensors, named "PARAMETER.STATE", and its groups' scalars."""
    state = optimizer.state_dict()
    tensors = {f"{index}.{name}": value for index, values in state["state"].items() for name, value in values.items()}
    # The learning rate is a function of images seen and is set anew each step.
    groups = [{key: value for key, value in group.items() if key != "lr"} for group in state["param_groups"]]
    return tensors, groups


def restore_optimizer_state(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], groups: list[dict[str, Any]]
) -> None:
    """Inverse of `split_optimizer_state`; moments take the memory format of their parameter, as in the run that saved them.

    Options such as weight decay stay those of `optimizer`: a resume may change them, and config.yaml says so.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        if not 0 <= int(index) < len(parameters):
            raise ValueError(f"there is no parameter {index}")
        parameter = parameters[int(index)]
        if value.shape != (() if key == "step" else parameter.shape) or not value.is_floating_point():
            raise ValueError(
                f"{name} is {value.dtype} of shape {tuple(value.shape)}, its parameter of {tuple(parameter.shape)}"
            )
        like_parameter = torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value
        state.setdefault(int(index), {})[key] = like_parameter.detach()
    if any(values.keys() != MOMENTS for values in state.values()):
        raise ValueError(f"some parameter lacks one of {', '.join(sorted(MOMENTS))}, or has others")
    current = optimizer.state_dict()["param_groups"]
    merged = [{**saved, **now} for now, saved in zip(current, groups, strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": merged})
