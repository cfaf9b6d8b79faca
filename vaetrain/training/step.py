"""One training step on one global batch: for training, for the short trainings that measure (scaling/), for the memory probe.

    accumulate    forward and backward of this process's micro-batches
    update        clip, find out whether the step is to be skipped, AdamW, the moving average

Neither waits for the device: what a step showed stays there, in a StepResult, until somebody asks.

    images uint8 ──flip, to the pixel range──> x ──model(x, noise)──> distortion, kl ──> loss in nats, summed over images
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from jaxtyping import Float, Float32
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

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
from vaetrain.training.compilation import WITH_CUDA_GRAPHS, compile_in_place
from vaetrain.training.ema import ExponentialMovingAverage
from vaetrain.training.noise_scale import NOISE_METERS, GradientNoiseProbe, GradientNorms
from vaetrain.training.optimizer import build_optimizer
from vaetrain.training.perceptual import PerceptualTerm, loss_terms
from vaetrain.training.spikes import SpikeDetector, skipping
from vaetrain.upload import upload


@runtime_checkable  # for the type checks of the tests
class Engine(Protocol):
    """What a step needs of Accelerate: which arithmetic, and how gradients of several processes become one."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        ...

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """Of the loss, in fp16."""
        ...

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Inside, a backward pass leaves the gradients to this process."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss, of which DDP takes the mean over processes."""
        ...

    def clip_grad_norm_(self, parameters: Iterator[nn.Parameter], max_norm: float) -> Tensor:
        """Scale the gradients down to this norm; returns what it was."""
        ...


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


class StepResult(NamedTuple):
    """What a step showed, on the device."""

    num_images: int
    """Of this process."""
    totals: dict[str, Float[Tensor, ""]]
    """Nats, summed over this process's images: loss, distortion_nats, rate_nats; and what there is of each further term."""
    grad_norm: Float[Tensor, ""]
    """Of the loss per pixel, mean over the global batch, before clipping; the same on every process."""
    skipped: Float[Tensor, ""]
    """1 where weights and moments were left alone, else 0."""
    spiked: Float[Tensor, ""]
    """1 where that was for a finite gradient far larger than of late."""
    noise_norms: GradientNorms | None
    """What the gradient noise scale is made of, if it is watched."""

    @property
    def sums(self) -> dict[str, Tensor]:
        """All numbers of which training logs the mean per image, times this process's images."""
        sums = self.totals | {"grad_norm": self.grad_norm * self.num_images}
        if self.noise_norms:
            squares = (self.grad_norm**2, *self.noise_norms)
            sums |= {name: sq * self.num_images for name, sq in zip(NOISE_METERS, squares, strict=True)}
        return sums


