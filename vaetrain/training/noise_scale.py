"""The gradient noise scale: how many images a step may average over before more of them stop helping.

With G the gradient of the mean loss over all data and Σ the covariance of single images' gradients, the simple noise scale is
tr Σ / |G|², in images (McCandlish et al. 2018, "An Empirical Model of Large-Batch Training", Sec. 2.2). Well below it, twice
the batch does with half the steps; well above it, twice the batch does little. Both numbers come from squared norms of
gradients that training computes anyway, at two batch sizes (their Appendix A.1): a part of the global batch and all of it.

AdamW does not step along the gradient but along D·g, D = 1/(√v̂ + ε). Their Eq. 2.8, tr(HΣ)/(GᵀHG) with the Hessian H, then becomes
tr(DΣ)/(GᵀDG) if D undoes the curvature, as Adam means it to: *Adam's noise scale*, from the same norms with every square
weighted by D. It is larger, and nearer to what batches turned out to be worth (docs/scaling.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch import distributed as dist
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from vaetrain.data.readers.order import BatchLayout

NUM_BLOCKS = 20
"""Stretches of steps that the jackknife leaves out one by one: neighbouring steps are alike, stretches hardly."""

NOISE_METERS = ("grad_sq", "small_grad_sq", "adam_small_grad_sq", "adam_grad_sq")
"""What training logs of it below train/: the squared norm of the whole gradient, then GradientNorms."""


@dataclass(frozen=True)
class NoiseScale:
    """An estimate from squared gradient norms, simple or Adam's, with its standard error."""

    images: float | None
    """tr Σ / |G|², above 0; None when either estimate is not above 0: see `why_none`."""
    standard_error: float | None
    """Of `images`, by jackknife over stretches of steps; None with fewer than four steps, or without an estimate."""
    gradient_sq: float
    """|G|², unbiased, mean over steps."""
    covariance_trace: float
    """tr Σ, unbiased, mean over steps."""
    num_steps: int

    @property
    def why_none(self) -> str | None:
        """What kept `images` from being measured."""
        if self.images is not None:
            return None
        if self.gradient_sq > 0:
            return "hardly any noise: the parts of a step agree; give more steps, or a smaller batch"
        return "noise drowns the gradient; give more steps"

    @classmethod
    def of(cls, small_sq: Sequence[float], big_sq: Sequence[float], small_batch: int, big_batch: int) -> NoiseScale:
        """From each step's squared norm of the mean gradient over `small_batch` images and over `big_batch`, which holds them.

        Both numbers are averaged over steps before one is divided by the other: a ratio of averages, since an average of
        ratios would be biased (Appendix A.1).
        """
        assert len(small_sq) == len(big_sq) > 0
        images, gradient_sq, trace = _estimate(small_sq, big_sq, small_batch, big_batch)
        count = min(NUM_BLOCKS, len(small_sq))
        error = None
        if images is not None and len(small_sq) >= 4:
            left_out = []
            for block in range(count):
                rows = [row for row in range(len(small_sq)) if row * count // len(small_sq) != block]
                part, _, _ = _estimate(
                    [small_sq[row] for row in rows], [big_sq[row] for row in rows], small_batch, big_batch
                )
                left_out.append(math.inf if part is None else part)
            mean = sum(left_out) / count
            error = math.sqrt((count - 1) / count * sum((part - mean) ** 2 for part in left_out))
            error = error if math.isfinite(error) else None
        return cls(images, error, gradient_sq, trace, len(small_sq))


def _estimate(
    small_sq: Sequence[float], big_sq: Sequence[float], small_batch: int, big_batch: int
) -> tuple[float | None, float, float]:
    # E|g_B|² = |G|² + tr Σ / B at both batch sizes: two equations, two unknowns.
    small, big = sum(small_sq) / len(small_sq), sum(big_sq) / len(big_sq)
    gradient_sq = (big_batch * big - small_batch * small) / (big_batch - small_batch)
    trace = (small - big) / (1 / small_batch - 1 / big_batch)
    return (trace / gradient_sq if gradient_sq > 0 and trace > 0 else None), gradient_sq, trace


def by_progress(
    small_sq: Sequence[float], big_sq: Sequence[float], num_stretches: int = NUM_BLOCKS
) -> tuple[list[float], list[float]]:
    """Squared norms, each stretch of steps divided by its mean `big_sq`, so that `NoiseScale.of` them counts it by its progress.

    While training goes on, gradients shrink and the noise scale 𝓑 grows, and a ratio of plain averages is that of the first
    steps alone. A step at batch B does what 1/(1 + 𝓑/B) steps without noise would (Eq. 2.7), and the critical batch of a
    whole training is the mean of 𝓑 over these (Appendix D): Σ 𝓑/(1 + 𝓑/B) / Σ 1/(1 + 𝓑/B). As 1/(1 + 𝓑/B) = |G|² / E|g_B|² it takes
    two sums, Σ tr Σ/E|g_B|² and Σ |G|²/E|g_B|², neither of which minds a stretch whose |G|² drowns.
    """
    count = min(num_stretches, len(big_sq))
    small, big = [], []
    for number in range(count):
        rows = range(number * len(big_sq) // count, (number + 1) * len(big_sq) // count)
        mean = sum(big_sq[row] for row in rows) / len(rows)
        if mean != 0:  # as it is before Adam's first update
            small += [small_sq[row] / mean for row in rows]
            big += [big_sq[row] / mean for row in rows]
    return small, big


def small_batch(layout: BatchLayout, num_processes: int) -> int:
    """Images of the part of each step that is held against the whole: one process's, or the first micro-batch."""
    return layout.per_process_batch_size if num_processes > 1 else layout.micro_batch_size


class GradientNorms(NamedTuple):
    """Squared norms of one step's gradients of the loss per pixel, before clipping, on the device."""

    small_sq: Float[Tensor, ""]
    """Of the small batch, on this process."""
    adam_small_sq: Float[Tensor, ""]
    """The same weighted by Adam's D; like the next one 0 before its first update, and always with another optimizer."""
    adam_sq: Float[Tensor, ""]
    """Of the whole global batch, weighted by D."""


class GradientNoiseProbe:
    """Watches training for the squared norm of the gradient over a part of each global batch.

    With several processes it is each one's own gradient, read off while DDP reduces it; with one, that of the first
    micro-batch. Neither costs a backward pass.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, layout: BatchLayout, num_processes: int) -> None:
        """`model` is what Accelerate prepared. Raises ValueError where a step has no parts."""
        self.batch_size = small_batch(layout, num_processes)
        self._parameters = list(model.parameters())
        self._optimizer = optimizer
        self._first_micro_batch = num_processes == 1
        # The first micro-batch's gradient is already divided by all images of the step.
        self._accumulated = layout.grad_accum_steps
        self._sq = torch.zeros(2, dtype=torch.float64, device=self._parameters[0].device)
        if num_processes > 1:
            assert isinstance(model, DistributedDataParallel)
            # A lambda, because DDP refuses a hook whose annotations are strings.
            model.register_comm_hook(None, lambda _, bucket: self._reduce(bucket))
        elif layout.grad_accum_steps == 1:
            raise ValueError(
                "the gradient noise scale needs a step of several parts: several processes, or --train.micro-batch-size below "
                "--train.global-batch-size"
            )

    @torch.no_grad()
    def after_micro_batch(self, number: int) -> None:
        """To be called after the backward pass of micro-batch 1, 2, … of a step."""
        if self._first_micro_batch and number == 1:
            self._sq = self._squares(*self._gradients()) * self._accumulated**2

    @torch.no_grad()
    def pop(self) -> GradientNorms:
        """This step's norms; then ready for the next step. To be called after the last backward pass, before clipping."""
        taken, self._sq = self._sq, torch.zeros_like(self._sq)
        return GradientNorms(taken[0], taken[1], self._squares(*self._gradients())[1])

    def _gradients(self) -> tuple[list[nn.Parameter], list[Tensor]]:
        with_gradient = [(p, p.grad) for p in self._parameters if p.grad is not None]
        return [p for p, _ in with_gradient], [gradient for _, gradient in with_gradient]

    def _reduce(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        self._sq += self._squares(bucket.parameters(), bucket.gradients())
        assert dist.group.WORLD is not None
        return allreduce_hook(dist.group.WORLD, bucket)

    @torch.no_grad()
    def _squares(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> Float[Tensor, "2"]:
        """Σ g² and Σ D g², with D from before this step's update: as it does not know this gradient, it does not bias."""
        squares = torch._foreach_mul(list(gradients), list(gradients))
        weighted = torch.zeros_like(self._sq[0])
        states = [self._optimizer.state.get(parameter, {}) for parameter in parameters]
        if all("exp_avg_sq" in state for state in states):
            group = self._optimizer.param_groups[0]
            roots = torch._foreach_sqrt([state["exp_avg_sq"] for state in states])
            forgotten = (1 - group["betas"][1] ** states[0]["step"].to(self._sq)).sqrt().float()
            torch._foreach_div_(roots, forgotten)
            torch._foreach_add_(roots, group["eps"])
            weighted = _sum(torch._foreach_div(squares, roots))
        return torch.stack([_sum(squares), weighted])


def _sum(tensors: Sequence[Tensor]) -> Float[Tensor, ""]:
    return torch.stack([tensor.sum(dtype=torch.float64) for tensor in tensors]).sum()
