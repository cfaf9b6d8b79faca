"""The features of a set of images, extracted once, each process those of its own images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from jaxtyping import Float32, UInt8
from torch import Tensor

from vaetrain.distributed import processes
from vaetrain.metrics.extractor import FeatureExtractor
from vaetrain.metrics.fidelity import FeatureGaussian, FeatureStatistics
from vaetrain.progress_bar import ProgressBar
from vaetrain.upload import upload

NumberedImages = tuple[Sequence[int] | Tensor, UInt8[Tensor, "b c h w"]]
"""A batch of one process: the images' numbers in their set, and their pixels."""


@dataclass(frozen=True)
class FeatureSet:
    """Features in the order of the images' numbers: the same for any number of processes."""

    features: Float32[Tensor, "n d"]
    statistics: FeatureStatistics
    logits: Float32[Tensor, "n classes"] | None = None
    """Of the inception score, when the extractor is a classifier."""

    def gaussian(self) -> FeatureGaussian:
        """Mean and covariance: from the sums of all processes, or, where it is the better root, from the features."""
        num_images, num_features = self.features.shape
        return (
            FeatureGaussian.of_statistics(self.statistics)
            if num_images > num_features
            else FeatureGaussian.of_features(self.features)
        )


def extract(
    extractor: FeatureExtractor,
    batches: Iterable[NumberedImages],
    num_images: int,
    accelerator: Accelerator,
    *,
    batch_size: int,
    what: str,
) -> FeatureSet:
    """Features of images 0 … num_images − 1, of which each process brings some. A collective.

    Every process ends with all of them, in its device's memory: for Inception 8 KB an image, and its logits' 4 KB.
    """
    numbers, features, logits = [torch.empty(0, dtype=torch.int64)], [], []
    with ProgressBar(f"features of {what}", num_images, quiet=not accelerator.is_main_process) as bar:
        for indices, images in batches:
            numbers.append(torch.as_tensor(indices, dtype=torch.int64))
            for part in images.split(batch_size):
                output = extractor(part)
                features.append(output.features)
                if output.logits is not None:
                    logits.append(output.logits)
            bar.moved_to(min(bar.done + len(images) * accelerator.num_processes, num_images))
    mine = torch.cat(numbers)
    everybodys = _in_order(features, mine, num_images, accelerator)
    assert everybodys is not None, "no process has brought an image"
    statistics = FeatureStatistics.empty(everybodys.shape[1], accelerator.device)
    for part in features:
        statistics.update(part)
    statistics = statistics.reduce(lambda tensor: processes.sum_over_processes(accelerator, tensor))
    assert statistics.count == num_images, f"{statistics.count} images came in place of {num_images}"
    return FeatureSet(everybodys, statistics, _in_order(logits, mine, num_images, accelerator))


def _in_order(
    rows: list[Tensor], numbers: Tensor, num_images: int, accelerator: Accelerator
) -> Float32[Tensor, "n d"] | None:
    """All processes' rows under their images' numbers; None when no process has any."""
    [width] = map(int, processes.max_over_processes(accelerator, [float(rows[0].shape[1] if rows else 0)]))
    if width == 0:
        return None
    table = torch.zeros(num_images, width, device=accelerator.device)
    if rows:
        table[upload(numbers, table.device)] = torch.cat(rows)
    # Every row is zero in all processes but one: the sum is exact.
    return processes.sum_over_processes(accelerator, table)
