"""Train a VAE on image shards, on any number of processes.

accelerate launch [--config_file launch/F.yaml] vaetrain/train.py --config configs/C.yaml [--section.key value ...]
"""

from __future__ import annotations

from vaetrain.command_line import parse, user_errors
from vaetrain.config import Config

if __name__ == "__main__":
    CONFIG = parse(Config, __doc__)  # before the imports below, which take seconds: --help and typos answer at once

import contextlib
import math
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from vaetrain import distributed
from vaetrain.checkpoint import Checkpoints, Progress
from vaetrain.data.order import BatchLayout
from vaetrain.data.reader import open_reader
from vaetrain.metrics.validation import validate
from vaetrain.model.autoencoder import VAE
from vaetrain.model.likelihood import from_uint8
from vaetrain.objective.config import beta_at
from vaetrain.objective.elbo import negative_elbo, rate
from vaetrain.optim import ExponentialMovingAverage, build_optimizer, learning_rate_at
from vaetrain.plots import RunFigures
from vaetrain.randomness import noise_of_global_batch
from vaetrain.resume import load_weights, resume_point
from vaetrain.run import RunDirectory, describe_dataset, provenance
from vaetrain.run_lock import hold
from vaetrain.tracking import Interval, Meters, Stopwatch, Tracker


def train(config: Config, accelerator: Accelerator) -> Progress:
    """Run the training that `config` describes, or go on with it; returns how far it came.

    Every process calls this. Raises ValueError, FileNotFoundError or FileExistsError for what the user can mend, and
    FloatingPointError when training diverged.
    """
    with contextlib.ExitStack() as opened:
        return train_with(config, accelerator, opened)