@dataclass
class TrainStep:
    """The step of one model; its order is accumulate, update, accumulate, update …"""

    config: Config
    layout: BatchLayout
    engine: Engine
    vae: VAE
    model: nn.Module
    """`vae` as Accelerate prepared it: DDP works only through its forward."""
    optimizer: Any
    """AdamW as Accelerate prepared it."""
    ema: ExponentialMovingAverage[VAE] | None = None
    spikes: SpikeDetector | None = None
    """None: nothing is skipped, as a measurement wants it that looks for the rate at which training fails."""
    noise_probe: GradientNoiseProbe | None = None
    terms: Sequence[LossTerm] = ()
    """Beyond the ELBO."""
    adversary: Adversary | None = None
    """The discriminator, whose term learns as the model does."""
    sums_in: torch.dtype = torch.float32
    """Of the totals over micro-batches."""

    @classmethod
    def build(cls, config: Config, layout: BatchLayout, accelerator: Accelerator, *, bare: bool = False) -> TrainStep:
        """A new model with seeded weights, and all that trains it. A collective.

        `bare`: without a moving average, a discriminator, or a step being skipped, and totals in float64, for a measurement.
        """
        torch.manual_seed(config.seed)
        vae = VAE(config.model).to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        vae.keeps_features = keeps_features(config) and not bare
        vae.train_only(config.train.only)
        ema = None if bare else ExponentialMovingAverage(vae, config.train.ema_half_life_images)
        if config.train.compile:
            compile_in_place(vae, config.train.compile)
        adamw = build_optimizer(vae, config.optim)
        model, optimizer = accelerator.prepare(vae, adamw)
        if isinstance(model, DistributedDataParallel):
            model.broadcast_buffers = False  # which never change; as an argument torch 2.15 has it deprecated
            if config.train.gradient_compression == "bf16":
                model.register_comm_hook(None, bf16_compress_hook)
        spikes = None if bare else SpikeDetector(config.train.skip_above, accelerator.device)
        noise_probe = None
        if config.log.noise_scale:
            noise_probe = GradientNoiseProbe(model, adamw, layout, accelerator.num_processes)
        terms = loss_terms(config, vae.likelihood, accelerator.device)
        adversary = None
        if config.objective.adversarial.weight and not bare:
            adversary = Adversary(config, layout, vae, accelerator.device, accelerator)
        sums_in = torch.float64 if bare else torch.float32
        return cls(
            config, layout, accelerator, vae, model, optimizer, ema, spikes, noise_probe, terms, adversary, sums_in
        )

    @property
    def averaged(self) -> VAE:
        """The model of averaged weights, which validation and pictures use."""
        assert self.ema is not None
        return self.ema.module

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """What the terms beyond the ELBO have to say of validation images."""
        terms = tuple(term for term in self.terms if isinstance(term, PerceptualTerm))
        return terms if self.adversary is None else (*terms, self.adversary)

    @property
    def made_of(self) -> dict[str, dict[str, str]]:
        """What the terms beyond the ELBO depend on, by name; a resume needs the same."""
        made_of = {term.name: dict(term.made_of) for term in self.terms}
        return made_of if self.adversary is None else made_of | {"adversarial": self.adversary.config.shape}

    @property
    def names_of_totals(self) -> tuple[str, ...]:
        """Of the parts of the loss that are summed."""
        return (
            "loss", "distortion_nats", "rate_nats", *(term.name for term in self.terms), *(NAMES if self.adversary else ()),
        )  # fmt: skip

    @property
    def names_of_sums(self) -> tuple[str, ...]:
        """Of what `StepResult.sums` has for the training records."""
        return (*self.names_of_totals, "grad_norm", *(NOISE_METERS if self.noise_probe else ()))

    def accumulate(
        self,
        batches: Iterator[Batch],
        images_seen: int,
        beta: float,
        adversarial: float | None = None,
        entering: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Forward and backward of the global batch that begins at position `images_seen`; tells what it is entering.

        `adversarial` is the weight of that term: None without it, 0 while the discriminator alone learns.
        """
        config, layout, device = self.config, self.layout, self.engine.device
        self.optimizer.zero_grad(set_to_none=config.train.compile not in WITH_CUDA_GRAPHS)
        if self.adversary:
            self.adversary.zero_grad()
        sums = []
        for number, positions in enumerate(layout.positions(images_seen), start=1):
            noise, mirrored = noise_of_training(config.seed, positions, config.model.latent_shape, device)
            entering("waiting for data")
            pixels = upload(next(batches).images, device)  # uint8 until here
            entering("forward")
            if config.data.horizontal_flip:
                pixels = flip(pixels, mirrored)
            x = from_uint8(pixels, self.vae.likelihood.pixel_range).contiguous(memory_format=torch.channels_last)
            is_last = number == layout.grad_accum_steps
            with contextlib.nullcontext() if is_last else self.engine.no_sync(self.model):
                terms = self.model(x, noise)
                loss = negative_elbo(terms.distortion, terms.kl, beta, config.objective.free_bits).sum()
                further: tuple[Tensor, ...] = ()
                if self.terms or self.adversary:
                    beyond, further = self.beyond_elbo(x, terms, positions, adversarial, is_last=is_last)
                    loss = loss + beyond
                entering("backward")
                # DDP averages over processes, hence per process; and per pixel, to stay within the range of fp16.
                self.engine.backward(
                    nan_unless_finite(loss / (layout.per_process_batch_size * config.model.num_pixels))
                )
            if self.noise_probe:
                self.noise_probe.after_micro_batch(number)
            values = [loss, terms.distortion.sum(), rate(terms.kl).sum(), *further]
            sums.append(torch.stack(values).detach().to(self.sums_in))
        self._totals = torch.stack(sums).sum(0)

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

    def update(self, lr: float, images_seen: int) -> StepResult:
        """Change the weights by what was accumulated; `images_seen` counts this step's images."""
        noise_norms = self.noise_probe.pop() if self.noise_probe else None
        grad_norm = self.engine.clip_grad_norm_(self.model.parameters(), self.config.optim.clip_norm or math.inf)
        skipped = spiked = torch.zeros((), device=self.engine.device)
        if self.spikes:
            # The reduced gradient is the same on all processes, so all skip together; the decision never leaves the device.
            skipped, spiked = self.spikes.detect(grad_norm)
            if self.adversary and self.adversary.has_judged:  # both models take a step, or neither does
                skipped, spiked = map(torch.maximum, (skipped, spiked), self.adversary.detect_spikes())
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with skipping(skipped, getattr(self.optimizer, "optimizer", self.optimizer)):
            self.optimizer.step()
        if self.adversary and self.adversary.has_judged:
            self.adversary.update(lr, skipped)
        if self.ema:
            self.ema.update(self.vae, self.layout.global_batch_size, images_seen, skipped)
        totals = dict(zip(self.names_of_totals, self._totals, strict=True))
        return StepResult(self.layout.per_process_batch_size, totals, grad_norm, skipped, spiked, noise_norms)


def keeps_features(config: Config) -> bool:
    """Whether the model is to return the input of the decoder's last layer: for the adaptive weight of the adversarial term."""
    return bool(config.objective.adversarial.weight) and config.objective.adversarial.adaptive


def nan_unless_finite(loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """The loss, times NaN if it is not finite, so that its gradient, and the reduced one of all processes, is NaN too."""
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)
