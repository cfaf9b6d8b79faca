"""What the order of the images depends on besides the seed, so that a resume within an epoch can tell whether it goes on.

The stream reader deals each epoch out by processes, workers and micro-batches; all others read in one order, whoever reads.
"""

from __future__ import annotations

from dataclasses import dataclass

from vaetrain.data.readers.order import BatchLayout
from vaetrain.data.readers.stream import StreamReader


@dataclass(frozen=True)
class ReadOrder:
    """Who reads which images in what order; kept in every checkpoint's state.json."""

    reader: str
    """"stream", or "any" for the readers whose order depends on nothing else."""
    num_processes: int
    num_workers: int
    """Of each process that decode; one where the process itself does."""
    micro_batch_size: int

    @classmethod
    def of(cls, reader: object, layout: BatchLayout) -> ReadOrder:
        """That of a training which reads with `reader`."""
        if not isinstance(reader, StreamReader):
            return cls("any", layout.num_processes, 1, layout.micro_batch_size)
        return cls("stream", layout.num_processes, max(1, reader.num_workers), layout.micro_batch_size)

    def is_resumable_from(self, before: ReadOrder) -> bool:
        """Whether the images that `before` has not read of an epoch are those that this reads from the same position on."""
        return self == before or self.reader == before.reader == "any"

    def __str__(self) -> str:
        """For messages: the options that bring it about."""
        if self.reader == "any":
            return "a reader other than stream"
        return (
            f"--data.reader stream --data.num-workers {self.num_workers} --train.micro-batch-size {self.micro_batch_size} on "
            f"{self.num_processes} process(es)"
        )
