"""A small network trained on the data at hand, whose features stand in for Inception's where its weights cannot be had.

With two classes or more it learns to tell them apart; with one, which way up an image is (Gidaris et al. 2018, "Unsupervised
Representation Learning by Predicting Image Rotations"). A Fréchet distance in its features ranks models on this data. It is no FID:
it compares with nothing measured through another network.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from vaetrain.data.readers.batch import Batch
from vaetrain.data.readers.order import BatchLayout
from vaetrain.data.readers.reader import Reader
from vaetrain.distributed.randomness import mixed_seed
from vaetrain.files import replace_file, sha256_of_file
from vaetrain.upload import upload

NUM_FEATURES = 128
NUM_TURNS = 4


@dataclass(frozen=True)
class OwnExtractorReport:
    """What was trained, and how well it does what it was trained for."""

    task: str
    """`classes` or `rotations`."""
    num_outputs: int
    accuracy: float
    """Share of the val split it gets right, each image once (upright for classes; turned by a draw for rotations)."""
    num_images: int
    """Training images seen."""
    seed: int
    dataset_fingerprint: str
    weights_sha256: str
    """Of the TorchScript file."""


class OwnExtractor(nn.Module):
    """Strided convolutions down to about 4×4, averaged: uint8 (b, 3, h, w) → float32 (b, 128)."""

    def __init__(self, image_size: int) -> None:
        """For images of `image_size`, though others pass through too."""
        super().__init__()
        layers: list[nn.Module] = []
        channels, side = 3, image_size
        for width in (32, 64, NUM_FEATURES, NUM_FEATURES, NUM_FEATURES, NUM_FEATURES):
            layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            channels, side = width, side // 2
            if side <= 4 and width == NUM_FEATURES:
                break
        self.layers = nn.Sequential(*layers)

    def forward(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 128"]:
        """Features, averaged over positions."""
        return self.layers(images.float() / 127.5 - 1).mean(dim=(2, 3))


def train_own_extractor(
    open_split: Callable[[Literal["train", "val"]], Reader],
    out: Path,
    *,
    num_images: int,
    batch_size: int,
    seed: int,
    device: torch.device,
) -> OwnExtractorReport:
    """Train on the train split, write a TorchScript module to `out`, and say how it does on the val split.

    `open_split` opens a split by name. The same seed on the same machine gives the same weights.
    """
    train, val = open_split("train"), open_split("val")
    try:
        task = "classes" if len(train.manifest.classes) > 1 else "rotations"
        num_outputs = len(train.manifest.classes) if task == "classes" else NUM_TURNS
        torch.manual_seed(seed)
        network = OwnExtractor(train.manifest.image_size).to(device)
        head = nn.Linear(NUM_FEATURES, num_outputs).to(device)
        num_steps = max(1, num_images // batch_size)
        optimizer = torch.optim.AdamW([*network.parameters(), *head.parameters()], weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=num_steps)
        layout = BatchLayout.of(batch_size, None, 0, 1)
        batches = train.train_batches(seed, 0, layout)
        for step, batch in zip(range(num_steps), batches, strict=False):
            images, targets = _question(batch, task, mixed_seed(seed, step), device)
            loss = F.cross_entropy(head(network(images)), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        network.eval()
        right = seen = 0
        for number, batch in enumerate(val.eval_batches(256, 0, 1)):
            images, targets = _question(batch, task, mixed_seed(seed, number), device)
            with torch.no_grad():
                right += int((head(network(images)).argmax(1) == targets).sum())
            seen += len(targets)
        _save(network.cpu(), train.manifest.image_size, out)
        return OwnExtractorReport(
            task,
            num_outputs,
            right / seen,
            num_steps * batch_size,
            seed,
            train.manifest.fingerprint,
            sha256_of_file(out),
        )
    finally:
        train.close()
        val.close()


def _question(
    batch: Batch, task: str, seed: int, device: torch.device
) -> tuple[UInt8[Tensor, "b 3 h w"], Int64[Tensor, " b"]]:
    """Images, gray ones as three equal channels, and what the network is to say of each."""
    images = upload(batch.images, device).expand(-1, 3, -1, -1)
    if task == "classes":
        return images, upload(batch.labels, device)
    generator = torch.Generator().manual_seed(seed)
    turns = torch.randint(NUM_TURNS, (len(images),), generator=generator)
    turned = [torch.rot90(image, int(turn), (1, 2)) for image, turn in zip(images, turns, strict=True)]
    return torch.stack(turned), upload(turns, device)


def _save(network: OwnExtractor, image_size: int, out: Path) -> None:
    example = torch.zeros(2, 3, image_size, image_size, dtype=torch.uint8)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # TorchScript is deprecated, and what `--fid.extractor FILE.pt` and torch-fidelity's users have.
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(network, example), buffer)
    replace_file(out, buffer.getvalue())
