"""Checkpoints that a kill cannot spoil and that hold everything an exact resume needs.

checkpoints/step-00001234/
    model.safetensors, ema.safetensors, optimizer.safetensors     tensors, never pickled
    judge.safetensors                                             what decides which steps are skipped
    state.json                                                    progress and scalars
    config.yaml, provenance.json, dataset.json                    what made it
    checksums.json                                                SHA-256 of each; written last

A checkpoint is written under another name, flushed to disk and renamed, so that one that has its name is whole.
Training draws all its randomness from (seed, images seen), so no generator state needs saving.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vaetrain.command_line import parse
from vaetrain.config import Config
from vaetrain.files import fsync, sha256_of_file
from vaetrain.run import RunDirectory

FORMAT_VERSION = 1


@dataclass
class Progress:
    """How far a run is; the loop's only mutable state besides the tensors."""

    step: int = 0
    """Optimizer steps taken, skipped ones included."""
    images_seen: int = 0
    """Position in the training data, in images."""
    validated_at: int = 0
    """images_seen of the last validation."""
    best_score: float | None = None
    """Highest −(distortion + rate) on the validation set, nats per image: the ELBO of a VAE."""
    best_step: int | None = None
    """Step of the checkpoint with that score."""
    validations_without_best: int = 0
    """Validations since; early stopping counts them."""
    skipped_steps: int = 0
    """Steps that changed no weight, since their loss or gradient was not finite or exploded."""
    exploded_steps: int = 0
    """Those of them whose gradient was finite but far larger than of late."""
    sound_step: int = 0
    """The last step up to which a training record without a skipped step reached."""
    rollbacks: int = 0
    """Times that training went back to a checkpoint because it diverged."""
    lr_factor: float = 1.0
    """Factor on the learning rate, lowered when that happened."""

    def note_validation(self, score: float) -> None:
        """Remember a validation at the current position, and whether it is the best so far (NaN never is)."""
        self.validated_at = self.images_seen
        if self.best_score is None or score > self.best_score:
            self.best_score, self.best_step, self.validations_without_best = score, self.step, 0
        else:
            self.validations_without_best += 1


@runtime_checkable  # for the type checks of the tests
class Stateful(Protocol):
    """A few tensors of the training loop that an exact resume needs."""

    def state(self) -> dict[str, Tensor]:
        """Them by name; they are not written to afterwards."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned."""
        ...


class Checkpoints:
    """The checkpoints of one run: what they hold is named once, in the constructor; save and load mirror each other."""

    def __init__(
        self,
        run: RunDirectory,
        *,
        model: nn.Module,
        ema: nn.Module,
        optimizer: torch.optim.Optimizer,
        judge: Stateful,
        scaler: torch.amp.GradScaler | None = None,
        keep_last: int = 2,
    ) -> None:
        self.folder = run.checkpoints
        self.attachments = (run.config_file, run.provenance_file, run.dataset_file)
        self.model = model
        self.ema = ema
        self.optimizer = optimizer
        self.judge = judge
        self.scaler = scaler
        self.keep_last = keep_last

    def save(self, progress: Progress) -> Path:
        """Write a checkpoint and drop those no longer kept. For the main process alone."""
        target = self.folder / f"step-{progress.step:08d}"
        aside = self.folder / f".{target.name}.{os.getpid()}"
        aside.mkdir(parents=True)
        tensors, scalars = split_optimizer_state(self.optimizer)
        save_file(plain_tensors(self.model), aside / "model.safetensors")
        save_file(plain_tensors(self.ema), aside / "ema.safetensors")
        save_file(tensors, aside / "optimizer.safetensors")
        save_file({name: tensor.cpu() for name, tensor in self.judge.state().items()}, aside / "judge.safetensors")
        scaler = self.scaler.state_dict() if self.scaler is not None else None
        state = {"format_version": FORMAT_VERSION, "progress": asdict(progress), "optimizer": scalars, "scaler": scaler}
        (aside / "state.json").write_text(json.dumps(state, indent=2) + "\n")
        for file in self.attachments:
            shutil.copy(file, aside)
        checksums = {file.name: sha256_of_file(file) for file in sorted(aside.iterdir())}
        (aside / "checksums.json").write_text(json.dumps(checksums, indent=2) + "\n")
        for file in aside.iterdir():
            fsync(file)
        if target.exists():  # the same step saved again, after a resume from an older checkpoint
            shutil.rmtree(target)
        aside.rename(target)
        fsync(self.folder)
        self.drop_old(progress.best_step)
        return target

    def load(self, checkpoint: Path) -> Progress:
        """Restore everything from a checkpoint; raises ValueError when it is damaged or of another model."""
        check(checkpoint)
        state = json.loads((checkpoint / "state.json").read_text())
        load_into(self.model, checkpoint / "model.safetensors")
        load_into(self.ema, checkpoint / "ema.safetensors")
        restore_optimizer_state(self.optimizer, load_file(checkpoint / "optimizer.safetensors"), state["optimizer"])
        if (checkpoint / "judge.safetensors").is_file():  # not in those of version 0.1
            self.judge.load_state(load_file(checkpoint / "judge.safetensors"))
        if self.scaler is not None and state["scaler"] is not None:
            self.scaler.load_state_dict(state["scaler"])
        progress = Progress(**state["progress"])
        if checkpoint.parent != self.folder:  # another run's: its best checkpoint is not among ours
            progress.best_score = progress.best_step = None
            progress.validations_without_best = 0
        return progress

    def drop_old(self, best_step: int | None) -> None:
        """Delete all but the newest `keep_last` checkpoints and the best, and what killed saves left behind."""
        for leftover in self.folder.glob(".step-*"):
            shutil.rmtree(leftover)
        for checkpoint in list_checkpoints(self.folder)[: -self.keep_last]:
            if step_of(checkpoint) != best_step:
                shutil.rmtree(checkpoint)

    def drop_after(self, step: int) -> None:
        """Delete the checkpoints later than `step`: of a stretch of training that is given up."""
        for checkpoint in list_checkpoints(self.folder):
            if step_of(checkpoint) > step:
                shutil.rmtree(checkpoint)


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / "checksums.json").is_file())


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step-"))


