"""Checkpoints that a kill cannot spoil and that hold everything an exact resume needs.

checkpoints/step-00001234/
    model.safetensors, ema.safetensors, optimizer.safetensors     tensors, never pickled
    meters.safetensors                                            running sums of the logging interval, by process
    judge.safetensors                                             what decides which steps are skipped
    adversary.safetensors                                         the discriminator and all that trains it, where there is one
    state.json                                                    format, progress and scalars
    config.yaml, provenance.json, dataset.json                    what made it
    checksums.json                                                SHA-256 of each; written last

A checkpoint is written under another name, flushed to disk and renamed, so that one that has its name is whole. The
tensors are copied and written while training goes on (async_writer.py); the scalars are those of the moment of the call.
Training draws all its randomness from (seed, images seen), so no generator state needs saving.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vaetrain.config import CheckpointConfig
from vaetrain.distributed.exchange import meet
from vaetrain.files import NewerFormatError, fsync, sha256_of_file
from vaetrain.runs.checkpoint_names import is_checkpoint, list_checkpoints, no_good_checkpoint, step_of
from vaetrain.runs.directory import RunDirectory
from vaetrain.runs.provenance import package_version
from vaetrain.training.async_writer import SnapshotWriter, Tensors
from vaetrain.training.optimizer import restore_optimizer_state, split_optimizer_state
from vaetrain.training.progress import Progress
from vaetrain.training.retention import Retention, put_in_place

FORMAT_VERSION = 3
"""Weights of 1 (no meters.safetensors, no version of vaetrain in state.json) and 2 (noise of whole global batches) are read;
training does not go on from them (`check_resumable`)."""


class CheckpointNotWritten(OSError):
    """A checkpoint could not be written, for want of space most likely; those before it are whole."""


@runtime_checkable  # for the type checks of the tests
class Stateful(Protocol):
    """A few tensors of the training loop that an exact resume needs."""

    def state_dict(self) -> dict[str, Tensor]:
        """Them by name; they are not written to afterwards. A collective."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` returned."""
        ...


