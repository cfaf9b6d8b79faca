"""Train a VAE on image shards, on any number of processes.

accelerate launch --config_file launch/gpu1.yaml vaetrain/train.py --config configs/C.yaml [--section.key value ...]
(launch/ has layouts for more processes, too)
"""

from __future__ import annotations

from vaetrain.command_line import parse, user_errors
from vaetrain.config import Config

if __name__ == "__main__":
    CONFIG = parse(Config, __doc__)  # before the imports below, which take seconds: --help and typos answer at once

    from vaetrain.preflight import check_training, refusing

    with refusing():
        check_training(CONFIG)

import contextlib
import math
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from vaetrain.data.readers.order import BatchLayout
from vaetrain.data.readers.read_order import ReadOrder
from vaetrain.data.readers.reader import open_split
from vaetrain.distributed import processes
from vaetrain.distributed.preemption import EXIT_STOPPED, StopRequest
from vaetrain.distributed.randomness import noise_of_global_batch
from vaetrain.distributed.watchdog import FIRST_STEP_S, Heartbeat, Watchdog
from vaetrain.metrics.validation import validate
from vaetrain.model.autoencoder import VAE
from vaetrain.model.likelihood import from_uint8
from vaetrain.objective.config import beta_at
from vaetrain.objective.elbo import negative_elbo, rate
from vaetrain.runs.directory import RunDirectory
from vaetrain.runs.lock import hold
from vaetrain.runs.provenance import describe_dataset, provenance
from vaetrain.training import precision
from vaetrain.training.checkpoint import Checkpoints
from vaetrain.training.divergence import SpikeDetector, note_steps, roll_back, skip_where
from vaetrain.training.ema import ExponentialMovingAverage
from vaetrain.training.figures import RunFigures
from vaetrain.training.logger import RunLogger
from vaetrain.training.memory import suggest_on_oom
from vaetrain.training.meters import Meters
from vaetrain.training.noise_scale import NOISE_METERS, GradientNoiseProbe
from vaetrain.training.optimizer import build_optimizer
from vaetrain.training.progress import Progress
from vaetrain.training.resume import load_weights, origin, recorded_precision, resume_point
from vaetrain.training.schedule import learning_rate_at, unfinished_warmups
from vaetrain.training.throughput import Stopwatch
from vaetrain.training.time_limit import TimeLimit


def train(
    config: Config,
    accelerator: Accelerator,
    heartbeat: Heartbeat | None = None,
    stop: StopRequest | None = None,
    time_limit: TimeLimit | None = None,
) -> Progress:
    """Run the training that `config` describes, or go on with it; returns how far it came.

    Every process calls this. `pulse` is told how far it is, `stop` is asked whether to go on, `time_limit` whether there is time.
    Raises ValueError, FileNotFoundError or FileExistsError for what the user can mend, and FloatingPointError when
    training diverged.
    """
    with contextlib.ExitStack() as opened:
        time_limit = time_limit or TimeLimit(config.train.max_hours)
        return train_with(config, accelerator, heartbeat or Heartbeat(), stop or StopRequest(), time_limit, opened)