def train_with(config: Config, accelerator: Accelerator, opened: contextlib.ExitStack) -> Progress:
    """`train`, with what `opened` closes however it ends: the readers, the lock, the checkpoint being written."""
    device, model_config = accelerator.device, config.model
    run = RunDirectory(config.run_dir)

    # Data: an epoch is whole global batches; the length of training is whole global batches.
    rank, num_processes = accelerator.process_index, accelerator.num_processes
    layout = BatchLayout.of(config.train.global_batch_size, config.train.micro_batch_size, rank, num_processes)
    open_split = partial(
        open_reader, config.data, device=device, processes_per_node=distributed.processes_per_node(), rank=rank,
        num_processes=num_processes, gather=partial(distributed.gather_integers, accelerator),
    )  # fmt: skip
    train_reader, val_reader = open_split("train"), open_split("val")
    for reader in (train_reader, val_reader):
        opened.callback(reader.close)
        model_config.check_images(reader.manifest.image_size, reader.manifest.channels)
    images_per_epoch = layout.images_per_epoch(train_reader.num_images)
    wanted_images = config.train.num_images or config.train.epochs * images_per_epoch
    total_images = math.ceil(wanted_images / layout.global_batch_size) * layout.global_batch_size

    # Model: all randomness after the initial weights is drawn in randomness.py.
    torch.manual_seed(config.seed)
    vae = VAE(model_config).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    ema = ExponentialMovingAverage(vae, config.train.ema_half_life_images)
    if config.train.compile:
        vae.compile()  # in place: no wrapper, so checkpoint keys stay the same
    model, optimizer = accelerator.prepare(vae, build_optimizer(vae, config.optim))

    # Run: go on from a checkpoint if there is one, and write down what starts.
    meters = Meters(("loss", "distortion_nats", "rate_nats", "grad_norm"), device)
    checkpoints = Checkpoints(
        run, config.checkpoint, accelerator, model=vae, ema=ema.module, optimizer=optimizer.optimizer, meters=meters
    )
    dataset = describe_dataset(train_reader.manifest, val_reader.manifest)

    def claim_run() -> Path | None:
        opened.enter_context(hold(run.lock_file))
        checkpoints.check_space(total_images)
        return resume_point(run, config, dataset)

    resumed_from = distributed.decided_by_main(accelerator, claim_run)
    opened.enter_context(checkpoints)
    progress = checkpoints.load(resumed_from) if resumed_from else Progress()
    if config.init_from and not resumed_from:
        load_weights(config.init_from, vae, ema.module)
    if accelerator.is_main_process:
        made_by = provenance(
            device=distributed.device_name(device),
            num_processes=accelerator.num_processes,
            dataset_fingerprint=train_reader.manifest.fingerprint,
        )
        run.write_start(config, made_by, dataset, step=progress.step, validated_at=progress.validated_at)
        for line in (train_reader.description, val_reader.description):
            print(line)
        if resumed_from:
            print(f"resuming from {resumed_from} at {progress.images_seen:,} images")
        elif config.init_from:
            print(f"starting with the weights of {config.init_from}")
    tracker = Tracker(
        accelerator, run, config, vae, step=progress.step, total_images=total_images,
        images_per_epoch=images_per_epoch, dataset_fingerprint=train_reader.manifest.fingerprint,
    )  # fmt: skip
    figures = RunFigures(run, ema.module, val_reader, num_pictures=config.log.num_pictures)
    stopwatch = Stopwatch(progress.images_seen)

    def validation_is_due() -> bool:
        at_epoch = progress.images_seen % (config.train.val_every_epochs * images_per_epoch) == 0
        return at_epoch or progress.images_seen >= total_images

    batches = train_reader.train_batches(config.seed, progress.images_seen, layout)
    while True:
        validated = validation_is_due() and progress.images_seen > progress.validated_at
        if validated:
            with stopwatch.paused():
                scores = validate(ema.module, val_reader, accelerator, layout.micro_batch_size, config.seed)
                raw_scores = validate(vae, val_reader, accelerator, layout.micro_batch_size, config.seed)
                progress.note_validation(scores.score)
                tracker.log_validation(progress, val=scores, val_raw=raw_scores)
        out_of_patience = progress.validations_without_best >= (config.train.patience or math.inf)
        at_end = progress.images_seen >= total_images or out_of_patience
        if checkpoints.are_due(progress, validated=validated, at_end=at_end):
            checkpoints.save(progress)  # copied during the next forward and backward pass, written after that
        if validated and accelerator.is_main_process:
            with stopwatch.paused():
                figures.draw(tracker, progress, at_end=at_end)
        if at_end:
            break

        # One step on one global batch, of which `layout` says which part is ours.
        lr = learning_rate_at(config.optim, progress.images_seen + layout.global_batch_size, total_images)
        beta = beta_at(config.objective, progress.images_seen)
        noise, mirror = noise_of_global_batch(
            config.seed, progress.images_seen, layout.global_batch_size, model_config.latent_shape, device
        )
        optimizer.zero_grad()
        totals = torch.zeros(3, device=device)
        for number, part in enumerate(layout.positions(0), start=1):
            with stopwatch.waiting_for_data():
                batch = next(batches)
            pixels = batch.images.to(device, non_blocking=True)  # uint8 until here
            if config.data.horizontal_flip:
                pixels = torch.where(mirror[part][:, None, None, None], pixels.flip(-1), pixels)
            x = from_uint8(pixels, vae.likelihood.pixel_range).contiguous(memory_format=torch.channels_last)
            with contextlib.nullcontext() if number == layout.grad_accum_steps else accelerator.no_sync(model):
                terms = model(x, noise[part])
                loss = negative_elbo(terms.distortion, terms.kl, beta, config.objective.free_bits).sum()
                # DDP averages over processes, hence per process; and per pixel, to stay within the range of fp16.
                accelerator.backward(
                    nan_unless_finite(loss / (layout.per_process_batch_size * model_config.num_pixels))
                )
            totals += torch.stack([loss, terms.distortion.sum(), rate(terms.kl).sum()]).detach()
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), config.optim.clip_norm or math.inf)
        # The reduced gradient is the same on all processes, so all skip together; and the decision never leaves the
        # device: fused AdamW leaves weights and moments alone where found_inf is 1.
        skipped = (~torch.isfinite(grad_norm)).float()
        optimizer.optimizer.found_inf = skipped
        for group in optimizer.param_groups:
            group["lr"] = lr
        checkpoints.before_update()
        optimizer.step()
        progress.step += 1
        progress.images_seen += layout.global_batch_size
        ema.update(vae, layout.global_batch_size, progress.images_seen, skipped)

        images = layout.per_process_batch_size
        meters.add(
            images, skipped, loss=totals[0], distortion_nats=totals[1], rate_nats=totals[2], grad_norm=grad_norm * images
        )  # fmt: skip
        if progress.step % config.log.every_steps == 0 or validation_is_due():
            interval = meters.fetch(accelerator)  # the one wait for the device, once per logging interval
            progress.skipped_steps += interval.skipped_steps
            performance = stopwatch.lap(accelerator, progress.images_seen)
            tracker.log_training(progress, interval, performance, beta=beta, lr=lr)
            stop_if_diverged(interval, progress, config)

    checkpoints.finish()
    if accelerator.is_main_process:
        tracker.close()
        print(f"{progress.images_seen:,} images trained; run written to {run.path}")
    return progress


def nan_unless_finite(loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """The loss, times NaN if it is not finite, so that its gradient, and the reduced one of all processes, is NaN too."""
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)


def stop_if_diverged(interval: Interval, progress: Progress, config: Config) -> None:
    """Raise FloatingPointError when too many steps in a row were skipped; the same on all processes."""
    if interval.longest_streak >= config.train.max_nonfinite_steps:
        raise FloatingPointError(
            f"{interval.longest_streak} steps in a row up to step {progress.step} had a loss or gradient that is not "
            f"finite; no weight was changed by them and {config.run_dir}/checkpoints keeps the last good checkpoint. "
            f"Lower --optim.lr (now {config.optim.lr}), warm up longer, or try --train.precision bf16 or fp32"
        )


def main(config: Config) -> None:
    """Join the other processes and train."""
    with user_errors():
        accelerator = distributed.start(
            config.train.precision, log_with=config.log.trackers, project_dir=config.run_dir
        )
        with distributed.finishing(accelerator):
            train(config, accelerator)


if __name__ == "__main__":
    main(CONFIG)
