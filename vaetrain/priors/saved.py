"""Fitted priors as files beside the checkpoint: RUN/priors/CHECKPOINT/NAME.safetensors, with the facts in its metadata."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vaetrain.command_line import plain
from vaetrain.documents import parse_json
from vaetrain.export import PRIOR_OF_EXPORT, TrainedModel, weights_sha256
from vaetrain.files import inside, replace_file
from vaetrain.model.prior import Prior, StandardNormal
from vaetrain.priors.codes import MeanCode, RandomCode
from vaetrain.priors.config import FlowSettings, PriorFitConfig, PriorName
from vaetrain.priors.flow import FlowPrior, build_flow
from vaetrain.priors.flow_matching.prior import FlowMatchingPrior
from vaetrain.priors.gaussian import GaussianPrior
from vaetrain.priors.mixture import Mixture, MixturePrior
from vaetrain.priors.whitening import Whitening
from vaetrain.strict_json import from_json

FORMAT_VERSION = 1

MOST_AVERAGED = 1_000_000
"""Codes that a mean-code averages."""


@dataclass(frozen=True)
class PriorFacts:
    """What a fitted prior is, and of what."""

    format_version: int
    prior: PriorName
    checkpoint: str
    """The checkpoint's folder in the run."""
    checkpoint_sha256: str
    """Of the weights that encoded the images."""
    dataset_fingerprint: str
    """Of the shard set they come from."""
    latent_shape: tuple[int, ...]
    num_codes: int
    """Training images it was fitted to."""
    fit: dict[str, Any]
    """The `PriorFitConfig`."""
    heldout_nats_per_dim: float | None
    """Mean log-density of latents z ~ q(z|x) of validation images that took no part in the fit, nats per latent dimension;
    None for a prior without a density."""
    heldout_num_codes: int
    """So many validation images."""
    details: dict[str, Any]
    """What the fit tried and chose."""


@dataclass(frozen=True)
class SavedPrior:
    """A prior, its facts, and the file that holds both."""

    prior: Prior
    facts: PriorFacts
    file: Path
    sha256: str

    def drawn(self, settings: FlowSettings) -> SavedPrior:
        """The same, drawn from as told; raises ValueError for what this prior cannot."""
        if isinstance(self.prior, FlowMatchingPrior):
            return dataclasses.replace(self, prior=dataclasses.replace(self.prior, settings=settings))
        return self


def prior_file(run: Path, trained: TrainedModel, name: PriorName) -> Path:
    """Where the prior of a run's checkpoint is kept."""
    return inside(run, "priors", trained.checkpoint.name, f"{name}.safetensors")


def save_prior(file: Path, prior: Prior, facts: PriorFacts) -> None:
    """Write a prior, whole or not at all. For the main process alone."""
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in prior.tensors().items()}
    metadata = {"format": "pt", "vaetrain_prior": json.dumps(dataclasses.asdict(facts))}
    replace_file(file, safetensors.torch.save(tensors, metadata))


def prior_of_run(run: Path, trained: TrainedModel) -> FlowMatchingPrior | None:
    """The flow-matching prior of a run's checkpoint; None where none was trained. Raises as `load_prior`."""
    file = prior_file(run, trained, "flow-matching")
    if not file.is_file():
        return None
    prior = load_prior(file, trained, weights_sha256(run, trained), PriorFitConfig()).prior
    assert isinstance(prior, FlowMatchingPrior)
    return prior


def prior_of_export(folder: Path, latent_shape: tuple[int, ...]) -> FlowMatchingPrior | None:
    """The flow-matching prior that an export carries; None where it has none. Raises ValueError for a damaged file."""
    file = inside(folder, PRIOR_OF_EXPORT)
    if not file.is_file():
        return None
    facts, tensors, _ = read_prior_file(file, latent_shape, again="export the run again")
    prior = _checked(facts, tensors, file, "export the run again")
    if not isinstance(prior, FlowMatchingPrior):
        raise ValueError(f"{file} holds a {facts.prior} prior; export the run again")
    return prior


