"""Two processes whose gradients are a known mean plus known noise, read off DDP's reduction; run by test_noise_scale.py.

tests/noise_scale_scenario.py OUT.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from vaetrain import distributed
from vaetrain.data.order import BatchLayout
from vaetrain.scaling.noise_scale import SmallGradient

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

if __name__ == "__main__":
    accelerator = distributed.start()
    layout = BatchLayout.of(BATCH, None, accelerator.process_index, 2)
    model = accelerator.prepare(Quadratic())
    small = SmallGradient(model, layout, 2)
    small_sq, big_sq = [], []
    for step in range(STEPS):
        x = images(step, DEVIATIONS)[layout.positions(0)[0]]
        model.zero_grad()
        accelerator.backward(model(x).mean())
        big_sq.append(float(accelerator.clip_grad_norm_(model.parameters(), 1e9)) ** 2)
        small_sq.append(float(distributed.sum_over_processes(accelerator, small.take())) / 2)
    if accelerator.is_main_process:
        Path(sys.argv[1]).write_text(json.dumps({"small": small_sq, "big": big_sq, "batch": small.batch_size}))
    accelerator.end_training()
