"""What a command refuses before it imports torch, which takes seconds, and on a cold disk a minute.

Each check here is one that the command makes again, by the same code, together with those that need torch, a device or the
other processes. Manifests are opened, and nothing is read that grows with the number of images; shard sets behind URLs are left
to the command.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

from vaetrain.command_line import user_errors
from vaetrain.config import Config, RfidConfig, TrainingConfig
from vaetrain.data.config import DataConfig
from vaetrain.data.format.shard_set import ShardSet
from vaetrain.data.readers.order import BatchLayout
from vaetrain.data.readers.selection import count_images
from vaetrain.data.remote.url import remote_folder
from vaetrain.distributed.launcher_environment import LauncherEnvironment
from vaetrain.evaluation.config import EvaluateConfig
from vaetrain.interchange.diffusers_config import check_fits, is_diffusers_folder
from vaetrain.latents.manifest import LatentManifest, manifest_file
from vaetrain.metrics.lpips_config import check_perceptual
from vaetrain.model.config import ModelConfig
from vaetrain.priors.flow_matching.config import PriorTraining
from vaetrain.runs.checkpoint_names import list_checkpoints, require_checkpoint
from vaetrain.runs.directory import RunDirectory
from vaetrain.scaling.config import ScaleConfig
from vaetrain.wandb_account import check_wandb

OTHERS_WAIT_S = 10.0
"""Before a process speaks that is not the first of its machine."""


@contextmanager
def refusing() -> Iterator[None]:
    """`user_errors` for checks that every process makes, and that usually all fail: the first of each machine speaks.

    The others wait, for the launcher ends them as soon as one has left. If it does not, the first found nothing wrong.
    """
    with user_errors():
        try:
            yield
        except Exception:
            if LauncherEnvironment.read().local_rank > 0:
                time.sleep(OTHERS_WAIT_S)
            raise
    if LauncherEnvironment.read().rank == 0:
        print("loading PyTorch", file=sys.stderr, flush=True)  # which on a cold disk takes a minute


def check_training(config: Config) -> None:
    """Refuse, as `train` would, batches that do not divide, data that do not fit, a perceptual term without its files, a
    discriminator of larger images, W&B without an account or a connection, and a place that nothing can start from.

    Raises ValueError, FileNotFoundError or FileExistsError, as all functions here.
    """
    layout = _layout(config)
    check_perceptual(config.objective.perceptual, config.model.image_size)
    config.objective.adversarial.check_images(config.model.image_size)
    check_rfid(config.train.rfid)
    if config.log.wandb == "online":
        check_wandb(ask_server=LauncherEnvironment.read().rank == 0)
    num_images, _ = (check_split(config.data, split, config.model) for split in ("train", "val"))
    if num_images is not None:
        layout.images_per_epoch(num_images)
    run = RunDirectory(config.run_dir)
    run.check_format()
    run.check_resume(config.resume)
    if list_checkpoints(run.checkpoints):
        return
    if config.resume not in ("auto", "never"):
        require_checkpoint(Path(config.resume))
    elif config.init_from is not None:
        if is_diffusers_folder(config.init_from):
            check_fits(config.init_from, config.model)
        elif not (config.init_from / "config.json").is_file():
            require_checkpoint(config.init_from)


def check_prior_training(config: PriorTraining) -> None:
    """Refuse what `train_prior` would: a first stage without a checkpoint, no latents, batches that do not divide."""
    trained_on = check_run(config.first_stage).config()
    layout = _layout(config)
    if config.log.wandb == "online":
        check_wandb(ask_server=LauncherEnvironment.read().rank == 0)
    num_images: int | None
    if config.data.latents is not None:
        manifest = LatentManifest.read(manifest_file(config.data.latents))
        config.model.check_latent(manifest.latent_shape)
        num_images = manifest.splits["train"].num_images
    else:
        config.model.check_latent(trained_on.model.latent_shape)
        data = trained_on.data.as_recorded()
        data = data if config.data.images is None else replace(data, train=config.data.images, val=None)
        num_images, _ = (check_split(data, split, trained_on.model) for split in ("train", "val"))
    if num_images is not None:
        layout.images_per_epoch(num_images)
    run = RunDirectory(config.run_dir)
    run.check_format()
    run.check_resume(config.resume)


def check_rfid(config: RfidConfig) -> None:
    """Raise FileNotFoundError where a file is missing that the distance of reconstructions needs."""
    for name, file in (("extractor", config.extractor), ("weights", config.weights)):
        if config.every_epochs is not None and file is not None and Path(file).suffix and not Path(file).is_file():
            raise FileNotFoundError(
                f"--train.rfid.{name} {file} does not exist; nothing is downloaded: give a file's path"
            )


def check_scaling(config: ScaleConfig) -> None:
    """Refuse what `scale` would: a result that is there already, and what cannot be measured."""
    config.check_out()
    layout = _layout(config)
    check_perceptual(config.objective.perceptual, config.model.image_size)
    config.objective.adversarial.check_images(config.model.image_size)
    num_images = check_split(config.data, "train", config.model)
    if num_images is not None:
        if config.train.num_images is None:
            layout.images_per_epoch(num_images)
        config.counts_within(num_images)
    if "noise" in config.phases:
        config.check_noise_parts(layout.num_processes)


def check_evaluation(config: EvaluateConfig) -> None:
    """Refuse what `evaluate` would: a run without a checkpoint, and a val split that is not there or not the model's."""
    run = check_run(config.run).config()
    check_split(config.data_of(run.data), "val", run.model)


def check_run(path: Path) -> RunDirectory:
    """A run directory that has a checkpoint, damaged or not: hashing it is left to whoever loads it."""
    run = RunDirectory.open(path)
    require_checkpoint(path)
    return run


def check_split(config: DataConfig, split: Literal["train", "val"], model: ModelConfig | None = None) -> int | None:
    """Images that `config` keeps of a split, which fit `model` if that is given; None for a shard set behind a URL."""
    location = config.location(split)
    if remote_folder(location) is not None:
        return None
    manifest = ShardSet.open(location).resized_to(config.resized_to).manifest
    if model is not None:
        model.check_images(manifest.image_size, manifest.channels)
    return count_images(manifest, split, config.classes, location)


def _layout(config: TrainingConfig) -> BatchLayout:
    train, num_processes = config.train, LauncherEnvironment.read().num_processes
    return BatchLayout.of(train.global_batch_size, train.micro_batch_size, 0, num_processes)  # alike for every rank
