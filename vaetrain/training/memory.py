"""Which micro-batch fits into memory: tried out on dummy data, with all that training keeps there besides."""

from __future__ import annotations

import gc
import itertools
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vaetrain.config import Config, PrecisionName, TrainingConfig
from vaetrain.data.config import DataConfig
from vaetrain.data.format.shard_set import ShardSet
from vaetrain.data.readers.batch import Batch
from vaetrain.data.readers.choose import choose_reader
from vaetrain.data.readers.order import BatchLayout
from vaetrain.data.readers.resident import DEVICE_MEMORY_SHARE
from vaetrain.data.readers.selection import Selection
from vaetrain.data.remote.remote import is_remote
from vaetrain.model.autoencoder import VAE, ElboTerms
from vaetrain.training.adversarial import Adversary
from vaetrain.training.compilation import compile_in_place
from vaetrain.training.ema import ExponentialMovingAverage
from vaetrain.training.optimizer import build_optimizer
from vaetrain.training.perceptual import loss_terms
from vaetrain.training.precision import resolved
from vaetrain.training.step import TrainStep, keeps_features

GIB = 2**30

ADVICE_S = 120.0
"""For trying out what fits, after which the error goes without: a device may wait for ever for a process that is gone, too."""


@dataclass(frozen=True)
class FitResult:
    """What trying some micro-batch sizes showed."""

    largest: int | None
    """The largest that fits, None if not even the smallest does."""
    peak_gib: float | None
    """What the device's allocator reserved for it at most, in GiB; None on a CPU."""
    too_large: int | None
    """The smallest that was tried and does not fit."""


def largest_that_fits(config: Config, accelerator: Accelerator, sizes: list[int]) -> FitResult:
    """The largest of `sizes` with which two steps of training fit into what memory is free now; found by bisection.

    No collective: every process may try for itself, or one alone.
    """
    sizes = sorted(sizes)
    fit = FitResult(None, None, None)
    below, above = -1, len(sizes)  # positions known to fit and not to
    while above - below > 1:
        middle = (below + above) // 2
        peak_gib = peak_memory(config, accelerator, sizes[middle])
        if peak_gib is None:
            above, fit = middle, FitResult(fit.largest, fit.peak_gib, sizes[middle])
        else:
            below, fit = middle, FitResult(sizes[middle], peak_gib or None, fit.too_large)
    return fit


def peak_memory(config: Config, accelerator: Accelerator, micro_batch_size: int) -> float | None:
    """GiB that two steps of training take at most, 0 on a CPU, where nobody counts; None if they do not fit."""
    release_memory(accelerator)
    try:
        # Uncompiled: compiling takes a minute for each size.
        uncompiled = replace(config, train=replace(config.train, compile=False))
        train_on_dummies(uncompiled, accelerator, micro_batch_size)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None
    finally:
        reserved = torch.cuda.max_memory_reserved() / GIB if accelerator.device.type == "cuda" else 0.0
        release_memory(accelerator)
    return reserved


def train_on_dummies(
    config: Config, accelerator: Accelerator, micro_batch_size: int, num_steps: int = 2
) -> list[float]:
    """Steps of training on black images, and the seconds of each: from the second on there are the optimizer's moments too."""
    config = resolved(config, accelerator)
    device, model = accelerator.device, config.model
    step = step_alone(config, device, BatchLayout(micro_batch_size, micro_batch_size, rank=0, num_processes=1))
    kept = [
        # DDP's buckets hold every gradient once more.
        [torch.empty_like(w) for w in step.vae.parameters() if w.requires_grad]
        if accelerator.num_processes > 1
        else None,
        torch.empty(data_bytes_on(device, config.data), dtype=torch.uint8, device=device),
    ]
    images = torch.zeros(micro_batch_size, model.in_channels, model.image_size, model.image_size, dtype=torch.uint8)
    numbers = torch.zeros(micro_batch_size, dtype=torch.int64)
    batches = itertools.repeat(Batch(images, numbers, numbers))
    seconds = []
    for number in range(num_steps):
        start = time.perf_counter()
        weights = config.objective.beta, config.objective.adversarial.weight or None
        step.accumulate(batches, number * micro_batch_size, *weights)
        step.update(config.optim.lr, (number + 1) * micro_batch_size)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    kept.clear()
    return seconds


def step_alone(config: Config, device: torch.device, layout: BatchLayout) -> TrainStep:
    """A new model and all that trains it in this process, in the arithmetic and compiled as `config` says; nothing is skipped."""
    vae = VAE(config.model).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    vae.keeps_features = keeps_features(config)
    vae.train_only(config.train.only)
    ema = ExponentialMovingAverage(vae, config.train.ema_half_life_images)
    if config.train.compile:
        compile_in_place(vae, config.train.compile)
    engine = ThisProcess(device, config.train.precision)
    optimizer = ScaledOptimizer(build_optimizer(vae, config.optim), engine.scaler)
    return TrainStep(
        config, layout, engine, vae, InArithmetic(vae, config.train.precision), optimizer, ema,
        terms=loss_terms(config, vae.likelihood, device),
        adversary=Adversary(config, layout, vae, device, None) if config.objective.adversarial.weight else None,
    )  # fmt: skip


