"""Two processes whose gradients are a known mean plus known noise, read off DDP's reduction; run by test_noise_scale.py."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from vaetrain.data.readers.order import BatchLayout
from vaetrain.distributed import processes
from vaetrain.training.noise_scale import GradientNoiseProbe

DIM, BATCH, STEPS = 20, 32, 400


class Quadratic(torch.nn.Module):
    """½ |θ − ξ|² of each image ξ: its gradient is θ − ξ."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = torch.nn.Parameter(torch.full((DIM,), 0.1))

    def forward(self, x):
        return 0.5 * (self.theta - x).square().sum(1)


def images(step: int, deviations: torch.Tensor) -> torch.Tensor:
    """The global batch of a step: normal around 0 with these deviations."""
    return torch.randn(BATCH, DIM, generator=torch.Generator().manual_seed(step)) * deviations


DEVIATIONS = torch.linspace(0.2, 1.0, DIM)
THEORY = float(DEVIATIONS.square().sum() / (DIM * 0.1**2))
"""tr Σ / |G|²."""


def adam_theory() -> float:
    """tr(DΣ) / GᵀDG: v has settled at G² + Σ/B, and D is the inverse of its root."""
    weights = (0.1**2 + DEVIATIONS.square() / BATCH).rsqrt()
    return float((weights * DEVIATIONS.square()).sum() / (weights * 0.1**2).sum())


def adam_at_rest(model: torch.nn.Module) -> torch.optim.Optimizer:
    """It gathers v and never moves the weights, so that every step's gradient has the same mean."""
    return torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, betas=(0.9, 0.98))


def norms_together(out: Path) -> None:
    """Write what SmallGradient finds in each step as JSON; a collective of two processes."""
    accelerator = processes.start()
    with processes.finishing(accelerator):
        layout = BatchLayout.of(BATCH, None, accelerator.process_index, 2)
        model = accelerator.prepare(Quadratic())
        optimizer = adam_at_rest(model)
        small = GradientNoiseProbe(model, optimizer, layout, 2)
        found = []
        for step in range(STEPS):
            x = images(step, DEVIATIONS)[layout.positions(0)[0]]
            model.zero_grad()
            accelerator.backward(model(x).mean())
            norms = processes.sum_over_processes(accelerator, torch.stack(small.pop())) / 2
            grad_sq = float(accelerator.clip_grad_norm_(model.parameters(), 1e9)) ** 2
            found.append([grad_sq, *norms.tolist()])  # NOISE_METERS
            optimizer.step()
        if accelerator.is_main_process:
            out.write_text(json.dumps({"norms": found, "batch": small.batch_size}))
