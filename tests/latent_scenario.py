"""What a process of several does with a set of latents."""

from pathlib import Path

from safetensors.torch import save_file

from vaetrain.data.readers.order import BatchLayout
from vaetrain.distributed import processes
from vaetrain.latents.reader import LatentReader


def read_a_share(folder: Path, out: Path) -> None:
    """This process's part of two global batches of 20, from memory that both fill."""
    accelerator = processes.start()
    with processes.finishing(accelerator):
        rank = accelerator.process_index
        layout = BatchLayout.of(20, None, rank, accelerator.num_processes)
        batches = LatentReader.open(folder, accelerator=accelerator).train_batches(1, 0, layout)
        tensors = {}
        for number in range(2):
            batch = next(batches)
            tensors |= {f"z.{number}": batch.z.contiguous(), f"indices.{number}": batch.indices}
        save_file(tensors, out / f"share-{rank}.safetensors")
