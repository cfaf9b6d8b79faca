"""When training ends because validation no longer gets better."""

from __future__ import annotations

from vaetrain.training.progress import Progress


def out_of_patience(progress: Progress, patience: int | None) -> bool:
    """Whether the last `patience` validations were none of them the best so far; never where it is None."""
    return patience is not None and progress.validations_without_best >= patience