class ThisProcess:
    """What a step needs of Accelerate, without the other processes and in an arithmetic of its own."""

    def __init__(self, device: torch.device, precision: PrecisionName) -> None:
        self.device = device
        # With a scale at which no step overflows and is skipped: the first makes the optimizer's moments.
        self.scaler = torch.amp.GradScaler(device.type, init_scale=1.0, enabled=precision == "fp16")

    def no_sync(self, model: nn.Module) -> AbstractContextManager[None]:
        """Nothing: there is nobody to be in step with."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss."""
        self.scaler.scale(loss).backward()

    def clip_grad_norm_(self, parameters: Iterator[nn.Parameter], max_norm: float) -> Tensor:
        """Scale the gradients down to this norm."""
        return nn.utils.clip_grad_norm_(parameters, max_norm)


class ScaledOptimizer:
    """An optimizer whose step is the gradient scaler's, as Accelerate's is."""

    def __init__(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups
        self.zero_grad = optimizer.zero_grad
        self._scaler = scaler

    def step(self) -> None:
        """Update the weights."""
        self._scaler.step(self.optimizer)
        self._scaler.update()


class InArithmetic(nn.Module):
    """A model whose forward pass is in this precision, whatever the accelerator's own is."""

    def __init__(self, vae: VAE, precision: PrecisionName) -> None:
        super().__init__()
        self.vae = vae
        self.precision = precision

    def forward(self, x: Tensor, noise: Tensor) -> ElboTerms:
        """The terms of the ELBO."""
        with arithmetic(x.device, self.precision):
            return self.vae(x, noise)


def arithmetic(device: torch.device, precision: PrecisionName) -> torch.autocast:
    """Autocast of this precision, whatever the accelerator's own is."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def data_bytes_on(device: torch.device, config: DataConfig) -> int:
    """Bytes of images that the resident reader keeps on a GPU."""
    if device.type != "cuda":
        return 0
    num_bytes = 0
    for split in ("train", "val"):
        location = config.location(split)
        if not is_remote(location):
            shard_set = ShardSet.open(location).resized_to(config.resized_to)
            selection = Selection.of(shard_set, split, config.classes)
            resident = choose_reader(config, selection, remote=False)[0] == "resident"
            if resident and selection.decoded_bytes <= DEVICE_MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]:
                num_bytes += selection.decoded_bytes
    return num_bytes


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed: on a GPU, or on the CPU, where PyTorch has no class for it."""
    words = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in words or "DefaultCPUAllocator" in words


def release_memory(accelerator: Accelerator) -> None:
    """Give the device's memory back, what Accelerate remembers of models included."""
    accelerator.free_memory()
    gc.collect()
    if accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@contextmanager
def suggest_on_oom(config: TrainingConfig, accelerator: Accelerator) -> Iterator[None]:
    """Turn running out of memory inside into a ValueError that says which `--train.micro-batch-size` would fit."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        problem = str(error).splitlines()[0]
        # The traceback holds the frames of the training loop, and with them weights and activations.
        traceback.clear_frames(error.__traceback__)
    else:
        return
    raise ValueError(f"{advice_in_time(config, accelerator)} ({problem})")


def advice_in_time(config: TrainingConfig, accelerator: Accelerator) -> str:
    """`advice`, or that there is none: whatever waits for a device that runs another process's unfinished sum waits for ever.

    All of it does, giving memory back too, and when memory runs out it often does on several processes at once.
    """
    if not isinstance(config, Config):  # there is nothing that tries out other models
        failed = failed_micro_batch(config, accelerator)
        return f"out of memory with {failed} latents at a time in each process; lower --train.micro-batch-size"
    seconds = min(ADVICE_S, config.train.timeout_s / 2)  # before the watchdog finds that nothing goes on
    own_device = accelerator.device if accelerator.device.type == "cuda" else -1
    said: Future[str] = Future()

    def try_out() -> None:
        try:
            with torch.cuda.device(own_device):  # a thread begins with the first
                said.set_result(advice(config, accelerator))
        except BaseException as error:
            said.set_exception(error)

    # A daemon: one that blocks for good ends with the process.
    threading.Thread(target=try_out, name="advice", daemon=True).start()
    try:
        return said.result(seconds)
    except FutureTimeout:
        return (
            f"out of memory with {failed_micro_batch(config, accelerator)} images at a time in each process; what fits could not "
            f"be tried out, the device did not answer within {seconds:g} s: lower --train.micro-batch-size"
        )


def advice(config: Config, accelerator: Accelerator) -> str:
    """What ran out of memory, and the micro-batch size that does not."""
    per_process = config.train.global_batch_size // accelerator.num_processes
    failed = failed_micro_batch(config, accelerator)
    sizes = [size for size in range(1, failed) if per_process % size == 0]
    fit = largest_that_fits(config, accelerator, sizes)
    said = f"out of memory with {failed} images at a time in each process"
    if fit.largest is None:
        return f"{said}, and not even --train.micro-batch-size 1 fits: use a smaller model or --train.precision bf16"
    peak = ""
    if fit.peak_gib is not None:
        total = torch.cuda.get_device_properties(accelerator.device).total_memory / GIB
        peak = f" (peak {fit.peak_gib:.1f} of {total:.1f} GiB)"
    return f"{said}; --train.micro-batch-size {fit.largest} fits{peak}, {fit.too_large or failed} does not"


def failed_micro_batch(config: TrainingConfig, accelerator: Accelerator) -> int:
    """Images that a process took at a time."""
    return config.train.micro_batch_size or config.train.global_batch_size // accelerator.num_processes
