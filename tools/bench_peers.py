"""What people use today, each set up as its own documentation advises, for bench_data.py to be measured against.

Every peer reads the same JPEG bytes, shuffled, and gives batches of uint8 or float tensors of shape (b, 3, h, w).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
import webdataset
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import CenterCrop, Compose, Resize, ToTensor
from torchvision.transforms.functional import pil_to_tensor

from vaetrain.data.readers.selection import Selection


@dataclass(frozen=True)
class Material:
    """The images of a selection in the forms that peers read."""

    selection: Selection
    folder: Path
    """CLASS/NAME.jpg"""
    scratch: Path
    """Where a peer may put its own format."""

    @classmethod
    def extract(cls, selection: Selection, folder: Path) -> Material:
        """Write each image as a file."""
        classes = selection.shard_set.manifest.classes
        for name in classes:
            (folder / "images" / name).mkdir(parents=True)
        for position in range(selection.num_images):
            name = classes[int(selection.index.label[position])]
            (folder / "images" / name / f"{position:08d}.jpg").write_bytes(selection.read(position))
        return cls(selection, folder / "images", folder)

    @property
    def files(self) -> list[tuple[str, int]]:
        """Path and label of each image."""
        return list(ImageFolder(self.folder).samples)


Loader = Iterable[Any]
_RESIZE = Compose([Resize(128), CenterCrop(128)])


def image_folder(material: Material, batch_size: int, num_workers: int) -> Loader:
    """torchvision's ImageFolder: a file per image, decoded by Pillow, made float by ToTensor."""
    dataset = ImageFolder(material.folder, transform=ToTensor())
    return _loader(dataset, batch_size, num_workers, shuffle=True)


def webdataset_torchrgb(material: Material, batch_size: int, num_workers: int) -> Loader:
    """webdataset's own `decode("torchrgb")`, with a shuffle buffer as in its README."""
    selection = material.selection
    shards = [str(selection.shard_set.path(shard)) for shard in selection.shard_set.manifest.splits["train"].shards]
    dataset = (
        webdataset.WebDataset(shards, shardshuffle=False, workersplitter=webdataset.split_by_worker)
        .shuffle(1000)
        .decode("torchrgb")
        .to_tuple("jpg", "json")
        .map_tuple(_unchanged, _label)
    )
    return _loader(dataset, batch_size, num_workers)


def litdata_streaming(
    material: Material, batch_size: int, num_workers: int, decode: Callable[[bytes], Tensor] | None = None
) -> Loader:
    """litdata's StreamingDataset on local chunks of encoded bytes, decoded by torchvision."""
    import litdata

    decode = decode or _decode
    chunks = material.scratch / "litdata"
    if not chunks.exists():
        litdata.optimize(
            fn=_file_and_label, inputs=material.files, output_dir=str(chunks), chunk_bytes="64MB", num_workers=1
        )

    class Decoded(litdata.StreamingDataset):
        def __getitem__(self, index: Any) -> tuple[Tensor, int]:
            content, label = super().__getitem__(index)
            return decode(content), label

    return litdata.StreamingDataLoader(
        Decoded(str(chunks), shuffle=True), batch_size=batch_size, num_workers=num_workers, drop_last=True
    )


def hugging_face_datasets(
    material: Material, batch_size: int, num_workers: int, decode: Callable[[bytes], Tensor] | None = None
) -> Loader:
    """datasets' Arrow table of encoded bytes, random access by whole batches, decoded by torchvision."""
    import datasets

    decode = decode or _decode

    table = datasets.Dataset.from_dict(
        {
            "image": [Path(path).read_bytes() for path, _ in material.files],
            "label": [label for _, label in material.files],
        }
    )
    # Written and opened again: from memory to a memory map, as a data set of some size is used.
    table.save_to_disk(str(material.scratch / "datasets"))
    dataset = datasets.load_from_disk(str(material.scratch / "datasets")).with_transform(
        partial(_decode_columns, decode)
    )
    return _loader(dataset, batch_size, num_workers, shuffle=True)


def webdataset_resized(material: Material, batch_size: int, num_workers: int) -> Loader:
    """webdataset's `decode("pil")` of images of any size, and torchvision's Resize and CenterCrop."""
    selection = material.selection
    shards = [selection.shard_set.place(shard) for shard in selection.shard_set.manifest.splits["train"].shards]
    dataset = (
        webdataset.WebDataset(shards, shardshuffle=False, workersplitter=webdataset.split_by_worker)
        .shuffle(1000)
        .to_tuple("jpg", "cls")
        .map_tuple(_shorter_side, int)
    )
    return _loader(dataset, batch_size, num_workers)


RESIZING_PEERS: dict[str, Callable[[Material, int, int], Loader]] = {
    "webdataset": webdataset_resized,
    "litdata": lambda material, batch_size, num_workers: litdata_streaming(
        material, batch_size, num_workers, _shorter_side
    ),
    "datasets": lambda material, batch_size, num_workers: hugging_face_datasets(
        material, batch_size, num_workers, _shorter_side
    ),
}
"""The same of images of other sizes, whose shorter side is made 128 and whose middle is cut out."""


PEERS: dict[str, Callable[[Material, int, int], Loader]] = {
    "imagefolder": image_folder,
    "webdataset": webdataset_torchrgb,
    "litdata": litdata_streaming,
    "datasets": hugging_face_datasets,
}
"""How to open each peer, by the name of its package."""


def installed(name: str) -> bool:
    """Whether a peer can be measured here."""
    # Not find_spec: the folder datasets/ would do for a package of that name.
    return name == "imagefolder" or any(distribution.metadata["Name"] == name for distribution in distributions())


def endless(loader: Loader) -> Iterator[Any]:
    """Epoch after epoch."""
    while True:
        yield from loader


def _loader(dataset: Any, batch_size: int, num_workers: int, shuffle: bool | None = None) -> Loader:
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=shuffle,
        num_workers=num_workers,
        drop_last=True,
        persistent_workers=num_workers > 0,
    )


def _decode(content: bytes) -> Tensor:
    return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)


def _decode_columns(decode: Callable[[bytes], Tensor], columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {"image": [decode(content) for content in columns["image"]], "label": columns["label"]}


def _shorter_side(content: bytes) -> Tensor:
    """What torchvision's documentation has for it: Pillow, Resize, CenterCrop."""
    return pil_to_tensor(_RESIZE(Image.open(io.BytesIO(content)).convert("RGB")))


def _file_and_label(sample: tuple[str, int]) -> tuple[bytes, int]:
    path, label = sample
    return Path(path).read_bytes(), label


def _label(record: dict[str, Any]) -> int:
    return int(record["label"])


def _unchanged(value: Any) -> Any:
    return value
