"""Directions in latent space along which images differ most, and moving along them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vaetrain.metrics.active_units import THRESHOLD


@dataclass(frozen=True)
class Directions:
    """Ways to move a latent, the widest first."""

    names: tuple[str, ...]
    steps: Float[Tensor, "n d"]
    """One standard deviation along each, in the flattened latent."""

    def moved(self, z: Float[Tensor, "b *latent"], shifts: Sequence[float]) -> Float[Tensor, "b *latent"]:
        """Latents moved by so many standard deviations along each direction; `shifts` may be empty."""
        if not shifts:
            return z
        if len(shifts) != len(self.names):
            raise ValueError(f"{len(shifts)} shifts are given for {len(self.names)} directions; give one for each")
        return z + (torch.tensor(shifts, dtype=torch.float32) @ self.steps).view(z.shape[1:])


def most_active_units(codes: Float[Tensor, "n d"], num_units: int) -> Directions:
    """The active units (Burda et al. 2016) among the `num_units` of largest variance over posterior means `codes`."""
    variance = codes.double().var(0)
    units = variance.argsort(descending=True, stable=True)[:num_units]
    units = units[variance[units] > THRESHOLD]
    steps = torch.zeros(len(units), codes.shape[1])
    steps[torch.arange(len(units)), units] = variance[units].sqrt().float()
    names = tuple(f"unit {unit} · variance {variance[unit]:.2g}" for unit in units.tolist())
    return Directions(names, steps)


def principal_directions(codes: Float[Tensor, "n d"], num_directions: int) -> Directions:
    """The principal directions of posterior means `codes`, at most n − 1; each points to where its largest entry is positive.

    From the eigenvectors of the n × n Gram matrix: a spatial latent has more dimensions than there are images here.
    """
    centred = codes.double() - codes.double().mean(0)
    values, vectors = torch.linalg.eigh(centred @ centred.T)
    values, vectors = values.flip(0), vectors.flip(1)  # largest first
    num = min(num_directions, len(codes) - 1, int((values > 1e-12 * values.sum()).sum()))
    # A unit vector v of the Gram matrix gives Xᵀv, of length √value; one standard deviation is √(value / (n − 1)).
    steps = (centred.T @ vectors[:, :num]).T / (len(codes) - 1) ** 0.5
    largest = steps.gather(1, steps.abs().argmax(1, keepdim=True))
    shares = values[:num] / values.sum()
    names = tuple(
        f"direction {number} · {share:.1%} of the variance" for number, share in enumerate(shares.tolist(), 1)
    )
    return Directions(names, (steps * largest.sign()).float())
