"""`Config`: everything that decides a training run, as nested frozen dataclasses; saved in the run as config.yaml.

Sections live beside what they configure (data, model, objective); those of the training loop itself live here. Nothing
here imports torch, so that `--help` and a mistyped key answer at once.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from vaetrain.data.config import DataConfig
from vaetrain.model.config import ModelConfig
from vaetrain.objective.config import ObjectiveConfig
from vaetrain.wandb_account import wandb_mode, wandb_project

PrecisionName = Literal["auto", "fp32", "tf32", "bf16", "fp16"]
BestBy = Literal["elbo", "psnr", "ssim", "lpips", "rfid", "flow-loss"]
CompileMode = Literal["auto", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its learning rate, which is a pure function of the images seen."""

    lr: float = 1e-3
    """Peak learning rate."""

    warmup_images: int = 10_000
    """Images over which the learning rate rises linearly from 0."""

    warmup_fraction: float | None = None
    """The same as a fraction of the length of training, from 0 to below 1, in place of `warmup_images`. None: those."""

    schedule: Literal["cosine", "constant"] = "cosine"
    """After warm-up: a half cosine down to `final_lr_fraction` of the peak at the end of training, or flat."""

    final_lr_fraction: float = 0.01
    """Learning rate at the end of the cosine, as a fraction of the peak."""

    beta1: float = 0.9
    """Decay of AdamW's mean of gradients."""

    beta2: float = 0.99
    """Decay of AdamW's mean of squared gradients."""

    eps: float = 1e-8
    """Added to AdamW's denominator."""

    weight_decay: float = 0.01
    """Decoupled weight decay of matrices and kernels; biases, norms and the shared σ have none."""

    clip_norm: float | None = 10.0
    """Gradients are scaled down to this norm, measured per pixel (the loss divided by the image's dimensions); None: never."""

    def __post_init__(self) -> None:
        """Refuse what would not train."""
        if self.lr <= 0:
            raise ValueError(f"--optim.lr is {self.lr}; it must be positive")
        if self.warmup_images < 0:
            raise ValueError(f"--optim.warmup-images is {self.warmup_images}; it must not be negative")
        if self.warmup_fraction is not None and not 0 <= self.warmup_fraction < 1:
            raise ValueError(f"--optim.warmup-fraction is {self.warmup_fraction}; give a fraction in [0, 1), or None")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"--optim.clip-norm is {self.clip_norm}; give a positive number, or None not to clip")

    def warmup_within(self, total_images: int) -> int:
        """Images over which the learning rate rises in a training of so many."""
        return self.warmup_images if self.warmup_fraction is None else round(self.warmup_fraction * total_images)

    def in_images(self, total_images: int) -> OptimConfig:
        """The same for a training of so many images, with a warm-up in images alone, for what scales or shortens it."""
        return replace(self, warmup_images=self.warmup_within(total_images), warmup_fraction=None)


@dataclass(frozen=True)
class RfidConfig:
    """Fréchet distance of the validation split's reconstructions from its images while training, as `evaluate.py --scores rfid`."""

    every_epochs: int | None = None
    """Epochs between two of it, at a validation; the end of training has one, too. None: never."""

    extractor: str = "inception-v3-compat"
    """Network whose features are compared, as of `--fid.extractor`. What judges never trains: not that of the perceptual term."""

    weights: Path | None = None
    """File with the weights of an extractor given by name, as `--fid.weights`."""

    def __post_init__(self) -> None:
        """Refuse an interval that means nothing, and an extractor without its file."""
        if self.every_epochs is None:
            return
        if self.every_epochs < 1:
            raise ValueError(f"--train.rfid.every-epochs is {self.every_epochs}; give at least 1, or None")
        if self.weights is None and not self.extractor.endswith(".pt"):
            raise ValueError(
                f"--train.rfid.extractor {self.extractor} needs --train.rfid.weights FILE (nothing is downloaded; "
                "`vaetrain/evaluate.py --scores rfid` says which file), or give FILE.pt as the extractor"
            )


