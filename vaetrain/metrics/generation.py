"""Scores of generated images and of reconstructions against real images, all from features extracted once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_fidelity
from accelerate import Accelerator
from jaxtyping import Float32, Int64
from torch import Tensor
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from vaetrain.data.reader import Reader
from vaetrain.files import replace_file
from vaetrain.metrics.config import MIN_NUM_IMAGES, FidConfig
from vaetrain.metrics.extractor import FeatureExtractor
from vaetrain.metrics.features import FeatureSet, NumberedImages, extract
from vaetrain.metrics.fid_gap import fid_gap
from vaetrain.metrics.fidelity import FidAgainstCount, Gaussian, fid_against_count, frechet_distance
from vaetrain.metrics.kid import kid
from vaetrain.metrics.protocol import Protocol
from vaetrain.metrics.reference import RealImages
from vaetrain.metrics.subset import choose_images
from vaetrain.model.autoencoder import VAE

PRC_NEIGHBORHOOD = 3
PRC_BLOCK = 1000
"""Rows of the distance matrix held at a time."""

MIN_CLASS = 4
"""Images of a class from which two halves have a covariance each."""


@dataclass(frozen=True)
class Reference:
    """The real images that generated ones are compared with, their features extracted or read from the cache."""

    protocol: Protocol
    real: RealImages
    features: FeatureSet
    extra: Float32[Tensor, "m d"]
    """Features of the real images beyond these that the floor needs; may be none."""
    held_out: Float32[Tensor, "v d"] | None
    """Features of images that the model was not trained on; None where there are fewer than a score takes."""
    extractor: FeatureExtractor
    batch_size: int
    """Images per forward pass through the extractor."""
    seed: int
    """Picks which real images the gap between the splits is of."""

    @classmethod
    def open(
        cls,
        real: RealImages,
        val: RealImages,
        protocol: Protocol,
        config: FidConfig,
        extractor: FeatureExtractor,
        accelerator: Accelerator,
    ) -> Reference:
        """The real images that `protocol` asks for, and at most as many of `val`, drawn by the config's seed. A collective.

        Extracts what the cache does not hold.
        """
        features = real.features(protocol.reference(), extractor, accelerator)
        extra = features.features[:0]
        if len(protocol.extra()):
            extra = real.features(protocol.extra(), extractor, accelerator).features
        held_out = None
        if val.num_images >= MIN_NUM_IMAGES:
            chosen = choose_images(val.num_images, protocol.num_reference, config.seed)
            held_out = val.features(chosen, extractor, accelerator).features
        return cls(protocol, real, features, extra, held_out, extractor, config.batch_size, config.seed)

    def score(
        self, images: Iterable[NumberedImages], accelerator: Accelerator, what: str = "samples"
    ) -> dict[str, Any]:
        """FID with its floor, extrapolation and gap, KID, precision, recall and inception score of images. A collective.

        `images` are this process's part of images 0 … `protocol.num_generated` − 1. The names are those of a score's
        record (`eval/fid`, …); `fid_protocol` says what they were computed from.
        """
        protocol, real = self.protocol, self.features.features
        generated = extract(
            self.extractor, images, protocol.num_generated, accelerator, batch_size=self.batch_size, what=what
        )
        line = fid_against_count(generated.features, real, cut_reference=not protocol.whole_split)
        first, second = (self._at(positions) for positions in protocol.halves())
        record: dict[str, Any] = {
            "name": protocol.name,
            "num_generated": protocol.num_generated,
            "num_real": protocol.num_reference,
            "real_images": protocol.describe(),
            "dataset_fingerprint": self.real.manifest.fingerprint,
            "num_floor": protocol.num_floor,
            "floor": f"two disjoint sets of {protocol.num_floor} real images of the train split",
            "fid_against_count": describe_line(line),
            **describe_extractor(self.extractor),
        }
        scores: dict[str, float | None] = {
            "eval/fid": frechet_distance(generated.gaussian(), self.features.gaussian()),
            "eval/fid_floor": frechet_distance(Gaussian.of_features(first), Gaussian.of_features(second)),
            "eval/fid_infinity": line.at_infinity,
        }
        for values, details in (
            self._gap(generated.features),
            kid(generated.features, real),
            precision_recall(generated.features, real),
            inception_score(generated.logits),
        ):
            scores |= values
            record |= details
        if protocol.name == "per-class":
            record["per_class"], of_class = self._per_class(generated)
            scores |= of_class
        return {**scores, "fid_protocol": record}

    def write_images(self, path: Path) -> None:
        """Write where each reference image lies, one JSON object a line, so that anyone can score against the same ones."""
        lines = [
            json.dumps(image, ensure_ascii=False) for image in self.real.images.at(self.protocol.reference()).describe()
        ]
        replace_file(path, "".join(f"{line}\n" for line in lines).encode())

    def _gap(self, generated: Float32[Tensor, "n d"]) -> tuple[dict[str, float | None], dict[str, Any]]:
        """How much nearer the samples are to the training images than to held-out ones, and how that was computed."""
        if self.held_out is None:
            return {"eval/fid_gap": None}, {"gap": f"the val split has fewer than {MIN_NUM_IMAGES} images"}
        found = fid_gap(generated, self.features.features, self.held_out, self.seed)
        scores = {
            "eval/fid_val": found.val,
            "eval/fid_train": float(np.mean(found.train)),
            "eval/fid_gap": found.gap,
            "eval/fid_gap_std_error": found.standard_error,
        }
        details = {"num_gap": found.num_real, "gap_train_fids": list(found.train)}
        return scores, details

    def _at(self, positions: Int64[np.ndarray, " n"]) -> Float32[Tensor, "n d"]:
        row = np.zeros(self.protocol.num_split, dtype=np.int64)
        known = np.concatenate([self.protocol.reference(), self.protocol.extra()])
        row[known] = np.arange(len(known))
        rows = torch.from_numpy(row[positions]).to(self.extra.device)
        return torch.cat([self.features.features, self.extra])[rows]

    def _per_class(self, generated: FeatureSet) -> tuple[dict[str, int], dict[str, float | None]]:
        """The number of real images of each class, and the FID of all samples against each, with floor and extrapolation."""
        manifest = self.real.manifest
        labels = self.real.images.selection.index.label
        order = np.concatenate(self.protocol.halves())  # random, so that halves of a class are random too
        counts: dict[str, int] = {}
        scores: dict[str, float | None] = {}
        for label in np.unique(labels):
            name = manifest.classes[label]
            members = self._at(order[labels[order] == label])
            counts[name] = len(members)
            if len(members) < MIN_CLASS:
                scores[f"eval/fid/{name}"] = None
                continue
            line = fid_against_count(generated.features, members, cut_reference=False)
            half = len(members) // 2
            first, second = members[:half], members[half : 2 * half]
            scores[f"eval/fid/{name}"] = line.fids[-1]
            scores[f"eval/fid_floor/{name}"] = frechet_distance(
                Gaussian.of_features(first), Gaussian.of_features(second)
            )
            scores[f"eval/fid_infinity/{name}"] = line.at_infinity
        return counts, scores


def precision_recall(
    generated: Float32[Tensor, "n d"], real: Float32[Tensor, "m d"]
) -> tuple[dict[str, float], dict[str, Any]]:
    """Share of samples among the real images' neighbourhoods and the reverse (Kynkäänniemi et al. 2019, Eq. 2), in [0, 1]."""
    result = prc_features_to_metric(
        generated, real, prc_neighborhood=PRC_NEIGHBORHOOD, prc_batch_size=PRC_BLOCK, save_cpu_ram=True, verbose=False
    )
    scores = {"eval/precision": result[KEY_METRIC_PRECISION], "eval/recall": result[KEY_METRIC_RECALL]}
    return scores, {"prc_neighborhood": PRC_NEIGHBORHOOD}


