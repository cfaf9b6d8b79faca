"""One pass over a split, shared by all processes, that says how far it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, TypeVar, runtime_checkable

from accelerate import Accelerator
from torch import Tensor

from vaetrain.progress_bar import ProgressBar


class Numbered(Protocol):
    """A batch that knows its items' positions in the split."""

    @property
    def indices(self) -> Tensor:
        """(b,), int64."""
        ...


B_co = TypeVar("B_co", bound=Numbered, covariant=True)


@runtime_checkable  # for the type checks of the tests
class Split(Protocol[B_co]):
    """A reader of images, or of latents."""

    @property
    def num_images(self) -> int:
        """Of the split."""
        ...

    def eval_batches(self, *args: Any, **options: Any) -> Iterator[B_co]:
        """One pass, by batch size, rank and number of processes."""
        ...


def pass_over(
    doing: str, split: Split[B_co], accelerator: Accelerator, batch_size: int, **options: Any
) -> Iterator[B_co]:
    """This process's batches: over all processes every image of the split exactly once. `options` are the reader's own."""
    with ProgressBar(doing, split.num_images, quiet=not accelerator.is_main_process) as bar:
        for batch in split.eval_batches(batch_size, accelerator.process_index, accelerator.num_processes, **options):
            yield batch
            # The others are as far, but for the last batches, of which some process may have none.
            bar.moved_to(min(bar.done + len(batch.indices) * accelerator.num_processes, split.num_images))