@dataclass(frozen=True)
class LoopConfig:
    """How long, in which batches and in which arithmetic: what every training has."""

    epochs: int = 20
    """Passes over the training images."""

    num_images: int | None = None
    """Length of training in images, in place of `epochs`; rounded up to whole global batches."""

    global_batch_size: int = 64
    """Images per optimizer step over all processes: what the mathematics sees."""

    micro_batch_size: int | None = None
    """Images one process handles at a time; gradients accumulate to the global batch. None: no accumulation."""

    precision: PrecisionName = "auto"
    """Arithmetic of the network; densities, weights and optimizer stay fp32. auto: that of the run that is resumed; otherwise bf16
    where all devices compute it natively (GPUs from compute capability 8.0, CPUs on which it is measured to be faster), else
    fp32. fp32 is IEEE; tf32 rounds the factors of its products to 10 bits of mantissa (GPUs from 8.0). fp16 needs a GPU."""

    deterministic: bool = False
    """Use only algorithms that give the same bits every time: then resumes and reruns are exact on GPUs, too. Slower there. CPUs
    are exact without."""

    compile: bool | CompileMode = "auto"
    """Compile the model: a minute or more at the start for a faster step. True and default: fused kernels. reduce-overhead: also
    without the time to launch each, for small micro-batches. max-autotune: also the fastest of several kernels, after many
    minutes; with -no-cudagraphs launched one by one. auto: that of the run that is resumed; otherwise default on a GPU where
    there is a C compiler, and False on a CPU."""

    gradient_compression: Literal["bf16"] | None = None
    """Send gradients between processes in bf16: half the traffic, and two digits less of each. None: as they are, in fp32."""

    ema_half_life_images: int = 50_000
    """Images after which a weight's share in the exponential moving average has halved; 0: the average is the weights."""

    val_every_epochs: int = 1
    """Epochs between validations; the end of training always has one."""

    max_hours: float | None = None
    """Hours after which training has saved and stopped, to be started again (exit code 75), such as a batch system gives; None:
    no limit."""

    patience: int | None = None
    """Stop after this many validations without a better score. None: never."""

    skip_above: float | None = 100.0
    """Skip a step whose gradient norm is over this many times the geometric mean of recent ones, once 50 steps were taken.
    None: only steps whose loss or gradient is not finite are skipped. A skipped step changes no weight."""

    max_nonfinite_steps: int = 20
    """When this many steps in a row were skipped, go back to the last checkpoint from before them with a lower learning
    rate; the second time, stop."""

    rollback_lr_factor: float | None = 0.5
    """Factor on the learning rate, from then on, when going back. None: never go back, stop the first time."""

    timeout_s: float = 600.0
    """Seconds without progress in any process after which the run ends with a message that says which process hangs, and
    where. Longer than the slowest step, data wait and checkpoint."""

    start_timeout_s: float = 1800.0
    """The same before the first step. Longer than opening the data takes, with `--data.verify full` reading them all, and
    checking and loading a checkpoint."""

    def __post_init__(self) -> None:
        """Refuse lengths and batches that mean nothing."""
        if self.compile is True:  # as configs of older runs have it
            object.__setattr__(self, "compile", "default")
        for name in ("epochs", "global_batch_size", "val_every_epochs", "max_nonfinite_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--train.{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        for name in ("num_images", "micro_batch_size", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--train.{name.replace('_', '-')} is {value}; give at least 1, or None")
        if self.skip_above is not None and self.skip_above <= 1:
            raise ValueError(f"--train.skip-above is {self.skip_above}; give a factor above 1, or None for never")
        if self.rollback_lr_factor is not None and not 0 < self.rollback_lr_factor <= 1:
            raise ValueError(
                f"--train.rollback-lr-factor is {self.rollback_lr_factor}; give a factor in (0, 1], or None not to go back"
            )
        if self.max_hours is not None and self.max_hours <= 0:
            raise ValueError(f"--train.max-hours is {self.max_hours}; give a positive number, or None for no limit")
        for name in ("timeout_s", "start_timeout_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--train.{name.replace('_', '-')} is {getattr(self, name)}; it must be positive")
        if self.ema_half_life_images < 0:
            raise ValueError(f"--train.ema-half-life-images is {self.ema_half_life_images}; give 0 for no EMA")


