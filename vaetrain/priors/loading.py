"""`vaetrain.load`: a trained VAE with the prior that was trained on its latents."""

from __future__ import annotations

from pathlib import Path

import torch

from vaetrain import export
from vaetrain.model.autoencoder import VAE
from vaetrain.priors.saved import prior_of_export, prior_of_run
from vaetrain.runs.directory import RunDirectory


def load(
    path: str | Path,
    *,
    checkpoint: export.CheckpointName = "best",
    weights: export.WeightsName = "ema",
    device: str | torch.device = "cpu",
) -> VAE:
    """A ready VAE (evaluation mode, float32) from an export or a run directory; `sample` draws from its flow-matching prior.

    `checkpoint` and `weights` choose among what a run holds; an export holds one set. The prior is the one that
    vaetrain/train_prior.py trained on the latents of these very weights; without one `sample` draws from N(0, I), and `vae.prior`
    is None. Raises FileNotFoundError when there is neither run nor export, ValueError when a file is damaged or of another format.
    """
    folder = Path(path)
    if (folder / "config.json").is_file():
        vae = export.load(folder, device=device)
        prior = prior_of_export(folder, vae.config.latent_shape)
    else:
        trained = export.load_run(RunDirectory.open(folder).path, checkpoint=checkpoint, weights=weights, device=device)
        vae = trained.vae
        prior = prior_of_run(folder, trained) if weights == "ema" else None
    if prior is not None:
        vae.prior = prior.to(torch.device(device))
    return vae
