"""Encode a run's images into latents, for a second stage to train on, on any number of processes.

accelerate launch --config_file launch/gpu1.yaml vaetrain/encode.py --run RUN --out DIR [--flip True] [--dtype bf16]
(launch/ has layouts for more processes, too)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from vaetrain.command_line import parse, user_errors
from vaetrain.data.config import DataConfig
from vaetrain.data.remote.remote import is_remote
from vaetrain.latents.manifest import LatentDtype, Layout

SPLITS: tuple[Literal["train"], Literal["val"]] = ("train", "val")
IMAGES_PER_FILE: dict[Layout, int] = {"webdataset": 1000, "safetensors": 10_000}


@dataclass(frozen=True)
class EncodeConfig:
    """Posterior mean and log-variance of every image of both splits, with label and index. A killed command, started again with
    any number of processes, goes on where it stopped."""

    run: Path
    """Run directory of the trained model."""

    out: Path
    """Folder for the latents and their manifest. When it already holds these very ones, nothing is done."""

    flip: bool = False
    """Also encode each image's mirrored twin: a convolution does not mirror what it sees, so flipping latents is not the same."""

    dtype: LatentDtype = "fp32"
    """Numbers are stored in this precision; they are computed in fp32."""

    layout: Layout = "webdataset"
    """webdataset: tars of KEY.safetensors and KEY.json. safetensors: files as LightningDiT's trainers read them."""

    checkpoint: Literal["best", "last"] = "best"
    """Checkpoint with the best validation score, or the newest."""

    weights: Literal["ema", "raw"] = "ema"
    """The moving average of the weights, or what the optimizer left."""

    data: str | None = None
    """Shard set to encode: another one, or that of the run if it has moved. A convolutional model with a spatial latent takes
    images of other sizes, too. None: where the run found its own."""

    batch_size: int = 50
    """Images encoded at a time by one process; on a convolution's rounding it may have an influence."""

    images_per_file: int | None = None
    """Latents in a file, a multiple of the batch size, shared out among processes file by file. None: 1,000 in tars, 10,000 in
    safetensors."""

    timeout_s: float = 3600.0
    """Seconds that processes wait for each other before all end."""

    def __post_init__(self) -> None:
        """Refuse counts that mean nothing."""
        for name, value in (("batch-size", self.batch_size), ("images-per-file", self.latents_per_file)):
            if value < 1:
                raise ValueError(f"--{name} is {value}; it must be at least 1")
        if self.timeout_s <= 0:
            raise ValueError(f"--timeout-s is {self.timeout_s}; it must be positive")
        if self.latents_per_file % self.batch_size:
            below = self.latents_per_file // self.batch_size * self.batch_size
            raise ValueError(
                f"--images-per-file {self.latents_per_file} is no multiple of --batch-size {self.batch_size}; the nearest that "
                f"work are {f'{below} and ' if below else ''}{below + self.batch_size}"
            )
        if self.layout == "safetensors" and not self.flip:
            raise ValueError(
                "--layout safetensors is read by trainers that take latents_flip half of the time; pass --flip True, or use "
                "--layout webdataset"
            )

    @property
    def latents_per_file(self) -> int:
        """`images_per_file`, or its default."""
        return IMAGES_PER_FILE[self.layout] if self.images_per_file is None else self.images_per_file

    def data_of(self, data: DataConfig) -> DataConfig:
        """What is read, given a run's data: local images by their offset, since each process needs its own alone."""
        if self.data is not None:
            data = replace(data, train=self.data, val=None)
        is_local = not any(is_remote(data.location(split)) for split in SPLITS)
        return replace(data, reader="indexed") if is_local else data


if __name__ == "__main__":
    CONFIG = parse(EncodeConfig, __doc__)  # before the imports below, which take seconds

    from vaetrain.preflight import check_run, check_split, refusing

    with refusing():
        DATA = CONFIG.data_of(check_run(CONFIG.run).config().data)
        for SPLIT in SPLITS:
            check_split(DATA, SPLIT)

import contextlib

from accelerate import Accelerator

