"""`PriorTraining`: everything that decides the training of a flow-matching prior, saved in its run as config.yaml.

Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vaetrain.config import CheckpointConfig, LogConfig, LoopConfig, OptimConfig, filled_in

DEFAULT_RUN_DIR = Path("FIRST_STAGE/priors/flow-matching")


@dataclass(frozen=True)
class NetworkConfig:
    """A small transformer over the patches of a spatial latent (DiT), or residual layers for a latent vector."""

    width: int = 256
    """Features of a token, or of a layer; a multiple of 4 and of `heads`."""

    depth: int = 8
    """Blocks."""

    heads: int = 4
    """Of the attention; a latent vector has none."""

    patch_size: int = 2
    """Side of the patches of a spatial latent that become tokens."""

    dropout: float = 0.0
    """Of each block's features: against learning a small set by heart."""

    def __post_init__(self) -> None:
        """Refuse what no network has."""
        for name in ("width", "depth", "heads", "patch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--model.{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if self.width % 4 or self.width % self.heads:
            raise ValueError(f"--model.width is {self.width}; give a multiple of 4 and of --model.heads {self.heads}")
        if self.width > 2**14 or self.depth > 2**8:
            raise ValueError(f"--model.width {self.width} and --model.depth {self.depth}: at most 16384 and 256")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--model.dropout is {self.dropout}; give a fraction in [0, 1)")

    def check_latent(self, latent_shape: tuple[int, ...]) -> None:
        """Raise ValueError unless the patches tile latents of this shape."""
        if len(latent_shape) == 3 and any(side % self.patch_size for side in latent_shape[1:]):
            raise ValueError(
                f"--model.patch-size {self.patch_size} does not divide the latent's {latent_shape[1]} × {latent_shape[2]} places"
            )


@dataclass(frozen=True)
class FlowObjectiveConfig:
    """Squared error of the velocity on the straight line from noise to a latent, mean over dimensions (Lipman et al. 2023)."""

    time: Literal["log-normal", "uniform"] = "log-normal"
    """How often each time in (0, 1) is trained: sigmoid of a standard normal (Esser et al. 2024), or all alike."""

    label_dropout: float = 0.1
    """Share of latents whose class is withheld, for guidance; 1: the prior knows no classes."""

    def __post_init__(self) -> None:
        """Refuse what is no share."""
        if not 0 <= self.label_dropout <= 1:
            raise ValueError(f"--objective.label-dropout is {self.label_dropout}; give a fraction in [0, 1]")


@dataclass(frozen=True)
class LatentDataConfig:
    """The latents that the prior is trained on."""

    latents: Path | None = None
    """Folder that vaetrain/encode.py wrote of the first stage's best checkpoint. None: RUN_DIR/latents, encoded at the start, with
    mirrored twins where the first stage was trained with mirrored images."""

    images: str | None = None
    """Shard set to encode when there is none: that of the first stage, if it has moved. None: where the first stage found it."""

    resident_gib: float = 4.0
    """Latents are kept in memory up to this size, once for the processes of a node."""


@dataclass(frozen=True)
class PriorTraining:
    """One training of a prior."""

    first_stage: Path
    """Run directory of the trained VAE whose latents are modelled; its best checkpoint."""

    data: LatentDataConfig = field(default_factory=LatentDataConfig)
    model: NetworkConfig = field(default_factory=NetworkConfig)
    objective: FlowObjectiveConfig = field(default_factory=FlowObjectiveConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(warmup_images=5_000, beta2=0.999, clip_norm=1.0))
    train: LoopConfig = field(default_factory=lambda: LoopConfig(epochs=100))
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    run_dir: Path = DEFAULT_RUN_DIR
    """Folder of this training: config, provenance, metrics, checkpoints and figures. FIRST_STAGE stands for `first_stage`."""

    seed: int = 0
    """Decides initial weights, order of latents, their noise, times and dropped labels."""

    resume: str = "auto"
    """As of vaetrain/train.py."""

    def __post_init__(self) -> None:
        """Fill in the run directory; seeds are counted from 0."""
        if self.seed < 0:
            raise ValueError(f"--seed is {self.seed}; it must not be negative")
        place, *further = self.run_dir.parts or ("",)
        run_dir = self.first_stage.joinpath(*further) if place == "FIRST_STAGE" else self.run_dir
        object.__setattr__(self, "run_dir", filled_in(run_dir))

    @property
    def init_from(self) -> None:
        """A prior begins with its own weights."""
        return None

    @property
    def best_by(self) -> Literal["flow-loss"]:
        """The loss of held-out latents."""
        return "flow-loss"

    def fixed(self) -> dict[str, Any]:
        """See `TrainingConfig.fixed`."""
        return {
            "--model.*": self.model,
            "--objective.*": self.objective,
            "--seed": self.seed,
            "--train.global-batch-size": self.train.global_batch_size,
        }