def train_with(
    config: Config,
    accelerator: Accelerator,
    heartbeat: Heartbeat,
    stop: StopRequest,
    time_limit: TimeLimit,
    opened: contextlib.ExitStack,
) -> Progress:
    """`train`, with what `opened` closes however it ends: the readers, the lock, the checkpoint being written."""
    config = precision.resolved(config, accelerator)
    device, model_config = accelerator.device, config.model
    run = RunDirectory(config.run_dir)

    # Data: an epoch is whole global batches; the length of training is whole global batches.
    heartbeat.enter("starting: opening the data")
    layout = BatchLayout.of(
        config.train.global_batch_size, config.train.micro_batch_size,
        accelerator.process_index, accelerator.num_processes,
    )  # fmt: skip
    train_reader, val_reader = (open_split(config.data, accelerator, split) for split in ("train", "val"))
    for reader in (train_reader, val_reader):
        opened.callback(reader.close)
        model_config.check_images(reader.manifest.image_size, reader.manifest.channels)
    images_per_epoch = layout.images_per_epoch(train_reader.num_images)
    wanted_images = config.train.num_images or config.train.epochs * images_per_epoch
    total_images = math.ceil(wanted_images / layout.global_batch_size) * layout.global_batch_size

    # Model: all randomness after the initial weights is drawn in randomness.py.
    heartbeat.enter("starting: building the model")
    torch.manual_seed(config.seed)
    vae = VAE(model_config).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    ema = ExponentialMovingAverage(vae, config.train.ema_half_life_images)
    if config.train.compile:
        vae.compile()  # in place: no wrapper, so checkpoint keys stay the same
    model, optimizer = accelerator.prepare(vae, build_optimizer(vae, config.optim))
    judge = SpikeDetector(config.train.skip_above, device)

    # Run: go on from a checkpoint if there is one, and write down what starts.
    heartbeat.enter("starting: looking for a checkpoint")
    small_gradient = None
    if config.log.noise_scale:
        small_gradient = GradientNoiseProbe(model, optimizer.optimizer, layout, accelerator.num_processes)
    meters = Meters(
        ("loss", "distortion_nats", "rate_nats", "grad_norm", *(NOISE_METERS if small_gradient else ())), device
    )
    reading = ReadOrder.of(train_reader, layout)
    checkpoints = Checkpoints(
        run, config.checkpoint, accelerator, model=vae, ema=ema.module, optimizer=optimizer.optimizer, meters=meters,
        judge=judge, reading=asdict(reading),
    )  # fmt: skip
    dataset = describe_dataset(train_reader.manifest, val_reader.manifest)

    def claim_run() -> Path | None:
        opened.enter_context(hold(run.lock_file))
        checkpoints.check_space(total_images)
        return resume_point(run, config, dataset, reading, images_per_epoch)

    resumed_from = processes.decided_by_main(accelerator, claim_run)
    opened.enter_context(checkpoints)
    progress = checkpoints.load(resumed_from) if resumed_from else Progress()
    if config.init_from and not resumed_from:
        load_weights(config.init_from, vae, ema.module)
    if accelerator.is_main_process:
        made_by = provenance(
            device=processes.device_name(device),
            num_processes=accelerator.num_processes,
            processes_per_node=processes.processes_per_node(),
            dataset_fingerprint=train_reader.manifest.fingerprint,
            precision=config.train.precision,
        )
        made_by |= origin(run, config, resumed_from)
        run.write_start(config, made_by, dataset, step=progress.step, validated_at=progress.validated_at)
        for line in (train_reader.description, val_reader.description):
            print(line)
        if resumed_from:
            print(f"resuming from {resumed_from} at {progress.images_seen:,} images")
        elif config.init_from:
            print(f"starting with the weights of {config.init_from}")
        for unfinished in unfinished_warmups(config, total_images):
            print(f"note: {unfinished}")
    logger = RunLogger(
        accelerator, run, config, vae, step=progress.step, images_seen=progress.images_seen, total_images=total_images,
        images_per_epoch=images_per_epoch, dataset_fingerprint=train_reader.manifest.fingerprint,
    )  # fmt: skip
    opened.enter_context(logger.bar)
    if resumed_from and resumed_from.parent == run.checkpoints:
        logger.log_missing_rollback(progress)
    figures = RunFigures(run, ema.module, val_reader, num_pictures=config.log.num_pictures)
    stopwatch = Stopwatch(progress.images_seen)

    def validation_is_due() -> bool:
        at_epoch = progress.images_seen % (config.train.val_every_epochs * images_per_epoch) == 0
        return at_epoch or progress.images_seen >= total_images

    batches = train_reader.train_batches(config.seed, progress.images_seen, layout)
    while True:
        heartbeat.begin(progress.step)
        if time_limit.is_near(checkpoints.longest_save_s):
            stop.reason = time_limit.reason
        if stop.agree():  # before a validation that may be due: whoever resumes makes up for it
            checkpoints.save(progress)
            break
        validated = validation_is_due() and progress.images_seen > progress.validated_at
        if validated:
            heartbeat.enter("validation")
            with stopwatch.paused():
                scores = validate(
                    ema.module, val_reader, accelerator, layout.micro_batch_size, config.seed, heartbeat.each
                )
                raw_scores = validate(
                    vae, val_reader, accelerator, layout.micro_batch_size, config.seed, heartbeat.each
                )
                progress.note_validation(scores.score)
                logger.log_validation(progress, val=scores, val_raw=raw_scores)
        heartbeat.enter("checkpoint and figures")
        out_of_patience = progress.validations_without_best >= (config.train.patience or math.inf)
        at_end = progress.images_seen >= total_images or out_of_patience
        if checkpoints.are_due(progress, validated=validated, at_end=at_end):
            checkpoints.save(progress)  # copied during the next forward and backward pass, written after that
        if validated and accelerator.is_main_process:
            with stopwatch.paused():
                figures.draw(logger, progress, at_end=at_end)
        if at_end:
            break

        # One step on one global batch, of which `layout` says which part is ours.
        lr = learning_rate_at(config.optim, progress.images_seen + layout.global_batch_size, total_images)
        lr *= progress.lr_factor
        beta = beta_at(config.objective, progress.images_seen)
        noise, mirror = noise_of_global_batch(
            config.seed, progress.images_seen, layout.global_batch_size, model_config.latent_shape, device
        )
        optimizer.zero_grad()
        totals = torch.zeros(3, device=device)
        for number, part in enumerate(layout.positions(0), start=1):
            heartbeat.enter("waiting for data")
            with stopwatch.waiting_for_data():
                batch = next(batches)
            heartbeat.enter("forward")
            pixels = batch.images.to(device, non_blocking=True)  # uint8 until here
            if config.data.horizontal_flip:
                pixels = torch.where(mirror[part][:, None, None, None], pixels.flip(-1), pixels)
            x = from_uint8(pixels, vae.likelihood.pixel_range).contiguous(memory_format=torch.channels_last)
            with contextlib.nullcontext() if number == layout.grad_accum_steps else accelerator.no_sync(model):
                terms = model(x, noise[part])
                loss = negative_elbo(terms.distortion, terms.kl, beta, config.objective.free_bits).sum()
                heartbeat.enter("backward")
                # DDP averages over processes, hence per process; and per pixel, to stay within the range of fp16.
                accelerator.backward(
                    nan_unless_finite(loss / (layout.per_process_batch_size * model_config.num_pixels))
                )
            if small_gradient:
                small_gradient.after_micro_batch(number)
            totals += torch.stack([loss, terms.distortion.sum(), rate(terms.kl).sum()]).detach()
        heartbeat.enter("update")
        norms = small_gradient.pop() if small_gradient else ()
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), config.optim.clip_norm or math.inf)
        # The reduced gradient is the same on all processes, so all skip together; the decision never leaves the device.
        skipped, spiked = judge.judge(grad_norm)
        skip_where(skipped, optimizer.optimizer, accelerator.scaler)
        for group in optimizer.param_groups:
            group["lr"] = lr
        checkpoints.before_update()
        optimizer.step()
        progress.step += 1
        progress.images_seen += layout.global_batch_size
        logger.bar.moved_to(progress.images_seen)
        ema.update(vae, layout.global_batch_size, progress.images_seen, skipped)

        images = layout.per_process_batch_size
        meters.add(
            images, skipped, spiked, loss=totals[0], distortion_nats=totals[1], rate_nats=totals[2],
            grad_norm=grad_norm * images,
            **({name: sq * images for name, sq in zip(NOISE_METERS, (grad_norm**2, *norms), strict=True)} if norms else {}),
        )  # fmt: skip
        if progress.step == 1 or progress.step % config.log.every_steps == 0 or validation_is_due():
            heartbeat.enter("waiting for the device and the others, to log")
            window = meters.fetch(accelerator)  # the one wait for the device, once per logging interval
            diverged = note_steps(progress, window, config.train.max_nonfinite_steps)
            performance = stopwatch.lap(accelerator, progress.images_seen)
            small_batch_size = small_gradient.batch_size if small_gradient else None
            logger.log_training(progress, window, performance, beta=beta, lr=lr, small_batch_size=small_batch_size)
            if note := time_limit.forecast(total_images - progress.images_seen, performance["perf/images_per_s"]):
                logger.bar.say(note)
            if diverged:
                meters.reset()
                progress = roll_back(config.train, run, checkpoints, logger, accelerator, progress, window)
                stopwatch = Stopwatch(progress.images_seen)
                batches = train_reader.train_batches(config.seed, progress.images_seen, layout)

    checkpoints.finish()
    logger.bar.close()
    if accelerator.is_main_process:
        end = f"run written to {run.path}"
        if stop.agreed:
            end = f"saved and stopped by {stop.reason or 'a signal to another process'}; the same command goes on from here"
        print(f"{progress.images_seen:,} images trained; {end}")
    return progress


