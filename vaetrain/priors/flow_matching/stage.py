"""The training of a flow-matching prior: latents of a trained VAE, held-out loss, samples of the VAE's decoder."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import matplotlib.pyplot as plt
import torch
from torch.utils.flop_counter import FlopCounterMode

from vaetrain.distributed.exchange import decided_by_main
from vaetrain.distributed.processes import sum_over_processes
from vaetrain.export import load_run, weights_sha256
from vaetrain.latents.reader import LatentReader
from vaetrain.metrics.split_pass import pass_over
from vaetrain.priors.flow_matching.config import PriorTraining
from vaetrain.priors.flow_matching.model import HELD_OUT_TIMES, FlowMatching, draw_held_out
from vaetrain.priors.flow_matching.prior import FlowMatchingPrior
from vaetrain.priors.flow_matching.publish import publish
from vaetrain.priors.flow_matching.step import FlowMatchingStep
from vaetrain.runs.curves import Curve
from vaetrain.runs.directory import RunDirectory
from vaetrain.training.control import Control
from vaetrain.training.figures import SECONDS_BETWEEN_DRAWINGS, STYLE, draw, finish, save_grid, save_samples
from vaetrain.training.logger import RunLogger
from vaetrain.training.progress import Progress
from vaetrain.training.schedule import LoopSchedule
from vaetrain.training.stage import SPLITS, Stage, Validation

FLOW_LOSS = Curve("Loss of the velocity", "squared error per dimension",
                  (("training", "train/loss"), ("validation, averaged weights", "val/flow_loss")))  # fmt: skip


@dataclass(frozen=True)
class FlowScores:
    """Of the held-out latents."""

    flow_loss: float
    """Squared error of the velocity, mean over dimensions, latents and fixed times spread evenly over (0, 1)."""

    @property
    def record(self) -> dict[str, float | None]:
        """By name."""
        return {"flow_loss": self.flow_loss}

    @property
    def in_words(self) -> str:
        """For the terminal."""
        return f"loss {self.flow_loss:.4f} per dimension"


class FlowMatchingStage(Stage):
    """See `Stage`."""

    config: PriorTraining
    step: FlowMatchingStep
    train_reader: LatentReader
    val_reader: LatentReader
    unit = "per dimension"

    @property
    def latents(self) -> Path:
        """Where they are, or are put."""
        return self.config.data.latents or self.config.run_dir / "latents"

    def open_data(self, opened: ExitStack) -> None:
        """Both splits of the latents, which the first stage's best checkpoint must have encoded."""
        self.trained = load_run(self.config.first_stage, device=self.accelerator.device)
        resident_gib, encoder = self.config.data.resident_gib, weights_sha256(self.config.first_stage, self.trained)
        self.train_reader, self.val_reader = (
            LatentReader.open(self.latents, split, resident_gib=resident_gib, accelerator=self.accelerator)
            for split in SPLITS
        )
        for reader in (self.train_reader, self.val_reader):
            reader.check_encoder(encoder)
        self.schedule = LoopSchedule(self.config, self.train_reader.num_images, self.layout)

    def build_model(self) -> None:
        """The velocity network."""
        self.step = FlowMatchingStep.build(self.config, self.train_reader, self.layout, self.accelerator)

    def start_from(self, source: Path) -> NoReturn:
        """A prior has no `--init-from`."""
        raise AssertionError(source)

    def flops_per_image(self) -> float:
        """Of the network."""
        module = self.step.module
        with torch.device("meta"):
            model = FlowMatching(module.config, module.latent_shape, module.num_classes)
            z, t = torch.empty(1, *module.latent_shape), torch.empty(1)
            labels = torch.empty(1, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            model(z, z, t, labels).sum().backward()
        return float(counter.get_total_flops())

    def begin(self, run: RunDirectory) -> None:
        """Remember where pictures go."""
        self.run, self.drawn_at = run, -float("inf")

    def validate(self, progress: Progress, control: Control) -> Validation:
        """Of the averaged weights, by which the best is chosen, and of the raw ones."""
        scores, raw_scores = (
            FlowScores(self.held_out_loss(model, control)) for model in (self.step.averaged, self.step.module)
        )
        return Validation(-scores.flow_loss, {"val": scores, "val_raw": raw_scores})

    @torch.no_grad()
    def held_out_loss(self, model: FlowMatching, control: Control) -> float:
        """Every latent of the val split once, at HELD_OUT_TIMES times; with its class, never mirrored. A collective."""
        accelerator, seed = self.accelerator, self.config.seed
        was_training, sums = model.training, torch.zeros(2, dtype=torch.float64, device=accelerator.device)
        model.eval()
        labelled = self.config.objective.label_dropout < 1
        batches = pass_over("validation", self.val_reader, accelerator, self.layout.micro_batch_size, seed=seed)
        for batch in control.each(batches):
            labels = batch.labels if labelled else torch.full_like(batch.labels, model.num_classes)
            indices = batch.indices.tolist()
            for number in range(HELD_OUT_TIMES):
                noise, t = draw_held_out(seed, indices, number, model.latent_shape, accelerator.device)
                with accelerator.autocast():
                    errors = model.forward(batch.z, noise, t, labels)
                sums += torch.stack([errors.double().sum(), torch.full_like(sums[0], len(t))])
        model.train(was_training)
        total, count = sum_over_processes(accelerator, sums).tolist()
        return float(total / count)

    def prior(self) -> FlowMatchingPrior:
        """The averaged weights as they are now."""
        return FlowMatchingPrior.trained_as(self.config, self.step.averaged, self.train_reader.manifest.classes)

    def draw(self, logger: RunLogger, progress: Progress, *, at_end: bool) -> None:
        """samples.png, always of the same noise, one row for each class; losses.png."""
        if not at_end and time.monotonic() - self.drawn_at < SECONDS_BETWEEN_DRAWINGS:
            return
        vae, folder = self.trained.vae, self.run.figures
        with torch.no_grad():
            z = samples_by_class(self.prior(), self.config.log.num_pictures)
            images = vae.likelihood.to_unit(vae.decode(z.to(self.accelerator.device)))
        save_grid(images, folder / "samples.png", columns=8)
        with plt.style.context(STYLE):
            figure, axis = plt.subplots(figsize=(5.4, 3.6), layout="constrained")
            draw(axis, self.run.metrics(), FLOW_LOSS)
            finish(figure, [axis], folder / "losses.png")
        for name in ("samples", "losses"):
            logger.log_picture(name, folder / f"{name}.png", progress.step)
        self.drawn_at = time.monotonic()

    def finish(self, run: RunDirectory) -> None:
        """Put the best weights where sampling, evaluation and exports find them. A collective."""

        def publish_and_draw() -> None:
            vae = self.trained.vae
            vae.prior = publish(run, self.config, self.trained, self.val_reader)
            figures = RunDirectory(self.config.first_stage).figures
            save_samples(vae, self.config.log.num_pictures, figures / "samples.png")  # from the best prior there is

        decided_by_main(self.accelerator, publish_and_draw, "put the prior beside the first stage's checkpoint")


def samples_by_class(prior: FlowMatchingPrior, num_images: int) -> torch.Tensor:
    """Latents of seed 0: rows of eight, one class after the other, or of all where there is one."""
    names: tuple[str | None, ...] = tuple(
        name for name, share in zip(prior.classes, prior.model.class_shares.tolist(), strict=False) if share
    )
    rows = max(1, num_images // 8)
    if len(names) < 2:
        return prior.sample(0, range(rows * 8))
    rows = max(rows, min(len(names), 16))
    drawn = (prior.of_class(names[row % len(names)]).sample(0, range(row * 8, row * 8 + 8)) for row in range(rows))
    return torch.cat(list(drawn))
