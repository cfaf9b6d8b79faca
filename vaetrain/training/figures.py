"""The pictures of a run: curves from its metrics, and grids of reconstructions, samples and interpolations."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torchvision.utils import make_grid, save_image

from vaetrain.data.readers.reader import Reader
from vaetrain.model.autoencoder import VAE
from vaetrain.runs.directory import RunDirectory
from vaetrain.training.logger import RunLogger
from vaetrain.training.progress import Progress

SECONDS_BETWEEN_DRAWINGS = 60
"""Drawing costs some two seconds; short epochs need not pay it every time. The end of training always draws."""

TRAIN_COLOUR, VAL_COLOUR, OTHER_COLOUR, INCIDENT_COLOUR = "#4c72b0", "#dd8452", "#8c8c8c", "#c44e52"


class RunFigures:
    """Draws figures/*.png of a run in training; for the main process alone."""

    def __init__(self, run: RunDirectory, vae: VAE, val_reader: Reader, *, num_pictures: int) -> None:
        self.run = run
        self.vae = vae
        self.val_reader = val_reader
        self.num_pictures = num_pictures
        self.drawn_at = -math.inf

    def draw(self, logger: RunLogger, progress: Progress, *, at_end: bool) -> None:
        """Draw everything anew and hand it to the trackers, unless it was done a moment ago and more is to come."""
        if not at_end and time.monotonic() - self.drawn_at < SECONDS_BETWEEN_DRAWINGS:
            return
        self.drawn_at = time.monotonic()
        images = self.val_reader.first(self.num_pictures).images
        folder = self.run.figures
        device = next(self.vae.parameters()).device
        save_reconstructions(self.vae, self.vae.from_uint8(images.to(device)), folder / "reconstructions.png")
        save_samples(self.vae, self.num_pictures, folder / "samples.png")
        save_interpolations(self.vae, self.vae.from_uint8(images[:12].to(device)), folder / "interpolations.png")
        save_curves(self.run.metrics(), folder)
        for name in ("reconstructions", "samples", "interpolations", "losses", "kl"):
            if (folder / f"{name}.png").exists():  # a single image has no interpolations
                logger.log_picture(name, folder / f"{name}.png", progress.step)


def save_grid(images: Float[Tensor, "b c h w"], file: Path, columns: int) -> None:
    """Save images in [0, 1] side by side, row by row; those under 128 pixels are enlarged so that one can see them."""
    scale = max(1, 128 // images.shape[-1])
    enlarged = F.interpolate(images.float().cpu(), scale_factor=scale, mode="nearest")
    save_image(make_grid(enlarged, nrow=columns, padding=2, pad_value=1.0), file)


@torch.no_grad()
def save_reconstructions(vae: VAE, x: Float[Tensor, "b c h w"], file: Path) -> None:
    """Pairs of rows: images (in the pixel range) above, what the decoder makes of their posterior modes below."""
    columns = min(8, len(x))
    x = x[: len(x) // columns * columns]
    both = torch.stack([x, vae.reconstruct(x)]).unflatten(1, (-1, columns))  # (2, rows, columns, c, h, w)
    save_grid(vae.likelihood.to_unit(both.transpose(0, 1).flatten(0, 2)), file, columns)


@torch.no_grad()
def save_samples(vae: VAE, num_images: int, file: Path, seed: int = 0) -> None:
    """Samples 0 to num_images − 1 of the set that `seed` names: decoder means at latents from the prior."""
    save_grid(vae.likelihood.to_unit(vae.sample(num_images, seed=seed)), file, columns=min(8, num_images))


@torch.no_grad()
def save_interpolations(vae: VAE, x: Float[Tensor, "b c h w"], file: Path, num_steps: int = 8) -> None:
    """One row for each pair of neighbouring images: decoded latents on the straight line between their posterior modes."""
    z = vae.encode(x).mode()
    start, end = z[0::2][: len(z) // 2], z[1::2]
    if len(end) == 0:
        return  # a single image has nobody to turn into
    weights = torch.linspace(0, 1, num_steps, device=z.device).reshape(1, num_steps, *[1] * (z.ndim - 1))
    between = torch.lerp(start[:, None], end[:, None], weights).flatten(0, 1)
    save_grid(vae.likelihood.to_unit(vae.decode(between)), file, columns=num_steps)


def save_curves(metrics: Sequence[dict[str, Any]], folder: Path) -> None:
    """losses.png and kl.png: training and validation over epochs, as in the lecture; nats per image."""
    train = [record for record in metrics if record["split"] == "train"]
    val = [record for record in metrics if record["split"] == "val"]

    with plt.style.context(
        {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}
    ):
        figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
        negative_elbo = [
            (r["epoch"], r["val/distortion_nats"] + r["val/rate_nats"]) for r in val if finite(r, "val/distortion_nats")
        ]
        draw_curve(axes[0], points(train, "train/loss"), "training: distortion + β · rate", TRAIN_COLOUR)
        draw_curve(axes[0], negative_elbo, "validation: −ELBO", VAL_COLOUR, marker="o")
        axes[0].set(title="Loss", xlabel="epoch", ylabel="nats per image")
        draw_curve(axes[1], points(train, "train/distortion_nats"), "training", TRAIN_COLOUR)
        draw_curve(axes[1], points(val, "val/distortion_nats"), "validation", VAL_COLOUR, marker="o")
        mark_incidents(axes[0], train, [record for record in metrics if record["split"] == "event"])
        axes[1].set(title="Distortion, −log p(x|z)", xlabel="epoch", ylabel="nats per image")
        finish(figure, list(axes), folder / "losses.png")

        figure, axis = plt.subplots(figsize=(5.4, 3.6), layout="constrained")
        draw_curve(axis, points(train, "train/rate_nats"), "training", TRAIN_COLOUR)
        draw_curve(axis, points(val, "val/rate_nats"), "validation", VAL_COLOUR, marker="o")
        axis.set(title="Rate, KL(q(z|x) ‖ p(z))", xlabel="epoch", ylabel="nats per image")
        if len({record["train/beta"] for record in train}) > 1:
            right = axis.twinx()
            right.grid(False)
            draw_curve(right, points(train, "train/beta"), "β (right)", OTHER_COLOUR, linestyle="--")
            right.set_ylim(bottom=0)
        finish(figure, [axis], folder / "kl.png")


def mark_incidents(axis: Any, train: Sequence[dict[str, Any]], events: Sequence[dict[str, Any]]) -> None:
    """Ticks at the bottom where steps were skipped, triangles at the top where training went back to a checkpoint."""
    skipped = [record["epoch"] for record in train if record.get("train/skipped_steps")]
    rollbacks = [event["epoch"] for event in events if event["event"] == "rollback"]
    for epochs, height, marker, label in ((skipped, 0.02, "|", "steps skipped"), (rollbacks, 0.98, "v", "rolled back")):
        if epochs:
            # Not lines: `finish` looks at those for the limits of the axis.
            axis.scatter(
                epochs, [height] * len(epochs), marker=marker, color=INCIDENT_COLOUR, label=label,
                transform=axis.get_xaxis_transform(),
            )  # fmt: skip


def finite(record: dict[str, Any], name: str) -> bool:
    """Whether a record has a number under a name; non-finite values were written as null."""
    return record.get(name) is not None


def points(records: Sequence[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """(epoch, value) of the records that have a value."""
    return [(record["epoch"], record[name]) for record in records if finite(record, name)]


def draw_curve(axis: Any, curve: Sequence[tuple[float, float]], label: str, colour: str, **style: Any) -> None:
    """Add one labelled line to an axis."""
    axis.plot(
        [x for x, _ in curve], [y for _, y in curve], label=label, color=colour, linewidth=1.6, markersize=3, **style
    )


def finish(figure: Any, axes: Sequence[Any], file: Path) -> None:
    """Keep the first, enormous losses from flattening the rest; then legend and save."""
    for axis in axes:
        values = [y for line in axis.get_lines() for y in line.get_ydata()]
        later = sorted(values)[: max(2, math.ceil(0.97 * len(values)))]
        if len(values) > 10 and max(values) > 2 * max(map(abs, later)):
            axis.set_ylim(top=max(later) + 0.05 * (max(later) - min(values)))
    figure.axes[0].legend(frameon=False)
    figure.savefig(file, dpi=120)
    plt.close(figure)
