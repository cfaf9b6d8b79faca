"""Is the model repeating its training images? Each sample's nearest one, in pixels and in features.

A short distance alone says nothing: blurred images are close to everything. So the same search is made for validation images,
which the model cannot have memorised, and for their reconstructions, which are as blurred as samples are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Float, Float64, Int64, UInt8
from torch import Tensor

from vaetrain.data.readers.reader import Reader
from vaetrain.data.readers.subset import Subset
from vaetrain.distributed import processes
from vaetrain.evaluation.image_grid import save_labelled_grid
from vaetrain.metrics.split_pass import pass_over
from vaetrain.metrics.subset import choose_images, subset_batches
from vaetrain.model.autoencoder import VAE
from vaetrain.upload import upload

Features = Callable[[UInt8[Tensor, "b c h w"]], Float[Tensor, "b ..."]]
"""Images to the numbers whose Euclidean distance is taken; called without gradients, in batches."""

BATCH_SIZE = 64

MAX_DISTANCES = 2**24
"""Distances computed at a time, 128 MiB in float64: queries are cut into blocks so that their number costs no memory."""


def pixels(images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
    """Levels 0 to 255 as features: squared distances are whole numbers, hence exact in float64."""
    return images.flatten(1).float()


def encoder_features(vae: VAE) -> Features:
    """The model's own code of an image, its posterior mean, as features."""

    def features(images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        x = vae.from_uint8(images).contiguous(memory_format=torch.channels_last)
        return vae.encode(x).mode().flatten(1)

    return features


@dataclass(frozen=True)
class Neighbours:
    """For each query its nearest training image."""

    distance: Float64[Tensor, " q"]
    """Euclidean, in units of the features."""
    index: Int64[Tensor, " q"]
    """The training image, as a position in the split; of several at the same distance the first."""
    image: UInt8[Tensor, "shown c h w"]
    """The nearest images of the first queries."""


class Memorisation(NamedTuple):
    """How close samples are to the training images."""

    scores: dict[str, float | None]
    neighbours: dict[str, Neighbours]
    """Of each sample, in pixels and in features."""
    save_picture: Callable[[Path], None]
    """Writes samples and neighbours side by side as a PNG."""


class NearestSearch:
    """Exact nearest neighbours of queries among images that pass by in batches, in one space."""

    def __init__(self, features: Features, queries: Float[Tensor, "q d"], shown: UInt8[Tensor, "s c h w"]) -> None:
        self.features = features
        self.queries = queries.double()
        self.norms = self.queries.square().sum(1)
        self.squared = torch.full_like(self.norms, math.inf)
        self.index = torch.full_like(self.norms, -1, dtype=torch.int64)
        self.image = torch.zeros_like(shown)

    def update(
        self, images: UInt8[Tensor, "b c h w"], indices: Int64[Tensor, " b"], features: Float[Tensor, "b d"]
    ) -> None:
        """Compare every query with every image of a batch; ‖a − b‖² = ‖a‖² − 2 a·b + ‖b‖² in float64."""
        passing = features.double()
        norms = passing.square().sum(1)
        block = max(1, MAX_DISTANCES // len(passing))
        for start in range(0, len(self.queries), block):
            rows = slice(start, start + block)
            squared = torch.addmm(norms, self.queries[rows], passing.T, alpha=-2) + self.norms[rows, None]
            nearest, at = squared.min(1)
            closer = nearest < self.squared[rows]
            self.squared[rows] = torch.where(closer, nearest, self.squared[rows])
            self.index[rows] = torch.where(closer, indices[at], self.index[rows])
            shown = self.image[rows]  # of the first queries alone
            num_shown = len(shown)
            shown.copy_(torch.where(closer[:num_shown, None, None, None], images[at[:num_shown]], shown))

    def finish(self, accelerator: Accelerator) -> Neighbours:
        """The nearest over all processes; a collective."""
        squared, index, image = self.squared, self.index, self.image
        if accelerator.num_processes > 1:
            everyones_squared = accelerator.gather(squared[None])
            everyones_index = accelerator.gather(index[None])
            everyones_image = accelerator.gather(image[None])
            # Of equal distances the lower index, as a single process finds it.
            least = everyones_squared.amin(0)
            candidates = everyones_index.masked_fill(everyones_squared > least, torch.iinfo(torch.int64).max)
            winner = candidates.argmin(0)
            squared, index = least, candidates.amin(0)
            image = everyones_image[winner[: len(image)], torch.arange(len(image), device=winner.device)]
        return Neighbours(squared.clamp(min=0).sqrt().cpu(), index.cpu(), image.cpu())


@torch.no_grad()
def nearest_images(
    queries: UInt8[Tensor, "q c h w"],
    reader: Reader,
    accelerator: Accelerator,
    spaces: dict[str, Features],
    *,
    known: Mapping[str, Float[Tensor, "m ..."]] | None = None,
    num_shown: int = 0,
    batch_size: int = BATCH_SIZE,
) -> dict[str, Neighbours]:
    """Each query's exact nearest image of the reader's split in every space, in one pass shared by all processes.

    A collective. All processes give the same queries and get the same answer, whatever their number; memory is bounded by
    the queries and their features, not by the split. `known` has the features of the whole split for spaces where these
    have been computed already.
    """
    device, known = accelerator.device, known or {}
    searches = {}
    for name, features in spaces.items():
        rows = [features(upload(block, device)).flatten(1) for block in queries.split(batch_size)]
        searches[name] = NearestSearch(features, torch.cat(rows), upload(queries[:num_shown], device))
    for batch in pass_over("nearest training images", reader, accelerator, batch_size):
        images, indices = upload(batch.images, device), upload(batch.indices, device)
        for name, search in searches.items():
            passing = known[name][indices] if name in known else search.features(images)
            search.update(images, indices, passing.flatten(1))
    return {name: search.finish(accelerator) for name, search in searches.items()}


@torch.no_grad()
def memorisation(
    vae: VAE,
    samples: UInt8[Tensor, "n c h w"],
    train_reader: Reader,
    val_reader: Reader,
    accelerator: Accelerator,
    *,
    features: Features | None = None,
    known: Float[Tensor, "m ..."] | None = None,
    num_shown: int = 16,
    seed: int = 0,
) -> Memorisation:
    """Scores of how much closer samples are to training images than held-out images are, and their picture. A collective.

    `samples` are the same on every process (`vaetrain.sampling.generate.gather_samples`) and compared with as many validation
    images, drawn by `seed`, or all. `features` defaults to the encoder's mean; `known` are those of the whole train split, if
    they have been computed already. For the spaces S pixel and feature:

    - eval/nearest_S_distance_ratio: median distance of samples to their nearest training image / that of validation
      images. Near 0: copies. About 1: as far from the training images as new images are.
    - eval/nearest_S_distance_ratio_to_recon: the same with reconstructions of the validation images below the line:
      samples of a VAE are blurred, and blurred images lie closer to everything. Both are None where most
      validation images are training images, too.
    - eval/nearest_S_closer_than_val: probability that a random sample lies closer to the training images than a random
      validation image, ties half. ½ where nothing is copied, 1 for copies: the Mann-Whitney statistic of Meehan, Chaudhuri
      & Dasgupta 2020 (A non-parametric test to detect data-copying in generative models, Sec. 3), over the whole space.
    """
    val, _ = draw_images(val_reader, len(samples), accelerator, seed)
    recon = [vae.reconstruct(vae.from_uint8(upload(block, accelerator.device))) for block in val.split(BATCH_SIZE)]
    queries = torch.cat([samples, val, *(vae.likelihood.to_uint8(block).cpu() for block in recon)])
    spaces = {"pixel": pixels, "feature": features or encoder_features(vae)}
    found = nearest_images(
        queries,
        train_reader,
        accelerator,
        spaces,
        known=None if known is None else {"feature": known},
        num_shown=min(num_shown, len(samples)),
    )
    scores: dict[str, float | None] = {}
    references: dict[str, float] = {}
    for space, neighbours in found.items():
        of_samples, of_val, of_recon = neighbours.distance.split([len(samples), len(val), len(val)])
        references[space] = float(of_val.median())
        for name, reference in (("distance_ratio", of_val), ("distance_ratio_to_recon", of_recon)):
            scores[f"eval/nearest_{space}_{name}"] = ratio(float(of_samples.median()), float(reference.median()))
        scores[f"eval/nearest_{space}_closer_than_val"] = probability_of_less(of_samples, of_val)
    of_samples_alone = {
        space: Neighbours(each.distance[: len(samples)], each.index[: len(samples)], each.image)
        for space, each in found.items()
    }
    return Memorisation(scores, of_samples_alone, partial(save_nearest, samples, found, references))


def ratio(distance: float, reference: float) -> float | None:
    """Of distances; None where there is nothing to compare with."""
    return distance / reference if reference > 0 else None


def draw_images(
    reader: Reader, num_images: int, accelerator: Accelerator, seed: int = 0
) -> tuple[UInt8[Tensor, "n c h w"], Int64[Tensor, " n"]]:
    """At most so many images of a split, drawn by the seed without replacement, in shard order, and their labels. A collective.

    Every process gets all of them; they do not depend on the number of processes.
    """
    side, channels = reader.manifest.image_size, reader.manifest.channels
    images = [torch.empty(0, channels, side, side, dtype=torch.uint8)]
    labels = [torch.empty(0, dtype=torch.int64)]
    indices = [torch.empty(0, dtype=torch.int64)]
    chosen = choose_images(reader.num_images, num_images, seed)
    for batch in subset_batches(reader, chosen, BATCH_SIZE, accelerator.process_index, accelerator.num_processes):
        images.append(batch.images.cpu())
        labels.append(batch.labels.cpu())
        indices.append(batch.indices.cpu())
    numbers = torch.cat(indices)
    return (
        processes.gather_by_index(accelerator, numbers, torch.cat(images)),
        processes.gather_by_index(accelerator, numbers, torch.cat(labels)),
    )


def probability_of_less(a: Float64[Tensor, " n"], b: Float64[Tensor, " m"]) -> float:
    """P(a < b) + ½ P(a = b) of two random members."""
    return float((a[:, None] < b).double().mean() + 0.5 * (a[:, None] == b).double().mean())


def save_nearest(
    samples: UInt8[Tensor, "n c h w"], found: dict[str, Neighbours], references: dict[str, float], file: Path
) -> None:
    """The samples with the nearest training images beside them; each distance over the median one of validation images."""
    shown = len(found["pixel"].image)
    per_row = min(4, shown)
    shown -= shown % per_row
    triples = torch.stack([samples[:shown].cpu(), *(neighbours.image[:shown] for neighbours in found.values())], dim=1)
    captions = []
    for number in range(shown):
        ratios = (ratio(float(found[space].distance[number]), references[space]) for space in found)
        captions += [f"#{number}", *("–" if each is None else f"{each:.2f}" for each in ratios)]
    per_line = per_row * len(triples[0])
    save_labelled_grid(
        triples.reshape(-1, per_line, *samples.shape[1:]), file,
        title="Samples with their nearest training images, by pixels and by features\n"
        "(number: distance over the median distance of validation images to their nearest)",
        column_labels=["sample", *found] * per_row, captions=captions, columns_per_group=len(triples[0]),
    )  # fmt: skip


def describe_neighbours(neighbours: dict[str, Neighbours], train: Subset) -> list[dict[str, Any]]:
    """For each sample its number and, in each space, its nearest training image: index, distance, and where it lies."""
    lines: list[dict[str, Any]] = [{"sample": number} for number in range(len(neighbours["pixel"].index))]
    for space, found in neighbours.items():
        positions, of_sample = np.unique(found.index.numpy(), return_inverse=True)
        places = train.at(positions).describe()
        for line, index, distance, place in zip(lines, found.index, found.distance, of_sample, strict=True):
            line[space] = {"index": int(index), "distance": float(distance), **places[place]}
    return lines
