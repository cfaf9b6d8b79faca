"""Scores of generated images and of reconstructions against real images, all from features extracted once."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
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

from vaetrain.data.readers.batch import Batch
from vaetrain.data.readers.reader import Reader
from vaetrain.distributed.arithmetic import ieee_fp32
from vaetrain.files import replace_file
from vaetrain.metrics.config import MIN_NUM_IMAGES, FidConfig
from vaetrain.metrics.extractor import FeatureExtractor
from vaetrain.metrics.features import FeatureSet, NumberedImages, extract
from vaetrain.metrics.fid_gap import GapSets
from vaetrain.metrics.fidelity import FeatureGaussian, FidAgainstCount, fid_against_count, frechet_distance
from vaetrain.metrics.kid import kid
from vaetrain.metrics.protocol import Protocol
from vaetrain.metrics.reference import RealFeatures
from vaetrain.metrics.subset import choose_images
from vaetrain.model.autoencoder import VAE
from vaetrain.upload import upload

PRC_NEIGHBORHOOD = 3
PRC_BLOCK = 1000
"""Rows of the distance matrix held at a time."""

MIN_CLASS = 4
"""Images of a class from which two halves have a covariance each."""


@dataclass(frozen=True)
class ClassReference:
    """The real images of one class."""

    num_images: int
    whole: FeatureGaussian | None
    """None for fewer than `MIN_CLASS` images."""
    floor: float | None
    """Distance between two disjoint random halves."""

    @classmethod
    def of(cls, features: Float32[Tensor, "n d"]) -> ClassReference:
        """From the class's features in random order."""
        half = len(features) // 2
        if len(features) < MIN_CLASS:
            return cls(len(features), None, None)
        first, second = (FeatureGaussian.of_features(part) for part in (features[:half], features[half : 2 * half]))
        return cls(len(features), FeatureGaussian.of_features(features), frechet_distance(first, second))


