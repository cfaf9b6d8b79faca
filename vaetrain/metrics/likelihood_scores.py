"""Everything a model's likelihood and latent are scored by, under the names that evaluation.json uses."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from accelerate import Accelerator

from vaetrain.data.readers.reader import Reader
from vaetrain.metrics.active_units import THRESHOLD, latent_activity
from vaetrain.metrics.elbo_gap import elbo_gap
from vaetrain.metrics.elbo_surgery import elbo_surgery
from vaetrain.metrics.estimate import Estimate
from vaetrain.metrics.importance_bound import importance_bound
from vaetrain.metrics.likelihood_config import LikelihoodConfig
from vaetrain.model.autoencoder import VAE

NOT_VARIATIONAL = "a deterministic autoencoder has no posterior density, hence no ELBO and no bound on log p(x)"

VARIATIONAL_SCORES = (
    "eval/nll_nats", "eval/nll_bits_per_dim", "eval/rate_nats", "eval/mutual_information_nats", "eval/marginal_kl_nats",
    "eval/dimension_kl_nats", "eval/total_correlation_nats", "eval/elbo_gap_nats",
)  # fmt: skip


def likelihood_scores(
    vae: VAE,
    train_reader: Reader,
    val_reader: Reader,
    accelerator: Accelerator,
    config: LikelihoodConfig,
    batch_size: int,
) -> dict[str, Any]:
    """Scores by name in nats per image, each with its `_se`, and `likelihood_protocol`; a collective.

    Of the val split but for the gap. For a deterministic autoencoder all but the active units are None, with
    `eval/nll_nats_reason`. `batch_size` is in images, for the encoder.
    """
    activity = latent_activity(vae, val_reader, accelerator, batch_size)
    scores: dict[str, Any] = {
        "eval/active_units": activity.active_units,
        "eval/active_units_threshold": THRESHOLD,
    }
    if not vae.config.variational:
        return {**scores, **dict.fromkeys(VARIATIONAL_SCORES), "eval/nll_nats_reason": NOT_VARIATIONAL}

    bound = importance_bound(vae, val_reader, accelerator, config)
    surgery = elbo_surgery(vae, val_reader, accelerator, config, batch_size)
    gap = elbo_gap(vae, train_reader, val_reader, accelerator, batch_size, config.seed)
    nll = -bound.log_prob.mean
    return {
        **scores,
        "eval/nll_nats": nll,
        "eval/nll_nats_se": bound.log_prob.standard_error,
        "eval/nll_bits_per_dim": vae.likelihood.bits_per_dim(nll, vae.config.num_pixels),
        **_with_error("eval/rate_nats", surgery.rate),
        **_with_error("eval/mutual_information_nats", surgery.mutual_information),
        **_with_error("eval/marginal_kl_nats", surgery.marginal_kl),
        **_with_error("eval/dimension_kl_nats", surgery.dimension_kl_sum),
        "eval/total_correlation_nats": surgery.total_correlation,
        "eval/elbo_gap_nats": gap.gap,
        "eval/elbo_gap_nats_se": gap.standard_error,
        "likelihood_protocol": {
            "nll": {
                "num_samples": bound.num_samples,
                "num_images": bound.log_prob.num_images,
                "bounds_nats": {str(k): asdict(estimate) for k, estimate in bound.bounds.items()},
                "elbo_of_these_images_nats": asdict(bound.elbo),
                "gain_over_elbo_nats": asdict(bound.gain),
                "effective_samples": asdict(bound.effective_samples),
            },
            "aggregate_posterior": {
                "num_images": surgery.rate.num_images,
                "latents_per_image": config.latents_per_image,
                "mutual_information_limit_nats": surgery.limit,
            },
            "elbo_gap": {"train_nats": asdict(gap.train), "val_nats": asdict(gap.val)},
            "seed": config.seed,
        },
    }


def _with_error(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.mean, f"{name}_se": estimate.standard_error}
