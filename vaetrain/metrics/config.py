"""Which generated and real images FID and its kin compare, and through which network, without importing torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ProtocolName = Literal["lecture-2k", "standard", "per-class", "custom"]


LECTURE_NUM_IMAGES = 2000
"""Images on each side behind the lecture's FID of 269.98."""


MIN_NUM_IMAGES = 10
"""The inception score cuts the samples into ten parts, and none may be empty."""


@dataclass(frozen=True)
class FidConfig:
    """FID, KID, inception score, precision and recall of generated images, through torch-fidelity."""

    protocol: ProtocolName | None = None
    """lecture-2k: 2,000 samples against 2,000 random images of the train split. standard: as many samples as the train
    split has images, at least 10,000, against the whole of it. per-class: standard, and the same samples against each
    class alone (the model has no classes to draw from: this says which ones its samples resemble). custom: --fid.num-images
    on both sides. None: custom when --fid.num-images is given, otherwise lecture-2k."""

    num_images: int | None = None
    """Images on each side under `custom`: so many are generated, and as many real ones drawn from the train split. FID
    falls as this grows, so only scores at the same count compare."""

    extractor: str = "inception-v3-compat"
    """Network whose features are compared: torch-fidelity's inception-v3-compat (the one FID is defined on), vgg16 or clip-*
    by name, or FILE.pt: a TorchScript module from uint8 (b, 3, h, w) to float32 (b, d). TorchScript is code and runs when
    it is loaded: name only files that you trust."""

    weights: Path | None = None
    """File with the weights of an extractor given by name; for Inception the one torch-fidelity publishes (.pth, or the
    same tensors as .safetensors). Nothing is ever downloaded: without the file no FID is computed."""

    batch_size: int = 64
    """Images per forward pass through the extractor, per process; memory and speed only, not the score."""

    seed: int = 0
    """Seed that picks the real images."""

    cache_dir: Path | None = None
    """Folder for the features of real images, so that a second evaluation does not extract them again (8 KB an image).
    None: vaetrain/reference in $XDG_CACHE_HOME, or in ~/.cache."""

    def __post_init__(self) -> None:
        """Refuse counts from which no score can be computed, and a count that contradicts the protocol."""
        if self.num_images is not None and self.num_images < MIN_NUM_IMAGES:
            raise ValueError(f"--fid.num-images is {self.num_images}; the scores need at least {MIN_NUM_IMAGES}")
        if self.num_images is not None and self.protocol not in (None, "custom"):
            raise ValueError(
                f"--fid.num-images is {self.num_images} but --fid.protocol {self.protocol} says itself how many images "
                "it compares; leave out one of the two, or choose --fid.protocol custom"
            )
        if self.num_images is None and self.protocol == "custom":
            raise ValueError("--fid.protocol custom needs --fid.num-images")
        if self.batch_size < 1:
            raise ValueError(f"--fid.batch-size is {self.batch_size}; it must be at least 1")
        if self.seed < 0:
            raise ValueError(f"--fid.seed is {self.seed}; it must not be negative")
