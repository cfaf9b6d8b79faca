"""Training as train.py does it, without what a run writes down: for measuring what a few hundred steps do."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from accelerate import Accelerator

from vaetrain.config import Config
from vaetrain.data.readers.order import BatchLayout
from vaetrain.data.readers.reader import Reader
from vaetrain.distributed.processes import sum_over_processes
from vaetrain.distributed.randomness import noise_of_global_batch
from vaetrain.model.autoencoder import VAE
from vaetrain.model.likelihood import from_uint8
from vaetrain.objective.config import beta_at
from vaetrain.objective.elbo import negative_elbo
from vaetrain.training.noise_scale import GradientNoiseProbe
from vaetrain.training.optimizer import build_optimizer


class Step(NamedTuple):
    """What one step showed, the same on every process."""

    loss: float
    """Nats per image, mean over the global batch, before the update."""
    grad_sq: float
    """Squared norm of the mean gradient over the global batch, of the loss per pixel, before clipping."""
    small_grad_sq: float | None
    """The same of the small batch, mean over processes; None, like the next two, when it is not watched."""
    adam_grad_sq: float | None
    """The global batch's, weighted by Adam's preconditioner (noise_scale.py)."""
    adam_small_grad_sq: float | None
    """The small batch's, so weighted."""


class ShortTraining:
    """A model from scratch, trained step by step with learning rates that the caller chooses."""

    def __init__(self, config: Config, accelerator: Accelerator, reader: Reader, *, watch_noise: bool = False) -> None:
        self.config = config
        self.accelerator = accelerator
        self.layout = BatchLayout.of(
            config.train.global_batch_size, config.train.micro_batch_size,
            accelerator.process_index, accelerator.num_processes,
        )  # fmt: skip
        torch.manual_seed(config.seed)
        self.vae = VAE(config.model).to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = build_optimizer(self.vae, config.optim)
        self.model, self.optimizer = accelerator.prepare(self.vae, optimizer)
        self.small = None
        if watch_noise:
            self.small = GradientNoiseProbe(self.model, optimizer, self.layout, accelerator.num_processes)
        self.images_seen = 0
        self._batches = reader.train_batches(config.seed, 0, self.layout)

    def step(self, lr: float) -> Step:
        """One update; a collective, and one wait for the device."""
        config, layout, accelerator = self.config, self.layout, self.accelerator
        beta = beta_at(config.objective, self.images_seen)
        noise, mirror = noise_of_global_batch(
            config.seed, self.images_seen, layout.global_batch_size, config.model.latent_shape, accelerator.device
        )
        self.optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        for number, part in enumerate(layout.positions(0), start=1):
            pixels = next(self._batches).images.to(accelerator.device, non_blocking=True)
            if config.data.horizontal_flip:
                pixels = torch.where(mirror[part][:, None, None, None], pixels.flip(-1), pixels)
            x = from_uint8(pixels, self.vae.likelihood.pixel_range).contiguous(memory_format=torch.channels_last)
            is_last = number == layout.grad_accum_steps
            with contextlib.nullcontext() if is_last else accelerator.no_sync(self.model):
                terms = self.model(x, noise[part])
                loss = negative_elbo(terms.distortion, terms.kl, beta, config.objective.free_bits).sum()
                accelerator.backward(loss / (layout.per_process_batch_size * config.model.num_pixels))
            if self.small:
                self.small.after_micro_batch(number)
            total += loss.detach()
        norms = self.small.pop() if self.small else None
        grad_norm = accelerator.clip_grad_norm_(self.model.parameters(), config.optim.clip_norm or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.images_seen += layout.global_batch_size
        parts = torch.stack([total, *(norms or ())])
        loss_sum, *summed = sum_over_processes(accelerator, parts).tolist()
        small_sq, adam_small_sq, adam_sq = (
            (value / accelerator.num_processes for value in summed) if norms else (None,) * 3
        )
        return Step(loss_sum / layout.global_batch_size, float(grad_norm) ** 2, small_sq, adam_sq, adam_small_sq)


@contextlib.contextmanager
def short_training(
    config: Config, accelerator: Accelerator, reader: Reader, *, watch_noise: bool = False
) -> Iterator[ShortTraining]:
    """A Trial whose model Accelerate forgets at the end."""
    try:
        yield ShortTraining(config, accelerator, reader, watch_noise=watch_noise)
    finally:
        accelerator.free_memory()
