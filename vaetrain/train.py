"""Train a VAE on image shards, on any number of processes.

accelerate launch --config_file launch/gpu1.yaml vaetrain/train.py --config configs/C.yaml [--section.key value ...]
(launch/ has layouts for more processes, too)
"""

from __future__ import annotations

if __name__ == "__main__":
    from vaetrain.distributed.launcher import end_with_launcher

    end_with_launcher()  # before anything that takes time

from vaetrain.command_line import parse, user_errors
from vaetrain.config import Config, TrainingConfig

if __name__ == "__main__":
    CONFIG = parse(Config, __doc__)  # before the imports below, which take seconds: --help and typos answer at once

    from vaetrain.preflight import check_training, refusing

    with refusing():
        check_training(CONFIG)

import contextlib

from accelerate import Accelerator

from vaetrain.data.readers.order import BatchLayout
from vaetrain.distributed import exchange, processes
from vaetrain.distributed.preemption import StopRequest
from vaetrain.distributed.watchdog import FIRST_STEP_S, Heartbeat, Watchdog, longest_wait_s
from vaetrain.exit_codes import EXIT_STOPPED
from vaetrain.runs.directory import RunDirectory
from vaetrain.training import compilation, precision
from vaetrain.training.control import Control
from vaetrain.training.divergence import note_steps, roll_back
from vaetrain.training.memory import suggest_on_oom
from vaetrain.training.progress import Progress
from vaetrain.training.resume import recorded_compile, recorded_precision
from vaetrain.training.stage import Stage
from vaetrain.training.start import start_run
from vaetrain.training.throughput import Stopwatch
from vaetrain.training.time_limit import TimeLimit
from vaetrain.training.vae_stage import VaeStage


def train(
    config: TrainingConfig, accelerator: Accelerator, control: Control | None = None, kind: type[Stage] = VaeStage
) -> Progress:
    """Run the training that `config` describes, or go on with it; returns how far it came.

    Every process calls this. `control` is told how far it is and asked whether to go on; `kind` says what is trained on what.
    Raises ValueError, FileNotFoundError or FileExistsError for what the user can mend, and FloatingPointError when training
    diverged.
    """
    control = control or Control.of(config)
    with contextlib.ExitStack() as opened:  # closed however it ends: readers, lock, the checkpoint being written
        config = compilation.resolved(precision.resolved(config, accelerator), accelerator)

        # Data: an epoch is whole global batches; the length of training is whole global batches.
        control.enter("starting: opening the data")
        layout = BatchLayout.of(
            config.train.global_batch_size, config.train.micro_batch_size,
            accelerator.process_index, accelerator.num_processes,
        )  # fmt: skip
        stage = kind(config, layout, accelerator)
        stage.open_data(opened)
        train_reader, schedule = stage.train_reader, stage.schedule

        # Model: all randomness after the initial weights is a function of the seed and the images seen.
        control.enter("starting: building the model")
        stage.build_model()
        step = stage.step

        # Run: go on from a checkpoint if there is one, and write down what starts.
        control.enter("starting: looking for a checkpoint")
        run = RunDirectory(config.run_dir)
        progress, checkpoints, meters, logger = start_run(run, stage, accelerator, opened)
        stage.begin(run)
        stopwatch = Stopwatch(progress.images_seen)

        batches = stopwatch.timing(train_reader.train_batches(config.seed, progress.images_seen, layout))
        while True:
            control.begin(progress.step)
            if control.should_stop(checkpoints.longest_save_s):
                checkpoints.save(progress)  # without a validation that may be due: a resume makes up for it
                break
            validated = schedule.validation_is_due(progress)
            if validated:
                control.enter("validation")
                with stopwatch.paused():
                    validation = stage.validate(progress, control)
                progress.note_validation(validation.score, config.best_by)
                logger.log_validation(progress, **validation.scores)
            control.enter("checkpoint and figures")
            at_end = schedule.is_over(progress)
            if checkpoints.are_due(progress, validated=validated, at_end=at_end):
                checkpoints.save(progress)  # copied during the next forward and backward pass, written after that
            if validated:
                with stopwatch.paused():
                    if accelerator.is_main_process:
                        stage.draw(logger, progress, at_end=at_end)
                    exchange.meet("the main process to draw figures")
            if at_end:
                break

            # One step on one global batch, of which `layout` says which part is ours.
            lr, weights = schedule.lr(progress), schedule.weights(progress)
            step.accumulate(batches, progress.images_seen, *weights, entering=control.enter)
            control.enter("update")
            checkpoints.before_update()
            progress.advance(layout.global_batch_size)
            meters.add_step(step.update(lr, progress.images_seen))
            logger.bar.moved_to(progress.images_seen)
            if schedule.record_is_due(progress):
                control.enter("waiting for the device and the others, to log")
                window = meters.fetch()  # the one wait for the device, once per logging interval
                diverged = note_steps(progress, window, config.train.max_nonfinite_steps)
                performance = stopwatch.lap(accelerator, progress.images_seen)
                logger.log_training(progress, window, performance, lr=lr, **schedule.record(weights))
                control.forecast(schedule.images_left(progress), performance["perf/images_per_s"], logger.bar.say)
                if diverged:
                    meters.reset()
                    progress = roll_back(config.train, run, checkpoints, logger, accelerator, progress, window)
                    stopwatch = Stopwatch(progress.images_seen)
                    batches = stopwatch.timing(train_reader.train_batches(config.seed, progress.images_seen, layout))

        checkpoints.finish()
        if control.why_stopped is None:
            control.enter("finishing")
            stage.finish(run)
        logger.say_end(progress, control.why_stopped)
    return progress


def run_training(config: TrainingConfig, kind: type[Stage] = VaeStage) -> None:
    """Join the other processes and train; exits with EXIT_STOPPED when told to stop."""
    timeout_s, heartbeat, time_limit = config.train.timeout_s, Heartbeat(), TimeLimit(config.train.max_hours)
    waits_s = longest_wait_s(
        timeout_s, config.train.start_timeout_s
    )  # the watchdog, who knows who is missing, speaks before
    with user_errors():
        accelerator = precision.start(
            config.train.precision, kept=recorded_precision(config), log_with=config.log.trackers,
            project_dir=config.run_dir, timeout_s=waits_s, timeout_option="--train.timeout-s, --train.start-timeout-s",
            deterministic=config.train.deterministic,
        )  # fmt: skip
        config = precision.resolved(config, accelerator)
        config = compilation.resolved(config, accelerator, kept=recorded_compile(config))
        control = Control(heartbeat, StopRequest(waits_s), time_limit)
        watchdog = Watchdog(
            heartbeat, rank=accelerator.process_index, num_processes=accelerator.num_processes,
            store=exchange.shared_store(), folder=config.run_dir, timeout_s=timeout_s,
            first_step_s=FIRST_STEP_S if config.train.compile else 0.0, start_timeout_s=config.train.start_timeout_s,
        )  # fmt: skip
        with (
            control.stop.on_signals(),
            watchdog,
            suggest_on_oom(config, accelerator),
            compilation.explaining_failure(config),
            processes.finishing(accelerator),
        ):
            train(config, accelerator, control, kind)
    if control.stop.agreed:
        raise SystemExit(EXIT_STOPPED)


def main(config: Config) -> None:
    """Train a VAE."""
    run_training(config)


if __name__ == "__main__":
    main(CONFIG)