@dataclass(frozen=True)
class TrainConfig(LoopConfig):
    """The same of a VAE, and which part of it is trained and what counts as best."""

    only: Literal["all", "encoder", "decoder"] = "all"
    """The part that is trained; the other keeps its weights, those of `--init-from`, to the bit. The likelihood's own parameters,
    such as σ, go with the decoder."""

    best_by: Literal["elbo", "psnr", "ssim", "lpips", "rfid"] = "elbo"
    """What the best checkpoint, and patience, go by: the highest validation elbo, psnr or ssim, or the lowest lpips (with
    --objective.perceptual.weight) or rfid (with --train.rfid.every-epochs). With terms beyond the ELBO it is no longer what is
    minimised."""

    rfid: RfidConfig = field(default_factory=RfidConfig)

    def __post_init__(self) -> None:
        """Refuse a score that is not computed."""
        super().__post_init__()
        if self.best_by == "rfid" and self.rfid.every_epochs is None:
            raise ValueError("--train.best-by rfid needs --train.rfid.every-epochs, and the extractor's file")


@dataclass(frozen=True)
class LogConfig:
    """What is written down while training; metrics.jsonl and figures always are."""

    every_steps: int = 50
    """Steps between training records (a validation has one too); each is the mean since the last record and costs one
    host-device synchronisation."""

    noise_scale: bool = False
    """Also measure the gradient noise scale (docs/scaling.md): for several processes, or with accumulation; not in fp16."""

    num_pictures: int = 32
    """Images in the sample grid, and twice the images in the reconstruction grid."""

    wandb: Literal["disabled", "offline", "online"] = field(default_factory=wandb_mode)
    """Also log to Weights & Biases: `offline` writes under the run directory for `wandb sync`. Not given: what the environment's
    WANDB_MODE says, if it says anything."""

    wandb_project: str = field(default_factory=wandb_project)
    """Weights & Biases project. Not given: the environment's WANDB_PROJECT, or vaetrain."""

    tensorboard: bool = False
    """Also log to TensorBoard, under the run directory."""

    @property
    def trackers(self) -> list[str]:
        """Accelerate's names of the trackers asked for."""
        return [*(["wandb"] if self.wandb != "disabled" else []), *(["tensorboard"] if self.tensorboard else [])]

    def __post_init__(self) -> None:
        """Refuse intervals that mean nothing."""
        if "/" in self.wandb_project or self.wandb_project in ("", ".", ".."):
            raise ValueError(
                f"--log.wandb-project is {self.wandb_project!r}; it is a name, also of TensorBoard's folder"
            )
        if self.every_steps < 1:
            raise ValueError(f"--log.every-steps is {self.every_steps}; it must be at least 1")
        if self.num_pictures < 1:
            raise ValueError(f"--log.num-pictures is {self.num_pictures}; it must be at least 1")


