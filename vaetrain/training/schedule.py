"""The learning rate as a function of images seen, and warm-ups that do not end in time."""

from __future__ import annotations

import math

from vaetrain.config import Config, OptimConfig
from vaetrain.objective.config import beta_at


def learning_rate_at(config: OptimConfig, images_seen: int, total_images: int) -> float:
    """Learning rate of the step that ends at `images_seen` of `total_images`: linear warm-up, then cosine or flat.

    A pure function of images, so that it survives a resume and a change of batch size or process count.
    """
    warmup_images = config.warmup_within(total_images)
    if images_seen < warmup_images:
        return config.lr * images_seen / warmup_images
    if config.schedule == "constant":
        return config.lr
    progress = (images_seen - warmup_images) / max(1, total_images - warmup_images)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.final_lr_fraction + (1 - config.final_lr_fraction) * cosine)


def unfinished_warmups(config: Config, total_images: int) -> list[str]:
    """For each warm-up that does not end within a training of so many images, a sentence with both numbers and the remedy."""
    found = []
    warmup_images = config.optim.warmup_within(total_images)
    if warmup_images >= total_images:
        found.append(
            f"training is over after {total_images:,} images and the learning rate warms up for {warmup_images:,} "
            f"(--optim.warmup-images): it ends at {learning_rate_at(config.optim, total_images, total_images):.3g} of "
            f"{config.optim.lr:g}; --optim.warmup-fraction 0.05 fits any length"
        )
    objective = config.objective
    rising = {"constant": 0, "warmup": objective.beta_warmup_images, "cyclical": objective.beta_cycle_images // 2}
    if (ramp := rising[objective.beta_schedule]) >= total_images:
        option = "--objective.beta-warmup-images"
        if objective.beta_schedule == "cyclical":
            option = "half of --objective.beta-cycle-images"
        found.append(
            f"training is over after {total_images:,} images and β rises for {ramp:,} ({option}): it ends at "
            f"{beta_at(objective, total_images):.3g} of {objective.beta:g}"
        )
    return found
