"""The scores of a trained model, group by group."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
from accelerate import Accelerator
from torch import Tensor

from vaetrain.command_line import print_traceback_if_asked
from vaetrain.data.readers.reader import Reader, open_split
from vaetrain.distributed.exchange import WaitedTooLong, problems_of_all
from vaetrain.evaluation import latent_figures as latent_pictures
from vaetrain.evaluation.config import ALL_SCORES, EvaluateConfig, ScoreName
from vaetrain.evaluation.memorization import describe_neighbours, draw_images, memorisation
from vaetrain.export import TrainedModel, load_run, weights_sha256
from vaetrain.files import replace_file
from vaetrain.metrics.extractor import FeatureExtractor, missing_weights
from vaetrain.metrics.features import NumberedImages
from vaetrain.metrics.generation import FidReference, describe_extractor, reconstruct, reconstruction_fid
from vaetrain.metrics.likelihood_scores import likelihood_scores
from vaetrain.metrics.lpips_config import how_to_get_weights
from vaetrain.metrics.perceptual_distance import PerceptualDistance, reconstruction_lpips
from vaetrain.metrics.protocol import Protocol
from vaetrain.metrics.reference import RealFeatures
from vaetrain.metrics.validation import validate
from vaetrain.model.prior import Prior, StandardNormal
from vaetrain.priors.config import PriorName
from vaetrain.priors.fit import fitted_priors, prior_table, priors_for, untrained
from vaetrain.priors.flow_matching.prior import FlowMatchingPrior
from vaetrain.priors.saved import SavedPrior, prior_file
from vaetrain.runs.directory import RunDirectory
from vaetrain.runs.provenance import provenance
from vaetrain.sampling.generate import gather_images, gather_samples, generate
from vaetrain.sampling.manifest import content_of, manifest_of
from vaetrain.sampling.reader import SampleReader
from vaetrain.sampling.save_samples import keep

T = TypeVar("T")

PRIOR_COLUMNS = 12
"""Samples of each prior in their picture."""


NAMES: dict[str, tuple[str, ...]] = {
    "fid": ("eval/fid", "eval/kid", "eval/precision", "eval/recall"),
    "rfid": ("eval/rfid",),
    "elbo": ("val/elbo_nats", "val/bits_per_dim", "val/psnr_db", "val/ssim"),
    "lpips": ("eval/lpips",),
    "likelihood": ("eval/nll_nats", "eval/mutual_information_nats", "eval/marginal_kl_nats", "eval/active_units"),
    "nearest": ("eval/nearest_pixel_distance_ratio", "eval/nearest_feature_distance_ratio"),
}
"""What a group of scores would have measured: None, with a reason, where it failed."""


class Evaluator:
    """A trained model, the images it is held against, and each group of scores as a method; all of them collectives.

    `failures` says, for each group, prior and picture that could not be had, why.
    """

    def __init__(self, config: EvaluateConfig, accelerator: Accelerator) -> None:
        self.config = config
        self.accelerator = accelerator
        self.failures: dict[str, str] = {}
        self._first_error: Exception | None = None
        self.missing = unmeasured(config)
        self.extractor = self._opened(("fid", "rfid"), lambda: FeatureExtractor(config.fid, accelerator.device))
        self.distance = self._opened(("lpips",), lambda: PerceptualDistance(config.lpips).to(accelerator.device))
        refuse_to_measure_nothing(config, self.missing)
        if config.scores != ALL_SCORES:  # asked for by name
            self.failures |= dict(self.missing.items())
        self.trained = load_run(config.run, checkpoint=config.checkpoint, device=accelerator.device)
        self.given = open_given_samples(config, self.trained)
        self.run = RunDirectory.open(config.run)
        self.data = config.data_of(self.run.config().data)
        self.trained.vae.config.check_images(self.val_reader.manifest.image_size, self.val_reader.manifest.channels)
        self._samples_to_score: dict[PriorName, Iterable[NumberedImages]] | None = None

    def _opened(self, scores: tuple[ScoreName, ...], open_network: Callable[[], T]) -> T | None:
        """The network that these scores need, first of all, so that a wrong file is known before anything is computed.

        None when none of them is asked for, or the file is missing or no such network: then `missing` says so.
        """
        wanted = [name for name in scores if name in self.config.scores]
        if not wanted or wanted[0] in self.missing:
            return None
        try:
            return open_network()
        except (ValueError, OSError) as error:
            self.missing |= dict.fromkeys(wanted, str(error))
            self.failures |= dict.fromkeys(wanted, str(error))  # asked for by name: the file was given
        return None

    def attempt(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The scores of a group; where it fails, None for each of its names and the reason. A collective.

        A failure on one process fails the group on all. Raises TimeoutError when the others cannot be told, because they wait
        inside the group for this one.
        """
        problem, found = "", {}
        try:
            found = measure()
        except WaitedTooLong:  # no fault of the group's: nobody knows where the others are
            raise
        except Exception as error:
            self._first_error = self._first_error or error
            problem = f"{type(error).__name__}: {error}" if not isinstance(error, (ValueError, OSError)) else str(error)
            print_traceback_if_asked()
        problems = problems_of_all(problem)
        problem = next(filter(None, problems), "")
        if not problem:
            return found
        self.failures[name] = problem
        if self.accelerator.is_main_process:
            print(f"warning: {name} could not be measured: {problem}", file=sys.stderr, flush=True)
        missing = NAMES.get(name, ())
        return {**dict.fromkeys(missing), **{f"{each}_reason": problem for each in missing}}

    def raise_first_error(self) -> NoReturn:
        """When no group could be measured: what was wrong with the first one that was tried."""
        raise self._first_error or ValueError("; ".join(dict.fromkeys(self.failures.values())))

    def draw(self, name: str, save: Callable[[Path], None]) -> None:
        """Have `save` write the picture `name`, on the main process; one that fails is left out, and said to be."""
        if not self.accelerator.is_main_process:
            return
        file = self.figure(name)
        file.unlink(missing_ok=True)  # not that an older evaluation's stands for it
        try:
            save(file)
        except Exception as error:
            self.failures[f"picture {name}"] = f"{type(error).__name__}: {error}"
            print_traceback_if_asked()
            print(f"warning: the picture {file} could not be drawn: {error}", file=sys.stderr, flush=True)

    @cached_property
    def train_reader(self) -> Reader:
        """The train split."""
        return open_split(self.data, self.accelerator, "train")

    @cached_property
    def val_reader(self) -> Reader:
        """The val split."""
        return open_split(self.data, self.accelerator, "val")

    @cached_property
    def priors(self) -> dict[PriorName, SavedPrior]:
        """The chosen priors, fitted where there is no fit yet; empty when it is the standard normal alone, which needs none.

        `all` leaves out those that this latent is too large for.
        """
        if not self.wants_priors:
            return {}
        names = self.config.chosen_priors
        if "all" in self.config.priors:
            names = tuple(name for name in names if name in priors_for(self.trained.vae.config.latent_shape))
            if "flow-matching" not in self.config.priors and not self._flow_matching_is_trained():
                names = tuple(name for name in names if name != "flow-matching")
        unfitted: dict[PriorName, str] = {}
        fitted = fitted_priors(
            self.config.run, self.trained, names, self.accelerator,
            lambda split: self.train_reader if split == "train" else self.val_reader, self.config.fit, unfitted,
        )  # fmt: skip
        self.failures |= {f"prior {name}": reason for name, reason in unfitted.items()}
        return {name: saved.drawn(self.config.flow) for name, saved in fitted.items()}

    def _flow_matching_is_trained(self) -> bool:
        """Whether there is one of this checkpoint; the main process says that it is left out."""
        is_trained = prior_file(self.config.run, self.trained, "flow-matching").is_file()
        if not is_trained and self.accelerator.is_main_process:
            print(f"left out of all priors: {untrained(self.config.run, self.trained)}", flush=True)
        return is_trained

    @property
    def wants_priors(self) -> bool:
        """Whether there is more to draw from than the standard normal."""
        return self.config.chosen_priors != ("standard",)

    @property
    def first_prior(self) -> PriorName:
        """The prior that `eval/fid` is of; raises ValueError where that one could not be fitted."""
        if self.given is not None:
            name: PriorName = self.given.manifest["prior"]
            return name
        first = self.config.chosen_priors[0]
        if self.priors and first not in self.priors:
            raise ValueError(f"prior {first}: {self.failures.get(f'prior {first}', 'it does not fit this latent')}")
        return first

    @cached_property
    def real(self) -> RealFeatures:
        """The train split, as what samples are compared with."""
        return RealFeatures(self.data, "train", self.config.fid)

    @cached_property
    def protocol(self) -> Protocol:
        """How many samples are compared with which images; raises ValueError where there are too few of those."""
        return Protocol.of(self.config.fid, self.real.num_images)

    def prepare_samples(self) -> None:
        """Find fault, before anything is computed, with where samples are to be kept or with those that are given.

        Raises ValueError or FileExistsError. What only makes FID impossible is left for `generation` to say.
        """
        if self._samples_to_score is not None or "fid" not in self.config.scores or self.extractor is None:
            return
        try:
            protocol, first = self.protocol, self.first_prior
        except ValueError:
            return
        names = self.priors or (first,)
        self._samples_to_score = {name: self._samples(name, protocol.num_generated) for name in names}

    def figure(self, name: str) -> Path:
        """Where a picture goes: among the run's figures, or beside the scores when these have a file of their own."""
        folder = self.run.figures if self.config.out is None else self.config.out.with_suffix(".figures")
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{name}.png"

    def prior(self, name: PriorName) -> Prior:
        """What samples are drawn from."""
        return self.priors[name].prior if self.priors else StandardNormal(self.trained.vae.config.latent_shape)

    def elbo(self) -> dict[str, Any]:
        """ELBO and reconstruction of every validation image."""
        scores = validate(self.trained.vae, self.val_reader, self.accelerator, self.config.batch_size, self.config.seed)
        return {f"val/{name}": value for name, value in scores.record.items()}

    def generation(self) -> dict[str, Any]:
        """Samples of each prior against training images, and what they were computed from."""
        if self.extractor is None:
            return self._absent("fid")
        real, protocol, first = self.real, self.protocol, self.first_prior
        if self._samples_to_score is None:
            self.prepare_samples()
        assert self._samples_to_score is not None
        images = self._samples_to_score
        table = self._prior_rows()
        val = RealFeatures(self.data, "val", self.config.fid)
        reference = FidReference.open(real, val, protocol, self.config.fid, self.extractor, self.accelerator)
        scores = reference.score(images[first], self.accelerator, of_class=self._of_class(first))
        for name, row in table.items():
            if name == first:
                row |= {score: value for score, value in scores.items() if score.startswith("eval/")}
            else:
                row |= reference.score(
                    images[name], self.accelerator, what=f"samples of {name}", of_class=self._of_class(name)
                )
        listing = out_file(self.config).with_suffix(".reference_images.jsonl")
        if self.accelerator.is_main_process:
            reference.write_images(listing)
        scores["fid_protocol"] |= {
            "prior": first,
            "reference_images": listing.name,
            "samples": self._content(first, protocol.num_generated) if self.given is None else self._given_content(),
            "kept_samples": str(kept) if (kept := self._kept_folder(first)) else None,
        }
        return {**scores, "priors": table}

    def reconstruction(self) -> dict[str, Any]:
        """rFID of the val split, and what it was computed from."""
        config = self.config
        if self.extractor is None:
            return self._absent("rfid")
        images = reconstruct(self.trained.vae, self.val_reader, self.accelerator, config.batch_size)
        real = RealFeatures(self.data, "val", config.fid)
        return reconstruction_fid(images, real, self.extractor, self.accelerator, config.fid.batch_size)

    def perceptual(self) -> dict[str, Any]:
        """LPIPS of the val split's reconstructions."""
        config, distance = self.config.lpips, self.distance
        if distance is None:
            return self._absent("lpips")
        found = reconstruction_lpips(self.trained.vae, self.val_reader, self.accelerator, distance, config.batch_size)
        return {
            "eval/lpips": found.mean,
            "eval/lpips_se": found.standard_error,
            "lpips_protocol": {
                "net": config.net,
                "num_images": found.num_images,
                "backbone_sha256": distance.backbone_sha256,
                "heads_sha256": distance.heads_sha256,
            },
        }

    def _absent(self, name: ScoreName) -> dict[str, Any]:
        """The names of a group whose network is missing, with the reason."""
        return {**dict.fromkeys(NAMES[name]), **{f"{each}_reason": self.missing[name] for each in NAMES[name]}}

    def likelihood(self) -> dict[str, Any]:
        """How likely the model finds images, and what its latent holds."""
        return likelihood_scores(
            self.trained.vae, self.train_reader, self.val_reader, self.accelerator, self.config.likelihood,
            self.config.batch_size,
        )  # fmt: skip

    def nearest(self) -> dict[str, Any]:
        """Whether samples of the first prior repeat training images; figures/nearest.png, and a line for each sample."""
        config, vae, accelerator = self.config, self.trained.vae, self.accelerator
        if self.given is None:
            samples = gather_samples(
                vae, accelerator, config.num_pictures, seed=config.seed, batch_size=config.batch_size,
                prior=self.prior(self.first_prior), temperature=config.temperature,
            )  # fmt: skip
        else:
            num_images = min(config.num_pictures, self.given.num_images)
            samples = gather_images(vae, accelerator, self.given.batches(accelerator, num_images, config.batch_size))
        all_are_known = config.fid.protocol in ("standard", "per-class")  # in the cache by now
        by_network = config.nearest_features == "extractor" or (config.nearest_features == "auto" and all_are_known)
        extractor = self.extractor if by_network else None
        real = RealFeatures(self.data, "train", config.fid)
        known = None
        if extractor is not None and all_are_known:
            known = real.features(np.arange(real.num_images), extractor, accelerator).features
        found = memorisation(
            vae, samples, self.train_reader, self.val_reader, accelerator, known=known,
            features=None if extractor is None else lambda images: extractor(images).features, seed=config.seed,
        )  # fmt: skip
        self.draw("nearest", found.save_picture)
        listing = out_file(config).with_suffix(".nearest.jsonl")
        if accelerator.is_main_process:
            lines = [
                json.dumps(line, ensure_ascii=False) for line in describe_neighbours(found.neighbours, real.images)
            ]
            replace_file(listing, "".join(f"{line}\n" for line in lines).encode())
        protocol = {
            "neighbours": listing.name,
            "num_samples": len(samples),
            "samples": self._content(self.first_prior, len(samples)) if self.given is None else self._given_content(),
            "features": describe_extractor(extractor) if extractor else "posterior means of the model's own encoder",
        }
        return {**found.scores, "nearest_protocol": protocol}

    def latents(self) -> dict[str, Any]:
        """Pictures of the latent space in the run's figures: interpolations, traversals and the codes' principal axes."""
        images, labels = draw_images(self.val_reader, self.config.num_pictures, self.accelerator, self.config.seed)
        vae, classes = self.trained.vae, self.val_reader.manifest.classes
        self.draw("latent_interpolations", partial(latent_pictures.save_latent_interpolations, vae, images[:12]))
        self.draw("latent_traversals", partial(latent_pictures.save_traversals, vae, images))
        self.draw("latent_pca", partial(latent_pictures.save_latent_pca, vae, images, labels, classes))
        return {}

    def compare_priors(self) -> dict[str, Any]:
        """The table of the chosen priors, without scores of their samples, and figures/priors.png; nothing for N(0, I) alone."""
        vae, config = self.trained.vae, self.config
        samples: dict[str, Tensor] = {}
        for name, saved in self.priors.items():
            nats = saved.facts.heldout_nats_per_dim
            label = name if nats is None else f"{name}\n{nats:.2f} nats/dim"
            samples[label] = gather_samples(
                vae, self.accelerator, PRIOR_COLUMNS, seed=config.seed, batch_size=PRIOR_COLUMNS, prior=saved.prior,
                temperature=config.temperature,
            )  # fmt: skip
        if not samples:
            return {}
        real, _ = draw_images(self.val_reader, PRIOR_COLUMNS, self.accelerator, config.seed)
        self.draw("priors", partial(latent_pictures.save_prior_comparison, samples, real=real))
        return {"priors": self._prior_rows()}

    def _prior_rows(self) -> dict[PriorName, dict[str, Any]]:
        return {row.pop("prior"): row for row in prior_table(self.priors)}

    def _content(self, name: PriorName, num_images: int) -> dict[str, Any]:
        """What decides the samples of a prior that are drawn now."""
        config = self.config
        return content_of(
            config.run, self.trained, name, self.priors.get(name), temperature=config.temperature, seed=config.seed,
            count=num_images, batch_size=config.batch_size, flow=config.flow,
        )  # fmt: skip

    def _of_class(self, name: PriorName) -> Callable[[str], Iterable[NumberedImages]] | None:
        """This process's part of the samples of one class, where the prior draws a class that is asked for."""
        prior = self.prior(name)
        if self.given is not None or not isinstance(prior, FlowMatchingPrior) or not prior.classes:
            return None
        config = self.config

        def of_class(class_: str) -> Iterable[NumberedImages]:
            return generate(
                self.trained.vae, self.accelerator, self.protocol.num_generated, seed=config.seed,
                temperature=config.temperature, batch_size=config.batch_size, prior=prior.of_class(class_),
            )  # fmt: skip

        return of_class

    def _given_content(self) -> dict[str, Any]:
        """What decided the samples that were given, as their manifest has it."""
        assert self.given is not None
        own = self._content(self.first_prior, 0)
        return {"read_from": str(self.given.folder), **{name: self.given.manifest.get(name) for name in own}}

    def _kept_folder(self, name: PriorName) -> Path | None:
        """Where the samples of a prior are kept: with several, each in a folder of its own."""
        folder = self.config.keep_samples
        return folder / name if folder is not None and len(self.priors) > 1 else folder

    def _samples(self, name: PriorName, num_images: int) -> Iterable[NumberedImages]:
        """This process's part of the sample set that is scored, kept on its way if that was asked for."""
        config, trained = self.config, self.trained
        if self.given is not None:
            if self.given.num_images < num_images:
                raise ValueError(
                    f"--samples {self.given.folder} holds {self.given.num_images} images and the protocol compares "
                    f"{num_images}; draw more with sample.py --num-images {num_images}, or pass --fid.num-images "
                    f"{self.given.num_images}"
                )
            return self.given.batches(self.accelerator, num_images, config.batch_size)
        images = generate(
            trained.vae, self.accelerator, num_images, seed=config.seed, temperature=config.temperature,
            batch_size=config.batch_size, prior=self.prior(name),
        )  # fmt: skip
        folder = self._kept_folder(name)
        if folder is None:
            return images
        content = self._content(name, num_images)

        def manifest(shards: list[dict[str, Any]]) -> dict[str, Any]:
            made_by = provenance(self.accelerator, trained.dataset["train"]["fingerprint"])
            return manifest_of(content, self.priors.get(name), trained, made_by, shards)

        return keep(images, folder, content, manifest, self.accelerator)


