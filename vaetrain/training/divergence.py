"""Steps that would spoil the weights: found and skipped on the device; after too many in a row, back to a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from vaetrain.config import TrainConfig
from vaetrain.distributed.processes import decided_by_main
from vaetrain.runs.directory import RunDirectory
from vaetrain.training.checkpoint import Checkpoints, newest_good, warn_of_damage
from vaetrain.training.logger import RunLogger
from vaetrain.training.meters import LogWindow
from vaetrain.training.progress import Progress

STEPS_BEFORE_JUDGING = 50
"""Steps taken before the gradient norm is compared: in the first ones it falls by orders of magnitude."""

STEPS_REMEMBERED = 100
"""The mean of the gradient norm is over about so many steps."""


class SpikeDetector:
    """Which steps are skipped: those whose gradient is not finite, or far larger than of late; never waits for the device.

    Given the reduced gradient, all processes decide alike.
    """

    def __init__(self, skip_above: float | None, device: torch.device) -> None:
        self.skip_above = math.inf if skip_above is None else skip_above
        self.num_taken = torch.zeros((), dtype=torch.float64, device=device)
        self.mean_log_norm = torch.zeros_like(self.num_taken)

    def judge(self, grad_norm: Float[Tensor, ""]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """1 or 0 on the device: whether the step is to be skipped, and whether that is for a finite but exploding gradient."""
        log_norm = grad_norm.detach().double().clamp_min(1e-30).log()
        finite = torch.isfinite(log_norm)
        excess = log_norm - self.mean_log_norm
        spiked = finite & (excess > math.log(self.skip_above)) & (self.num_taken >= STEPS_BEFORE_JUDGING)
        taken = finite & ~spiked
        # An arithmetic mean of the logarithms of the first steps, an exponential one later.
        self.num_taken = self.num_taken + taken
        share = (1 / self.num_taken).clamp_min(1 / STEPS_REMEMBERED)
        self.mean_log_norm = self.mean_log_norm + torch.where(taken, share * excess, 0.0)
        return (~taken).float(), spiked.float()

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps; `judge` makes new tensors and never writes to these."""
        return {"num_taken": self.num_taken, "mean_log_norm": self.mean_log_norm}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a saved state."""
        self.num_taken = state["num_taken"].to(self.num_taken)
        self.mean_log_norm = state["mean_log_norm"].to(self.mean_log_norm)


def skip_where(
    skipped: Float[Tensor, ""], optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None
) -> None:
    """Make the next step of a fused optimizer leave weights and moments alone if `skipped` is 1, unseen by the host.

    A gradient scaler brings its own verdict along, to which this one is added; it also lowers the scale.
    """
    if scaler is None:
        optimizer.found_inf = skipped  # type: ignore[attr-defined]
        return
    for found in scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values():
        torch.maximum(found, skipped, out=found)


def note_steps(progress: Progress, window: LogWindow, max_nonfinite_steps: int) -> bool:
    """Count an interval's skipped steps; whether so many were in a row that training must go back."""
    progress.skipped_steps += window.skipped_steps
    progress.exploded_steps += window.exploded_steps
    diverged = window.longest_streak >= max_nonfinite_steps
    if not diverged:  # else what lies before those steps stays the point to go back to
        progress.sound_step = progress.step - window.skip_streak
    return diverged


def roll_back(
    config: TrainConfig,
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
    accelerator.wait_for_everyone()  # everybody has read the checkpoint before it is written anew
    # A resume finds the lower learning rate, and does not go back again; later checkpoints are dropped. Only then are records:
    # killed in between, the resume drops them and writes the event.
    checkpoints.save(restored)
    checkpoints.finish()
    accelerator.wait_for_everyone()
    logger.log_rollback(progress.step, restored, reason_to_go_back(config, progress, window))
    return restored


def checkpoint_to_go_back_to(
    config: TrainConfig, run: RunDirectory, accelerator: Accelerator, progress: Progress, window: LogWindow
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

    return decided_by_main(accelerator, find_checkpoint)


def reason_to_go_back(config: TrainConfig, progress: Progress, window: LogWindow) -> str:
    """What happened, for records and messages."""
    return (
        f"{interval.longest_streak} steps in a row up to step {progress.step} had a loss or gradient that is not finite, or "
        f"a gradient norm over {config.skip_above} times the recent mean"
    )


def what_to_do(run: RunDirectory) -> str:
    """The state of things and the remedies, for the message that training diverged."""
    return (
        f"no weight was changed by them and {run.checkpoints} keeps the last good checkpoint. "
        "Lower --optim.lr, warm up longer, or try --train.precision bf16 or fp32"
    )