def nan_unless_finite(loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """The loss, times NaN if it is not finite, so that its gradient, and the reduced one of all processes, is NaN too."""
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)


def main(config: Config) -> None:
    """Join the other processes and train; exits with EXIT_STOPPED when told to stop."""
    timeout_s, heartbeat, time_limit = config.train.timeout_s, Heartbeat(), TimeLimit(config.train.max_hours)
    longest_wait_s = timeout_s + FIRST_STEP_S  # in a collective; the watchdog, who knows who is missing, speaks before
    with user_errors():
        accelerator = precision.start(
            config.train.precision, kept=recorded_precision(config), log_with=config.log.trackers,
            project_dir=config.run_dir, timeout_s=longest_wait_s,
        )  # fmt: skip
        config = precision.resolved(config, accelerator)
        stop = StopRequest(longest_wait_s)
        watchdog = Watchdog(
            heartbeat, rank=accelerator.process_index, num_processes=accelerator.num_processes,
            store=processes.shared_store(), folder=config.run_dir, timeout_s=timeout_s,
            first_step_s=FIRST_STEP_S if config.train.compile else 0.0, start_timeout_s=config.train.start_timeout_s,
        )  # fmt: skip
        with (
            stop.on_signals(),
            watchdog,
            suggest_on_oom(config, accelerator),
            processes.finishing(accelerator),
        ):
            train(config, accelerator, heartbeat, stop, time_limit)
    if stop.agreed:
        raise SystemExit(EXIT_STOPPED)


if __name__ == "__main__":
    main(CONFIG)
