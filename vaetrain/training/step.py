"""The step of a VAE: for training, for the short trainings that measure (scaling/), for the memory probe.

    images uint8 ──flip, to the pixel range──> x ──model(x, noise)──> distortion, kl ──> loss in nats, summed over images

How the gradients of micro-batches and processes become one step: gradient_step.py.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from jaxtyping import Float, Float32
from torch import Tensor

from vaetrain.config import Config
from vaetrain.data.readers.batch import Batch
from vaetrain.data.readers.order import BatchLayout
from vaetrain.distributed.randomness import noise_of_training
from vaetrain.metrics.validation import Comparison
from vaetrain.model.autoencoder import VAE, ElboTerms
from vaetrain.model.likelihood import from_uint8
from vaetrain.objective.elbo import negative_elbo, rate
from vaetrain.training.adversarial import NAMES, Adversary
from vaetrain.training.augment import flip
from vaetrain.training.gradient_step import GradientStep, Losses, prepared
from vaetrain.training.perceptual import PerceptualTerm, loss_terms
from vaetrain.upload import upload


@runtime_checkable
class LossTerm(Protocol):
    """A part of the loss beyond the ELBO: loss of an image = −ELBO_β + Σ weight · value."""

    name: str
    """Under which training logs its mean value, without the weight (train/NAME)."""
    weight: float
    """Nats per image for a value of 1."""
    made_of: Mapping[str, str]
    """What it depends on and the config does not say, such as the hashes of files; a resume needs the same."""

    def __call__(self, x: Float[Tensor, "b c h w"], terms: ElboTerms) -> Float32[Tensor, " b"]:
        """Value of each image, from what the one forward pass gave."""
        ...


@dataclass
class TrainStep(GradientStep[VAE]):
    """The step of a VAE."""

    config: Config
    terms: Sequence[LossTerm] = ()
    """Beyond the ELBO."""
    adversary: Adversary | None = None
    """The discriminator, whose term learns as the model does."""

    @classmethod
    def build(cls, config: Config, layout: BatchLayout, accelerator: Accelerator, *, bare: bool = False) -> TrainStep:
        """A new model with seeded weights, and all that trains it. A collective.

        `bare`: without a moving average, a discriminator, or a step being skipped, and totals in float64, for a measurement.
        """
        torch.manual_seed(config.seed)
        vae = VAE(config.model).to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        vae.keeps_features = keeps_features(config) and not bare
        vae.train_only(config.train.only)
        training = prepared(vae, config, layout, accelerator, bare=bare)
        terms = loss_terms(config, vae.likelihood, accelerator.device)
        adversary = None
        if config.objective.adversarial.weight and not bare:
            adversary = Adversary(config, layout, vae, accelerator.device, accelerator)
        return cls(config, **training, terms=terms, adversary=adversary)

    @property
    def vae(self) -> VAE:
        """The model."""
        return self.module

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """What the terms beyond the ELBO have to say of validation images."""
        terms = tuple(term for term in self.terms if isinstance(term, PerceptualTerm))
        return terms if self.adversary is None else (*terms, self.adversary)

    @property
    def made_of(self) -> dict[str, dict[str, str]]:
        """See `GradientStep.made_of`: what the terms beyond the ELBO depend on."""
        made_of = {term.name: dict(term.made_of) for term in self.terms}
        return made_of if self.adversary is None else made_of | {"adversarial": self.adversary.config.shape}

    @property
    def names_of_totals(self) -> tuple[str, ...]:
        """Of the parts of the loss that are summed."""
        return (
            "loss", "distortion_nats", "rate_nats", *(term.name for term in self.terms), *(NAMES if self.adversary else ()),
        )  # fmt: skip

    @property
    def dims_per_loss(self) -> int:
        """The pixels of an image, times its channels."""
        return self.config.model.num_pixels

    def zero_grad(self) -> None:
        """Of the model and of the discriminator."""
        super().zero_grad()
        if self.adversary:
            self.adversary.zero_grad()

    def losses(self, batch: Batch, positions: slice, *weights: Any, is_last: bool) -> Losses:
        """Nats, summed over the images of a micro-batch: loss, distortion, rate, and what there is of each further term.

        `weights` are β and that of the adversarial term: none or None without it, 0 while the discriminator alone learns.
        """
        beta, adversarial = (*weights, None)[:2]
        config, device = self.config, self.engine.device
        noise, mirrored = noise_of_training(config.seed, positions, config.model.latent_shape, device)
        pixels = upload(batch.images, device)  # uint8 until here
        if config.data.horizontal_flip:
            pixels = flip(pixels, mirrored)
        x = from_uint8(pixels, self.vae.likelihood.pixel_range).contiguous(memory_format=torch.channels_last)
        terms = self.model(x, noise)
        loss = negative_elbo(terms.distortion, terms.kl, beta, config.objective.free_bits).sum()
        further: tuple[Tensor, ...] = ()
        if self.terms or self.adversary:
            beyond, further = self.beyond_elbo(x, terms, positions, adversarial, is_last=is_last)
            loss = loss + beyond
        return Losses(loss, (terms.distortion.sum(), rate(terms.kl).sum(), *further))

    def beyond_elbo(
        self, x: Tensor, terms: ElboTerms, positions: slice, adversarial: float | None, *, is_last: bool
    ) -> tuple[Float[Tensor, ""], tuple[Tensor, ...]]:
        """The weighted terms beyond the ELBO, summed over images, and the totals of each.

        Every term's own networks are passed backward right here, down to the decoder's output, and forgotten; what the model's
        backward pass needs of them is the gradient there.
        """
        params = terms.params.detach().float().requires_grad_()
        values = [term(x, terms._replace(params=params)) for term in self.terms]
        weighted = [term.weight * value for term, value in zip(self.terms, values, strict=True)]
        totals = [value.detach().sum() for value in values]
        loss = torch.zeros((), device=params.device)
        pull = None
        if weighted:
            total = torch.stack(weighted).sum()
            (pull,) = torch.autograd.grad(total, params)
            loss = total.detach()
        if self.adversary:
            if adversarial is None:
                totals += [torch.full_like(loss, math.nan)] * len(NAMES)
            else:
                syncing = contextlib.nullcontext() if is_last else self.engine.no_sync(self.adversary.model)
                judged = self.adversary.judge(x, terms, params, pull, positions, adversarial, syncing)
                totals += judged.totals
                if adversarial:
                    loss = loss + (judged.weight * judged.value).sum()
                    pull = judged.pull if pull is None else pull + judged.pull
        if pull is None:
            return loss, tuple(totals)
        carrier = (terms.params.float() * pull).sum()  # has the gradient, whatever its value
        return loss + (carrier - carrier.detach()), tuple(totals)

    def detect_spikes(self, grad_norm: Float[Tensor, ""]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Both models take a step, or neither does."""
        skipped, spiked = super().detect_spikes(grad_norm)
        if self.spikes and self.adversary and self.adversary.has_judged:
            skipped, spiked = map(torch.maximum, (skipped, spiked), self.adversary.detect_spikes())
        return skipped, spiked

    def update_others(self, lr: float, skipped: Float[Tensor, ""]) -> None:
        """The discriminator."""
        if self.adversary and self.adversary.has_judged:
            self.adversary.update(lr, skipped)


def keeps_features(config: Config) -> bool:
    """Whether the model is to return the input of the decoder's last layer: for the adaptive weight of the adversarial term."""
    return bool(config.objective.adversarial.weight) and config.objective.adversarial.adaptive
