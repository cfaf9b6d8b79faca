"""Encoder and decoder of a VAE as ONNX graphs that take batches of any size, compared with the model they were made of.

encoder.onnx    x (b, c, h, w) in the pixel range → mean, logvar (b, *latent); of a deterministic autoencoder mean alone
decoder.onnx    z (b, *latent) → image (b, c, h, w), E[x|z] in the pixel range
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vaetrain.model.autoencoder import VAE
from vaetrain.model.posterior import DiagonalGaussian

TOLERANCE = 1e-4
"""Largest difference, absolute or relative, between what onnxruntime computes and the model."""

BATCH_SIZES = (1, 3)
"""At which they are compared; neither is the one that the graphs were made with."""


class Encoder(nn.Module):
    """x → mean and log-variance of q(z|x)."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, x: Float[Tensor, "b c h w"]) -> tuple[Tensor, ...]:
        """See the class."""
        posterior = self.vae.encode(x)
        return (posterior.mean, posterior.logvar) if isinstance(posterior, DiagonalGaussian) else (posterior.mean,)


class Decoder(nn.Module):
    """z → E[x|z]."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, z: Float[Tensor, "b *latent"]) -> tuple[Tensor, ...]:
        """See the class."""
        return (self.vae.decode(z),)


def require_onnx() -> None:
    """Raise ValueError, naming the extra, unless what writes and runs ONNX is installed."""
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--format onnx needs {error.name}; install vaetrain[onnx]") from error


def write_onnx(vae: VAE, folder: Path) -> float:
    """Write encoder.onnx and decoder.onnx of a model on the CPU; returns the largest difference that was found.

    Raises ValueError when one differs from the model by more than TOLERANCE.
    """
    config = vae.config
    generator = torch.Generator().manual_seed(0)
    low, high = vae.likelihood.pixel_range
    shape = (config.in_channels, config.image_size, config.image_size)
    images = torch.rand(max(BATCH_SIZES), *shape, generator=generator) * (high - low) + low
    latents = torch.randn(max(BATCH_SIZES), *config.latent_shape, generator=generator)
    outputs = ["mean", "logvar"] if config.variational else ["mean"]
    vae = vae.to(memory_format=torch.contiguous_format)
    return max(
        _write(Encoder(vae), {"x": images}, outputs, folder / "encoder.onnx"),
        _write(Decoder(vae), {"z": latents}, ["image"], folder / "decoder.onnx"),
    )


def _write(module: nn.Module, inputs: dict[str, Tensor], outputs: list[str], file: Path) -> float:
    ((name, batch),) = inputs.items()
    with quiet():
        torch.onnx.export(
            module.eval(), (batch[:2],), file, input_names=[name], output_names=outputs, dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},), external_data=False, verbose=False,
        )  # fmt: skip
    import onnxruntime  # optional

    session: Any = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    largest = 0.0
    for size in BATCH_SIZES:
        with torch.no_grad():
            expected = module(batch[:size])
        for got, wanted in zip(session.run(None, {name: batch[:size].numpy()}), expected, strict=True):
            difference = (torch.from_numpy(got) - wanted).abs() / wanted.abs().clamp(min=1)
            largest = max(largest, float(difference.max()))
    if not largest <= TOLERANCE:
        raise ValueError(f"{file} differs from the model by {largest:.1e} under onnxruntime, more than {TOLERANCE:g}")
    return largest


@contextlib.contextmanager
def quiet() -> Any:
    """Without what the exporter prints about itself."""
    level = logging.getLogger("torch.onnx").level
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        try:
            yield
        finally:
            logging.getLogger("torch.onnx").setLevel(level)