def out_file(config: EvaluateConfig) -> Path:
    """Where the scores go."""
    return config.out or RunDirectory(config.run).evaluation_file


def unmeasured(config: EvaluateConfig) -> dict[ScoreName, str]:
    """Those of the scores asked for that need a file which is not given, and which file to put where."""
    reasons: dict[ScoreName, str] = {}
    if (missing := missing_weights(config.fid)) is not None:
        reasons |= {"fid": missing, "rfid": missing}
    if config.lpips.backbone is None:
        reasons["lpips"] = how_to_get_weights(config.lpips.net)
    return {name: reasons[name] for name in config.scores if name in reasons}


def refuse_to_measure_nothing(config: EvaluateConfig, missing: dict[ScoreName, str]) -> None:
    """Raise ValueError when every score that was asked for lacks its weights, or samples are to be kept that nobody draws."""
    if set(config.scores) <= missing.keys():
        raise ValueError(f"--scores {' '.join(config.scores)}: {' '.join(dict.fromkeys(missing.values()))}")
    if config.keep_samples is not None and "fid" in missing:
        raise ValueError(f"--keep-samples {config.keep_samples}: samples are drawn for FID, and {missing['fid']}")


def open_given_samples(config: EvaluateConfig, trained: TrainedModel) -> SampleReader | None:
    """The sample set to be scored; raises ValueError when another model drew it."""
    if config.samples is None:
        return None
    found = SampleReader.open(config.samples)
    if found.manifest["checkpoint_sha256"] != weights_sha256(config.run, trained):
        raise ValueError(
            f"--samples {config.samples} was drawn from {found.manifest['run']}/{found.manifest['checkpoint']}, whose weights "
            f"are not those of {config.run / trained.checkpoint}; name that run and --checkpoint, or draw samples of this one"
        )
    return found
