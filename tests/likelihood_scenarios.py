"""Likelihood scores of an untrained VAE on however many processes there are; for test_likelihood_scores.py."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from vaetrain.data.config import DataConfig
from vaetrain.data.readers.reader import open_reader
from vaetrain.distributed import processes
from vaetrain.metrics.active_units import latent_activity
from vaetrain.metrics.likelihood_config import LikelihoodConfig
from vaetrain.metrics.likelihood_scores import likelihood_scores
from vaetrain.metrics.lpips_config import LpipsConfig
from vaetrain.metrics.perceptual_distance import PerceptualDistance, reconstruction_lpips
from vaetrain.model.autoencoder import VAE
from vaetrain.model.config import ModelConfig

MODEL = ModelConfig(image_size=16, base_channels=8, channel_mult=(1, 2), num_res_blocks=1, latent_channels=2)
SAMPLES = {"num_samples": 60, "num_posteriors": None}
SCENARIOS = {
    "whole": LikelihoodConfig(num_images=None, **SAMPLES),
    "small batches": LikelihoodConfig(num_images=None, batch_size=7, **SAMPLES),
    "some": LikelihoodConfig(num_images=5, num_samples=60, num_posteriors=15, latents_per_image=2),
}


def measure(accelerator: Accelerator, shards: Path, lpips: Path) -> dict[str, Any]:
    """The scores of each scenario; a collective."""
    torch.manual_seed(0)
    vae = VAE(MODEL).eval().requires_grad_(False)
    train, val = (
        open_reader(DataConfig(train=str(shards)), split, device=accelerator.device) for split in ("train", "val")
    )
    results: dict[str, Any] = {"num_processes": accelerator.num_processes}
    for batch_size, (name, config) in zip((23, 4, 16), SCENARIOS.items(), strict=True):
        results[name] = likelihood_scores(vae, train, val, accelerator, config, batch_size)
    activity = latent_activity(vae, val, accelerator, 5)
    results["activity"] = {name: getattr(activity, name).flatten().tolist() for name in ("mean", "variance", "kl")}
    distance = PerceptualDistance(LpipsConfig("vgg", lpips / "vgg-backbone.pth", lpips / "vgg-heads.pth"))
    results["lpips"] = dataclasses.asdict(reconstruction_lpips(vae, val, accelerator, distance, batch_size=5))
    return results


def measure_together(shards: Path, lpips: Path, out: Path) -> None:
    """Write the scores as JSON; a collective of all processes."""
    accelerator = processes.start()
    with processes.finishing(accelerator):
        results = measure(accelerator, shards, lpips)
        if accelerator.is_main_process:
            out.write_text(json.dumps(results))
