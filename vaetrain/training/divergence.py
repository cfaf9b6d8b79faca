"""Too many steps in a row that were skipped: back to a checkpoint from before them, with a lower learning rate."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator

from vaetrain.config import LoopConfig
from vaetrain.distributed.exchange import decided_by_main, meet
from vaetrain.runs.directory import RunDirectory
from vaetrain.training.checkpoint import Checkpoints, newest_good, warn_of_damage
from vaetrain.training.logger import RunLogger
from vaetrain.training.meters import LogWindow
from vaetrain.training.progress import Progress


def note_steps(progress: Progress, window: LogWindow, max_nonfinite_steps: int) -> bool:
    """Count a window's skipped steps; whether so many were in a row that training must go back."""
    progress.skipped_steps += window.skipped_steps
    progress.exploded_steps += window.exploded_steps
    diverged = window.longest_streak >= max_nonfinite_steps
    if not diverged:  # else what lies before those steps stays the point to go back to
        progress.sound_step = progress.step - window.skip_streak
    return diverged


def roll_back(
    config: LoopConfig,
    run: RunDirectory,
    checkpoints: Checkpoints,
    logger: RunLogger,
    accelerator: Accelerator,
    progress: Progress,
    window: LogWindow,
) -> Progress:
    """Go back to the newest good checkpoint from before the skipped steps, and on with a lower learning rate. A collective.

    Raises FloatingPointError, on every process, the second time, when there is no such checkpoint, or when
    `rollback_lr_factor` is None; metrics.jsonl says so too.
    """
    try:
        checkpoint = checkpoint_to_go_back_to(config, run, accelerator, progress, window)
    except FloatingPointError as error:
        logger.log_divergence(progress, str(error))
        raise
    checkpoints.finish()
    restored = checkpoints.load(checkpoint)
    restored.rollbacks = progress.rollbacks + 1
    restored.lr_factor = progress.lr_factor * (config.rollback_lr_factor or 1.0)
    meet("all processes to load the checkpoint")  # before it is written anew
    # A resume finds the lower learning rate, and does not go back again; later checkpoints are dropped. Only then are records:
    # killed in between, the resume drops them and writes the event.
    checkpoints.save(restored)
    checkpoints.finish()
    meet("the main process to write the checkpoint")
    logger.log_rollback(progress.step, restored, reason_to_go_back(config, progress, window))
    return restored


def checkpoint_to_go_back_to(
    config: LoopConfig, run: RunDirectory, accelerator: Accelerator, progress: Progress, window: LogWindow
) -> Path:
    """The newest good checkpoint from before the skipped steps; FloatingPointError, on every process, where none will do."""
    reason = reason_to_go_back(config, progress, window)
    if config.rollback_lr_factor is None or progress.rollbacks > 0:
        again = f", after going back once to learning rates × {progress.lr_factor:g}" if progress.rollbacks else ""
        raise FloatingPointError(f"{reason}{again}; {what_to_do(run)}")

    def find_checkpoint() -> Path:
        checkpoint, damaged = newest_good(run.checkpoints, up_to_step=progress.sound_step)
        warn_of_damage(damaged, checkpoint)
        if checkpoint is None:
            raise FloatingPointError(f"{reason}, and there is no checkpoint from before them; {what_to_do(run)}")
        return checkpoint

    return decided_by_main(accelerator, find_checkpoint, "find and check a checkpoint to go back to")


def reason_to_go_back(config: LoopConfig, progress: Progress, window: LogWindow) -> str:
    """What happened, for records and messages."""
    return (
        f"{window.longest_streak} steps in a row up to step {progress.step} had a loss or gradient that is not finite, or "
        f"a gradient norm over {config.skip_above} times the recent mean"
    )


def what_to_do(run: RunDirectory) -> str:
    """The state of things and the remedies, for the message that training diverged."""
    return (
        f"no weight was changed by them and {run.checkpoints} keeps the last good checkpoint. "
        "Lower --optim.lr, warm up longer, or try --train.precision bf16 or fp32"
    )