def newest_good(folder: Path, *, up_to_step: int | None = None) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose checksums hold, and what is wrong with the newer ones that were passed over.

    Those later than `up_to_step` are not looked at.
    """
    damaged: list[str] = []
    for checkpoint in reversed(list_checkpoints(folder)):
        if up_to_step is not None and step_of(checkpoint) > up_to_step:
            continue
        try:
            check(checkpoint)
        except ValueError as error:
            damaged.append(str(error))
        else:
            return checkpoint, damaged
    return None, damaged


def resume_point(run: RunDirectory, config: Config, dataset: Mapping[str, Any]) -> Path | None:
    """The checkpoint a run starts from, None for a fresh start.

    The run directory's own newest good checkpoint comes first, then `--resume PATH`. Raises FileExistsError when there
    is one and `--resume never` was given, and ValueError when it is of another model, order of data or data set.
    """
    own, damaged = newest_good(run.checkpoints)
    for problem in damaged:
        print(f"warning: {problem}", file=sys.stderr)
    if own is not None and config.resume == "never":
        raise FileExistsError(
            f"{run.path} already holds a run ({own.name}); choose another --run-dir, or --resume auto"
        )
    checkpoint = own or (find(Path(config.resume)) if config.resume not in ("auto", "never") else None)
    if checkpoint is None:
        return None
    saved = parse(Config, None, ["--config", str(checkpoint / "config.yaml")])
    fixed: list[tuple[str, Any, Any]] = [
        ("--model.*", saved.model, config.model),
        ("--seed", saved.seed, config.seed),
        ("--train.global-batch-size", saved.train.global_batch_size, config.train.global_batch_size),
        ("--data.classes", saved.data.classes, config.data.classes),
        (
            "--data.train (fingerprint)",
            json.loads((checkpoint / "dataset.json").read_text())["train"]["fingerprint"],
            dataset["train"]["fingerprint"],
        ),
    ]
    for flag, before, now in fixed:
        if before != now:
            raise ValueError(
                f"{checkpoint} was trained with {flag} {before}, now it is {now}; resuming would not continue that run. "
                "Use the saved value, or another --run-dir for a new run"
            )
    return checkpoint


def find(path: Path) -> Path:
    """The checkpoint that `path` names: itself, or the newest good one of a run directory."""
    if (path / "state.json").is_file():
        return path
    checkpoint, damaged = newest_good(path / "checkpoints")
    if checkpoint is None:
        raise FileNotFoundError("; ".join([f"{path} is neither a checkpoint nor a run that has a good one", *damaged]))
    return checkpoint


def best(run: Path) -> Path:
    """The checkpoint of a run with the best validation score, or the newest where none is marked."""
    newest = find(run)
    best_step = json.loads((newest / "state.json").read_text())["progress"]["best_step"]
    if best_step is None:
        return newest
    checkpoint = run / "checkpoints" / f"step-{best_step:08d}"
    check(checkpoint)
    return checkpoint


def check(checkpoint: Path) -> None:
    """Compare every file with its checksum; ValueError names the file that differs and what to do."""
    try:
        checksums: dict[str, str] = json.loads((checkpoint / "checksums.json").read_text())
        version = json.loads((checkpoint / "state.json").read_text())["format_version"]
    except (FileNotFoundError, json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"{checkpoint} is not a whole checkpoint ({error}); use an older one") from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{checkpoint} has format {version}, this vaetrain reads {FORMAT_VERSION}; use the version in its provenance.json"
        )
    for name, expected in checksums.items():
        file = checkpoint / name
        if not file.is_file() or sha256_of_file(file) != expected:
            raise ValueError(f"{file} is damaged (its checksum differs); use an older checkpoint")


def plain_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's state as contiguous CPU tensors: safetensors takes no channels_last."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}


def load_into(module: nn.Module, file: Path) -> None:
    """Copy saved weights into a module, keeping its memory format; ValueError names what does not fit."""
    try:
        module.load_state_dict(load_file(file))
    except RuntimeError as error:
        raise ValueError(f"{file} does not fit this --model.*: {error}") from error


def split_optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """An optimizer's state as tensors named "PARAMETER.STATE" and its groups' scalars."""
    state = optimizer.state_dict()
    tensors = {
        f"{index}.{name}": value.detach().cpu().contiguous()
        for index, values in state["state"].items()
        for name, value in values.items()
    }
    # The learning rate is a function of images seen and is set anew each step.
    groups = [{key: value for key, value in group.items() if key != "lr"} for group in state["param_groups"]]
    return tensors, groups


def restore_optimizer_state(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], groups: list[dict[str, Any]]
) -> None:
    """Inverse of `split_optimizer_state`; moments take the memory format of their parameter, as in the run that saved them."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        parameter = parameters[int(index)]
        like_parameter = torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value
        state.setdefault(int(index), {})[key] = like_parameter.detach()
    current = optimizer.state_dict()["param_groups"]
    merged = [{**now, **saved, "lr": now["lr"]} for now, saved in zip(current, groups, strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": merged})
