"""Which checkpoints of a run stay, and the room they need."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from vaetrain.config import CheckpointConfig
from vaetrain.files import fsync
from vaetrain.runs.checkpoint_names import NONE_YET, has_checksums, list_checkpoints, step_of


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint; it loses its name first, so that half of one never has it."""
    nameless = checkpoint.with_name(f".{checkpoint.name}.removed")
    try:
        checkpoint.rename(nameless)
    except OSError as error:
        warn_of_leftover(checkpoint, error)
    else:
        delete(nameless)


def delete(folder: Path) -> None:
    """Delete a folder; a warning where the file system refuses: what is too much ends no training."""
    try:
        shutil.rmtree(folder)
    except OSError as error:  # NFS keeps a file that somebody has open
        warn_of_leftover(folder, error)


def warn_of_leftover(folder: Path, error: OSError) -> None:
    """Say that something was not deleted; the next checkpoint tries again."""
    print(f"warning: {folder} could not be deleted and takes up room: {error}", file=sys.stderr)


def put_in_place(aside: Path, target: Path) -> None:
    """Give a checkpoint its name, durably. One that has the name keeps it until then, if need be until the next start."""
    replaced = target.with_name(f".{target.name}.replaced")
    if target.exists():  # the same step again: after a resume from an older one, or now with a validation
        target.rename(replaced)
    aside.rename(target)
    fsync(target.parent)
    target.with_name(NONE_YET).unlink(missing_ok=True)
    if replaced.exists():
        delete(replaced)


class Retention:
    """The newest checkpoints, the best, the one to go back to, and the first at or after each multiple of `keep_every_images`."""

    def __init__(self, folder: Path, config: CheckpointConfig) -> None:
        self.folder = folder
        self.config = config

    def drop_old(
        self, step: int, best_step: int | None, images_per_step: int, *, sound_step: int | None = None
    ) -> None:
        """Delete the checkpoints that need not stay now that the one of `step` is whole.

        Should training diverge, it goes back to the newest up to `sound_step`; None: that of `step`.
        """
        self.clear_leftovers()
        checkpoints = [path for path in list_checkpoints(self.folder) if has_checksums(path)]  # others are left alone
        # Training passed over those of later steps, because they are damaged or because it went back.
        usable = [path for path in checkpoints if step_of(path) <= step]
        kept = {*usable[-self.config.keep_last :], *(path for path in usable if step_of(path) == best_step)}
        sound = [path for path in usable if sound_step is None or step_of(path) <= sound_step]
        kept |= set(sound[-1:])
        if self.config.keep_every_images is not None:
            first_after: dict[int, Path] = {}
            for path in usable:
                first_after.setdefault(step_of(path) * images_per_step // self.config.keep_every_images, path)
            kept |= {path for multiple, path in first_after.items() if multiple > 0}
        for path in checkpoints:
            if path not in kept:
                remove(path)

    def clear_leftovers(self) -> None:
        """Delete what a process that was killed while it wrote or deleted left behind; nobody may be writing now."""
        for replaced in self.folder.glob(".step-*.replaced"):
            original = self.folder / replaced.name.removeprefix(".").removesuffix(".replaced")
            if not original.exists():
                replaced.rename(original)
        for leftover in self.folder.glob(".step-*"):
            delete(leftover)

    def check_space(self, checkpoint_bytes: int, total_images: int) -> None:
        """Refuse, with ValueError, a training whose checkpoints will not fit into the free space of the run's file system.

        It counts those that will be there at once: the newest, the best, the one from before a divergence, one that is
        being written, and over the whole run those that stay for ever. Room that existing ones take will be theirs.
        Quotas it cannot see.
        """
        kept_for_ever = total_images // self.config.keep_every_images if self.config.keep_every_images else 0
        at_once = self.config.keep_last + 3 + kept_for_ever
        self.clear_leftovers()
        existing = sum(file.stat().st_size for file in self.folder.glob("step-*/*"))
        needed = max(at_once * checkpoint_bytes - existing, checkpoint_bytes)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            mib = 2**20
            raise ValueError(
                f"{self.folder} will need {needed / mib:,.1f} MiB more and its file system has {free / mib:,.1f} free. Up to "
                f"{at_once} checkpoints of {checkpoint_bytes / mib:,.1f} MiB exist at once: the last {self.config.keep_last}, "
                f"the best, the one before a divergence, one being written, and {kept_for_ever} kept for ever; "
                f"{existing / mib:,.1f} MiB are there. Make room, choose another --run-dir, lower --checkpoint.keep-last, or "
                "raise --checkpoint.keep-every-images"
            )
