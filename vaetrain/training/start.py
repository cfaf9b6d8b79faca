"""The start of a training: its run directory is claimed, its checkpoint found and loaded, and what starts written down."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from accelerate import Accelerator

from vaetrain.data.readers.read_order import ReadOrder
from vaetrain.distributed.exchange import decided_by_main, meet
from vaetrain.runs.directory import RunDirectory
from vaetrain.runs.lock import hold
from vaetrain.runs.provenance import describe_dataset, provenance
from vaetrain.training.checkpoint import Checkpoints
from vaetrain.training.logger import RunLogger
from vaetrain.training.meters import Meters
from vaetrain.training.progress import Progress
from vaetrain.training.resume import origin, resume_point
from vaetrain.training.stage import Stage


class Started(NamedTuple):
    """A run that has begun, or goes on."""

    progress: Progress
    checkpoints: Checkpoints
    meters: Meters
    logger: RunLogger


def start_run(
    run: RunDirectory,
    stage: Stage,
    accelerator: Accelerator,
    opened: ExitStack,
) -> Started:
    """Claim the run directory for as long as `opened` lasts, and go on from the checkpoint there is. A collective.

    Raises what `hold`, `resume_point` and `load_weights` do.
    """
    config, step, schedule, train_reader = stage.config, stage.step, stage.schedule, stage.train_reader
    assert step.spikes is not None
    meters = Meters(step.names_of_sums, accelerator)
    reading = ReadOrder.of(train_reader, step.layout)
    made_of = step.made_of
    checkpoints = Checkpoints(
        run, config.checkpoint, accelerator, model=step.module, ema=step.averaged, optimizer=step.optimizer.optimizer,
        meters=meters, spikes=step.spikes, reading=asdict(reading), loss_terms=made_of, adversary=stage.adversary,
    )  # fmt: skip
    dataset = describe_dataset(train_reader.manifest, stage.val_reader.manifest)

    def claim_run() -> Path | None:
        opened.enter_context(hold(run.lock_file))
        checkpoints.check_space(schedule.total_images)
        return resume_point(run, config, dataset, reading, schedule.images_per_epoch, made_of)

    resumed_from = decided_by_main(accelerator, claim_run, "find and check the checkpoint to go on from")
    opened.enter_context(checkpoints)
    progress = checkpoints.load(resumed_from) if resumed_from else Progress()
    if config.init_from and not resumed_from:
        stage.start_from(config.init_from)
    if accelerator.is_main_process:
        made_by = provenance(accelerator, train_reader.manifest.fingerprint)
        made_by |= origin(run, config, resumed_from) | ({"loss_terms": made_of} if made_of else {})
        run.write_start(config, made_by, dataset, step=progress.step, validated_at=progress.validated_at)
        for line in (train_reader.description, stage.val_reader.description):
            print(line)
        if resumed_from:
            print(f"resuming from {resumed_from} at {progress.images_seen:,} images")
        elif config.init_from:
            print(f"starting with the weights of {config.init_from}")
        for unfinished in schedule.unfinished():
            print(f"note: {unfinished}")
    logger = RunLogger(
        accelerator, run, config, step=progress.step, images_seen=progress.images_seen,
        total_images=schedule.total_images, images_per_epoch=schedule.images_per_epoch,
        dataset_fingerprint=train_reader.manifest.fingerprint, flops_per_image=stage.flops_per_image, unit=stage.unit,
        small_batch_size=step.noise_probe.batch_size if step.noise_probe else None,
    )  # fmt: skip
    opened.enter_context(logger.bar)
    if resumed_from and resumed_from.parent == run.checkpoints:
        logger.log_missing_rollback(progress)
    meet("the main process to write down the start")
    return Started(progress, checkpoints, meters, logger)
