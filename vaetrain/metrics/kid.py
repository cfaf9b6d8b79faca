"""Kernel inception distance, and how far it is from that of endlessly many images."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float32, Float64
from torch import Tensor
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

from vaetrain.data.readers.order import epoch_order
from vaetrain.distributed.arithmetic import ieee_fp32
from vaetrain.upload import upload

KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
"""Images of each side in a subset, as torch-fidelity has it; half of the images where there are fewer than 2,000."""

NUM_BLOCKS = 50
"""Parts of a set that the jackknife leaves out, one after the other: the error is then known to a tenth of itself."""

MAX_IMAGES = 10_000
"""Images of each side that the jackknife looks at: kernel values grow with their square."""


def kid(generated: Float32[Tensor, "n d"], real: Float32[Tensor, "m d"]) -> tuple[dict[str, float], dict[str, Any]]:
    """Kernel inception distance (Bińkowski et al. 2018, Sec. 3.1) and its standard error, and how they were computed.

    Mean over subsets of the unbiased squared MMD under the kernel (x·y / d + 1)³, computed by torch-fidelity. Its variance has
    two parts: that of the MMD of all images, by a jackknife, and that of the drawing of subsets, whose deviation
    over the root of their number is about a tenth of the whole, since all subsets are drawn from the same images.
    """
    size = min(KID_SUBSET_SIZE, len(generated) // 2, len(real) // 2)
    with ieee_fp32(generated.device):
        result = kid_features_to_metric(generated, real, kid_subsets=KID_SUBSETS, kid_subset_size=size, verbose=False)
        variance = jackknife_variance(generated, real) + result[KEY_METRIC_KID_STD] ** 2 / KID_SUBSETS
    scores = {"eval/kid": result[KEY_METRIC_KID_MEAN], "eval/kid_std_error": variance**0.5}
    return scores, {"kid_subsets": KID_SUBSETS, "kid_subset_size": size}


def jackknife_variance(generated: Float32[Tensor, "n d"], real: Float32[Tensor, "m d"]) -> float:
    """Of the unbiased squared MMD over data sets of n and m images: block after block of either side is left out.

    A jackknife counts what two blocks contribute only together with each of them, twice, and where the distributions are
    equal there is nothing else (Efron & Stein 1981): it is taken off once. Of a larger set than `MAX_IMAGES` so many are
    looked at, and the variance goes with 1/n.
    """
    x, y = (_shuffled(features) for features in (generated, real))
    x_blocks, y_blocks = x.tensor_split(min(NUM_BLOCKS, len(x))), y.tensor_split(min(NUM_BLOCKS, len(y)))
    cross = kernel_sums(x_blocks, y_blocks)
    joint = 4 * interaction_variance(cross, x_blocks, y_blocks) / cross.numel()
    variance = 0.0
    for blocks, of_other, num_other, total in (
        (x_blocks, cross.sum(1), len(y), len(generated)),
        (y_blocks, cross.sum(0), len(x), len(real)),
    ):
        own = kernel_sums(blocks, blocks)
        # An image is not compared with itself.
        own.diagonal().sub_(torch.stack([(block.double().square().mean(1) + 1).pow(3).sum() for block in blocks]))
        sizes = upload(torch.tensor([len(block) for block in blocks], dtype=torch.float64), own.device)
        left = sizes.sum() - sizes
        own_left = own.sum() - 2 * own.sum(1) + own.diagonal()
        values = own_left / (left * (left - 1)) - 2 * (of_other.sum() - of_other) / (left * num_other)
        half = len(blocks) // 2  # a table without the diagonal, whose sums are of fewer pairs
        among_own = interaction_variance(own[:half, half:], blocks[:half], blocks[half:])
        counted_twice = 2 * among_own / len(blocks) ** 2 + joint / 2
        found = float(values.var(correction=0)) * (len(blocks) - 1)
        variance += max(found - counted_twice, counted_twice) * float(sizes.sum()) / total
    return variance


def interaction_variance(sums: Float64[Tensor, "b c"], x: tuple[Tensor, ...], y: tuple[Tensor, ...]) -> float:
    """Variance of the mean kernel value of two blocks that no sum of an effect of each explains."""
    rows, columns = (upload(torch.tensor([len(block) for block in blocks]), sums.device) for blocks in (x, y))
    means = sums / rows[:, None] / columns
    residuals = means - means.mean(1, keepdim=True) - means.mean(0) + means.mean()
    return float(residuals.square().sum()) / ((len(x) - 1) * (len(y) - 1))


def kernel_sums(x: tuple[Tensor, ...], y: tuple[Tensor, ...]) -> Float64[Tensor, "b c"]:
    """Σ (x·y / d + 1)³ over the pairs of images in each pair of blocks."""
    everything = torch.cat(y)
    sizes = [len(block) for block in y]
    rows = []
    for block in x:
        kernel = (block @ everything.T / block.shape[1] + 1).pow(3)
        rows.append(torch.stack([part.sum() for part in kernel.sum(0, dtype=torch.float64).split(sizes)]))
    return torch.stack(rows)


def _shuffled(features: Float32[Tensor, "n d"]) -> Float32[Tensor, "k d"]:
    """At most `MAX_IMAGES` in random order: real images come in the order of shards, which may be that of classes."""
    order = torch.from_numpy(epoch_order(len(features), 0, 0)[:MAX_IMAGES])
    return features[upload(order, features.device)]
