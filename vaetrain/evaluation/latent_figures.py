"""Pictures of what the latent space holds: interpolations, traversals, a projection, and priors side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from matplotlib.patches import Circle
from torch import Tensor

from vaetrain.evaluation.image_grid import save_labelled_grid
from vaetrain.files import write_png
from vaetrain.model.autoencoder import VAE
from vaetrain.picture_text import legible, name_entries
from vaetrain.upload import upload

CODING_BATCH = 64
LEGEND_ROWS = 24


def encode_moments(
    vae: VAE, images: UInt8[Tensor, "n c h w"], seed: int = 0
) -> tuple[Float[Tensor, "n *latent"], Float[Tensor, "n *latent"]]:
    """Posterior means of images and one latent z ~ q(z|x) of each, on the CPU."""
    device = next(vae.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    means, latents = [], []
    for block in images.split(CODING_BATCH):
        posterior = vae.encode(vae.from_uint8(upload(block, device)))
        noise = torch.randn(posterior.mean.shape, generator=generator)
        means.append(posterior.mean.cpu())
        latents.append(posterior.sample(noise=upload(noise, device)).cpu())
    return torch.cat(means), torch.cat(latents)


def decode(vae: VAE, z: Float[Tensor, "n *latent"]) -> UInt8[Tensor, "n c h w"]:
    """Decoder means as images, on the CPU."""
    device = next(vae.parameters()).device
    return torch.cat(
        [vae.likelihood.to_uint8(vae.decode(upload(block, device))).cpu() for block in z.split(CODING_BATCH)]
    )


def slerp(
    start: Float[Tensor, "p d"], end: Float[Tensor, "p d"], weights: Float[Tensor, " steps"]
) -> Float[Tensor, "p steps d"]:
    """Points on the great circle between vectors (White 2016, "Sampling generative networks"): lengths keep to N(0, I)'s.

    Falls back on the straight line where the vectors are parallel.
    """
    cosine = torch.nn.functional.cosine_similarity(start, end, dim=1).clamp(-1, 1)[:, None, None]
    angle = cosine.acos()
    t = weights[None, :, None]
    parallel = angle.sin() < 1e-4
    safe = torch.where(parallel, torch.ones_like(angle), angle)
    first = torch.where(parallel, 1 - t, ((1 - t) * safe).sin() / safe.sin())
    second = torch.where(parallel, t, (t * safe).sin() / safe.sin())
    return first * start[:, None] + second * end[:, None]


@torch.no_grad()
def save_latent_interpolations(vae: VAE, images: UInt8[Tensor, "n c h w"], file: Path, *, num_steps: int = 8) -> None:
    """For each pair of neighbouring images the decoded latents on the straight line and on the great circle between them."""
    num_pairs = len(images) // 2
    if num_pairs == 0:
        return  # a single image has nobody to turn into
    starts, ends = images[0::2][:num_pairs], images[1::2]
    codes, _ = encode_moments(vae, images[: 2 * num_pairs])
    start, end = codes[0::2].flatten(1), codes[1::2].flatten(1)
    weights = torch.linspace(0, 1, num_steps)
    line = torch.lerp(start[:, None], end[:, None], weights[None, :, None])
    between = torch.stack([line, slerp(start, end, weights)], dim=1)  # (pairs, 2, steps, d)
    decoded = decode(vae, between.reshape(-1, *vae.config.latent_shape)).unflatten(0, (num_pairs, 2, num_steps))
    ends_shown = torch.stack([torch.stack([starts, starts], 1), torch.stack([ends, ends], 1)])[:, :, :, None]
    rows = torch.cat([ends_shown[0], decoded, ends_shown[1]], dim=2).flatten(0, 1)
    save_labelled_grid(
        rows, file,
        title="Interpolations between validation images",
        row_labels=["straight", "spherical"] * num_pairs,
        column_labels=["image", *(f"{weight:.2f}" for weight in weights.tolist()), "image"],
        rows_per_group=2,
    )  # fmt: skip


@torch.no_grad()
def save_traversals(
    vae: VAE, images: UInt8[Tensor, "n c h w"], file: Path, *, num_units: int = 10, num_steps: int = 9
) -> None:
    """The latent units whose posterior mean varies most over the images, each moved by itself in the first image's code.

    Columns: −3 to 3 of the unit's standard deviations over the latents of the images, about its mean there. A single image
    varies in nothing and gets no picture.
    """
    if len(images) < 2:
        return
    means, latents = encode_moments(vae, images)
    variances = means.flatten(1).var(0)
    units = variances.argsort(descending=True, stable=True)[:num_units]
    deviations = torch.linspace(-3, 3, num_steps)
    centre, spread = latents.flatten(1).mean(0), latents.flatten(1).std(0)
    z = means[0].flatten().repeat(len(units), num_steps, 1)
    for row, unit in enumerate(units.tolist()):
        z[row, :, unit] = centre[unit] + deviations * spread[unit]
    decoded = decode(vae, z.reshape(-1, *vae.config.latent_shape)).unflatten(0, (len(units), num_steps))
    first = images[:1].cpu().expand(len(units), -1, -1, -1)[:, None]
    save_labelled_grid(
        torch.cat([first, decoded], dim=1), file,
        title="Traversals of the most active latent units\n(column: standard deviations of the unit over validation images)",
        row_labels=[f"unit {unit_name(unit, vae.config.latent_shape)}\nvar. of mean {variances[unit]:.3g}"
                    for unit in units.tolist()],
        column_labels=["image", *(f"{deviation:+.2f}" for deviation in deviations.tolist())],
    )  # fmt: skip


def unit_name(unit: int, latent_shape: Sequence[int]) -> str:
    """A latent unit by its number, or in a map by channel, row and column."""
    place = np.unravel_index(unit, latent_shape)
    return str(unit) if len(latent_shape) == 1 else f"({', '.join(str(int(at)) for at in place)})"


@torch.no_grad()
def save_latent_pca(
    vae: VAE, images: UInt8[Tensor, "n c h w"], labels: Int64[Tensor, " n"], classes: Sequence[str], file: Path
) -> None:
    """Latents z ~ q(z|x) of images on the two widest principal axes of their posterior means, coloured by class.

    With a VAE the circles of one, two and three standard deviations of N(0, I) are drawn, to see where the aggregate
    posterior leaves the prior. There is no picture where there is no plane: of a single image, of a latent of one dimension,
    or where all means are the same.
    """
    means, latents = encode_moments(vae, images)
    codes = means.flatten(1).double()
    centre = codes.mean(0)
    _, singular, axes = torch.linalg.svd(codes - centre, full_matrices=False)
    if len(axes) < 2 or axes.shape[1] < 2 or singular[0] == 0:
        return
    shares = (singular.square() / singular.square().sum()).tolist()
    points = ((latents.flatten(1).double() - centre) @ axes[:2].T).numpy()
    figure, axis = plt.subplots(figsize=(6.4, 5.4), layout="constrained")
    colours = plt.get_cmap("tab10" if len(classes) <= 10 else "turbo")
    present = sorted(set(labels.tolist()))
    handles: list[Any] = []
    for place, label in enumerate(present):
        chosen = (labels == label).numpy()
        colour = colours(label % 10) if len(classes) <= 10 else colours(place / max(1, len(present) - 1))
        handles.append(axis.scatter(points[chosen, 0], points[chosen, 1], s=7, alpha=0.6, linewidths=0, color=colour))
    names = legible({f"class {label}": classes[label] for label in present})
    if vae.config.variational:
        origin = (-centre @ axes[:2].T).tolist()
        for radius in (1, 2, 3):
            circle = axis.add_patch(Circle(origin, radius, fill=False, color="0.35", linewidth=0.9, linestyle="--"))
        handles.append(circle)
        names.append("N(0, I): 1, 2, 3 σ")
    axis.set_aspect("equal", adjustable="datalim")
    axis.set(
        title=f"Aggregate posterior, {len(points):,} validation images, PCA",
        xlabel=f"principal axis 1 ({shares[0]:.0%} of the variance of the means)",
        ylabel=f"principal axis 2 ({shares[1]:.0%})",
    )
    numbers = [str(number) for number in range(len(handles))]
    legend = figure.legend(
        handles, numbers, loc="outside right upper", frameon=False, fontsize=9, markerscale=2.5,
        ncols=-(-len(handles) // LEGEND_ROWS),
    )  # fmt: skip
    name_entries(legend, names)
    # Room for long names, or many, is not taken from the plot.
    figure.set_figwidth(max(6.4, 4.9 + legend.get_window_extent().width / figure.dpi))
    for handle in filter(None, legend.legend_handles):
        handle.set_alpha(1)
    write_png(figure, file, dpi=120)
    plt.close(figure)


def save_prior_comparison(
    samples: Mapping[str, UInt8[Tensor, "n c h w"]], file: Path, *, real: UInt8[Tensor, "m c h w"] | None = None
) -> None:
    """One row of samples for each prior, under the label that is its key; above them, if given, `real` images.

    In one column gaussian and flow turn the same noise into images.
    """
    rows: dict[str, Tensor] = {"validation\nimages": real} if real is not None else {}
    rows |= dict(samples.items())
    width = min(map(len, rows.values()))
    save_labelled_grid(
        torch.stack([images[:width].cpu() for images in rows.values()]), file,
        title="Samples by prior", row_labels=list(rows), rows_per_group=1,
    )  # fmt: skip
