"""Numbers and pictures on their way out of training: to the terminal, metrics.jsonl, W&B and TensorBoard."""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypedDict, runtime_checkable

import numpy as np
from accelerate import Accelerator

from vaetrain.command_line import flatten, plain
from vaetrain.config import TrainingConfig
from vaetrain.distributed.processes import in_use
from vaetrain.documents import read_json
from vaetrain.files import inside
from vaetrain.progress_bar import ProgressBar
from vaetrain.runs.directory import RunDirectory, write_json
from vaetrain.training.meters import LogWindow
from vaetrain.training.noise_scale import NoiseScale
from vaetrain.training.progress import Progress
from vaetrain.training.throughput import peak_flops


class WandbRun(TypedDict):
    """Of a run at Weights & Biases."""

    id: str


class Trackers(TypedDict):
    """trackers.json."""

    wandb: WandbRun


@runtime_checkable  # for the type checks of the tests
class Scores(Protocol):
    """What a validation found."""

    @property
    def record(self) -> dict[str, float | None]:
        """By name."""
        ...

    @property
    def in_words(self) -> str:
        """For the terminal."""
        ...


class RunLogger:
    """Where records and pictures go: metrics.jsonl and the terminal always, W&B and TensorBoard when asked for.

    Every process may call the log methods; only the main process writes.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        run: RunDirectory,
        config: TrainingConfig,
        *,
        step: int,
        images_seen: int,
        total_images: int,
        images_per_epoch: int,
        dataset_fingerprint: str,
        flops_per_image: Callable[[], float],
        unit: str,
        small_batch_size: int | None = None,
    ) -> None:
        """`unit` is that of the loss, and `flops_per_image` asked where the device's peak is known.

        `small_batch_size`: images behind the meter small_grad_sq, for the noise scale, simple and Adam's."""
        self.accelerator = accelerator
        self.run = run
        self.images_per_epoch = images_per_epoch
        peak = peak_flops(accelerator.device, in_use(accelerator))
        self.mfu_per_image_per_s = flops_per_image() / peak / accelerator.num_processes if peak else None
        self.unit = unit
        self.bar = ProgressBar(
            "training", total_images, done=images_seen, quiet=not accelerator.is_main_process,
            write=partial(print, flush=True),
        )  # fmt: skip
        self.global_batch_size = config.train.global_batch_size
        self.small_batch_size = small_batch_size
        with _wandb_errors(config.log.wandb):
            self._start_trackers(accelerator, run, config, dataset_fingerprint, step)

    def _start_trackers(
        self, accelerator: Accelerator, run: RunDirectory, config: TrainingConfig, dataset_fingerprint: str, step: int
    ) -> None:
        if accelerator.log_with:
            for folder in ("wandb", config.log.wandb_project):  # where the trackers write
                inside(run.path, folder)
            accelerator.init_trackers(
                config.log.wandb_project,
                config=hyper_parameters(config) | {"dataset_fingerprint": dataset_fingerprint},
                init_kwargs={
                    "wandb": {
                        "mode": config.log.wandb, "dir": str(run.path), "name": run.path.name,
                        "id": wandb_id(run) if accelerator.is_main_process and config.log.wandb != "disabled" else None,
                        # Go on with the run of that id, if W&B has it; it drops steps that it knows. Offline it is not asked.
                        "resume": "allow" if config.log.wandb == "online" else None,
                    },
                    "tensorboard": {"purge_step": step + 1},  # hides what a killed process logged after its checkpoint
                },
            )  # fmt: skip

    def log_training(
        self,
        progress: Progress,
        window: LogWindow,
        performance: Mapping[str, float],
        *,
        lr: float,
        **weights: float,
    ) -> None:
        """One record of split "train": means since the last, the schedules' values now, and speed."""
        speed = performance["perf/images_per_s"]
        record = {f"train/{name}": value for name, value in window.means.items()} | {
            **{f"train/{name}": value for name, value in weights.items()},
            "train/lr": lr,
            "train/skipped_steps": window.skipped_steps,
            "train/exploded_steps": window.exploded_steps,
            **performance,
            "perf/mfu": speed * self.mfu_per_image_per_s if self.mfu_per_image_per_s else None,
        }
        if self.small_batch_size is not None:
            for kind in ("", "adam_"):
                small_sq, big_sq = window.means[f"{kind}small_grad_sq"], window.means[f"{kind}grad_sq"]
                if small_sq is not None and big_sq is not None:
                    scale = NoiseScale.of([small_sq], [big_sq], self.small_batch_size, self.global_batch_size)
                    record[f"train/{kind}noise_scale_images"] = scale.images
        self.write("train", progress, record)
        loss = window.means["loss"]
        if loss is None:
            loss_text = "loss not finite"
        else:
            loss_text = f"loss {loss:,.5g} {self.unit}" if abs(loss) < 10 else f"loss {loss:,.1f} {self.unit}"
        self.bar.noted(f"step {progress.step:,}, {loss_text}")

    def log_validation(self, progress: Progress, **scores: Scores) -> None:
        """One record of split "val": each keyword becomes a prefix of its scores' names."""
        record = {f"{prefix}/{name}": value for prefix, group in scores.items() for name, value in group.record.items()}
        self.write("val", progress, record)
        epoch = progress.images_seen / self.images_per_epoch
        self.bar.say(f"epoch {epoch:g}  validation  {scores['val'].in_words}")

    def log_divergence(self, progress: Progress, reason: str) -> None:
        """One record of split "event": training stops here for good."""
        self.write("event", progress, {"event": "diverged", "from_step": progress.step, "reason": reason})

    def log_missing_rollback(self, progress: Progress) -> None:
        """Make up, on a resume, for the record of a rollback that a kill kept from being written."""
        logged = sum(record.get("event") == "rollback" for record in self.run.metrics())
        if self.accelerator.is_main_process and logged < progress.rollbacks:
            event = {"event": "rollback", "from_step": None, "to_step": progress.step, "lr_factor": progress.lr_factor}
            reason = "killed before it could be written why; this was written by the resume"
            self.write("event", progress, event | {"reason": reason})

    def log_rollback(self, from_step: int, restored: Progress, reason: str) -> None:
        """One record of split "event", in place of the records after the step that training goes back to."""
        if self.accelerator.is_main_process:
            self.run.drop_metrics_after(restored.step, restored.validated_at)
        event = {"event": "rollback", "from_step": from_step, "to_step": restored.step, "reason": reason}
        self.write("event", restored, event | {"lr_factor": restored.lr_factor})
        self.bar.moved_to(restored.images_seen)
        self.bar.say(
            f"rolled back from step {from_step:,} to {restored.step:,}, learning rates × {restored.lr_factor:g}: {reason}"
        )

    def say_end(self, progress: Progress, why_stopped: str | None) -> None:
        """The last line: where the run is, or how to go on with one that was stopped."""
        self.bar.close()
        end = f"run written to {self.run.path}"
        if why_stopped is not None:
            end = f"saved and stopped by {why_stopped}; the same command goes on from here"
        if self.accelerator.is_main_process:
            print(f"{progress.images_seen:,} images trained; {end}")

    def write(self, split: str, progress: Progress, record: Mapping[str, Any]) -> None:
        """Append to metrics.jsonl and send the numbers to the trackers; NaN and infinity become null."""
        place = {
            "step": progress.step,
            "images_seen": progress.images_seen,
            "epoch": round(progress.images_seen / self.images_per_epoch, 6),
            "split": split,
        }
        record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        if self.accelerator.is_main_process:
            self.run.append_metrics(place | record)
        numbers = {key: value for key, value in (place | record).items() if isinstance(value, int | float)}
        self.accelerator.log(numbers, step=progress.step)

    def log_picture(self, name: str, file: Path, step: int) -> None:
        """Send a PNG of the run to the trackers that show images."""
        if not self.accelerator.is_main_process or not self.accelerator.trackers:
            return
        from PIL import Image

        with Image.open(file) as image:
            pixels = np.asarray(image.convert("RGB"))
        for logger in self.accelerator.trackers:
            layout = {"dataformats": "NHWC"} if logger.name == "tensorboard" else {}
            logger.log_images({name: pixels[None]}, step=step, **layout)


@contextmanager
def _wandb_errors(mode: str) -> Iterator[None]:
    """Turn what W&B refuses (a project of others, a server that left) into one line."""
    if mode == "disabled":
        yield
        return
    from wandb import errors

    try:
        yield
    except errors.Error as error:
        raise ValueError(f"--log.wandb {mode}: {error}; --log.wandb offline goes on without the server") from error


def wandb_id(run: RunDirectory) -> str:
    """The id of the run at W&B, kept in trackers.json: what a sweep's agent says, or made up; for the main process alone."""
    file = run.trackers_file
    if not file.is_file():
        write_json(file, {"wandb": {"id": os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)}})
    trackers = read_json(file, Trackers, remedy="delete it to have the run listed anew")
    return str(trackers["wandb"]["id"])


def hyper_parameters(config: TrainingConfig) -> dict[str, Any]:
    """A config as section.key → number or string: all that TensorBoard takes."""
    return {key: value if isinstance(value, int | float | str) else str(value) for key, value in flatten(plain(config))}
