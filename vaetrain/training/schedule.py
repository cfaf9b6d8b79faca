"""The learning rate as a function of images seen, and warm-ups that do not end in time."""

from __future__ import annotations

import math
from typing import Any

from vaetrain.config import Config, OptimConfig, TrainingConfig
from vaetrain.data.readers.order import BatchLayout
from vaetrain.objective.config import adversarial_weight_at, beta_at
from vaetrain.training.early_stopping import out_of_patience
from vaetrain.training.progress import Progress


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


def unfinished_warmup(config: TrainingConfig, total_images: int) -> list[str]:
    """Where the learning rate's warm-up does not end within a training of so many images, a sentence with the remedy."""
    warmup_images = config.optim.warmup_within(total_images)
    if warmup_images < total_images:
        return []
    end = learning_rate_at(config.optim, total_images, total_images)
    said = (
        f"training is over after {total_images:,} images and the learning rate warms up for {warmup_images:,} "
        f"(--optim.warmup-images): it ends at {end:.3g} of {config.optim.lr:g}; --optim.warmup-fraction 0.05 fits any length"
    )
    return [said]


def unfinished_warmups(config: Config, total_images: int) -> list[str]:
    """The same for each warm-up of a VAE's training."""
    found = unfinished_warmup(config, total_images)
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
    adversarial = objective.adversarial
    if adversarial.weight and not adversarial_weight_at(adversarial, total_images, total_images):
        found.append(
            f"training is over after {total_images:,} images and the decoder does not see the discriminator before "
            f"{adversarial.start_images:,} (--objective.adversarial.start-images); --objective.adversarial.start-fraction 0.5 fits "
            "any length"
            if adversarial.start_images is not None
            else f"--objective.adversarial.start-fraction {adversarial.start_fraction:g} starts it at the end of training"
        )
    return found


class LoopSchedule:
    """What happens when, of any training: a pure function of how far it is, in images."""

    def __init__(self, config: TrainingConfig, num_images: int, layout: BatchLayout) -> None:
        """`num_images` are those of the training split; raises ValueError when that has not even one global batch."""
        self.config = config
        self.global_batch_size = layout.global_batch_size
        self.images_per_epoch = layout.images_per_epoch(num_images)
        wanted_images = config.train.num_images or config.train.epochs * self.images_per_epoch
        self.total_images = math.ceil(wanted_images / self.global_batch_size) * self.global_batch_size

    def lr(self, progress: Progress) -> float:
        """Learning rate of the next step."""
        ends_at = progress.images_seen + self.global_batch_size
        return learning_rate_at(self.config.optim, ends_at, self.total_images) * progress.lr_factor

    def weights(self, progress: Progress) -> tuple[Any, ...]:
        """Of the parts of the loss in the next step, as the step takes them."""
        return ()

    def record(self, weights: tuple[Any, ...]) -> dict[str, float]:
        """What training logs of them, below train/."""
        return {}

    def unfinished(self) -> list[str]:
        """What does not end within this training, a sentence each."""
        return unfinished_warmup(self.config, self.total_images)

    def is_place_to_validate(self, progress: Progress) -> bool:
        """Whether every so many epochs end here, or training."""
        at_epoch = progress.images_seen % (self.config.train.val_every_epochs * self.images_per_epoch) == 0
        return at_epoch or progress.images_seen >= self.total_images

    def validation_is_due(self, progress: Progress) -> bool:
        """Whether to validate now: at such a place, once."""
        return self.is_place_to_validate(progress) and progress.images_seen > progress.validated_at

    def record_is_due(self, progress: Progress) -> bool:
        """Whether to log the steps since the last record: after the first, every few, and before a validation."""
        every_steps = self.config.log.every_steps
        return progress.step == 1 or progress.step % every_steps == 0 or self.is_place_to_validate(progress)

    def is_over(self, progress: Progress) -> bool:
        """Whether all images have been seen, or validation no longer gets better."""
        return self.images_left(progress) <= 0 or out_of_patience(progress, self.config.train.patience)

    def images_left(self, progress: Progress) -> int:
        """Until the end of training."""
        return self.total_images - progress.images_seen


class Schedule(LoopSchedule):
    """The same of a VAE: β, the adversarial weight, rFID."""

    def __init__(self, config: Config, num_images: int, layout: BatchLayout) -> None:
        """As `LoopSchedule`."""
        super().__init__(config, num_images, layout)
        self.vae_config = config

    def beta(self, progress: Progress) -> float:
        """β of the next step."""
        return beta_at(self.vae_config.objective, progress.images_seen)

    def adversarial(self, progress: Progress) -> float | None:
        """Weight of the adversarial term in the next step, see `adversarial_weight_at`."""
        return adversarial_weight_at(self.vae_config.objective.adversarial, progress.images_seen, self.total_images)

    def weights(self, progress: Progress) -> tuple[Any, ...]:
        """β and the adversarial weight."""
        return self.beta(progress), self.adversarial(progress)

    def record(self, weights: tuple[Any, ...]) -> dict[str, float]:
        """β."""
        return {"beta": weights[0]}

    def unfinished(self) -> list[str]:
        """See `unfinished_warmups`."""
        return unfinished_warmups(self.vae_config, self.total_images)

    def rfid_is_due(self, progress: Progress) -> bool:
        """Whether the validation here has the distance of reconstructions, too."""
        every_epochs = self.vae_config.train.rfid.every_epochs
        if every_epochs is None:
            return False
        return progress.images_seen % (every_epochs * self.images_per_epoch) == 0 or self.images_left(progress) <= 0
