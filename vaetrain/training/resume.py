"""Where a training starts: its own run directory, `--resume PATH`, `--init-from PATH`, or from nothing, in this order."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

from vaetrain.command_line import read_config
from vaetrain.config import CompileMode, PrecisionName, TrainConfig, TrainingConfig
from vaetrain.data.readers.read_order import ReadOrder
from vaetrain.documents import read_json, read_yaml
from vaetrain.files import sha256_of_file
from vaetrain.interchange.diffusers_config import WEIGHTS_FILE, check_fits, is_diffusers_folder
from vaetrain.interchange.diffusers_weights import load_diffusers
from vaetrain.model.autoencoder import VAE
from vaetrain.runs.checkpoint_names import list_checkpoints
from vaetrain.runs.directory import REMEDY, RunDirectory, read_dataset
from vaetrain.runs.recorded import Provenance
from vaetrain.strict_json import from_json
from vaetrain.training.checkpoint import (
    best,
    check,
    check_resumable,
    find,
    load_into,
    naming,
    newest_good,
    read_progress,
    read_state,
    warn_of_damage,
)


def resume_point(
    run: RunDirectory,
    config: TrainingConfig,
    dataset: Mapping[str, Any],
    reading: ReadOrder,
    images_per_epoch: int,
    loss_terms: Mapping[str, Mapping[str, str]],
) -> Path | None:
    """The checkpoint a run goes on from, None where there is none: its own newest good one, then that of `--resume PATH`.

    `loss_terms` is what those beyond the ELBO are made of (`LossTerm.made_of`), by name. Warns of damaged checkpoints on stderr.
    Raises FileExistsError when there is one and `--resume never` was given, and ValueError when it is of another model, order of
    data (`check_reading` too), data set or files of a loss term, when all checkpoints are damaged, or when a later or much earlier
    vaetrain wrote them.
    """
    run.check_format()
    run.check_resume(config.resume)
    own, damaged = newest_good(run.checkpoints)
    warn_of_damage(damaged, own)
    if own is None and damaged:
        raise ValueError(
            f"{run.path} holds a run and none of its checkpoints is good; delete {run.checkpoints} to train from the "
            "start again, or choose another --run-dir"
        )
    checkpoint = own
    if own is None and config.resume not in ("auto", "never"):
        checkpoint = find(Path(config.resume))
        check(checkpoint)
    if checkpoint is None:
        return None
    check_resumable(checkpoint)
    copied = RunDirectory(checkpoint)  # a checkpoint has files of the same names
    saved = read_config(type(config), copied.config_file)
    data = "--data.train (fingerprint)"
    then = saved.fixed() | {data: read_dataset(copied.dataset_file)["train"]["fingerprint"]}
    for flag, now in (config.fixed() | {data: dataset["train"]["fingerprint"]}).items():
        if (before := then[flag]) != now:
            raise ValueError(
                f"{checkpoint} was trained with {flag} {before}, now it is {now}; resuming would not continue that run. "
                "Use the saved value, or another --run-dir for a new run"
            )
    progress = read_progress(checkpoint)
    if progress.images_seen != progress.step * saved.train.global_batch_size:
        raise ValueError(
            f"{checkpoint / 'state.json'} is damaged: {progress.images_seen:,} images are not those of {progress.step:,} steps of "
            f"{saved.train.global_batch_size}; use an older checkpoint, or bring this one back from a copy"
        )
    check_reading(checkpoint, reading, images_per_epoch)
    check_loss_terms(checkpoint, loss_terms)
    return checkpoint


def recorded_precision(config: TrainingConfig) -> PrecisionName | None:
    """The arithmetic of the run that `config` would go on with; None where there is none, or nothing that can be read yet."""
    name = recorded(config, "precision")
    return name if name in get_args(PrecisionName) else None


def recorded_compile(config: TrainingConfig) -> CompileMode | bool | None:
    """The same of how its model was compiled, False if it was not."""
    mode = recorded(config, "compile")
    return "default" if mode is True else mode if mode is False or mode in get_args(CompileMode) else None


def recorded(config: TrainingConfig, name: str) -> Any:
    """What the run that `config` would go on with has for `--train.NAME`, None where there is nothing that can be read yet."""
    # What cannot be read is found, and said, by `resume_point`.
    with suppress(OSError, ValueError, KeyError, TypeError):
        own = list_checkpoints(RunDirectory(config.run_dir).checkpoints)
        checkpoint = own[-1] if own else None
        if checkpoint is None and config.resume not in ("auto", "never"):
            checkpoint = find(Path(config.resume))
        if checkpoint is not None:
            return read_yaml(RunDirectory(checkpoint).config_file, remedy=REMEDY)["train"][name]
    return None


def check_reading(checkpoint: Path, reading: ReadOrder, images_per_epoch: int) -> None:
    """Refuse, with ValueError, to go on in the middle of an epoch in another order: it would repeat images and leave others out."""
    saved = read_state(checkpoint).get("reading")  # None: written before it was recorded
    within_epoch = read_progress(checkpoint).images_seen % images_per_epoch
    if saved is None or not within_epoch:
        return
    with naming(checkpoint / "state.json"):
        before: ReadOrder = from_json(ReadOrder, saved, "reading")
    if reading.is_resumable_from(before):
        return
    raise ValueError(
        f"{checkpoint} lies {within_epoch:,} images into an epoch that was read with {before}; with {reading} the rest of it "
        "would repeat some images and leave others out. Use the saved values, or go on from a checkpoint at the end of an "
        "epoch (every validation has one)"
    )


def check_loss_terms(checkpoint: Path, loss_terms: Mapping[str, Mapping[str, str]]) -> None:
    """Refuse, with ValueError, to go on with other files or another network behind a loss term.

    Its weight may change, as β may, to 0 and from it.
    """
    saved = read_state(checkpoint).get("loss_terms", {})
    for term in saved.keys() & loss_terms.keys():
        for name, before in saved[term].items():
            if before != (now := loss_terms[term].get(name)):
                option = f"--objective.{term}.{name.removesuffix('_sha256')}"
                kind, of = ("file", "of SHA-256 ") if name.endswith("_sha256") else ("value", "")
                raise ValueError(
                    f"{checkpoint} was trained with {option} {of}{before}, now it is {now}; resuming would not continue that run. "
                    f"Use the same {kind}, or another --run-dir for a new run"
                )


def origin(run: RunDirectory, config: TrainingConfig, resumed_from: Path | None) -> dict[str, Any]:
    """For provenance: the checkpoint or weights a start goes on from and, where those are another run's, who made them."""
    if resumed_from is not None:
        facts: dict[str, Any] = {"resumed_from": str(resumed_from)}
        return facts if resumed_from.parent == run.checkpoints else facts | {"parent": made_by(resumed_from)}
    if config.init_from is not None:
        source = weights_of(config.init_from)
        return {
            "init_from": str(source),
            "init_from_sha256": sha256_of_file(weights_file(source, average=starts_from_average(config))),
            "parent": made_by(source),
        }
    return {}