class Checkpoints:
    """The checkpoints of one run: what they hold is named once, in the constructor; save and load mirror each other.

    In a `with` statement it waits, at the end, for the one that is being written.
    """

    def __init__(
        self,
        run: RunDirectory,
        config: CheckpointConfig,
        accelerator: Accelerator,
        *,
        model: nn.Module,
        ema: nn.Module,
        optimizer: torch.optim.Optimizer,
        meters: Stateful,
        spikes: Stateful,
        reading: Mapping[str, Any] | None = None,
        loss_terms: Mapping[str, Mapping[str, str]] | None = None,
        adversary: Stateful | None = None,
    ) -> None:
        self.run = run
        self.folder = run.checkpoints
        self.every_steps = config.every_steps
        self.retention = Retention(run.checkpoints, config)
        self.accelerator = accelerator
        self.model = model
        self.ema = ema
        self.optimizer = optimizer
        self.meters = meters
        self.spikes = spikes
        self.reading = reading
        self.loss_terms = loss_terms
        self.adversary = adversary
        self.scaler: torch.amp.GradScaler | None = accelerator.scaler
        self.writer = SnapshotWriter()
        self.newest_step = 0
        self.longest_save_s = 0.0
        """Of those so far, from `save` until it is on disk; known to the main process."""

    def are_due(self, progress: Progress, *, validated: bool, at_end: bool) -> bool:
        """Whether to save now, just `validated` or not; never what was loaded or saved and has not changed since."""
        if progress.step == self.newest_step and not validated:
            return False
        if at_end or progress.best_step == progress.step:
            return True
        return validated if self.every_steps is None else progress.step % self.every_steps == 0

    def save(self, progress: Progress) -> None:
        """Begin a checkpoint and, once it is whole, drop those no longer kept. A collective; the main process writes.

        Waits for the one before it. Raises CheckpointNotWritten, here or in the calls that follow, when one fails.
        """
        self.newest_step = progress.step
        self.finish()
        meet("the main process to write the checkpoint before this one")
        meters = self.meters.state_dict()
        if not self.accelerator.is_main_process:
            return
        optimizer, groups = split_optimizer_state(self.optimizer)
        tensors = {
            "model": self.model.state_dict(), "ema": self.ema.state_dict(), "optimizer": optimizer, "meters": meters,
            "judge": self.spikes.state_dict(),
            **({"adversary": self.adversary.state_dict()} if self.adversary else {}),
        }  # fmt: skip
        state = {
            "format_version": FORMAT_VERSION,
            "vaetrain": package_version("vaetrain"),
            "progress": asdict(progress),
            "reading": self.reading,
            **({"loss_terms": self.loss_terms} if self.loss_terms else {}),
            "optimizer": groups,
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
        }
        self.writer.start(
            tensors, partial(self._write, json.dumps(state, indent=2), replace(progress), time.monotonic())
        )

    def before_update(self) -> None:
        """Call before weights change: waits until a checkpoint that was begun has its copy of them."""
        self.writer.wait_for_copy()

    def finish(self) -> None:
        """Wait until the last checkpoint is on disk."""
        self.writer.finish()

    def __enter__(self) -> Checkpoints:
        """See the class."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait for the last checkpoint; what happened to it must not hide the error that ended training."""
        try:
            self.writer.finish()
        except CheckpointNotWritten as problem:
            if error is None or error is problem:
                raise
            print(f"error: {problem}", file=sys.stderr)

    def load(self, checkpoint: Path) -> Progress:
        """Restore everything from a checkpoint that was checked; raises ValueError when it is of another model."""
        self.finish()
        state = json.loads((checkpoint / "state.json").read_text())
        load_into(self.model, checkpoint / "model.safetensors")
        load_into(self.ema, checkpoint / "ema.safetensors")
        restore_optimizer_state(self.optimizer, load_file(checkpoint / "optimizer.safetensors"), state["optimizer"])
        if self.scaler is not None and state["scaler"] is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.meters.load_state_dict(load_file(checkpoint / "meters.safetensors"))
        self.spikes.load_state_dict(load_file(checkpoint / "judge.safetensors"))
        # A checkpoint without one is of a training without it, and it begins anew.
        if self.adversary is not None and (file := checkpoint / "adversary.safetensors").is_file():
            self.adversary.load_state_dict(load_file(file))
        progress = Progress(**state["progress"])
        if checkpoint.parent != self.folder:  # another run's: its best checkpoint is not among ours
            progress.best_score = progress.best_step = None
            progress.validations_without_best = 0
        self.newest_step = progress.step
        return progress

    def check_space(self, total_images: int) -> None:
        """Refuse, with ValueError, a training whose checkpoints will not fit on the disk; for the main process alone."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.retention.check_space(self.num_bytes(), total_images)

    def num_bytes(self) -> int:
        """Size of one checkpoint on disk, with AdamW's two moments of each weight; rather too much than too little."""
        tensors = [*self.model.state_dict().values(), *self.ema.state_dict().values()]
        tensors += [parameter for parameter in self.model.parameters() for _ in range(2)]
        tensors += [] if self.adversary is None else [*self.adversary.state_dict().values()] * 3
        headers = 200 * len(tensors)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors) + headers + 2**17

    def _write(self, state: str, progress: Progress, began: float, tensors: Tensors) -> None:
        target = self.folder / f"step-{progress.step:08d}"
        aside = self.folder / f".{target.name}.partial"
        file = aside
        try:
            aside.mkdir(parents=True)
            for name, group in tensors.items():
                file = aside / f"{name}.safetensors"
                save_file(dict(group), file)
            file = aside / "state.json"
            file.write_text(state + "\n")
            for attachment in (self.run.config_file, self.run.provenance_file, self.run.dataset_file):
                file = aside / attachment.name
                shutil.copy(attachment, file)
            checksums = {path.name: sha256_of_file(path) for path in sorted(aside.iterdir())}
            file = aside / "checksums.json"
            file.write_text(json.dumps(checksums, indent=2) + "\n")
            for file in (*aside.iterdir(), aside, self.run.metrics_file):  # records up to this step outlive it
                if file.exists():
                    fsync(file)
            put_in_place(aside, target)
        except Exception as error:
            free = shutil.disk_usage(self.folder).free
            shutil.rmtree(aside, ignore_errors=True)
            if not isinstance(error, OSError | SafetensorError):
                raise
            raise CheckpointNotWritten(
                f"checkpoint {target} could not be written: {file.name}: {error}. The file system had {free / 2**20:,.1f} MiB "
                f"free, and a checkpoint takes {self.num_bytes() / 2**20:,.1f}. The checkpoints before it are whole: make "
                "room (or lower --checkpoint.keep-last) and start the same command again to go on from the newest"
            ) from error
        self.longest_save_s = max(self.longest_save_s, time.monotonic() - began)
        images_per_step = progress.images_seen // max(1, progress.step)  # a resume may not change it
        self.retention.drop_old(
            progress.step, progress.best_step, images_per_step, sound_step=min(progress.step, progress.sound_step)
        )