from vaetrain.data.readers.reader import Reader, open_split
from vaetrain.distributed import exchange, processes
from vaetrain.export import TrainedModel, load_run, weights_sha256
from vaetrain.latents.encoding import FinishedFile, Request, complete, encode_files, prepare, tasks_of
from vaetrain.latents.manifest import Encoder
from vaetrain.latents.record import LatentRecord
from vaetrain.progress_bar import ProgressBar
from vaetrain.runs.directory import RunDirectory, write_json
from vaetrain.runs.provenance import provenance


def encode(config: EncodeConfig, accelerator: Accelerator) -> None:
    """Write the latents of both splits and the manifest; every process makes some of the files. A collective.

    A set that is already whole is left as it is. Raises FileExistsError for another one, and ValueError for images that do not fit
    the model and latents that are not finite.
    """
    trained = load_run(config.run, checkpoint=config.checkpoint, weights=config.weights, device=accelerator.device)
    with contextlib.ExitStack() as opened:
        readers: dict[str, Reader] = {}
        data = config.data_of(RunDirectory.open(config.run).config().data)
        for split in SPLITS:
            readers[split] = open_split(data, accelerator, split)
            opened.callback(readers[split].close)
        request = request_of(config, trained, readers, data, accelerator)
        is_whole = exchange.decided_by_main(
            accelerator, lambda: prepare(config.out, request), f"look into {config.out}"
        )
        num_images = {split: reader.num_images for split, reader in readers.items()}
        said = " and ".join(f"{count:,} {split}" for split, count in num_images.items())
        if is_whole:
            if accelerator.is_main_process:
                print(f"{config.out} already holds these {said} latents, nothing is left to do")
            return
        tasks = tasks_of(config.layout, num_images, config.latents_per_file)
        share = tasks[accelerator.process_index :: accelerator.num_processes]
        notes = {task.name: FinishedFile.of(config.out, task, request) for task in share}
        to_do = [task for task in share if notes[task.name] is None]
        size, left = (sum(task.stop - task.start for task in some) for some in (share, to_do))
        with ProgressBar("encoding", size, done=size - left, quiet=not accelerator.is_main_process) as bar:
            for split in SPLITS:
                mine = [task for task in to_do if task.split == split]
                for note in encode_files(trained.vae, readers[split], mine, config.out, request, bar):
                    notes[note.file.name] = note
        found = exchange.gather_objects(list(notes.items()), "all processes to encode their images")
        if accelerator.is_main_process:
            everyones = dict(found)
            finished: dict[str, list[FinishedFile]] = {
                split: [everyones[task.name] for task in tasks if task.split == split] for split in SPLITS
            }
            train = readers["train"].manifest
            made_by = provenance(accelerator, train.fingerprint)
            write_json(config.out / "provenance.json", {**made_by, "training": trained.provenance})
            manifest = complete(config.out, request, finished, train.classes)
            shape = " × ".join(map(str, manifest.latent_shape))
            print(f"{said} latents {shape} in {config.dtype} written to {config.out}")


def request_of(
    config: EncodeConfig, trained: TrainedModel, readers: dict[str, Reader], data: DataConfig, accelerator: Accelerator
) -> Request:
    """All that decides the bytes; raises ValueError for images that do not fit the model."""
    train, val = readers["train"].manifest, readers["val"].manifest
    if (train.image_size, train.channels, train.classes) != (val.image_size, val.channels, val.classes):
        raise ValueError(
            "the train and val splits differ in image size, channels or classes; name a shard set that has both with --data"
        )
    model = trained.vae.config
    model.check_channels(train.channels)
    return Request(
        layout=config.layout,
        record=LatentRecord(
            model.latent_shape_of(train.image_size, train.image_size), config.dtype, model.variational, config.flip
        ),
        encoder=Encoder(str(trained.checkpoint), config.weights, weights_sha256(config.run, trained, config.weights)),
        image_size=train.image_size,
        batch_size=config.batch_size,
        images_per_file=config.latents_per_file,
        device=accelerator.device.type,
        kept_classes=data.classes,
        sources={split: reader.manifest.fingerprint for split, reader in readers.items()},
    )


def main(config: EncodeConfig) -> None:
    """Join the other processes and encode."""
    with user_errors():
        accelerator = processes.start(timeout_s=config.timeout_s, timeout_option="--timeout-s")
        with processes.finishing(accelerator):
            encode(config, accelerator)


if __name__ == "__main__":
    main(CONFIG)