def load_prior(file: Path, trained: TrainedModel, checkpoint_sha256: str, fit: PriorFitConfig) -> SavedPrior:
    """Read a prior back onto the CPU.

    Raises FileNotFoundError, and ValueError for a file that is damaged, was fitted to another checkpoint or data set, or
    with other settings than `fit`.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: this prior has not been fitted")
    again = f"delete {file} to have it fitted again"
    if file.stem == "flow-matching":
        again = "train it again with vaetrain/train_prior.py"
    facts, tensors, sha256 = read_prior_file(file, trained.vae.config.latent_shape, again=again)
    fingerprint = trained.dataset["train"]["fingerprint"]
    asked: dict[str, tuple[Any, Any]] = {
        "format": (facts.format_version, FORMAT_VERSION),
        "weights with SHA-256": (facts.checkpoint_sha256, checkpoint_sha256),
        "the shard set with fingerprint": (facts.dataset_fingerprint, fingerprint),
    }
    # Only what this prior's fit looks at: other steps for the flow leave the mixture what it is.
    settings = plain(fit)
    asked |= {
        f"--fit.{name.replace('_', '-')}": (facts.fit.get(name), settings[name])
        for name in fit.settings_of(facts.prior)
    }
    for what, (saved, wanted) in asked.items():
        if saved != wanted:
            raise ValueError(f"{file} was made for {what} {saved}, now it is {wanted}; {again}")
    return SavedPrior(_checked(facts, tensors, file, again), facts, file, sha256)


def read_prior_file(
    file: Path, latent_shape: tuple[int, ...], *, again: str
) -> tuple[PriorFacts, dict[str, Tensor], str]:
    """Facts, tensors and SHA-256 of a prior's file, which must be of latents of this shape; `again` is the remedy."""
    content = file.read_bytes()  # once, so that the hash is that of what is used
    try:
        tensors = safetensors.torch.load(content)
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
        facts: PriorFacts = from_json(
            PriorFacts, parse_json(metadata.get("vaetrain_prior", "null"), nulls=True), str(file)
        )
        if facts.latent_shape != latent_shape:
            raise ValueError(f"it is of latents of shape {facts.latent_shape}")
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise ValueError("its numbers are not finite")
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{file} is damaged or no prior ({error}); {again}") from error
    return facts, tensors, hashlib.sha256(content).hexdigest()


def _checked(facts: PriorFacts, tensors: Mapping[str, Tensor], file: Path, again: str) -> Prior:
    """The prior, having drawn something finite once."""
    try:
        prior = build_prior(facts, tensors)
        if isinstance(prior, FlowMatchingPrior):  # one step will do
            sampled = dataclasses.replace(prior, settings=FlowSettings(steps=1, solver="euler")).sample(0, range(1))
        else:
            sampled = prior.sample(0, range(1))
        if not bool(sampled.reshape(facts.latent_shape).isfinite().all()):
            raise ValueError("what it draws is not finite")
    except (LookupError, RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"{file} does not hold what a {facts.prior} prior is made of ({error}); {again}") from error
    return prior


def _bounded(number: Tensor, most: int) -> int:
    """A number that decides how much is built."""
    if not 1 <= int(number) <= most:
        raise ValueError(f"{int(number)} is not within 1 to {most}")
    return int(number)


def build_prior(facts: PriorFacts, tensors: Mapping[str, Tensor]) -> Prior:
    """A prior from its tensors; raises KeyError, ValueError or RuntimeError when they are another's."""
    shape = facts.latent_shape
    match facts.prior:
        case "standard":
            return StandardNormal(shape)
        case "mean-code":
            return MeanCode(shape, tensors["codes"], _bounded(tensors["num_averaged"], MOST_AVERAGED))
        case "random-code":
            return RandomCode(shape, tensors["low"], tensors["high"])
        case "flow-matching":
            return FlowMatchingPrior.of_tensors(shape, facts.details, tensors)
    whitening = Whitening(*(tensors[f"whitening.{name}"] for name in ("mean", "axes", "cholesky")))
    match facts.prior:
        case "gaussian":
            return GaussianPrior(shape, whitening)
        case "gmm":
            mixture = Mixture(*(tensors[f"mixture.{name}"] for name in ("weights", "means", "choleskys")))
            return MixturePrior(shape, whitening, mixture)
        case "flow":
            rank = _bounded(tensors["flow_rank"], math.prod(shape))
            flow = build_flow(rank)
            prefix = "flow."
            flow.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
            return FlowPrior(shape, whitening, flow.eval().requires_grad_(False), rank)
