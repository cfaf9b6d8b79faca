"""The step of a flow-matching prior: the squared error of velocities at random times, mean over a latent's dimensions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from vaetrain.data.readers.order import BatchLayout
from vaetrain.latents.reader import LatentBatch, LatentReader
from vaetrain.priors.flow_matching.config import PriorTraining
from vaetrain.priors.flow_matching.model import FlowMatching, draw_for_training
from vaetrain.training.gradient_step import GradientStep, Losses, prepared


@dataclass
class FlowMatchingStep(GradientStep[FlowMatching]):
    """See `GradientStep`."""

    config: PriorTraining

    @classmethod
    def build(
        cls, config: PriorTraining, latents: LatentReader, layout: BatchLayout, accelerator: Accelerator
    ) -> FlowMatchingStep:
        """A new network with seeded weights, and all that trains it. A collective; raises ValueError for latents that do not fit.

        `latents` are those of the training split, by whose statistics all are normalised.
        """
        classes = latents.manifest.classes
        counts = latents.manifest.splits["train"].class_counts
        latents.normalize(torch.zeros_like(latents.mean))  # refuses a channel that never varies
        torch.manual_seed(config.seed)
        model = FlowMatching(config.model, latents.latent_shape, len(classes))
        model.mean.copy_(latents.mean)
        model.std.copy_(latents.std)
        model.class_shares.copy_(torch.tensor([counts[name] / latents.num_images for name in classes]))
        model = model.to(accelerator.device)
        return cls(config, **prepared(model, config, layout, accelerator))

    @property
    def dims_per_loss(self) -> int:
        """The loss is a mean over dimensions."""
        return 1

    def losses(self, batch: LatentBatch, positions: slice, *weights: Any, is_last: bool) -> Losses:
        """Squared error, summed over the latents of a micro-batch."""
        drawn = draw_for_training(
            self.config.objective, self.config.seed, positions, self.module.latent_shape, self.engine.device
        )
        labels = torch.where(drawn.unlabelled, self.module.num_classes, batch.labels)
        return Losses(self.model(batch.z, drawn.noise, drawn.t, labels).sum())