def newest_good(folder: Path, *, up_to_step: int | None = None) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose checksums hold, and what is wrong with the newer ones that were passed over.

    Those later than `up_to_step` are not looked at. Raises NewerFormatError for one that another vaetrain can read: an older
    one would throw its training away.
    """
    damaged: list[str] = []
    for checkpoint in reversed(list_checkpoints(folder)):
        if up_to_step is not None and step_of(checkpoint) > up_to_step:
            continue
        try:
            check(checkpoint)
        except NewerFormatError:
            raise
        except ValueError as error:
            damaged.append(str(error))
        else:
            return checkpoint, damaged
    return None, damaged


def find(path: Path) -> Path:
    """The checkpoint that `path` names: itself, or the newest good one of a run directory; warns of newer, damaged ones."""
    if is_checkpoint(path):
        return path
    checkpoint, damaged = newest_good(path / "checkpoints")
    if checkpoint is None:
        raise no_good_checkpoint(path, damaged)
    warn_of_damage(damaged, checkpoint)
    return checkpoint


def warn_of_damage(damaged: list[str], used: Path | None) -> None:
    """Name on stderr the checkpoints that were passed over, and the one that is used in their place."""
    for problem in damaged:
        print(f"warning: {problem}" + (f"; {used} is taken" if used else ""), file=sys.stderr)


def best(run: Path) -> Path:
    """The checkpoint of a run with the best validation score, or the newest where none is marked.

    Raises ValueError when the best is damaged: another one would pass for it.
    """
    newest = find(run)
    best_step = json.loads((newest / "state.json").read_text())["progress"]["best_step"]
    if best_step is None:
        return newest
    checkpoint = run / "checkpoints" / f"step-{best_step:08d}"
    try:
        check(checkpoint)
    except NewerFormatError:
        raise
    except ValueError as error:
        raise ValueError(
            f"the best checkpoint of {run} cannot be used: {error}. {newest} is the newest good one: take it with "
            "--checkpoint last (for --init-from give its path), or bring the best back from a copy"
        ) from error
    return checkpoint


def check(checkpoint: Path) -> None:
    """Compare every file with its checksum; ValueError names the file that differs and what to do.

    Raises NewerFormatError, a ValueError too, naming the version of vaetrain that reads it.
    """
    try:
        checksums: dict[str, str] = json.loads((checkpoint / "checksums.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{checkpoint} is not a whole checkpoint ({error}); use an older one") from error
    for name in ("state.json", *checksums):
        file = checkpoint / name
        if not file.is_file() or sha256_of_file(file) != checksums.get(name):
            raise ValueError(f"{file} is damaged (its checksum differs); use an older checkpoint")
    state = json.loads((checkpoint / "state.json").read_text())
    if state["format_version"] > FORMAT_VERSION:
        raise NewerFormatError(
            f"{checkpoint} has format {state['format_version']}, and this vaetrain ({package_version('vaetrain')}) reads up "
            f"to {FORMAT_VERSION}; use vaetrain {state['vaetrain']}, which wrote it, or a later one"
        )


def check_resumable(checkpoint: Path) -> None:
    """Refuse, with ValueError, to go on from a checkpoint of an older format: its training drew other noise."""
    state = json.loads((checkpoint / "state.json").read_text())
    if state["format_version"] < FORMAT_VERSION:
        writer = state.get("vaetrain") or f"of the git revision in {checkpoint / 'provenance.json'}"
        raise ValueError(
            f"{checkpoint} has format {state['format_version']}, in which noise was drawn otherwise, so that going on would be "
            f"another training; go on with vaetrain {writer}, which wrote it, or begin a new run with its weights: "
            f"--init-from {checkpoint} --run-dir NEW. evaluate.py, sample.py and export.py read it as it is"
        )


def plain_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's state as contiguous CPU tensors: safetensors takes no channels_last."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}


def load_into(module: nn.Module, file: Path) -> None:
    """Copy saved weights into a module, keeping its memory format; ValueError names what does not fit."""
    try:
        module.load_state_dict(load_file(file))
    except RuntimeError as error:
        raise ValueError(f"{file} does not fit this --model.*: {error}") from error
