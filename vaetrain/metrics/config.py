"""What the Fréchet inception distance is computed from, without importing torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FidConfig:
    """FID of generated images against real ones of the train split, through torch-fidelity's Inception v3."""

    num_images: int = 2000
    """Images on each side: so many are generated, and as many real ones drawn from the train split. FID falls as this
    grows, so only scores at the same count compare; the lecture's 269.98 is at 2,000."""

    weights: Path | None = None
    """File with the Inception weights that torch-fidelity publishes (.pth, or the same tensors as .safetensors).
    Nothing is ever downloaded: without the file no FID is computed."""

    batch_size: int = 64
    """Images per forward pass through Inception, per process; memory and speed only, not the score."""

    seed: int = 0
    """Seed that picks the real images."""

    def __post_init__(self) -> None:
        """Refuse counts from which no distance can be computed."""
        if self.num_images < 2:
            raise ValueError(f"--fid.num-images is {self.num_images}; a covariance needs at least 2")
        if self.batch_size < 1:
            raise ValueError(f"--fid.batch-size is {self.batch_size}; it must be at least 1")
        if self.seed < 0:
            raise ValueError(f"--fid.seed is {self.seed}; it must not be negative")
