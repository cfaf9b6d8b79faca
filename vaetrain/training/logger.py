"""Numbers on their way out of the training loop: summed on the device, written to metrics.jsonl and to trackers."""

from __future__ import annotations

import ctypes
import json
import math
import os
import re
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vaetrain.command_line import plain
from vaetrain.config import Config
from vaetrain.distributed.processes import max_over_processes, sum_over_processes
from vaetrain.metrics.validation import ValidationScores
from vaetrain.model.autoencoder import VAE
from vaetrain.progress_bar import ProgressBar
from vaetrain.runs.directory import RunDirectory, write_json
from vaetrain.training.checkpoint import Progress
from vaetrain.training.noise_scale import NoiseScale

PEAK_FLOPS = {  # dense, per second, from the vendors' data sheets: (fp32 outside tensor cores, bf16 and fp16)
    "H200": (67e12, 989e12),
    "H100": (67e12, 989e12),
    "A100": (19.5e12, 312e12),
    "L40S": (91.6e12, 362e12),
    "L4": (30.3e12, 121e12),
    "V100": (15.7e12, 125e12),
    "T4": (8.1e12, 65e12),
}


@dataclass(frozen=True)
class Interval:
    """What happened since the last training record, over all processes."""

    means: dict[str, float | None]
    """Mean per image of each meter, over the steps that were not skipped; None if all were."""
    skipped_steps: int
    """Steps whose loss or gradient was not finite, or whose gradient exploded."""
    exploded_steps: int
    """Those of them whose gradient was finite."""
    longest_streak: int
    """The most steps in a row that were skipped, counted from before the interval."""
    running_streak: int
    """The steps in a row that were skipped up to its end, 0 where the last one was not."""


class Meters:
    """Sums that stay on the device until `fetch` brings them all to the host in one synchronisation."""

    def __init__(self, names: tuple[str, ...], device: torch.device) -> None:
        self.names = names
        self.sums = torch.zeros(len(names) + 3, dtype=torch.float64, device=device)
        self.streak = torch.zeros((), dtype=torch.float64, device=device)
        self.longest = torch.zeros_like(self.streak)
        self.columns = (*names, "num_images", "skipped_steps", "exploded_steps", "streak", "longest_streak")

    def add(self, num_images: int, skipped: Float[Tensor, ""], exploded: Float[Tensor, ""], **totals: Tensor) -> None:
        """Add a step: totals over this process's `num_images`, which a skipped step (1 on the device) leaves out."""
        values = [totals[name].detach().double() for name in self.names]
        row = torch.stack([*values, torch.full_like(self.streak, num_images)])
        self.sums[:-2] += torch.where(skipped.bool(), 0.0, row)
        self.sums[-2:] += torch.stack([skipped, exploded])
        self.streak = (self.streak + 1) * skipped
        self.longest = torch.maximum(self.longest, self.streak)

    def fetch(self, accelerator: Accelerator) -> Interval:
        """The interval that ends now; start the next. A collective and a synchronisation with the device."""
        # The streak is the same on every process, so its sum is too.
        everything = sum_over_processes(
            accelerator, torch.cat([self.sums, self.streak[None], self.longest[None]])
        ).tolist()
        *totals, num_images, skipped_steps, exploded_steps, streak, longest = everything
        self.sums.zero_()
        self.longest = self.streak
        return Interval(
            means={
                name: total / num_images if num_images else None for name, total in zip(self.names, totals, strict=True)
            },
            skipped_steps=round(skipped_steps / accelerator.num_processes),
            exploded_steps=round(exploded_steps / accelerator.num_processes),
            longest_streak=round(longest / accelerator.num_processes),
            running_streak=round(streak / accelerator.num_processes),
        )

    def reset(self) -> None:
        """Forget everything, the running streak of skipped steps too."""
        self.sums, self.streak, self.longest = map(torch.zeros_like, (self.sums, self.streak, self.longest))

    def state(self, accelerator: Accelerator) -> dict[str, Float[Tensor, " processes"]]:
        """Every sum of the running interval as every process has it; a collective."""
        row = torch.cat([self.sums, self.streak[None], self.longest[None]])
        return dict(zip(self.columns, accelerator.gather(row[None]).T, strict=True))

    def restore(self, saved: Mapping[str, Tensor], accelerator: Accelerator) -> None:
        """Go on with the interval of `state`; on another number of processes the main one has all totals."""
        if saved.keys() != set(self.columns):  # --log.noise-scale was changed: the interval begins anew
            return
        rows = torch.stack([saved[name] for name in self.columns], dim=1).to(self.sums)
        if len(rows) == accelerator.num_processes:
            row = rows[accelerator.process_index]
        else:
            totals = rows[:, : len(self.names) + 1].sum(0)
            # Steps are skipped by all processes together: those counts are the same in every row.
            row = torch.cat([totals * accelerator.is_main_process, rows[0, len(totals) :]])
        self.sums, self.streak, self.longest = row[:-2].clone(), row[-2].clone(), row[-1].clone()


