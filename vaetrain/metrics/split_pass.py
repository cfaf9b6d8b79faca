"""One pass over a split, shared by all processes, that says how far it is."""

from __future__ import annotations

from collections.abc import Iterator

from accelerate import Accelerator

from vaetrain.data.readers.reader import Batch, Reader
from vaetrain.progress_bar import ProgressBar


def pass_over(doing: str, reader: Reader, accelerator: Accelerator, batch_size: int) -> Iterator[Batch]:
    """This process's batches: over all processes every image of the split exactly once."""
    with ProgressBar(doing, reader.num_images, quiet=not accelerator.is_main_process) as bar:
        for batch in reader.eval_batches(batch_size, accelerator.process_index, accelerator.num_processes):
            yield batch
            # The others are as far, but for the last batches, of which some process may have none.
            bar.moved_to(min(bar.done + len(batch.indices) * accelerator.num_processes, reader.num_images))
