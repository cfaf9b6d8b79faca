"""rFID while training: how far reconstructions are from their images, as a network sees them that trains nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property

from accelerate import Accelerator

from vaetrain.config import RfidConfig
from vaetrain.data.readers.batch import Batch
from vaetrain.data.readers.reader import Reader
from vaetrain.metrics.config import MIN_NUM_IMAGES, FidConfig
from vaetrain.metrics.extractor import FeatureExtractor
from vaetrain.metrics.features import NumberedImages, extract
from vaetrain.metrics.fidelity import FeatureGaussian, frechet_distance
from vaetrain.metrics.generation import reconstruct
from vaetrain.model.autoencoder import VAE


class ReconstructionFid:
    """The Fréchet distance of `evaluate.py --scores rfid`, of one split through one network."""

    def __init__(self, config: RfidConfig, reader: Reader, accelerator: Accelerator, batch_size: int) -> None:
        """Raises FileNotFoundError or ValueError where the network's file is missing, or the split too small."""
        self.reader = reader
        self.accelerator = accelerator
        self.batch_size = batch_size
        if (found := reader.num_images) < MIN_NUM_IMAGES:
            raise ValueError(
                f"--train.rfid.every-epochs: the validation split has {found} images of at least {MIN_NUM_IMAGES}"
            )
        try:
            fid = FidConfig(extractor=config.extractor, weights=config.weights, batch_size=batch_size)
            self.extractor = FeatureExtractor(fid, accelerator.device)
        except (ValueError, OSError) as error:
            raise type(error)(str(error).replace("--fid.", "--train.rfid.")) from error

    def __call__(self, vae: VAE, each: Callable[[Iterator[Batch]], Iterator[Batch]] = iter) -> float:
        """Of this model's decoded posterior modes. A collective; the batches go through `each`, as in `validate`."""
        originals = self.originals
        recons = reconstruct(vae, self.reader, self.accelerator, self.batch_size, each)
        return frechet_distance(self._gaussian(recons, "reconstructions"), originals)

    @cached_property
    def originals(self) -> FeatureGaussian:
        """Of the split's images; extracted once. A collective."""
        rank, num_processes = self.accelerator.process_index, self.accelerator.num_processes
        batches = self.reader.eval_batches(self.batch_size, rank, num_processes)
        return self._gaussian(((batch.indices, batch.images) for batch in batches), "validation images")

    def _gaussian(self, images: Iterator[NumberedImages], what: str) -> FeatureGaussian:
        num_images = self.reader.num_images
        return extract(
            self.extractor, images, num_images, self.accelerator, batch_size=self.batch_size, what=what
        ).gaussian()
