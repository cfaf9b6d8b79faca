"""The pictures of a run: curves from its metrics, and grids of reconstructions, samples and interpolations."""

from __future__ import annotations

import io
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
from vaetrain.files import replace_file, write_png
from vaetrain.model.autoencoder import VAE
from vaetrain.runs.curves import DISTORTION, LOSS, RATE, Curve, line_of, without_outliers
from vaetrain.runs.directory import RunDirectory
from vaetrain.runs.record import records_of
from vaetrain.training.logger import RunLogger
from vaetrain.training.progress import Progress
from vaetrain.upload import upload

SECONDS_BETWEEN_DRAWINGS = 60
"""Drawing costs some two seconds; short epochs need not pay it every time. The end of training always draws."""

STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}
OTHER_COLOUR, INCIDENT_COLOUR = "#8c8c8c", "#c44e52"
TRAINING, VALIDATION = {"color": "#4c72b0"}, {"color": "#dd8452", "marker": "o"}


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
        save_reconstructions(self.vae, self.vae.from_uint8(upload(images, device)), folder / "reconstructions.png")
        save_samples(self.vae, self.num_pictures, folder / "samples.png")
        save_interpolations(self.vae, self.vae.from_uint8(upload(images[:12], device)), folder / "interpolations.png")
        save_curves(self.run.metrics(), folder)
        for name in ("reconstructions", "samples", "interpolations", "losses", "kl"):
            if (folder / f"{name}.png").exists():  # a single image has no interpolations
                logger.log_picture(name, folder / f"{name}.png", progress.step)


def save_grid(images: Float[Tensor, "b c h w"], file: Path, columns: int) -> None:
    """Save images in [0, 1] side by side, row by row; those under 128 pixels are enlarged so that one can see them."""
    scale = max(1, 128 // images.shape[-1])
    enlarged = F.interpolate(images.float().cpu(), scale_factor=scale, mode="nearest")
    picture = io.BytesIO()
    save_image(make_grid(enlarged, nrow=columns, padding=2, pad_value=1.0), picture, format="png")
    replace_file(file, picture.getvalue())


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
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
        draw(axes[0], metrics, LOSS)
        draw(axes[1], metrics, DISTORTION)
        mark_incidents(axes[0], records_of(metrics, "train"), records_of(metrics, "event"))
        finish(figure, list(axes), folder / "losses.png")

        figure, axis = plt.subplots(figsize=(5.4, 3.6), layout="constrained")
        draw(axis, metrics, RATE)
        beta = line_of(metrics, "train/beta")
        if len({value for _, value in beta}) > 1:
            right = axis.twinx()
            right.grid(False)
            draw_line(right, beta, "β (right)", color=OTHER_COLOUR, linestyle="--")
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


def draw(axis: Any, metrics: Sequence[dict[str, Any]], curve: Curve) -> None:
    """Draw a curve's two lines, training and validation."""
    for (label, metric), style in zip(curve.lines, (TRAINING, VALIDATION), strict=True):
        draw_line(axis, line_of(metrics, metric), label, **style)
    axis.set(title=curve.title, xlabel="epoch", ylabel=curve.y)


def draw_line(axis: Any, line: Sequence[tuple[float, float]], label: str, **style: Any) -> None:
    """Add a labelled line through the finite values, if there are any: an autoencoder has no ELBO."""
    if finite := [(x, y) for x, y in line if math.isfinite(y)]:
        axis.plot(*zip(*finite, strict=True), label=label, linewidth=1.6, markersize=3, **style)


def finish(figure: Any, axes: Sequence[Any], file: Path) -> None:
    """Keep the first, enormous losses from flattening the rest; then legend and save."""
    for axis in axes:
        values = [y for line in axis.get_lines() for y in line.get_ydata()]
        later = without_outliers(values)
        if len(later) < len(values):
            axis.set_ylim(top=max(later) + 0.05 * (max(later) - min(later)))
    if figure.axes[0].get_legend_handles_labels()[0]:  # none where no loss was finite
        figure.axes[0].legend(frameon=False)
    write_png(figure, file, dpi=120)
    plt.close(figure)
