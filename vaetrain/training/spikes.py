"""Steps that would spoil the weights, found on the device: a gradient that is not finite, or far larger than of late."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

STEPS_BEFORE_JUDGING = 50
"""Steps taken before the gradient norm is compared: in the first ones it falls by orders of magnitude."""


STEPS_REMEMBERED = 100
"""The mean of the gradient norm is over about so many steps."""


class SpikeDetector:
    """Which steps are skipped: those whose gradient is not finite, or far larger than of late; never waits for the device.

    Given the reduced gradient, all processes decide alike.
    """

    def __init__(self, skip_above: float | None, device: torch.device) -> None:
        self.skip_above = math.inf if skip_above is None else skip_above
        self.num_taken = torch.zeros((), dtype=torch.float64, device=device)
        self.mean_log_norm = torch.zeros_like(self.num_taken)

    def detect(self, grad_norm: Float[Tensor, ""]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """1 or 0 on the device: whether the step is to be skipped, and whether that is for a finite but exploding gradient."""
        log_norm = grad_norm.detach().double().clamp_min(1e-30).log()
        finite = torch.isfinite(log_norm)
        excess = log_norm - self.mean_log_norm
        spiked = finite & (excess > math.log(self.skip_above)) & (self.num_taken >= STEPS_BEFORE_JUDGING)
        taken = finite & ~spiked
        # An arithmetic mean of the logarithms of the first steps, an exponential one later.
        self.num_taken = self.num_taken + taken
        share = (1 / self.num_taken).clamp_min(1 / STEPS_REMEMBERED)
        self.mean_log_norm = self.mean_log_norm + torch.where(taken, share * excess, 0.0)
        return (~taken).float(), spiked.float()

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps; `detect` makes new tensors and never writes to these."""
        return {"num_taken": self.num_taken, "mean_log_norm": self.mean_log_norm}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a saved state; ValueError where it is none."""
        if any(state[name].shape != () or not torch.isfinite(state[name]) for name in ("num_taken", "mean_log_norm")):
            raise ValueError("num_taken and mean_log_norm are not one finite number each")
        self.num_taken = state["num_taken"].to(self.num_taken)
        self.mean_log_norm = state["mean_log_norm"].to(self.mean_log_norm)


@contextmanager
def skipping(skipped: Float[Tensor, ""], optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, a step of this fused optimizer leaves weights and moments alone if `skipped` is 1, unseen by the host.

    A gradient scaler's own verdict counts as well, and is the only one that lowers its scale: a spike says nothing about that.
    """

    def add_verdict(optimizer: torch.optim.Optimizer, *_: object) -> None:
        found = getattr(optimizer, "found_inf", None)  # the scaler's
        optimizer.found_inf = skipped if found is None else torch.maximum(found, skipped)  # type: ignore[attr-defined]

    hook = optimizer.register_step_pre_hook(add_verdict)
    try:
        yield
    finally:
        hook.remove()
        if hasattr(optimizer, "found_inf"):
            del optimizer.found_inf