def inception_score(logits: Float32[Tensor, "n classes"] | None) -> tuple[dict[str, float], dict[str, Any]]:
    """Inception score (Salimans et al. 2016), 1 to the number of classes, and its deviation between ten parts of the set.

    Empty when the extractor is no classifier.
    """
    if logits is None:
        return {}, {}
    result = isc_features_to_metric(logits.cpu())
    scores = {
        "eval/inception_score": result[KEY_METRIC_ISC_MEAN],
        "eval/inception_score_std": result[KEY_METRIC_ISC_STD],
    }
    return scores, {"inception_score_splits": 10}


def reconstruction_fid(
    reconstructions: Iterable[NumberedImages],
    real: RealImages,
    extractor: FeatureExtractor,
    accelerator: Accelerator,
    batch_size: int,
) -> dict[str, Any]:
    """rFID: reconstructions of all images of a split against those images themselves. A collective.

    `reconstructions` are this process's part, under the images' positions in the split. The floor is 0, which perfect
    reconstructions reach at any number of images.
    """
    if real.num_images < MIN_NUM_IMAGES:
        reason = f"the {real.split} split has {real.num_images} images; it takes at least {MIN_NUM_IMAGES}"
        return {"eval/rfid": None, "eval/rfid_reason": reason}
    originals = real.features(np.arange(real.num_images), extractor, accelerator)
    found = extract(
        extractor, reconstructions, real.num_images, accelerator, batch_size=batch_size, what="reconstructions"
    )
    line = fid_against_count(found.features, originals.features, cut_reference=True)
    return {
        "eval/rfid": frechet_distance(found.gaussian(), originals.gaussian()),
        "eval/rfid_infinity": line.at_infinity,
        "rfid_protocol": {
            "num_generated": real.num_images,
            "num_real": real.num_images,
            "real_images": f"all {real.num_images} images of the {real.split} split, and their reconstructions",
            "dataset_fingerprint": real.manifest.fingerprint,
            "floor": "0: perfect reconstructions have the features of their images",
            "fid_against_count": describe_line(line),
            **describe_extractor(extractor),
        },
    }


@torch.no_grad()
def reconstruct(vae: VAE, reader: Reader, accelerator: Accelerator, batch_size: int) -> Iterator[NumberedImages]:
    """This process's part of a split, reconstructed: decoded posterior modes, rounded to the nearest of 256 levels."""
    for batch in reader.eval_batches(batch_size, accelerator.process_index, accelerator.num_processes):
        x = vae.from_uint8(batch.images.to(accelerator.device)).contiguous(memory_format=torch.channels_last)
        with accelerator.autocast():
            recon = vae.reconstruct(x)
        yield batch.indices, vae.likelihood.to_uint8(recon)


def describe_line(line: FidAgainstCount) -> dict[str, Any]:
    """FID at each number of images, as JSON holds it, and what was cut to that number."""
    cut = "samples and real images" if line.both_sides else "samples"
    return {"cut": cut, "counts": list(line.counts), "fids": list(line.fids)}


def describe_extractor(extractor: FeatureExtractor) -> dict[str, Any]:
    """The network behind a score, and the library."""
    return {**extractor.describe(), "torch_fidelity": torch_fidelity.__version__}