@dataclass(frozen=True)
class CheckpointConfig:
    """When a checkpoint is written, and which ones stay."""

    every_steps: int | None = None
    """Optimizer steps between checkpoints; the best validation and the end of training always have one. None: at every
    validation."""

    keep_last: int = 2
    """Newest checkpoints kept, besides the best."""

    keep_every_images: int | None = None
    """Also keep for ever the first checkpoint at or after each multiple of this many images. None: none."""

    def __post_init__(self) -> None:
        """The newest checkpoint is what a run resumes from."""
        if self.keep_last < 1:
            raise ValueError(f"--checkpoint.keep-last is {self.keep_last}; at least the newest checkpoint must stay")
        for name in ("every_steps", "keep_every_images"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--checkpoint.{name.replace('_', '-')} is {value}; give at least 1, or None")


@runtime_checkable  # for the type checks of the tests
class TrainingConfig(Protocol):
    """What the configs of all trainings have, of a VAE or of a prior."""

    @property
    def optim(self) -> OptimConfig:
        """AdamW."""
        ...

    @property
    def train(self) -> LoopConfig:
        """The loop."""
        ...

    @property
    def log(self) -> LogConfig:
        """Records."""
        ...

    @property
    def checkpoint(self) -> CheckpointConfig:
        """What is kept."""
        ...

    @property
    def run_dir(self) -> Path:
        """Where."""
        ...

    @property
    def seed(self) -> int:
        """Of all randomness."""
        ...

    @property
    def resume(self) -> str:
        """From where it may go on."""
        ...

    @property
    def init_from(self) -> Path | None:
        """Weights to start from."""
        ...

    @property
    def best_by(self) -> BestBy:
        """What the best checkpoint goes by."""
        ...

    def fixed(self) -> dict[str, Any]:
        """What a resume may not change, by option."""
        ...


@dataclass(frozen=True)
class Config:
    """One training run."""

    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    run_dir: Path = Path("runs/unnamed")
    """Folder of this run: config, provenance, metrics, checkpoints and figures. Environment variables ($WANDB_RUN_ID) in it are
    filled in."""

    seed: int = 0
    """Decides initial weights, order of images, flips and latent noise."""

    resume: str = "auto"
    """`auto`: go on from the run directory's newest good checkpoint, if it has one. `never`: refuse a run directory that
    has one. A path to a run or a checkpoint: go on from that one, unless the run directory has its own."""

    init_from: Path | None = None
    """Weights to start from when there is nothing to resume: a run (its best checkpoint), a checkpoint, an export, or the folder of
    a diffusers AutoencoderKL (docs/first_stage.md). Optimizer and progress start afresh; the average starts from the averaged
    weights, and with `--train.only` so do the weights."""

    def __post_init__(self) -> None:
        """Fill in the run directory and the size of images that are resized; seeds are counted from 0."""
        if self.data.resize != "none":
            object.__setattr__(self, "data", replace(self.data, image_size=self.model.image_size))
        if self.log.noise_scale and self.train.precision == "fp16":
            raise ValueError("--log.noise-scale cannot read fp16's scaled gradients; use --train.precision bf16")
        if self.log.noise_scale and self.train.gradient_compression:
            raise ValueError(
                "--log.noise-scale reads gradients while they are reduced as they are, and --train.gradient-compression "
                f"{self.train.gradient_compression} sends others; use one of the two"
            )
        if self.train.best_by == "lpips" and not self.objective.perceptual.weight:
            raise ValueError(
                "--train.best-by lpips needs --objective.perceptual.weight above 0, which has the network for it"
            )
        adversarial = self.objective.adversarial
        if self.train.only == "encoder" and adversarial.weight and adversarial.adaptive:
            raise ValueError(
                "--objective.adversarial.adaptive compares gradients at the decoder's last layer, which --train.only encoder "
                "freezes; give --objective.adversarial.adaptive False and a weight in nats"
            )
        if self.train.only != "all" and self.init_from is None and self.resume in ("auto", "never"):
            raise ValueError(
                f"--train.only {self.train.only} freezes the rest at random; name its weights with --init-from"
            )
        if self.seed < 0:
            raise ValueError(f"--seed is {self.seed}; it must not be negative")
        object.__setattr__(self, "run_dir", filled_in(self.run_dir))

    @property
    def best_by(self) -> BestBy:
        """See `TrainConfig`."""
        return self.train.best_by

    def fixed(self) -> dict[str, Any]:
        """See `TrainingConfig.fixed`."""
        return {
            "--model.*": self.model.without_checkpointing,
            "--seed": self.seed,
            "--train.only": self.train.only,
            "--train.global-batch-size": self.train.global_batch_size,
            "--data.classes": self.data.classes,
        }


def filled_in(run_dir: Path) -> Path:
    """A run directory with its environment variables filled in; raises ValueError for one that is not set."""
    filled = os.path.expandvars(run_dir)
    if unset := re.search(r"\$\w+|\$\{\w+\}", filled):
        raise ValueError(f"--run-dir is {run_dir}, and the environment has no {unset.group()}")
    return Path(filled)
