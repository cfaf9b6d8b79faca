"""A Gaussian mixture as prior, fitted by expectation-maximisation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from vaetrain.distributed.randomness import mixed_seed
from vaetrain.model.prior import standard_normal_log_density
from vaetrain.priors.aggregate import AggregatePosterior, Posteriors
from vaetrain.priors.config import PriorFitConfig
from vaetrain.priors.gaussian import WhitenedCodes, WhitePrior
from vaetrain.priors.whitening import Whitening
from vaetrain.progress_bar import ProgressBar

MAX_CODES = 20_000
"""Latents that EM sees; its time is proportional to their number."""

MAX_DRAWS = 8
"""Latents drawn from one image's posterior, at most, to bring few images up to MAX_CODES."""

COVARIANCES: tuple[Literal["full", "diag"], ...] = ("full", "diag")

REGULARISATION = 1e-3
"""Added to every variance, in white coordinates, whose own variance is 1."""

MAX_ITERATIONS = 60
"""Of EM; longer fits gained less than 1e-3 nats per dimension."""

TOLERANCE = 1e-3
"""EM ends when the mean log-likelihood of a code changes by less, in nats."""

FIT_DRAW = 11  # what the randomness is for


@dataclass(frozen=True)
class Mixture:
    """A Gaussian mixture of k components in r dimensions."""

    weights: Float64[Tensor, " k"]
    means: Float64[Tensor, "k r"]
    choleskys: Float64[Tensor, "k r r"]

    def log_density(self, w: Float64[Tensor, "b r"]) -> Float64[Tensor, " b"]:
        """log Σₖ πₖ N(w; μₖ, Σₖ) in nats."""
        return log_joint(w, self.weights, self.means, self.choleskys).logsumexp(dim=1)


def log_joint(
    w: Float64[Tensor, "b r"],
    weights: Float64[Tensor, " k"],
    means: Float64[Tensor, "k r"],
    scales: Float64[Tensor, "k r r"] | Float64[Tensor, "k r"],
) -> Float64[Tensor, "b k"]:
    """log πₖ N(w; μₖ, Σₖ) in nats; `scales` are the Cholesky factors of Σₖ, or of diagonal ones the standard deviations."""
    log_densities = []
    for mean, scale in zip(means, scales, strict=True):  # all at once would take b·k·r numbers
        if scale.ndim == 1:
            white, deviations = (w - mean) / scale, scale
        else:
            white = torch.linalg.solve_triangular(scale, (w - mean).T, upper=False).T
            deviations = scale.diagonal()
        log_densities.append(standard_normal_log_density(white) - deviations.log().sum())
    return torch.stack(log_densities, dim=1) + weights.log()


class MixturePrior(WhitePrior):
    """A Gaussian mixture in the leading white coordinates (ex-post density estimation, Ghosh et al. 2020, Sec. 4)."""

    def __init__(self, latent_shape: tuple[int, ...], whitening: Whitening, mixture: Mixture) -> None:
        super().__init__(latent_shape, whitening)
        self.mixture = mixture

    def draw(self, noise: Float[Tensor, "b d"], uniform: Float64[Tensor, " b"]) -> Float[Tensor, "b d"]:
        """See `WhitePrior.draw`; the temperature shrinks each component about its mean."""
        upper_edges = self.mixture.weights.cumsum(0)[:-1].contiguous()
        component = torch.searchsorted(upper_edges, uniform, right=True)
        rank = self.mixture.means.shape[1]
        w = noise.double()
        # Image by image: a batched product may round differently in another batch, and this costs microseconds.
        for row, k in zip(w, component.tolist(), strict=True):
            row[:rank] = self.mixture.means[k] + self.mixture.choleskys[k] @ row[:rank]
        return w

    def white_log_density(self, w: Float64[Tensor, "b d"]) -> Float64[Tensor, " b"]:
        """See `WhitePrior.white_log_density`."""
        rank = self.mixture.means.shape[1]
        return self.mixture.log_density(w[:, :rank]) + standard_normal_log_density(w[:, rank:])

    def tensors(self) -> dict[str, Tensor]:
        """See `Prior.tensors`."""
        mixture = self.mixture
        own = {
            "mixture.weights": mixture.weights,
            "mixture.means": mixture.means,
            "mixture.choleskys": mixture.choleskys,
        }
        return super().tensors() | own


