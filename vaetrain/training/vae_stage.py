"""The training of a VAE: images, the ELBO and the terms beyond it, reconstructions and samples."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from vaetrain.config import Config
from vaetrain.data.readers.reader import Reader, open_split
from vaetrain.metrics.validation import validate
from vaetrain.runs.directory import RunDirectory
from vaetrain.training.control import Control
from vaetrain.training.figures import RunFigures
from vaetrain.training.logger import RunLogger
from vaetrain.training.progress import Progress
from vaetrain.training.resume import load_weights, starts_from_average
from vaetrain.training.schedule import Schedule
from vaetrain.training.stage import SPLITS, Stage, Validation
from vaetrain.training.step import TrainStep
from vaetrain.training.throughput import training_flops_per_image

if TYPE_CHECKING:
    from vaetrain.training.reconstruction_fid import ReconstructionFid


class VaeStage(Stage):
    """See `Stage`."""

    config: Config
    step: TrainStep
    schedule: Schedule
    train_reader: Reader
    val_reader: Reader
    rfid: ReconstructionFid | None = None
    unit = "nats"

    def open_data(self, opened: ExitStack) -> None:
        """Both splits of the shard set, whose images must be the model's."""
        self.train_reader, self.val_reader = (open_split(self.config.data, self.accelerator, split) for split in SPLITS)
        for reader in (self.train_reader, self.val_reader):
            opened.callback(reader.close)
            self.config.model.check_images(reader.manifest.image_size, reader.manifest.channels)
        self.schedule = Schedule(self.config, self.train_reader.num_images, self.layout)

    def build_model(self) -> None:
        """A VAE, and the networks of the terms beyond the ELBO."""
        self.step = TrainStep.build(self.config, self.layout, self.accelerator)
        self.adversary = self.step.adversary

    def start_from(self, source: Path) -> None:
        """See `load_weights`."""
        load_weights(source, self.step.vae, self.step.averaged, average_only=starts_from_average(self.config))

    def flops_per_image(self) -> float:
        """Of the VAE alone."""
        return training_flops_per_image(self.step.vae)

    def begin(self, run: RunDirectory) -> None:
        """Figures, and the network that judges reconstructions."""
        num_pictures = self.config.log.num_pictures
        self.figures = RunFigures(run, self.step.averaged, self.val_reader, num_pictures=num_pictures)
        if self.config.train.rfid.every_epochs:
            from vaetrain.training.reconstruction_fid import ReconstructionFid  # torch-fidelity takes seconds to import

            self.rfid = ReconstructionFid(
                self.config.train.rfid, self.val_reader, self.accelerator, self.layout.micro_batch_size
            )

    def validate(self, progress: Progress, control: Control) -> Validation:
        """Of the averaged weights, by which the best is chosen, and of the raw ones."""
        step = self.step
        scores, raw_scores = (
            validate(
                vae, self.val_reader, self.accelerator, self.layout.micro_batch_size, self.config.seed, control.each,
                step.comparisons,
            )
            for vae in (step.averaged, step.vae)
        )  # fmt: skip
        if self.rfid and self.schedule.rfid_is_due(progress):
            scores = scores.with_further(rfid=self.rfid(step.averaged, control.each))
        return Validation(scores.score(self.config.train.best_by), {"val": scores, "val_raw": raw_scores})

    def draw(self, logger: RunLogger, progress: Progress, *, at_end: bool) -> None:
        """Reconstructions, samples, interpolations and curves."""
        self.figures.draw(logger, progress, at_end=at_end)