def starts_from_average(config: TrainingConfig) -> bool:
    """Whether `--init-from` takes the averages alone, so that a part that is frozen is the one that is exported."""
    return isinstance(config.train, TrainConfig) and config.train.only != "all"


def made_by(source: Path) -> dict[str, Any] | None:
    """The provenance inside a checkpoint or an export; None for one that has none."""
    file = source / "provenance.json"
    if not file.is_file():
        return None
    kind = Provenance if (source / "state.json").is_file() else dict
    made: dict[str, Any] = read_json(file, kind, remedy=REMEDY)
    return made


def weights_of(source: Path) -> Path:
    """The checkpoint or export whose weights `--init-from` takes: of a run its best checkpoint."""
    whole = any((source / name).is_file() for name in ("config.json", "state.json"))
    return source if whole else best(source)


def weights_file(source: Path, *, average: bool) -> Path:
    """The file of what `weights_of` returned; of a checkpoint the averaged weights or the raw ones. Others have one."""
    if is_diffusers_folder(source):
        return source / WEIGHTS_FILE
    is_checkpoint = (source / "state.json").is_file()
    return source / ("ema.safetensors" if average and is_checkpoint else "model.safetensors")


def load_weights(source: Path, model: VAE, ema: VAE, *, average_only: bool = False) -> None:
    """Start from the weights of a run (its best checkpoint), a checkpoint, an export, or a diffusers VAE.

    The last two have one set, for model and average; of the last the likelihood's own parameters stay as they are.
    `average_only`: of the others too both take the averages, so that a part that is frozen is the one that is exported.
    Raises FileNotFoundError when `source` is none of them, ValueError when it is damaged or does not fit the model.
    """
    if is_diffusers_folder(source):
        check_fits(source, model.config)
        for vae in (model, ema):
            load_diffusers(vae, source)
        return
    source = weights_of(source)
    if (source / "state.json").is_file():
        check(source)
    load_into(model, weights_file(source, average=average_only))
    load_into(ema, weights_file(source, average=True))
