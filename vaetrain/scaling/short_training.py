"""The steps of a training without what a run writes down: for measuring what a few hundred of them do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from accelerate import Accelerator

from vaetrain.config import Config
from vaetrain.data.readers.order import BatchLayout
from vaetrain.data.readers.reader import Reader
from vaetrain.distributed.processes import sum_over_processes
from vaetrain.model.autoencoder import VAE
from vaetrain.objective.config import beta_at
from vaetrain.training.noise_scale import GradientNoiseProbe
from vaetrain.training.optimizer import build_optimizer
from vaetrain.training.perceptual import loss_terms
from vaetrain.training.step import TrainStep


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
    """A model from scratch, trained step by step with learning rates that the caller chooses; nothing is skipped."""

    def __init__(self, config: Config, accelerator: Accelerator, reader: Reader, *, watch_noise: bool = False) -> None:
        self.config = config
        self.accelerator = accelerator
        layout = BatchLayout.of(
            config.train.global_batch_size, config.train.micro_batch_size,
            accelerator.process_index, accelerator.num_processes,
        )  # fmt: skip
        torch.manual_seed(config.seed)
        vae = VAE(config.model).to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        adamw = build_optimizer(vae, config.optim)
        model, optimizer = accelerator.prepare(vae, adamw)
        self.noise_probe = GradientNoiseProbe(model, adamw, layout, accelerator.num_processes) if watch_noise else None
        self.train_step = TrainStep(
            config, layout, accelerator, vae, model, optimizer, noise_probe=self.noise_probe,
            terms=loss_terms(config, vae.likelihood, accelerator.device), sums_in=torch.float64,
        )  # fmt: skip
        self.images_seen = 0
        self._batches = reader.train_batches(config.seed, 0, layout)

    def step(self, lr: float) -> Step:
        """One update; a collective, and one wait for the device."""
        accelerator, batch_size = self.accelerator, self.train_step.layout.global_batch_size
        self.train_step.accumulate(self._batches, self.images_seen, beta_at(self.config.objective, self.images_seen))
        self.images_seen += batch_size
        result = self.train_step.update(lr, self.images_seen)
        norms = result.noise_norms
        parts = torch.stack([result.totals["loss"], *(norms or ())])
        loss_sum, *summed = sum_over_processes(accelerator, parts).tolist()
        small_sq, adam_small_sq, adam_sq = (
            (value / accelerator.num_processes for value in summed) if norms else (None,) * 3
        )
        return Step(loss_sum / batch_size, float(result.grad_norm) ** 2, small_sq, adam_sq, adam_small_sq)


@contextlib.contextmanager
def short_training(
    config: Config, accelerator: Accelerator, reader: Reader, *, watch_noise: bool = False
) -> Iterator[ShortTraining]:
    """A ShortTraining whose model Accelerate forgets at the end."""
    try:
        yield ShortTraining(config, accelerator, reader, watch_noise=watch_noise)
    finally:
        accelerator.free_memory()
