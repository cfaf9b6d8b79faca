"""Score a trained VAE: ELBO, bits per dimension, reconstruction and FID, on any number of processes.

accelerate launch [--config_file launch/F.yaml] vaetrain/evaluate.py --run RUN [--fid.num-images 2000] [--fid.weights FILE]
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vaetrain.command_line import parse, plain, user_errors
from vaetrain.metrics.config import FidConfig


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

    fid: FidConfig = field(default_factory=FidConfig)


if __name__ == "__main__":
    CONFIG = parse(EvaluateConfig, __doc__)  # before the imports below, which take seconds

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import UInt8
from torch import Tensor
from tqdm import tqdm

from vaetrain import distributed
from vaetrain.data.reader import Reader, open_reader
from vaetrain.export import load_run
from vaetrain.metrics.fidelity import FeatureStatistics, fid
from vaetrain.metrics.inception import EXTRACTOR, HOW_TO_GET_WEIGHTS, LAYER, FeatureExtractor
from vaetrain.metrics.validation import validate
from vaetrain.model.autoencoder import VAE
from vaetrain.run import RunDirectory, provenance, write_json
from vaetrain.sampling import generate


def evaluate(config: EvaluateConfig, accelerator: Accelerator) -> dict[str, Any]:
    """All scores by name, with the protocol behind them and the provenance of model and scores. A collective.

    `val/*` are means over every image of the val split; `eval/fid` compares `fid.num_images` samples with as many images
    of the train split, and is None with `eval/fid_reason` when no weights are given.
    """
    trained = load_run(config.run, checkpoint=config.checkpoint, device=accelerator.device)
    vae = trained.vae
    data = replace(RunDirectory.open(config.run).config().data, allow_pipe=config.allow_pipe)
    if config.data is not None:
        data = replace(data, train=config.data, val=None)
    open_split = partial(
        open_reader, data, device=accelerator.device, processes_per_node=distributed.processes_per_node(),
        rank=accelerator.process_index, num_processes=accelerator.num_processes,
        gather=partial(distributed.gather_integers, accelerator),
    )  # fmt: skip
    val_reader = open_split("val")
    vae.config.check_images(val_reader.manifest.image_size, val_reader.manifest.channels)
    val_scores = validate(vae, val_reader, accelerator, config.batch_size, config.seed)
    record: dict[str, Any] = {
        "run": str(config.run),
        "checkpoint": str(trained.checkpoint),
        **{f"val/{name}": value for name, value in plain(val_scores).items()},
        **generation_scores(vae, open_split, config, accelerator),
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
        out = config.out or RunDirectory(config.run).evaluation_file
        write_json(out, record)
        for name, value in record.items():
            if "/" in name and not isinstance(value, str):
                print(f"{name:24s} {value if value is None else format(value, ',.4f')}")
        if record["eval/fid"] is None:
            print(f"eval/fid is not measured: {record['eval/fid_reason']}")
        print(f"scores written to {out}")
    return record


def generation_scores(
    vae: VAE, open_split: Callable[[Literal["train", "val"]], Reader], config: EvaluateConfig, accelerator: Accelerator
) -> dict[str, Any]:
    """FID of samples against training images, with the counts and weights it was computed from. A collective."""
    if config.fid.weights is None:
        return {"eval/fid": None, "eval/fid_reason": f"no Inception weights were given. {HOW_TO_GET_WEIGHTS}"}
    extractor = FeatureExtractor(config.fid.weights, accelerator.device)
    reader = open_split("train")
    num_images = config.fid.num_images
    if reader.num_images < num_images:
        raise ValueError(
            f"--fid.num-images is {num_images} but the train split has {reader.num_images} images; ask for at most that"
        )
    chosen = np.zeros(reader.num_images, dtype=bool)
    chosen[np.random.default_rng(config.fid.seed).choice(reader.num_images, num_images, replace=False)] = True
    wanted = torch.from_numpy(chosen)
    real = (
        batch.images[wanted[batch.indices.cpu()].to(batch.images.device)]
        for batch in reader.eval_batches(config.fid.batch_size, accelerator.process_index, accelerator.num_processes)
    )
    generated = (
        images
        for _, images in generate(
            vae, accelerator, num_images, seed=config.seed, temperature=1.0, batch_size=config.batch_size
        )
    )
    reference = statistics(extractor, real, accelerator, "real images")
    samples = statistics(extractor, generated, accelerator, "samples")
    return {
        "eval/fid": fid(samples, reference),
        "fid_protocol": {
            "num_generated": samples.count,
            "num_real": reference.count,
            "real_images": f"train split, {num_images} drawn without replacement by seed {config.fid.seed}",
            "extractor": f"torch-fidelity {EXTRACTOR}, layer {LAYER}",
            "weights_sha256": extractor.weights_sha256,
            "weights_are_published": extractor.weights_are_published,
        },
    }


def statistics(
    extractor: FeatureExtractor, batches: Iterable[UInt8[Tensor, "b c h w"]], accelerator: Accelerator, what: str
) -> FeatureStatistics:
    """Feature statistics of all processes' images together."""
    features = FeatureStatistics.empty(device=accelerator.device)
    for images in tqdm(batches, desc=what, unit="batch", disable=None if accelerator.is_main_process else True):
        if len(images):
            features.update(extractor(images))
    return features.reduce(lambda tensor: distributed.sum_over_processes(accelerator, tensor))


def main(config: EvaluateConfig) -> None:
    """Join the other processes and score."""
    with user_errors():
        accelerator = distributed.start(config.precision)
        with distributed.finishing(accelerator):
            evaluate(config, accelerator)


if __name__ == "__main__":
    main(CONFIG)
