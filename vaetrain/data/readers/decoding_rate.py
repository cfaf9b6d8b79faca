"""How many images a second the workers of a process decode, measured on the set itself."""

from __future__ import annotations

import time
from contextlib import suppress

import numpy as np

from vaetrain.data.readers.batch import decode_image
from vaetrain.data.readers.selection import Selection
from vaetrain.data.readers.worker_progress import ReaderProgress, end_process, stuck_message, watched

MEASURED_S = 0.25
MOST_IMAGES = 1000


def decoding_rate(selection: Selection, num_workers: int, timeout_s: float) -> float:
    """Images a second of so many workers (0: of the process itself), from reading and decoding some of the split in this thread.

    They are spread evenly over it. Damaged ones count: whoever wants them later names them.
    """
    progress, out = ReaderProgress(1), np.empty(selection.image_shape, np.uint8)

    def decode(position: int) -> None:
        with suppress(ValueError):
            decode_image(selection, selection.read(position), position, out=out)

    def end(reader: int) -> None:
        end_process(stuck_message(progress, reader, selection.where, timeout_s))

    num_tried = min(selection.num_images, MOST_IMAGES)
    positions = np.linspace(0, selection.num_images - 1, num_tried).astype(int).tolist()
    with watched(progress, timeout_s, end), progress.reader(0):
        decode(positions[0])  # loads what decodes
        num_decoded, began = 0, time.perf_counter()
        for position in positions:
            decode(position)
            num_decoded += 1
            seconds = time.perf_counter() - began
            if seconds > MEASURED_S:
                break
    return max(1, num_workers) * num_decoded / seconds