def fit_mixture(
    aggregate: AggregatePosterior, config: PriorFitConfig, whitening: Whitening
) -> tuple[MixturePrior, dict[str, Any]]:
    """Mixtures of full and of diagonal covariances; the one under which held-out codes are most likely is kept.

    The number of components rises until that likelihood falls. Raises ValueError when all are more than there are codes.
    """
    num_dims = aggregate.train.mean.shape[1]
    rank = min(config.leading_dims, num_dims)
    codes = whitening.whiten(fit_codes(aggregate, mixed_seed(config.seed, FIT_DRAW)), rank)
    selection = WhitenedCodes.of(aggregate.selection_codes(config.seed), whitening, rank)
    numbers = [components for components in sorted(config.gmm_components) if components <= len(codes)]
    if not numbers:
        raise ValueError(
            f"--fit.gmm-components {config.gmm_components} are all more than the {len(codes)} codes there are; try fewer"
        )
    tried: list[dict[str, Any]] = []
    candidates: list[MixturePrior] = []
    with ProgressBar("fitting mixtures, at most", len(COVARIANCES) * sum(numbers), "components") as bar:
        for done, covariance in enumerate(COVARIANCES, start=1):
            best = -math.inf
            for components in numbers:
                mixture, facts = expectation_maximisation(
                    codes, components, covariance, mixed_seed(config.seed) % 2**32
                )
                prior = MixturePrior(aggregate.latent_shape, whitening, mixture)
                score = selection.nats_per_dim(mixture.log_density(selection.leading), num_dims)
                candidates.append(prior)
                tried.append({**facts, "selection_nats_per_dim": score})
                bar.update(components)
                if score < best:
                    break
                best = score
            bar.moved_to(done * sum(numbers))
    scores = [facts["selection_nats_per_dim"] for facts in tried]
    chosen = scores.index(max(scores))
    return candidates[chosen], {"leading_dims": rank, "chosen": tried[chosen], "tried": tried}


def expectation_maximisation(
    codes: Float64[Tensor, "n r"], components: int, covariance: Literal["full", "diag"], seed: int
) -> tuple[Mixture, dict[str, Any]]:
    """A mixture of the greatest likelihood that one run of EM finds (Dempster, Laird & Rubin 1977), and what it took.

    On the codes' device; scikit-learn's GaussianMixture finds the same to 1e-9, on the CPU. It begins with components of single
    codes that k-means++ picks by the seed.
    """
    # Imported here because it takes a second or two, and only a fit needs it.
    from sklearn.cluster import kmeans_plusplus
    from threadpoolctl import threadpool_limits

    # With several threads of OpenBLAS, which spin while they wait, a fit beside other work took seven times the CPU time.
    with threadpool_limits(limits=1):
        _, starts = kmeans_plusplus(codes.cpu().numpy(), components, random_state=seed)
    responsibilities = codes.new_zeros(len(codes), components)
    responsibilities[torch.from_numpy(starts).long(), torch.arange(components)] = 1.0
    weights, means, scales = maximise(codes, responsibilities, covariance)
    likelihood, iterations = -math.inf, 0
    for _ in range(MAX_ITERATIONS):
        iterations += 1
        joint = log_joint(codes, weights, means, scales)
        evidence = joint.logsumexp(dim=1, keepdim=True)
        weights, means, scales = maximise(codes, (joint - evidence).exp(), covariance)
        before, likelihood = likelihood, float(evidence.mean())
        if abs(likelihood - before) < TOLERANCE:
            break
    mixture = Mixture(weights, means, scales if covariance == "full" else scales.diag_embed())
    return mixture, {"covariance": covariance, "components": components, "em_iterations": iterations}


def maximise(
    codes: Float64[Tensor, "n r"], responsibilities: Float64[Tensor, "n k"], covariance: Literal["full", "diag"]
) -> tuple[Float64[Tensor, " k"], Float64[Tensor, "k r"], Float64[Tensor, "k ..."]]:
    """The likeliest weights, means and scales (see `log_joint`), given how far each component is responsible for each code."""
    counts = responsibilities.sum(0) + 10 * torch.finfo(codes.dtype).eps
    means = responsibilities.T @ codes / counts[:, None]
    if covariance == "diag":
        variances = responsibilities.T @ codes.square() / counts[:, None] - means.square() + REGULARISATION
        return counts / counts.sum(), means, variances.sqrt()
    covariances = []
    for mean, share, count in zip(means, responsibilities.T, counts, strict=True):
        deviation = codes - mean
        covariances.append((share * deviation.T) @ deviation / count)
        covariances[-1].diagonal().add_(REGULARISATION)
    return counts / counts.sum(), means, torch.linalg.cholesky(torch.stack(covariances))


def fit_codes(aggregate: AggregatePosterior, seed: int) -> Float[Tensor, "n d"]:
    """At most MAX_CODES latents z ~ q(z|x): several of each image when there are few images and z is random."""
    rows = torch.randperm(len(aggregate.train), generator=torch.Generator().manual_seed(seed))[:MAX_CODES]
    train = Posteriors(aggregate.train.mean[rows], aggregate.train.std[rows])
    draws = min(MAX_DRAWS, MAX_CODES // len(train)) if train.std.any() else 1
    return torch.cat([train.sample(mixed_seed(seed, draw)) for draw in range(draws)])
