"""Fitting priors to a checkpoint's aggregate posterior: all missing ones in one pass over the training images."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from vaetrain.command_line import plain
from vaetrain.data.readers.reader import Reader
from vaetrain.distributed import exchange
from vaetrain.distributed.randomness import mixed_seed
from vaetrain.export import TrainedModel, weights_sha256
from vaetrain.model.prior import Prior, StandardNormal
from vaetrain.priors.aggregate import AggregatePosterior, gather_aggregate
from vaetrain.priors.codes import MeanCode, RandomCode
from vaetrain.priors.config import PRIOR_NAMES, PriorFitConfig, PriorName
from vaetrain.priors.flow import fit_flow
from vaetrain.priors.flow_matching.prior import FlowMatchingPrior
from vaetrain.priors.gaussian import GaussianPrior
from vaetrain.priors.mixture import fit_mixture
from vaetrain.priors.saved import FORMAT_VERSION, PriorFacts, SavedPrior, load_prior, prior_file, save_prior
from vaetrain.priors.whitening import Whitening
from vaetrain.progress_bar import ProgressBar

MAX_COVARIANCE_DIMS = 4096
"""Latent dimensions up to which gaussian, gmm and flow are fitted: a matrix of 128 MiB; a minute or two on a CPU for
that and its eigenvectors."""

MAX_MEAN_CODES = 10_000
"""Codes that mean-code keeps in its file, drawn at random: shards may be in the order of classes."""

MEAN_CODES = 13  # what the randomness is for


def priors_for(latent_shape: Sequence[int]) -> tuple[PriorName, ...]:
    """The priors that latents of this shape allow, in the order of tables."""
    if math.prod(latent_shape) <= MAX_COVARIANCE_DIMS:
        return PRIOR_NAMES
    return tuple(name for name in PRIOR_NAMES if name not in ("gaussian", "gmm", "flow"))


def fitted_priors(
    run: Path,
    trained: TrainedModel,
    names: Sequence[PriorName],
    accelerator: Accelerator,
    reader_of: Callable[[Literal["train", "val"]], Reader],
    config: PriorFitConfig,
    unfitted: dict[PriorName, str] | None = None,
) -> dict[PriorName, SavedPrior]:
    """The named priors of a run's checkpoint, from their files; those that have none are fitted and saved. A collective.

    `reader_of` a split is asked when something is to be fitted; who gave it closes the readers. All processes encode, the
    main one fits, everybody reads the file: the run directory is one that all of them see. A prior that cannot be fitted goes into
    `unfitted` with the reason, in place of an error, if that is given. Raises ValueError when a file is
    of something else (see `load_prior`), the images are not those the run was trained on, or the latent is too large for the
    prior.
    """
    if too_large := [name for name in names if name not in priors_for(trained.vae.config.latent_shape)]:
        raise ValueError(
            f"{', '.join(too_large)} would need the covariance of {math.prod(trained.vae.config.latent_shape):,} latent "
            f"dimensions, more than {MAX_COVARIANCE_DIMS:,}; use standard, mean-code or random-code"
        )
    files = {name: prior_file(run, trained, name) for name in names}
    sha256 = weights_sha256(run, trained)
    missing = [name for name, file in files.items() if not file.is_file()]
    if "flow-matching" in missing:
        reason = untrained(run, trained)
        if unfitted is None:
            raise FileNotFoundError(reason)
        missing.remove("flow-matching")
        del files["flow-matching"]
        unfitted["flow-matching"] = reason
    # Loaded first, to refuse one of something else before a pass over the data and not after it.
    priors = {name: load_prior(file, trained, sha256, config) for name, file in files.items() if name not in missing}
    exchange.meet("all processes to look for fitted priors")  # nobody saves before everybody has
    if missing:
        train_reader, fingerprint = reader_of("train"), trained.dataset["train"]["fingerprint"]
        if train_reader.manifest.fingerprint != fingerprint:
            raise ValueError(
                f"{run} was trained on the shard set with fingerprint {fingerprint}; the one given has "
                f"{train_reader.manifest.fingerprint}, and a prior is fitted to the training images"
            )
        aggregate = gather_aggregate(trained.vae, train_reader, reader_of("val"), accelerator, config)
        if accelerator.is_main_process:
            aggregate = aggregate.to(accelerator.device)
        whitening = functools.cache(partial(Whitening.of, aggregate))
        for name in missing:

            def fit_and_save(name: PriorName = name) -> None:
                print(f"fitting prior {name} to {run / trained.checkpoint}", flush=True)
                with ProgressBar(f"fitting prior {name}"):
                    prior, details = fit_prior(name, aggregate, config, whitening)
                facts = PriorFacts(
                    format_version=FORMAT_VERSION,
                    prior=name,
                    checkpoint=str(trained.checkpoint),
                    checkpoint_sha256=sha256,
                    dataset_fingerprint=fingerprint,
                    latent_shape=aggregate.latent_shape,
                    num_codes=len(aggregate.train),
                    fit=plain(config),
                    heldout_nats_per_dim=nats_per_dim(prior, aggregate.heldout_codes(config.seed)),
                    heldout_num_codes=len(aggregate.val) // 2,
                    details=details,
                )
                save_prior(files[name], prior, facts)

            try:
                # Together after each one, since nobody waits longer than the user allows.
                exchange.decided_by_main(accelerator, fit_and_save, f"fit prior {name}")
                priors[name] = load_prior(files[name], trained, sha256, config)
            except Exception as error:
                if unfitted is None or isinstance(error, exchange.WaitedTooLong):
                    raise
                unfitted[name] = f"{type(error).__name__}: {error}"
    for saved in priors.values():
        if isinstance(saved.prior, FlowMatchingPrior):
            saved.prior.to(accelerator.device)
    return {name: priors[name] for name in names if name in priors}


def untrained(run: Path, trained: TrainedModel) -> str:
    """That there is no flow-matching prior of this checkpoint, and what makes one."""
    return (
        f"{prior_file(run, trained, 'flow-matching')} does not exist: no flow-matching prior was trained on the latents of "
        f"{trained.checkpoint}; vaetrain/train_prior.py --first-stage {run} trains one"
    )


def prior_table(priors: dict[PriorName, SavedPrior]) -> list[dict[str, Any]]:
    """One row for each prior: its name, held-out likelihood (nats per dimension; None without a density), file and hash."""
    return [
        {
            "prior": name,
            "heldout_nats_per_dim": saved.facts.heldout_nats_per_dim,
            "heldout_num_codes": saved.facts.heldout_num_codes,
            "num_codes": saved.facts.num_codes,
            "details": saved.facts.details,
            "file": str(saved.file),
            "sha256": saved.sha256,
        }
        for name, saved in priors.items()
    ]


def fit_prior(
    name: PriorName,
    aggregate: AggregatePosterior,
    config: PriorFitConfig,
    whitening: Callable[[], Whitening] | None = None,
) -> tuple[Prior, dict[str, Any]]:
    """Fit one prior in this process, on the aggregate's device, where it stays until it is saved.

    The same aggregate and settings give the same fit on the same device. `whitening` gives that of the aggregate, if it is to be
    computed once for several priors. Returns with the prior what was tried and chosen.
    """
    shape = aggregate.latent_shape
    whitening = whitening or partial(Whitening.of, aggregate)
    match name:
        case "standard":
            return StandardNormal(shape), {}
        case "mean-code":
            generator = torch.Generator().manual_seed(mixed_seed(config.seed, MEAN_CODES))
            rows = torch.randperm(len(aggregate.train), generator=generator)[:MAX_MEAN_CODES]
            return MeanCode(shape, aggregate.train.mean[rows], config.mean_code_images), {}
        case "random-code":
            return RandomCode(shape, aggregate.train.mean.amin(0), aggregate.train.mean.amax(0)), {}
        case "gaussian":
            return GaussianPrior(shape, whitening()), {}
        case "gmm":
            return fit_mixture(aggregate, config, whitening())
        case "flow":
            return fit_flow(aggregate, config, whitening())
        case "flow-matching":
            raise ValueError("vaetrain/train_prior.py trains this one")


def nats_per_dim(prior: Prior, codes: Float[Tensor, "n d"]) -> float | None:
    """Mean log-density of codes in nats per latent dimension, None for a prior without a density."""
    log_density = prior.log_density(codes)
    return None if log_density is None else float(log_density.mean()) / codes.shape[1]
