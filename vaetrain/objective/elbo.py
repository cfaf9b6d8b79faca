"""The evidence lower bound, as a loss.

log p(x) ≥ ELBO(x) = E_q[log p(x|z)] − KL(q(z|x) ‖ p(z)) = −distortion − rate   (Kingma & Welling 2013, Eq. 3)
loss = distortion + β · Σ_j max(KL_j, free bits)    (β: Higgins et al. 2017, Eq. 4; free bits: Kingma et al. 2016)

All in nats per image: sums over pixels and latent dimensions, never means, so that β = 1 is the ELBO at every resolution
and latent size.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def rate(kl: Float[Tensor, "b *latent"]) -> Float[Tensor, " b"]:
    """KL(q(z|x) ‖ p(z)) in nats per image: the sum over latent dimensions."""
    return kl.flatten(1).sum(1)


def penalised_rate(kl: Float[Tensor, "b *latent"], free_bits: float) -> Float[Tensor, " b"]:
    """The rate as the loss sees it, in nats per image: every latent dimension costs at least `free_bits`.

    Kingma et al. 2016 average the KL of a dimension over the mini-batch before the maximum; here the maximum is
    taken for each image, so that the loss does not depend on how a global batch is cut among processes.
    """
    return rate(kl.clamp(min=free_bits)) if free_bits > 0 else rate(kl)


def negative_elbo(
    distortion: Float[Tensor, " b"], kl: Float[Tensor, "b *latent"], beta: float, free_bits: float = 0.0
) -> Float[Tensor, " b"]:
    """distortion + β · rate in nats per image; with β = 1 and no free bits, minus the ELBO."""
    return distortion + beta * penalised_rate(kl, free_bits)
