"""The gradient noise scale: how many images a step may average over before more of them stop helping.

With G the gradient of the mean loss over all data and Σ the covariance of single images' gradients, the simple noise scale is
tr Σ / |G|², in images (McCandlish et al. 2018, "An Empirical Model of Large-Batch Training", Sec. 2.2). Well below it, twice
the batch does with half the steps; well above it, twice the batch does little. Both numbers come from squared norms of
gradients that training computes anyway, at two batch sizes (their Appendix A.1): a part of the global batch and all of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch import distributed as dist
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from vaetrain.data.order import BatchLayout

NUM_BLOCKS = 20
"""Stretches of steps that the jackknife leaves out one by one: neighbouring steps are alike, stretches hardly."""


@dataclass(frozen=True)
class NoiseScale:
    """An estimate from squared gradient norms, with its standard error."""

    images: float | None
    """tr Σ / |G|²; None when the noise drowns |G|² and the estimate of it is not above 0."""
    standard_error: float | None
    """Of `images`, by jackknife over stretches of steps; None with fewer than four steps, or without an estimate."""
    gradient_sq: float
    """|G|², unbiased, mean over steps."""
    covariance_trace: float
    """tr Σ, unbiased, mean over steps."""
    num_steps: int

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
    return (trace / gradient_sq if gradient_sq > 0 else None), gradient_sq, trace


class SmallGradient:
    """Watches training for the squared norm of the gradient over a part of each global batch.

    With several processes it is each one's own gradient, read off while DDP reduces it; with one, that of the first
    micro-batch. Neither costs a backward pass.
    """

    def __init__(self, model: nn.Module, layout: BatchLayout, num_processes: int) -> None:
        """`model` is what Accelerate prepared. Raises ValueError where a step has no parts."""
        self.batch_size = layout.per_process_batch_size if num_processes > 1 else layout.micro_batch_size
        self._parameters = list(model.parameters())
        self._first_micro_batch = num_processes == 1
        # The first micro-batch's gradient is already divided by all images of the step.
        self._accumulated = layout.grad_accum_steps
        device = self._parameters[0].device
        self._sq = torch.zeros((), dtype=torch.float64, device=device)
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
            norms = torch._foreach_norm([p.grad for p in self._parameters if p.grad is not None])
            self._sq = torch.stack(list(norms)).double().square().sum() * self._accumulated**2

    def take(self) -> Float[Tensor, ""]:
        """The squared norm of this step's small gradient, on the device; then ready for the next step."""
        taken, self._sq = self._sq, torch.zeros_like(self._sq)
        return taken

    def _reduce(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        self._sq += bucket.buffer().double().square().sum()
        assert dist.group.WORLD is not None
        return allreduce_hook(dist.group.WORLD, bucket)
