"""From a protocol's name to the images it compares, without importing torch.

A FID means nothing without its protocol: it falls as the number of images grows, on either side, and depends on which
real images stand on the other one. What is decided here is written into every score's record.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from vaetrain.data.readers.order import epoch_order
from vaetrain.metrics.config import LECTURE_NUM_IMAGES, MIN_NUM_IMAGES, FidConfig, ProtocolName

STANDARD_MIN_GENERATED = 10_000


@dataclass(frozen=True)
class Protocol:
    """What is compared, for a train split of a known size."""

    name: ProtocolName
    num_generated: int
    """Samples drawn from the model."""
    num_split: int
    """Images of the train split after the class filter."""
    num_reference: int
    """Real images the samples are compared with: the first of a random order of the split, or all of it."""
    seed: int
    """Of the random order."""

    @classmethod
    def of(cls, config: FidConfig, num_split: int) -> Protocol:
        """The protocol that `config` names; raises ValueError when the split has too few images for it."""
        name: ProtocolName = config.protocol or ("lecture-2k" if config.num_images is None else "custom")
        if name in ("standard", "per-class"):
            if num_split < MIN_NUM_IMAGES:
                raise ValueError(
                    f"--fid.protocol {name} needs {MIN_NUM_IMAGES} images; the train split has {num_split}"
                )
            return cls(name, max(num_split, STANDARD_MIN_GENERATED), num_split, num_split, config.seed)
        num_images = config.num_images or LECTURE_NUM_IMAGES
        if num_split < num_images:
            asked = (
                f"--fid.num-images is {num_images}"
                if config.num_images
                else f"--fid.protocol {name} compares {num_images}"
            )
            raise ValueError(
                f"{asked} but the train split has {num_split} images; ask for at most that with --fid.num-images {num_split}"
            )
        return cls(name, num_images, num_split, num_images, config.seed)

    @property
    def whole_split(self) -> bool:
        """Whether the reference is all there is, rather than a sample of it."""
        return self.num_reference == self.num_split

    @property
    def num_floor(self) -> int:
        """Images in each of the two disjoint halves of real images whose distance is the floor."""
        return min(self.num_reference, self.num_split // 2)

    def order(self) -> Int64[np.ndarray, " n"]:
        """The random order of the split."""
        # That of a training epoch: its stream is frozen, so the same seed names the same images for good.
        return epoch_order(self.num_split, self.seed, 0)

    def reference(self) -> Int64[np.ndarray, " n"]:
        """Positions in the split of the reference images, ascending."""
        return np.sort(self.order()[: self.num_reference])

    def halves(self) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """Positions of the two halves behind the floor; the first is the reference where the split is large enough."""
        order = self.order()
        return order[: self.num_floor], order[self.num_floor : 2 * self.num_floor]

    def extra(self) -> Int64[np.ndarray, " n"]:
        """Positions of the real images beyond the reference that the floor needs, ascending; may be none."""
        return np.sort(self.order()[self.num_reference : 2 * self.num_floor])

    def describe(self) -> str:
        """The real images in words."""
        if self.whole_split:
            return f"all {self.num_reference} images of the train split"
        return f"train split, {self.num_reference} of {self.num_split} drawn without replacement by seed {self.seed}"
