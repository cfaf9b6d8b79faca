"""What is trained, and on what: all of a training that is not its loop (vaetrain/train.py)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from accelerate import Accelerator

from vaetrain.config import TrainingConfig
from vaetrain.data.readers.order import BatchLayout
from vaetrain.runs.directory import RunDirectory
from vaetrain.runs.provenance import DataSummary
from vaetrain.training.checkpoint import Stateful
from vaetrain.training.control import Control
from vaetrain.training.gradient_step import GradientStep
from vaetrain.training.logger import RunLogger, Scores
from vaetrain.training.progress import Progress
from vaetrain.training.schedule import LoopSchedule

SPLITS: tuple[Literal["train", "val"], ...] = ("train", "val")


@runtime_checkable  # for the type checks of the tests
class TrainingReader(Protocol):
    """Batches of a split, of images or of latents."""

    num_images: int
    description: str

    @property
    def manifest(self) -> DataSummary:
        """Of the data."""
        ...

    def train_batches(self, seed: int, images_seen: int, layout: BatchLayout) -> Iterator[Any]:
        """Endless micro-batches of this process from a position on."""
        ...


class Validation(NamedTuple):
    """What a validation found."""

    score: float | None
    """What the best checkpoint goes by, higher being better; None where it was not computed."""
    scores: Mapping[str, Scores]
    """By prefix of their names in the record."""


class Stage(ABC):
    """Data, model, schedule, validation and pictures of one kind of training."""

    step: GradientStep[Any]
    schedule: LoopSchedule
    train_reader: TrainingReader
    val_reader: TrainingReader
    unit: str
    """Of the loss, after its number."""
    adversary: Stateful | None = None
    """What else a checkpoint holds."""

    def __init__(self, config: TrainingConfig, layout: BatchLayout, accelerator: Accelerator) -> None:
        self.config = config
        self.layout = layout
        self.accelerator = accelerator

    @abstractmethod
    def open_data(self, opened: ExitStack) -> None:
        """Open the readers, until `opened` closes, and make the schedule. A collective; raises ValueError or FileNotFoundError."""

    @abstractmethod
    def build_model(self) -> None:
        """Make the step, with seeded weights. A collective."""

    @abstractmethod
    def start_from(self, source: Path) -> None:
        """Load the weights of `--init-from`."""

    @abstractmethod
    def flops_per_image(self) -> float:
        """Floating-point operations of one image's forward and backward pass."""

    @abstractmethod
    def begin(self, run: RunDirectory) -> None:
        """The run directory is ours: prepare pictures and scores."""

    @abstractmethod
    def validate(self, progress: Progress, control: Control) -> Validation:
        """Score the held-out split. A collective."""

    @abstractmethod
    def draw(self, logger: RunLogger, progress: Progress, *, at_end: bool) -> None:
        """Draw the run's figures; for the main process alone."""

    def finish(self, run: RunDirectory) -> None:
        """Training has come to its end, and its checkpoints are on disk. A collective."""
        return  # for most there is nothing left to do
