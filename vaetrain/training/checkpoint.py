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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
from vaetrain.documents import read_json, shorten
from vaetrain.files import NewerFormatError, create, fresh_name, fsync, inside, sha256_of_file
from vaetrain.model.autoencoder import VAE
from vaetrain.model.config import ModelConfig
from vaetrain.runs.checkpoint_names import (
    has_checkpoint_name,
    has_checksums,
    is_checkpoint,
    list_checkpoints,
    no_good_checkpoint,
    step_of,
)
from vaetrain.runs.directory import RunDirectory
from vaetrain.runs.provenance import package_version
from vaetrain.runs.recorded import SavedState
from vaetrain.strict_json import from_json
from vaetrain.training.async_writer import SnapshotWriter, Tensors
from vaetrain.training.optimizer import restore_optimizer_state, split_optimizer_state
from vaetrain.training.progress import Progress
from vaetrain.training.retention import Retention, put_in_place

FORMAT_VERSION = 3
"""Weights of 1 (no meters.safetensors, no version of vaetrain in state.json) and 2 (noise of whole global batches) are read;
training does not go on from them (`check_resumable`)."""

REMEDY = "use an older checkpoint, or bring this one back from a copy"


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
        state, progress = read_state(checkpoint), read_progress(checkpoint)
        load_into(self.model, checkpoint / "model.safetensors")
        load_into(self.ema, checkpoint / "ema.safetensors")
        moments = checkpoint / "optimizer.safetensors"
        with naming(moments):
            restore_optimizer_state(self.optimizer, read_tensors(moments), state["optimizer"])
        if self.scaler is not None and state.get("scaler") is not None:
            with naming(checkpoint / "state.json"):
                self.scaler.load_state_dict(state["scaler"])
        for stateful, name in ((self.meters, "meters"), (self.spikes, "judge")):
            with naming(checkpoint / f"{name}.safetensors"):
                stateful.load_state_dict(read_tensors(checkpoint / f"{name}.safetensors"))
        # A checkpoint without one is of a training without it, and it begins anew.
        if self.adversary is not None and (file := checkpoint / "adversary.safetensors").is_file():
            with naming(file):
                self.adversary.load_state_dict(read_tensors(file))
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
        aside = fresh_name(target)
        file = aside
        try:
            aside.mkdir(parents=True)
            for name, group in tensors.items():
                file = aside / f"{name}.safetensors"
                save_file(dict(group), file)
            file = aside / "state.json"
            write_text(file, state + "\n")
            for attachment in (self.run.config_file, self.run.provenance_file, self.run.dataset_file):
                file = aside / attachment.name
                shutil.copy(attachment, file)
            checksums = {path.name: sha256_of_file(path) for path in sorted(aside.iterdir())}
            file = aside / "checksums.json"
            write_text(file, json.dumps(checksums, indent=2) + "\n")
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

    Those later than `up_to_step` are not looked at. Two kinds are not passed over, since an older one would throw their training
    away: NewerFormatError for one that another vaetrain can read, ValueError for one whose checksums were taken away.
    """
    damaged: list[str] = []
    for checkpoint in reversed(list_checkpoints(folder)):
        if up_to_step is not None and step_of(checkpoint) > up_to_step:
            continue
        if not has_checksums(checkpoint):
            raise ValueError(
                f"{checkpoint} is damaged: it has no checksums.json, without which nothing ever gets its name; bring that back "
                "from a copy, or delete the whole folder to go on without it"
            )
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
    checkpoint, damaged = newest_good(inside(path, "checkpoints"))
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
    best_step = read_state(newest)["progress"]["best_step"]
    if best_step is None:
        return newest
    if best_step < 0:
        raise ValueError(f"{newest / 'state.json'} is damaged: best_step is {best_step}; {REMEDY}")
    checkpoint = inside(run, "checkpoints", f"step-{best_step:08d}")
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
    checksums = read_checksums(checkpoint)
    for name in ("state.json", *checksums):
        file = inside(checkpoint, name)
        if not file.is_file() or sha256_of_file(file) != checksums.get(name):
            raise ValueError(f"{file} is damaged (its checksum differs); use an older checkpoint")
    state = read_json(
        checkpoint / "state.json", remedy=REMEDY, nulls=True
    )  # of a later format other keys may be wanted
    version = state.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise NewerFormatError(
            f"{checkpoint} has format {version}, and this vaetrain ({package_version('vaetrain')}) reads up "
            f"to {FORMAT_VERSION}; use vaetrain {state.get('vaetrain')}, which wrote it, or a later one"
        )
    read_state(checkpoint)


def read_checksums(checkpoint: Path) -> dict[str, str]:
    """SHA-256 by name of each file of a checkpoint; ValueError where that cannot be had."""
    try:
        checksums: dict[str, str] = read_json(inside(checkpoint, "checksums.json"), dict[str, str], remedy=REMEDY)
    except (OSError, ValueError) as error:
        raise ValueError(f"{checkpoint} is not a whole checkpoint ({error})") from error
    return checksums


def read_state(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's state.json; raises FileNotFoundError, and ValueError naming it and what is wrong."""
    state: dict[str, Any] = read_json(inside(checkpoint, "state.json"), SavedState, remedy=REMEDY, nulls=True)
    return state