@dataclass(frozen=True)
class FidReference:
    """The real images that generated ones are compared with, and all that is computed from these alone, once for all priors."""

    protocol: Protocol
    real: RealFeatures
    features: Float32[Tensor, "n d"]
    whole: FeatureGaussian | None
    """Mean and covariance of all of them, where the line of FIDs holds them whole."""
    floor: float
    as_floor: FeatureGaussian | None
    """Of as many as either side of the floor has, where these are fewer than are compared."""
    gap: GapSets | None
    """None where too few images were held out."""
    classes: dict[str, ClassReference]
    """Under `per-class`; otherwise empty."""
    extractor: FeatureExtractor
    batch_size: int
    """Images per forward pass through the extractor."""
    seconds: float
    """That the distances and covariances here took; not the features."""

    @classmethod
    def open(
        cls,
        real: RealFeatures,
        val: RealFeatures,
        protocol: Protocol,
        config: FidConfig,
        extractor: FeatureExtractor,
        accelerator: Accelerator,
    ) -> FidReference:
        """The real images that `protocol` asks for, and at most as many of `val`, drawn by the config's seed. A collective.

        Extracts what the cache does not hold.
        """
        reference = real.features(protocol.reference(), extractor, accelerator)
        train = reference.features
        if len(protocol.extra()):
            train = torch.cat([train, real.features(protocol.extra(), extractor, accelerator).features])
        held_out = None
        if val.num_images >= MIN_NUM_IMAGES:
            chosen = choose_images(val.num_images, protocol.num_reference, config.seed)
            held_out = val.features(chosen, extractor, accelerator).features
        row = np.zeros(protocol.num_split, dtype=np.int64)
        known = np.concatenate([protocol.reference(), protocol.extra()])
        row[known] = np.arange(len(known))

        def at(positions: Int64[np.ndarray, " n"]) -> Float32[Tensor, "n d"]:
            return train[upload(torch.from_numpy(row[positions]), train.device)]

        start = time.perf_counter()
        first, second = (FeatureGaussian.of_features(at(positions)) for positions in protocol.halves())
        classes: dict[str, ClassReference] = {}
        if protocol.name == "per-class":
            order = protocol.order()  # random, so that halves of a class are random too
            labels = real.images.selection.index.label[order]
            for label in np.unique(labels):
                classes[real.manifest.classes[label]] = ClassReference.of(at(order[labels == label]))
        return cls(
            protocol, real, reference.features,
            whole=reference.gaussian() if protocol.whole_split else None,
            floor=frechet_distance(first, second),
            as_floor=first if protocol.num_floor < protocol.num_generated else None,
            gap=None if held_out is None else GapSets.draw(train, held_out, config.seed),
            classes=classes, extractor=extractor, batch_size=config.batch_size, seconds=time.perf_counter() - start,
        )  # fmt: skip

    def score(
        self,
        images: Iterable[NumberedImages],
        accelerator: Accelerator,
        what: str = "samples",
        of_class: Callable[[str], Iterable[NumberedImages]] | None = None,
    ) -> dict[str, Any]:
        """FID with its floor, extrapolation and gap, KID, precision, recall and inception score of images. A collective.

        `images` are this process's part of images 0 … `protocol.num_generated` − 1. The names are those of a score's
        record (`eval/fid`, …); `fid_protocol` says what they were computed from. Under `per-class`, `of_class` draws as many
        images of the class asked for; without it all images are held against each class.
        """
        protocol = self.protocol
        generated = extract(
            self.extractor, images, protocol.num_generated, accelerator, batch_size=self.batch_size, what=what
        )
        by_class: dict[str, Float32[Tensor, "n d"]] = {}
        if of_class is not None:
            for name, reference in self.classes.items():
                if reference.whole is not None:
                    by_class[name] = extract(
                        self.extractor, of_class(name), protocol.num_generated, accelerator, batch_size=self.batch_size,
                        what=f"{what}, {name}",
                    ).features  # fmt: skip
        start = time.perf_counter()
        distances, details = self._distances(generated, by_class)
        record: dict[str, Any] = {
            "name": protocol.name,
            "num_generated": protocol.num_generated,
            "num_real": protocol.num_reference,
            "real_images": protocol.describe(),
            "dataset_fingerprint": self.real.manifest.fingerprint,
            "num_floor": protocol.num_floor,
            "floor": f"two disjoint sets of {protocol.num_floor} real images of the train split",
            **details,
            "seconds": {"distances_of_real_images": self.seconds, "distances": time.perf_counter() - start},
            **describe_extractor(self.extractor),
        }
        scores: dict[str, Any] = distances
        for values, details in (
            kid(generated.features, self.features),
            precision_recall(generated.features, self.features),
            inception_score(generated.logits),
        ):
            scores |= values
            record |= details
        return {**scores, "fid_protocol": record}

    def write_images(self, path: Path) -> None:
        """Write where each reference image lies, one JSON object a line, so that anyone can score against the same ones."""
        lines = [
            json.dumps(image, ensure_ascii=False) for image in self.real.images.at(self.protocol.reference()).describe()
        ]
        replace_file(path, "".join(f"{line}\n" for line in lines).encode())

    def _distances(
        self, generated: FeatureSet, by_class: Mapping[str, Float32[Tensor, "n d"]]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Every Fréchet distance of the samples, and how they were computed."""
        line = fid_against_count(generated.features, self.features if self.whole is None else self.whole)
        scores: dict[str, Any] = {"eval/fid": line.fids[-1], "eval/fid_floor": self.floor}
        details: dict[str, Any] = {"fid_against_count": describe_line(line)}
        if self.as_floor is not None:
            as_many = FeatureGaussian.of_features(generated.features[: self.protocol.num_floor])
            scores["eval/fid_at_num_floor"] = frechet_distance(as_many, self.as_floor)
        scores["eval/fid_infinity"] = line.at_infinity
        if self.gap is None:
            scores["eval/fid_gap"] = None
            details["gap"] = f"the val split has fewer than {MIN_NUM_IMAGES} images"
        else:
            found = self.gap.gap(generated.gaussian())
            scores |= {
                "eval/fid_val": found.val,
                "eval/fid_train": float(np.mean(found.train)),
                "eval/fid_gap": found.gap,
                "eval/fid_gap_std_error": found.standard_error,
            }
            details |= {"num_gap": found.num_real, "gap_train_fids": list(found.train)}
        if self.classes:
            details["per_class"] = {name: reference.num_images for name, reference in self.classes.items()}
            details["per_class_samples"] = "of the class itself" if by_class else "all samples against each class"
        for name, reference in self.classes.items():
            if reference.whole is None:
                scores[f"eval/fid/{name}"] = None
                scores[f"eval/fid/{name}_reason"] = (
                    f"the train split has {reference.num_images} image(s) of this class; it takes at least {MIN_CLASS}"
                )
                continue
            line = fid_against_count(by_class.get(name, generated.features), reference.whole)
            scores[f"eval/fid/{name}"] = line.fids[-1]
            scores[f"eval/fid_floor/{name}"] = reference.floor
            scores[f"eval/fid_infinity/{name}"] = line.at_infinity
        return scores, details


def precision_recall(
    generated: Float32[Tensor, "n d"], real: Float32[Tensor, "m d"]
) -> tuple[dict[str, float], dict[str, Any]]:
    """Share of samples among the real images' neighbourhoods and the reverse (Kynkäänniemi et al. 2019, Eq. 2), in [0, 1]."""
    with ieee_fp32(generated.device):
        result = prc_features_to_metric(
            generated,
            real,
            prc_neighborhood=PRC_NEIGHBORHOOD,
            prc_batch_size=PRC_BLOCK,
            save_cpu_ram=True,
            verbose=False,
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
    real: RealFeatures,
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
    start = time.perf_counter()
    line = fid_against_count(found.features, originals.features)
    return {
        "eval/rfid": line.fids[-1],
        "eval/rfid_infinity": line.at_infinity,
        "rfid_protocol": {
            "num_generated": real.num_images,
            "num_real": real.num_images,
            "real_images": f"all {real.num_images} images of the {real.split} split, and their reconstructions",
            "dataset_fingerprint": real.manifest.fingerprint,
            "floor": "0: perfect reconstructions have the features of their images",
            "fid_against_count": describe_line(line),
            "seconds": {"distances": time.perf_counter() - start},
            **describe_extractor(extractor),
        },
    }


@torch.no_grad()
def reconstruct(
    vae: VAE,
    reader: Reader,
    accelerator: Accelerator,
    batch_size: int,
    each: Callable[[Iterator[Batch]], Iterator[Batch]] = iter,
) -> Iterator[NumberedImages]:
    """This process's part of a split, reconstructed: decoded posterior modes, rounded to the nearest of 256 levels."""
    for batch in each(reader.eval_batches(batch_size, accelerator.process_index, accelerator.num_processes)):
        x = vae.from_uint8(upload(batch.images, accelerator.device)).contiguous(memory_format=torch.channels_last)
        with accelerator.autocast():
            recon = vae.reconstruct(x)
        yield batch.indices, vae.likelihood.to_uint8(recon)


def describe_line(line: FidAgainstCount) -> dict[str, Any]:
    """FID at each number of images, as JSON holds it, and what was cut to that number."""
    cut = "samples and real images" if line.both_sides else "samples"
    return {"cut": cut, "counts": list(line.counts), "fids": list(line.fids)}


def describe_extractor(extractor: FeatureExtractor) -> dict[str, Any]:
    """The network behind a score, and the library."""
    return {**extractor.describe(), "arithmetic": "fp32 (IEEE)", "torch_fidelity": torch_fidelity.__version__}
