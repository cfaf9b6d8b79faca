"""Score a trained VAE: ELBO, bits per dimension, reconstruction and FID, on any number of processes.

accelerate launch [--config_file launch/F.yaml] vaetrain/evaluate.py --run RUN [--fid.num-images 2000] [--fid.weights FILE]

A score carries its protocol: which images, how many, through which network with which weights. FID stands next to its
floor (real images against real ones) and its extrapolation to endlessly many images.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vaetrain.command_line import parse, plain, user_errors
from vaetrain.metrics.config import FidConfig

ScoreName = Literal["elbo", "fid", "rfid"]


@dataclass(frozen=True)
class EvaluateConfig:
    """What is scored, and how."""

    run: Path
    """Run directory of the trained model."""

    out: Path | None = None
    """JSON file for the scores; None: RUN/evaluation.json."""

    checkpoint: Literal["best", "last"] = "best"
    """Checkpoint with the best validation score, or the newest. EMA weights either way."""

    data: str | None = None
    """Shard set to score against (both splits); None: where the run found its own."""

    allow_pipe: bool = False
    """Accept pipe:COMMAND for it, which runs COMMAND in a shell; never because the run, which may be another's, did."""

    batch_size: int = 64
    """Images per forward pass and process."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the network; fp32 gives the numbers to publish."""

    seed: int = 0
    """Of the latent noise in the ELBO, and of the samples scored by FID."""

    scores: tuple[ScoreName, ...] = ("elbo", "fid", "rfid")
    """elbo: ELBO and reconstruction of the val split. fid: samples against the train split, by FID, KID, inception score,
    precision and recall. rfid: the val split's reconstructions against its images."""

    keep_samples: Path | None = None
    """Folder to keep the scored samples in, as the sample set that sample.py writes; None: they are not kept."""

    fid: FidConfig = field(default_factory=FidConfig)

    def __post_init__(self) -> None:
        """Refuse to score nothing, and to keep samples that are not drawn."""
        if not self.scores:
            raise ValueError("--scores names none; leave it out for all of them")
        if self.keep_samples is not None and "fid" not in self.scores:
            raise ValueError(f"--keep-samples {self.keep_samples}: only --scores fid draws samples")


if __name__ == "__main__":
    CONFIG = parse(EvaluateConfig, __doc__)  # before the imports below, which take seconds

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

from accelerate import Accelerator

from vaetrain import distributed
from vaetrain.data.config import DataConfig
from vaetrain.data.reader import Reader, open_reader
from vaetrain.export import TrainedModel, load_run
from vaetrain.files import sha256_of_file
from vaetrain.metrics.extractor import FeatureExtractor, missing_weights
from vaetrain.metrics.features import NumberedImages
from vaetrain.metrics.generation import Reference, reconstruct, reconstruction_fid
from vaetrain.metrics.kept_samples import keep
from vaetrain.metrics.protocol import Protocol
from vaetrain.metrics.reference import RealImages
from vaetrain.metrics.validation import validate
from vaetrain.run import RunDirectory, provenance, write_json
from vaetrain.sampling import generate


def evaluate(config: EvaluateConfig, accelerator: Accelerator) -> dict[str, Any]:
    """All scores by name, with the protocol behind them and the provenance of model and scores. A collective.

    `val/*` are means over every image of the val split; `eval/*` compare sets of images through a network, and are None
    with a reason when no weights are given. Raises ValueError when nothing else was asked for.
    """
    extractor = open_extractor(config, accelerator)
    trained = load_run(config.run, checkpoint=config.checkpoint, device=accelerator.device)
    data = replace(RunDirectory.open(config.run).config().data, allow_pipe=config.allow_pipe)
    if config.data is not None:
        data = replace(data, train=config.data, val=None)
    val_reader = open_reader(
        data, "val", device=accelerator.device, processes_per_node=distributed.processes_per_node(),
        rank=accelerator.process_index, num_processes=accelerator.num_processes,
        gather=partial(distributed.gather_integers, accelerator),
    )  # fmt: skip
    trained.vae.config.check_images(val_reader.manifest.image_size, val_reader.manifest.channels)
    # FID first: it is what may find fault with the options, and nothing has been computed in vain by then.
    generation = generation_scores(trained, data, extractor, config, accelerator)
    reconstruction = reconstruction_scores(trained, data, val_reader, extractor, config, accelerator)
    elbo: dict[str, Any] = {}
    if "elbo" in config.scores:
        scores = validate(trained.vae, val_reader, accelerator, config.batch_size, config.seed)
        elbo = {f"val/{name}": value for name, value in plain(scores).items()}
    record: dict[str, Any] = {
        "run": str(config.run),
        "checkpoint": str(trained.checkpoint),
        **elbo,
        **generation,
        **reconstruction,
        "protocol": {
            "evaluate": plain(config),
            "val_fingerprint": val_reader.manifest.fingerprint,
            "elbo": "one latent sample per image; bits_per_dim of a density is approximate, see docs/objective.md",
        },
        "training": {"config": trained.config, "provenance": trained.provenance, "dataset": trained.dataset},
        "provenance": provenance(
            device=distributed.device_name(accelerator.device),
            num_processes=accelerator.num_processes,
            dataset_fingerprint=val_reader.manifest.fingerprint,
        ),
    }
    if accelerator.is_main_process:
        write_json(out_file(config), record)
        print_scores(record)
        print(f"scores written to {out_file(config)}")
    return record


