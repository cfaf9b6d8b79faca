"""Integration of a velocity field over the time from 0 to 1, and the log-density by the divergence along the way."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from vaetrain.model.prior import standard_normal_log_density
from vaetrain.priors.config import Solver

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x (b, …), t (b,)) → dx/dt (b, …)."""

MAX_EXACT_DIMS = 8
"""Dimensions up to which the divergence is summed exactly; beyond it is estimated (Hutchinson)."""


def integrate(
    velocity: Velocity, x: Float[Tensor, "b *latent"], steps: int, solver: Solver
) -> Float[Tensor, "b *latent"]:
    """x at time 1 of what starts at `x` at time 0, in equal steps: Euler's, or Heun's, which takes two velocities each."""
    for number in range(steps):
        start, end = (x.new_full((len(x),), each / steps) for each in (number, number + 1))
        first = velocity(x, start)
        if solver == "heun":
            first = 0.5 * (first + velocity(x + first / steps, end))
        x = x + first / steps
    return x


def log_density(
    velocity: Velocity, x: Float[Tensor, "b *latent"], steps: int, probe: Float[Tensor, "b *latent"] | None = None
) -> Float64[Tensor, " b"]:
    """Log-density, in nats, of `x` at time 1 under the flow that starts as N(0, I); back in time by Heun's method.

    d log p / dt = −∇·v. The divergence is the trace of the Jacobian, exact in up to MAX_EXACT_DIMS dimensions; otherwise εᵀJε
    with `probe` ε of independent signs, which is unbiased.
    """
    exact = math.prod(x.shape[1:]) <= MAX_EXACT_DIMS
    assert exact or probe is not None, "beyond that many dimensions a probe is needed"
    total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for number in reversed(range(steps)):
        later, earlier = (x.new_full((len(x),), each / steps) for each in (number + 1, number))
        first, first_divergence = _with_divergence(velocity, x, later, None if exact else probe)
        second, second_divergence = _with_divergence(velocity, x - first / steps, earlier, None if exact else probe)
        x = x - 0.5 * (first + second) / steps
        total -= 0.5 * (first_divergence.double() + second_divergence.double()) / steps
    return standard_normal_log_density(x.flatten(1)) + total


@torch.enable_grad()
def _with_divergence(
    velocity: Velocity, x: Tensor, t: Tensor, probe: Tensor | None
) -> tuple[Float[Tensor, "b *latent"], Float[Tensor, " b"]]:
    """Velocity and its divergence."""
    x = x.detach().requires_grad_()
    v = velocity(x, t)
    if probe is not None:
        (product,) = torch.autograd.grad((v * probe).sum(), x)
        return v.detach(), (product * probe).flatten(1).sum(1)
    divergence = torch.zeros(len(x), device=x.device)
    flat = v.flatten(1)
    for dim in range(flat.shape[1]):
        (row,) = torch.autograd.grad(flat[:, dim].sum(), x, retain_graph=True)
        divergence = divergence + row.flatten(1)[:, dim]
    return v.detach(), divergence