def read_progress(checkpoint: Path) -> Progress:
    """How far training was; raises ValueError where that cannot be."""
    file = checkpoint / "state.json"
    with naming(file):
        progress: Progress = from_json(Progress, asdict(Progress()) | read_state(checkpoint)["progress"], "progress")
        for name, value in asdict(progress).items():
            if isinstance(value, int) and not 0 <= value < 2**62:
                raise ValueError(f"progress.{name} is {value}")
        if has_checkpoint_name(checkpoint) and progress.step != step_of(checkpoint):
            raise ValueError(f"progress.step is {progress.step}")
        if not 0 < progress.lr_factor <= 1:
            raise ValueError(f"progress.lr_factor is {progress.lr_factor}")
    return progress


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Inside, whatever does not fit is `file`'s fault: a ValueError that names it."""
    try:
        yield
    except (ValueError, RuntimeError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        said = str(error)
        if isinstance(error, ValueError) and said.startswith(str(file)):
            raise
        raise ValueError(f"{file} is damaged: {shorten(said, 500)}; {REMEDY}") from error


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; raises FileNotFoundError, and ValueError naming it and what is wrong."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; {REMEDY}")
    with naming(file):
        return load_file(file)


def check_resumable(checkpoint: Path) -> None:
    """Refuse, with ValueError, to go on from a checkpoint of an older format: its training drew other noise."""
    state = read_state(checkpoint)
    if state["format_version"] < FORMAT_VERSION:
        writer = state.get("vaetrain") or f"of the git revision in {checkpoint / 'provenance.json'}"
        raise ValueError(
            f"{checkpoint} has format {state['format_version']}, in which noise was drawn otherwise, so that going on would be "
            f"another training; go on with vaetrain {writer}, which wrote it, or begin a new run with its weights: "
            f"--init-from {checkpoint} --run-dir NEW. evaluate.py, sample.py and export.py read it as it is"
        )


def write_text(file: Path, text: str) -> None:
    """Write a new file."""
    with create(file) as opened:
        opened.write(text.encode())


def plain_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's state as contiguous CPU tensors: safetensors takes no channels_last."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}


def load_into(module: nn.Module, file: Path) -> None:
    """Copy saved weights into a module, keeping its memory format; ValueError names what does not fit, or is not finite."""
    tensors = read_tensors(file)
    check_fits(tensors, module.state_dict(), file)
    module.load_state_dict(tensors)


def load_vae(config: ModelConfig, file: Path) -> VAE:
    """A VAE with the weights of a file; ValueError before anything is built that the file has no weights for."""
    tensors = read_tensors(file)
    with torch.device("meta"):
        check_fits(tensors, VAE(config).state_dict(), file)
    vae = VAE(config)
    vae.load_state_dict(tensors)
    return vae


def check_fits(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], file: Path) -> None:
    """Raise ValueError, naming the first of them, for tensors that are not those of a model."""
    problem = ""
    if different := sorted(tensors.keys() ^ wanted.keys()):
        problem = f"{'it lacks' if different[0] in wanted else 'it alone has'} {shorten(different[0])}"
    for name in tensors.keys() & wanted.keys():
        found, expected = tensors[name], wanted[name]
        if found.shape != expected.shape or found.dtype != expected.dtype:
            problem = f"{name} is {found.dtype} of shape {tuple(found.shape)}, not {expected.dtype} of {tuple(expected.shape)}"
    if problem:
        raise ValueError(f"{file} does not fit this --model.*: {problem}; {REMEDY}")
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{file} is damaged: {name} has values that are not finite; {REMEDY}")
