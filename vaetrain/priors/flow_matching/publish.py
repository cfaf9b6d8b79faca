"""A trained prior as a file beside the first stage's checkpoint, with the facts of its training."""

from __future__ import annotations

import math
from dataclasses import replace

from vaetrain.command_line import plain
from vaetrain.export import TrainedModel, weights_sha256
from vaetrain.files import sha256_of_file
from vaetrain.latents.reader import LatentReader
from vaetrain.priors.config import FlowSettings
from vaetrain.priors.flow_matching.config import PriorTraining
from vaetrain.priors.flow_matching.model import FlowMatching
from vaetrain.priors.flow_matching.prior import FlowMatchingPrior
from vaetrain.priors.saved import FORMAT_VERSION, PriorFacts, prior_file, save_prior
from vaetrain.progress_bar import ProgressBar
from vaetrain.runs.directory import RunDirectory
from vaetrain.training import checkpoint as checkpoints

DENSITY_LATENTS = 100
DENSITY_STEPS = 25
"""Held-out latents whose log-density is told, and the steps of its integration, which takes as long as those of samples."""


def publish(
    run: RunDirectory, config: PriorTraining, trained: TrainedModel, held_out: LatentReader
) -> FlowMatchingPrior:
    """Write RUN/priors/CHECKPOINT/flow-matching.safetensors from the best checkpoint of the prior's own run.

    For the main process alone. What was there before is replaced; returns the prior.
    """
    best = checkpoints.best(run.path)
    manifest = held_out.manifest
    model = FlowMatching(config.model, manifest.latent_shape, len(manifest.classes))
    checkpoints.load_into(model, best / "ema.safetensors")
    model = model.to(held_out.mean.device).eval().requires_grad_(False)
    prior = FlowMatchingPrior.trained_as(config, model, manifest.classes)
    codes = held_out.first(DENSITY_LATENTS).z.flatten(1)
    with ProgressBar("log-density of held-out latents"):
        density = replace(prior, settings=FlowSettings(steps=DENSITY_STEPS)).log_density(codes)
    progress = checkpoints.read_progress(best)
    facts = PriorFacts(
        format_version=FORMAT_VERSION,
        prior="flow-matching",
        checkpoint=str(trained.checkpoint),
        checkpoint_sha256=weights_sha256(config.first_stage, trained),
        dataset_fingerprint=trained.dataset["train"]["fingerprint"],
        latent_shape=manifest.latent_shape,
        num_codes=manifest.splits["train"].num_images,
        fit=plain(config),
        heldout_nats_per_dim=None if density is None else float(density.mean()) / math.prod(manifest.latent_shape),
        heldout_num_codes=len(codes),
        details={
            "classes": list(prior.classes),
            "network": plain(config.model),
            "num_labels": len(manifest.classes),
            "knows_no_class": prior.knows_no_class,
            "latents_fingerprint": manifest.fingerprint,
            "run": str(run.path),
            "images_seen": progress.images_seen,
            "flow_loss": None if progress.best_score is None else -progress.best_score,
            "weights_sha256": sha256_of_file(best / "ema.safetensors"),
            "provenance": RunDirectory(best).provenance(),
        },
    )
    save_prior(prior_file(config.first_stage, trained, "flow-matching"), prior, facts)
    print(f"prior flow-matching of {progress.images_seen:,} latents seen put beside {trained.checkpoint}", flush=True)
    return prior