class Stopwatch:
    """Wall-clock time between training records, less pauses, and the part of it spent waiting for data."""

    def __init__(self, images_seen: int) -> None:
        self.images_seen = images_seen
        self.started = time.perf_counter()
        self.data_wait = 0.0

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        start = time.perf_counter()
        yield
        self.data_wait += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside out: validation, pictures and checkpoints are no training."""
        start = time.perf_counter()
        yield
        self.started += time.perf_counter() - start

    def lap(self, accelerator: Accelerator, images_seen: int) -> dict[str, float]:
        """Speed and memory since the last lap, over all processes; start the next. A collective."""
        elapsed = time.perf_counter() - self.started
        images_per_s = (images_seen - self.images_seen) / elapsed
        memory = torch.cuda.max_memory_allocated() / 2**30 if accelerator.device.type == "cuda" else peak_rss_gib()
        # The slowest process sets the pace of all: its wait is the one that counts.
        wait, memory = max_over_processes(accelerator, [self.data_wait / elapsed, memory])
        self.images_seen, self.started, self.data_wait = images_seen, time.perf_counter(), 0.0
        return {"perf/images_per_s": images_per_s, "perf/data_wait_frac": wait, "perf/peak_memory_gib": memory}


def peak_rss_gib() -> float:
    """Largest resident memory of this process so far, on Linux since `forget_peak_rss`, in GiB."""
    status = Path("/proc/self/status")
    # Linux's ru_maxrss would count what the process was before it became this program, too.
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) / 2**20
    import resource  # not on Windows, where nobody trains on the CPU in earnest

    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def forget_peak_rss() -> bool:
    """Give free memory back to the system and let `peak_rss_gib` count from here; False where a process cannot (not Linux)."""
    with suppress(AttributeError, OSError, TypeError):  # only glibc has it: elsewhere the peak is a little higher
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # see proc_pid_clear_refs(5)
    except OSError:
        return False
    return True


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak dense operations per second of the device, None where we have no data sheet (any CPU, an unknown GPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for key, (fp32, half) in PEAK_FLOPS.items():
        if key in name.replace("-", " ").split():
            return fp32 if precision == "fp32" else half
    return None


def training_flops_per_image(vae: VAE) -> float:
    """Floating-point operations of one image's forward and backward pass, matrix products and convolutions only."""
    with torch.device("meta"):
        model = VAE(vae.config)
        config = vae.config
        x = torch.empty(1, config.in_channels, config.image_size, config.image_size)
        noise = torch.empty(1, *config.latent_shape)
    with FlopCounterMode(display=False) as counter:
        terms = model(x, noise)
        (terms.distortion + terms.kl.sum()).sum().backward()
    return float(counter.get_total_flops())