def out_file(config: EvaluateConfig) -> Path:
    """Where the scores go."""
    return config.out or RunDirectory(config.run).evaluation_file


def open_extractor(config: EvaluateConfig, accelerator: Accelerator) -> FeatureExtractor | None:
    """The network that FID compares images through, first of all, so that a wrong file costs nobody an evaluation.

    None when no weights are given and other scores were asked for; raises ValueError when none were, or when samples are to
    be kept that nobody would draw.
    """
    if "fid" not in config.scores and "rfid" not in config.scores:
        return None
    missing = missing_weights(config.fid)
    if missing is None:
        return FeatureExtractor(config.fid, accelerator.device)
    if not set(config.scores) - {"fid", "rfid"}:
        raise ValueError(f"--scores {' '.join(config.scores)}: {missing}")
    if config.keep_samples is not None:
        raise ValueError(f"--keep-samples {config.keep_samples}: samples are drawn for FID, and {missing}")
    return None


def generation_scores(
    trained: TrainedModel,
    data: DataConfig,
    extractor: FeatureExtractor | None,
    config: EvaluateConfig,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Samples against training images, and what they were computed from. A collective."""
    if "fid" not in config.scores:
        return {}
    if extractor is None:
        return {"eval/fid": None, "eval/fid_reason": missing_weights(config.fid)}
    real = RealImages(data, "train", config.fid)
    protocol = Protocol.of(config.fid, real.num_images)
    images = samples(trained, protocol.num_generated, config, accelerator)
    reference = Reference.open(real, protocol, config.fid, extractor, accelerator)
    scores = reference.score(images, accelerator)
    listing = out_file(config).with_suffix(".reference_images.jsonl")
    if accelerator.is_main_process:
        reference.write_images(listing)
    scores["fid_protocol"] |= {
        "reference_images": listing.name,
        "kept_samples": str(config.keep_samples) if config.keep_samples else None,
    }
    return scores


def samples(
    trained: TrainedModel, num_images: int, config: EvaluateConfig, accelerator: Accelerator
) -> Iterable[NumberedImages]:
    """This process's part of the sample set that is scored, kept on its way if that was asked for."""
    images = generate(
        trained.vae, accelerator, num_images, seed=config.seed, temperature=1.0, batch_size=config.batch_size
    )
    if config.keep_samples is None:
        return images
    content = {
        "run": str(config.run),
        "checkpoint": str(trained.checkpoint),
        "checkpoint_sha256": sha256_of_file(config.run / trained.checkpoint / "ema.safetensors"),
        "prior": "standard",
        "temperature": 1.0,
        "seed": config.seed,
        "count": num_images,
        "batch_size": config.batch_size,
    }
    details = {
        "training": {"config": trained.config, "provenance": trained.provenance, "dataset": trained.dataset},
        "provenance": provenance(
            device=distributed.device_name(accelerator.device),
            num_processes=accelerator.num_processes,
            dataset_fingerprint=trained.dataset["train"]["fingerprint"],
        ),
    }
    return keep(images, config.keep_samples, content, details, accelerator)


def reconstruction_scores(
    trained: TrainedModel,
    data: DataConfig,
    val_reader: Reader,
    extractor: FeatureExtractor | None,
    config: EvaluateConfig,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """rFID of the val split, and what it was computed from. A collective."""
    if "rfid" not in config.scores:
        return {}
    if extractor is None:
        return {"eval/rfid": None, "eval/rfid_reason": missing_weights(config.fid)}
    images = reconstruct(trained.vae, val_reader, accelerator, config.batch_size)
    real = RealImages(data, "val", config.fid)
    return reconstruction_fid(images, real, extractor, accelerator, config.fid.batch_size)


def print_scores(record: dict[str, Any]) -> None:
    """A line for each number, and for each one that is missing the reason."""
    for name, value in record.items():
        if "/" in name and not isinstance(value, str):
            print(f"{name:28s} {value if value is None else format(value, ',.6g')}")
    for name in ("eval/fid", "eval/rfid"):
        if f"{name}_reason" in record:
            print(f"{name} is not measured: {record[f'{name}_reason']}")
    if not record.get("fid_protocol", {}).get("weights_are_published", True):
        print("eval/fid is no FID that compares with anybody's: the extractor's weights are not the published ones")


def main(config: EvaluateConfig) -> None:
    """Join the other processes and score."""
    with user_errors():
        accelerator = distributed.start(config.precision)
        with distributed.finishing(accelerator):
            evaluate(config, accelerator)


if __name__ == "__main__":
    main(CONFIG)
