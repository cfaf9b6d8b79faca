"""The scores of a trained model, group by group."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from vaetrain import distributed, latent_pictures
from vaetrain.command_line import plain
from vaetrain.data.reader import Reader, open_split
from vaetrain.export import load_run
from vaetrain.files import sha256_of_file
from vaetrain.metrics.config import EvaluateConfig
from vaetrain.metrics.extractor import FeatureExtractor, missing_weights
from vaetrain.metrics.features import NumberedImages
from vaetrain.metrics.generation import Reference, reconstruct, reconstruction_fid
from vaetrain.metrics.kept_samples import keep
from vaetrain.metrics.likelihood_scores import likelihood_scores
from vaetrain.metrics.perceptual_distance import PerceptualDistance, how_to_get_weights, reconstruction_lpips
from vaetrain.metrics.protocol import Protocol
from vaetrain.metrics.reference import RealImages
from vaetrain.metrics.validation import validate
from vaetrain.model.prior import Prior, StandardNormal
from vaetrain.nearest import draw_images, memorisation
from vaetrain.priors.config import PriorName
from vaetrain.priors.fit import fitted_priors, prior_table, priors_for
from vaetrain.priors.saved import SavedPrior
from vaetrain.run import RunDirectory, provenance
from vaetrain.sampling import gather_samples, generate

PRIOR_COLUMNS = 12
"""Samples of each prior in their picture."""


class Scoring:
    """A trained model, the images it is held against, and each group of scores as a method; all of them collectives."""

    def __init__(self, config: EvaluateConfig, accelerator: Accelerator) -> None:
        self.config = config
        self.accelerator = accelerator
        self.extractor = open_extractor(config, accelerator)
        measures_lpips = "lpips" in config.scores and config.lpips.backbone is not None
        self.distance = PerceptualDistance(config.lpips).to(accelerator.device) if measures_lpips else None
        self.trained = load_run(config.run, checkpoint=config.checkpoint, device=accelerator.device)
        self.run = RunDirectory.open(config.run)
        data = replace(self.run.config().data, allow_pipe=config.allow_pipe)
        self.data = data if config.data is None else replace(data, train=config.data, val=None)
        self.trained.vae.config.check_images(self.val_reader.manifest.image_size, self.val_reader.manifest.channels)

    @cached_property
    def train_reader(self) -> Reader:
        """The train split."""
        return open_split(self.data, self.accelerator, "train")

    @cached_property
    def val_reader(self) -> Reader:
        """The val split."""
        return open_split(self.data, self.accelerator, "val")

    @cached_property
    def priors(self) -> dict[PriorName, SavedPrior]:
        """The chosen priors, fitted where there is no fit yet; empty when it is the standard normal alone, which needs none.

        `all` leaves out those that this latent is too large for.
        """
        names = self.config.chosen_priors
        if names == ("standard",):
            return {}
        if "all" in self.config.priors:
            names = tuple(name for name in names if name in priors_for(self.trained.vae.config.latent_shape))
        return fitted_priors(
            self.config.run, self.trained, names, self.accelerator,
            lambda split: self.train_reader if split == "train" else self.val_reader, self.config.fit,
        )  # fmt: skip

    @property
    def first_prior(self) -> PriorName:
        """The prior that `eval/fid` is of."""
        return next(iter(self.priors), "standard")

    def prior(self, name: PriorName) -> Prior:
        """What samples are drawn from."""
        return self.priors[name].prior if self.priors else StandardNormal(self.trained.vae.config.latent_shape)

    def elbo(self) -> dict[str, Any]:
        """ELBO and reconstruction of every validation image."""
        scores = validate(self.trained.vae, self.val_reader, self.accelerator, self.config.batch_size, self.config.seed)
        return {f"val/{name}": value for name, value in plain(scores).items()}

    def generation(self) -> dict[str, Any]:
        """Samples of each prior against training images, and what they were computed from."""
        self._draw_priors()
        table = {row.pop("prior"): row for row in prior_table(self.priors)}
        if self.extractor is None:
            reason = missing_weights(self.config.fid)
            return {"eval/fid": None, "eval/fid_reason": reason, "priors": table}
        real = RealImages(self.data, "train", self.config.fid)
        protocol = Protocol.of(self.config.fid, real.num_images)
        first = self.first_prior
        # Before the reference, to find fault with where samples are to be kept.
        images = self._samples(first, protocol.num_generated)
        val = RealImages(self.data, "val", self.config.fid)
        reference = Reference.open(real, val, protocol, self.config.fid, self.extractor, self.accelerator)
        scores = reference.score(images, self.accelerator)
        for name, row in table.items():
            if name == first:
                row |= {score: value for score, value in scores.items() if score.startswith("eval/")}
            else:
                images = self._samples(name, protocol.num_generated)
                row |= reference.score(images, self.accelerator, what=f"samples of {name}")
        listing = out_file(self.config).with_suffix(".reference_images.jsonl")
        if self.accelerator.is_main_process:
            reference.write_images(listing)
        scores["fid_protocol"] |= {
            "prior": first,
            "reference_images": listing.name,
            "kept_samples": str(self.config.keep_samples) if self.config.keep_samples else None,
        }
        return {**scores, "priors": table}

    def reconstruction(self) -> dict[str, Any]:
        """rFID of the val split, and what it was computed from."""
        config = self.config
        if self.extractor is None:
            return {"eval/rfid": None, "eval/rfid_reason": missing_weights(config.fid)}
        images = reconstruct(self.trained.vae, self.val_reader, self.accelerator, config.batch_size)
        real = RealImages(self.data, "val", config.fid)
        return reconstruction_fid(images, real, self.extractor, self.accelerator, config.fid.batch_size)

    def perceptual(self) -> dict[str, Any]:
        """LPIPS of the val split's reconstructions."""
        config, distance = self.config.lpips, self.distance
        if distance is None:
            return {"eval/lpips": None, "eval/lpips_reason": how_to_get_weights(config.net)}
        found = reconstruction_lpips(self.trained.vae, self.val_reader, self.accelerator, distance, config.batch_size)
        return {
            "eval/lpips": found.mean,
            "eval/lpips_se": found.standard_error,
            "lpips_protocol": {
                "net": config.net,
                "num_images": found.num_images,
                "backbone_sha256": distance.backbone_sha256,
                "heads_sha256": distance.heads_sha256,
            },
        }

    def likelihood(self) -> dict[str, Any]:
        """How likely the model finds images, and what its latent holds."""
        return likelihood_scores(
            self.trained.vae, self.train_reader, self.val_reader, self.accelerator, self.config.likelihood,
            self.config.batch_size,
        )  # fmt: skip

    def nearest(self) -> dict[str, Any]:
        """Whether samples of the first prior repeat training images; figures/nearest.png."""
        config, vae = self.config, self.trained.vae
        samples = gather_samples(
            vae, self.accelerator, config.num_pictures, seed=config.seed, batch_size=config.batch_size,
            prior=self.prior(self.first_prior),
        )  # fmt: skip
        return dict(
            memorisation(
                vae, samples, self.train_reader, self.val_reader, self.accelerator, self.run.figures / "nearest.png",
                seed=config.seed,
            )
        )  # fmt: skip

    def latents(self) -> dict[str, Any]:
        """Pictures of the latent space in the run's figures: interpolations, traversals and the codes' principal axes."""
        images, labels = draw_images(self.val_reader, self.config.num_pictures, self.accelerator, self.config.seed)
        if self.accelerator.is_main_process:
            vae, figures = self.trained.vae, self.run.figures
            latent_pictures.save_interpolations(vae, images[:12], figures / "latent_interpolations.png")
            latent_pictures.save_traversals(vae, images, figures / "latent_traversals.png")
            classes = self.val_reader.manifest.classes
            latent_pictures.save_latent_pca(vae, images, labels, classes, figures / "latent_pca.png")
        return {}

    def provenance(self, fingerprint: str) -> dict[str, Any]:
        """What is making these scores, from the data of that fingerprint."""
        return provenance(
            device=distributed.device_name(self.accelerator.device),
            num_processes=self.accelerator.num_processes,
            processes_per_node=distributed.processes_per_node(),
            dataset_fingerprint=fingerprint,
        )

    def _draw_priors(self) -> None:
        vae, config = self.trained.vae, self.config
        samples: dict[str, Tensor] = {}
        for name, saved in self.priors.items():
            nats = saved.facts.heldout_nats_per_dim
            label = name if nats is None else f"{name}\n{nats:.2f} nats/dim"
            samples[label] = gather_samples(
                vae, self.accelerator, PRIOR_COLUMNS, seed=config.seed, batch_size=PRIOR_COLUMNS, prior=saved.prior
            )
        if not samples:
            return
        real, _ = draw_images(self.val_reader, PRIOR_COLUMNS, self.accelerator, config.seed)
        if self.accelerator.is_main_process:
            latent_pictures.save_prior_comparison(samples, self.run.figures / "priors.png", real=real)

    def _samples(self, name: PriorName, num_images: int) -> Iterable[NumberedImages]:
        """This process's part of the sample set that is scored; that of the first prior is kept if that was asked for."""
        config, trained = self.config, self.trained
        images = generate(
            trained.vae, self.accelerator, num_images, seed=config.seed, temperature=1.0,
            batch_size=config.batch_size, prior=self.prior(name),
        )  # fmt: skip
        if config.keep_samples is None or name != self.first_prior:
            return images
        content = {
            "run": str(config.run),
            "checkpoint": str(trained.checkpoint),
            "checkpoint_sha256": sha256_of_file(config.run / trained.checkpoint / "ema.safetensors"),
            "prior": name,
            "prior_sha256": self.priors[name].sha256 if self.priors else None,
            "temperature": 1.0,
            "seed": config.seed,
            "count": num_images,
            "batch_size": config.batch_size,
        }
        details = {
            "training": {"config": trained.config, "provenance": trained.provenance, "dataset": trained.dataset},
            "provenance": self.provenance(trained.dataset["train"]["fingerprint"]),
        }
        return keep(images, config.keep_samples, content, details, self.accelerator)


def out_file(config: EvaluateConfig) -> Path:
    """Where the scores go."""
    return config.out or RunDirectory(config.run).evaluation_file


def open_extractor(config: EvaluateConfig, accelerator: Accelerator) -> FeatureExtractor | None:
    """The network that FID compares images through, first of all, so that a wrong file costs nobody an evaluation.

    None when no weights are given and other scores were asked for; raises ValueError when none were, or when samples are to
    be kept that nobody would draw.
    """
    if "fid" not in config.scores and "rfid" not in config.scores:
        return None
    missing = missing_weights(config.fid)
    if missing is None:
        return FeatureExtractor(config.fid, accelerator.device)
    if not set(config.scores) - {"fid", "rfid"}:
        raise ValueError(f"--scores {' '.join(config.scores)}: {missing}")
    if config.keep_samples is not None:
        raise ValueError(f"--keep-samples {config.keep_samples}: samples are drawn for FID, and {missing}")
    return None