class Tracker:
    """Where records and pictures go: metrics.jsonl and the terminal always, W&B and TensorBoard when asked for.

    Every process may call the log methods; only the main process writes.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        run: RunDirectory,
        config: Config,
        vae: VAE,
        *,
        step: int,
        images_seen: int,
        total_images: int,
        images_per_epoch: int,
        dataset_fingerprint: str,
    ) -> None:
        self.accelerator = accelerator
        self.run = run
        self.images_per_epoch = images_per_epoch
        peak = peak_flops(accelerator.device, config.train.precision)
        self.mfu_per_image_per_s = training_flops_per_image(vae) / peak / accelerator.num_processes if peak else None
        self.bar = ProgressBar(
            "training", total_images, done=images_seen, quiet=not accelerator.is_main_process,
            write=partial(print, flush=True),
        )  # fmt: skip
        self.global_batch_size = config.train.global_batch_size
        if accelerator.log_with:
            accelerator.init_trackers(
                config.log.wandb_project,
                config=flat_config(config) | {"dataset_fingerprint": dataset_fingerprint},
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
        interval: Interval,
        performance: Mapping[str, float],
        *,
        beta: float,
        lr: float,
        small_batch_size: int | None = None,
    ) -> None:
        """One record of split "train": means since the last, the schedules' values now, and speed.

        With `small_batch_size`, the images behind the meter small_grad_sq, also the noise scale, simple and Adam's.
        """
        speed = performance["perf/images_per_s"]
        record = {f"train/{name}": value for name, value in interval.means.items()} | {
            "train/beta": beta,
            "train/lr": lr,
            "train/skipped_steps": interval.skipped_steps,
            "train/exploded_steps": interval.exploded_steps,
            **performance,
            "perf/mfu": speed * self.mfu_per_image_per_s if self.mfu_per_image_per_s else None,
        }
        if small_batch_size is not None:
            for kind in ("", "adam_"):
                small_sq, big_sq = interval.means[f"{kind}small_grad_sq"], interval.means[f"{kind}grad_sq"]
                if small_sq is not None and big_sq is not None:
                    scale = NoiseScale.of([small_sq], [big_sq], small_batch_size, self.global_batch_size)
                    record[f"train/{kind}noise_scale_images"] = scale.images
        self.write("train", progress, record)
        loss = interval.means["loss"]
        loss_text = "loss not finite" if loss is None else f"loss {loss:,.1f} nats"
        self.bar.noted(f"step {progress.step:,}, {loss_text}")

    def log_validation(self, progress: Progress, **scores: ValidationScores) -> None:
        """One record of split "val": each keyword becomes a prefix of its scores' names."""
        record = {
            f"{prefix}/{name}": value for prefix, group in scores.items() for name, value in asdict(group).items()
        }
        self.write("val", progress, record)
        val = scores["val"]
        bound = "" if val.elbo_nats is None else f"ELBO {val.elbo_nats:,.1f} nats  {val.bits_per_dim:.3f} bits/dim  "
        self.bar.say(
            f"epoch {progress.images_seen / self.images_per_epoch:g}  validation  {bound}PSNR {val.psnr_db:.2f} dB"
        )

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
        for tracker in self.accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: pixels[None]}, step=step, **layout)


def wandb_id(run: RunDirectory) -> str:
    """The id of the run at W&B, kept in trackers.json: what a sweep's agent says, or made up; for the main process alone."""
    if not run.trackers_file.is_file():
        write_json(run.trackers_file, {"wandb": {"id": os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)}})
    return str(json.loads(run.trackers_file.read_text())["wandb"]["id"])


def flat_config(config: Config) -> dict[str, Any]:
    """A config as section.key → number or string: all that TensorBoard's hyper-parameters take."""

    def leaves(mapping: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for key, value in mapping.items():
            if isinstance(value, dict):
                flat |= leaves(value, f"{prefix}{key}.")
            else:
                flat[prefix + key] = value if isinstance(value, int | float | str) else str(value)
        return flat

    return leaves(plain(config), "")
