"""One optimizer step on one global batch, whatever the model and its loss.

    accumulate    forward and backward of this process's micro-batches
    update        clip, find out whether the step is to be skipped, AdamW, the moving average

Neither waits for the device: what a step showed stays there, in a StepResult, until somebody asks. training/step.py says what the
loss of a VAE is, priors/flow_matching/step.py that of a prior.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from vaetrain.config import TrainingConfig
from vaetrain.data.readers.order import BatchLayout
from vaetrain.training.compilation import WITH_CUDA_GRAPHS, compile_in_place
from vaetrain.training.ema import ExponentialMovingAverage
from vaetrain.training.noise_scale import NOISE_METERS, GradientNoiseProbe, GradientNorms
from vaetrain.training.optimizer import build_optimizer
from vaetrain.training.spikes import SpikeDetector, skipping

M = TypeVar("M", bound=nn.Module)


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


class Losses(NamedTuple):
    """Of one micro-batch."""

    loss: Float[Tensor, ""]
    """Summed over its images; what is passed backward."""
    further: tuple[Float[Tensor, ""], ...] = ()
    """Totals of its parts, for the training records."""


@dataclass
class GradientStep(ABC, Generic[M]):
    """The step of one model; its order is accumulate, update, accumulate, update …"""

    config: TrainingConfig
    layout: BatchLayout
    engine: Engine
    module: M
    model: nn.Module
    """`module` as Accelerate prepared it: DDP works only through its forward."""
    optimizer: Any
    """AdamW as Accelerate prepared it."""
    ema: ExponentialMovingAverage[M] | None = None
    spikes: SpikeDetector | None = None
    """None: nothing is skipped, as a measurement wants it that looks for the rate at which training fails."""
    noise_probe: GradientNoiseProbe | None = None
    sums_in: torch.dtype = torch.float32
    """Of the totals over micro-batches."""

    @property
    def averaged(self) -> M:
        """The model of averaged weights, which validation and pictures use."""
        assert self.ema is not None
        return self.ema.module

    @property
    def made_of(self) -> dict[str, dict[str, str]]:
        """What the loss depends on and the config does not say, by name of its part; a resume needs the same."""
        return {}

    @property
    def names_of_totals(self) -> tuple[str, ...]:
        """Of `Losses`."""
        return ("loss",)

    @property
    def names_of_sums(self) -> tuple[str, ...]:
        """Of what `StepResult.sums` has for the training records."""
        return (*self.names_of_totals, "grad_norm", *(NOISE_METERS if self.noise_probe else ()))

    @property
    @abstractmethod
    def dims_per_loss(self) -> int:
        """By which the loss is divided before it is passed backward, to stay within the range of fp16."""

    @abstractmethod
    def losses(self, batch: Any, positions: slice, *weights: Any, is_last: bool) -> Losses:
        """Forward pass of the micro-batch at these positions of training; `weights` are those of the loss's parts."""

    def zero_grad(self) -> None:
        """Forget the gradients of the step before."""
        self.optimizer.zero_grad(set_to_none=self.config.train.compile not in WITH_CUDA_GRAPHS)

    def accumulate(
        self,
        batches: Iterator[Any],
        images_seen: int,
        *weights: Any,
        entering: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Forward and backward of the global batch that begins at position `images_seen`; tells what it is entering."""
        layout, sums = self.layout, []
        self.zero_grad()
        for number, positions in enumerate(layout.positions(images_seen), start=1):
            entering("waiting for data")
            batch = next(batches)
            entering("forward")
            is_last = number == layout.grad_accum_steps
            with contextlib.nullcontext() if is_last else self.engine.no_sync(self.model):
                losses = self.losses(batch, positions, *weights, is_last=is_last)
                entering("backward")
                # DDP averages over processes, hence per process.
                self.engine.backward(
                    nan_unless_finite(losses.loss / (layout.per_process_batch_size * self.dims_per_loss))
                )
            if self.noise_probe:
                self.noise_probe.after_micro_batch(number)
            sums.append(torch.stack([losses.loss, *losses.further]).detach().to(self.sums_in))
        self._totals = torch.stack(sums).sum(0)

    def update(self, lr: float, images_seen: int) -> StepResult:
        """Change the weights by what was accumulated; `images_seen` counts this step's images."""
        noise_norms = self.noise_probe.pop() if self.noise_probe else None
        grad_norm = self.engine.clip_grad_norm_(self.model.parameters(), self.config.optim.clip_norm or math.inf)
        skipped, spiked = self.detect_spikes(grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with skipping(skipped, getattr(self.optimizer, "optimizer", self.optimizer)):
            self.optimizer.step()
        self.update_others(lr, skipped)
        if self.ema:
            self.ema.update(self.module, self.layout.global_batch_size, images_seen, skipped)
        totals = dict(zip(self.names_of_totals, self._totals, strict=True))
        return StepResult(self.layout.per_process_batch_size, totals, grad_norm, skipped, spiked, noise_norms)

    def detect_spikes(self, grad_norm: Float[Tensor, ""]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Whether the step is to be skipped, and whether for a finite gradient; on the device.

        The reduced gradient is the same on all processes, so all skip together.
        """
        if self.spikes:
            return self.spikes.detect(grad_norm)
        return (torch.zeros((), device=self.engine.device),) * 2

    def update_others(self, lr: float, skipped: Float[Tensor, ""]) -> None:
        """Change what else learns."""


def prepared(
    module: M, config: TrainingConfig, layout: BatchLayout, accelerator: Accelerator, *, bare: bool = False
) -> dict[str, Any]:
    """All that trains a new model, as GradientStep takes it by name. A collective.

    `bare`: without a moving average or a step being skipped, and totals in float64, for a measurement.
    """
    ema = None if bare else ExponentialMovingAverage(module, config.train.ema_half_life_images)
    if config.train.compile:
        compile_in_place(module, config.train.compile)
    adamw = build_optimizer(module, config.optim)
    model, optimizer = accelerator.prepare(module, adamw)
    if isinstance(model, DistributedDataParallel):
        model.broadcast_buffers = False  # which never change; as an argument torch 2.15 has it deprecated
        if config.train.gradient_compression == "bf16":
            model.register_comm_hook(None, bf16_compress_hook)
    noise_probe = None
    if config.log.noise_scale:
        noise_probe = GradientNoiseProbe(model, adamw, layout, accelerator.num_processes)
    return {
        "layout": layout, "engine": accelerator, "module": module, "model": model, "optimizer": optimizer, "ema": ema,
        "spikes": None if bare else SpikeDetector(config.train.skip_above, accelerator.device),
        "noise_probe": noise_probe, "sums_in": torch.float64 if bare else torch.float32,
    }  # fmt: skip


def nan_unless_finite(loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """The loss, times NaN if it is not finite, so that its gradient, and the reduced one of all processes, is NaN too."""
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)
