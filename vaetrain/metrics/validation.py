"""ELBO and reconstruction scores of a split: every image exactly once, the same for any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from vaetrain.config import BestBy
from vaetrain.data.readers.reader import Batch, Reader
from vaetrain.distributed.processes import sum_over_processes
from vaetrain.distributed.randomness import noise_of_images
from vaetrain.metrics.reconstruction import mse, psnr_db, ssim
from vaetrain.metrics.split_pass import pass_over
from vaetrain.model.autoencoder import VAE
from vaetrain.objective.elbo import rate
from vaetrain.upload import upload


@runtime_checkable  # for the type checks of the tests
class Comparison(Protocol):
    """What a term of the loss beyond the ELBO has to say of reconstructions."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of its numbers, below val/."""
        ...

    def compare(
        self, recon: Float[Tensor, "b c h w"], image: Float[Tensor, "b c h w"]
    ) -> tuple[Float[Tensor, " b"], ...]:
        """Its numbers for each image; both on the [0, 1] scale."""
        ...


@dataclass(frozen=True)
class ValidationScores:
    """Means over all images of a split."""

    elbo_nats: float | None
    """−distortion − rate; None for a deterministic autoencoder, which bounds no likelihood."""
    distortion_nats: float
    """−log p(x|z) at one z ~ q(z|x) whose noise depends on (seed, image) alone."""
    rate_nats: float
    """KL(q(z|x) ‖ p(z))."""
    bits_per_dim: float | None
    """Minus the ELBO per channel and pixel, see `Likelihood.bits_per_dim`; None where there is no ELBO."""
    mse: float
    """Mean squared error on [0, 1] between image and decoded posterior mode; psnr_db and ssim are of the same pair."""
    psnr_db: float
    """Mean over images of each image's peak signal-to-noise ratio."""
    ssim: float
    """Mean over images of each image's structural similarity."""
    further: Mapping[str, float] = field(default_factory=dict)
    """Means over images of what the terms beyond the ELBO find, of the same pair; rfid, where it was computed."""

    @property
    def record(self) -> dict[str, float | None]:
        """By name, as training logs them."""
        scores = asdict(self)
        further = scores.pop("further")
        return scores | further

    @property
    def in_words(self) -> str:
        """For the terminal."""
        psnr = f"PSNR {self.psnr_db:.2f} dB"
        if self.elbo_nats is None:
            return psnr
        return f"ELBO {self.elbo_nats:,.1f} nats  {self.bits_per_dim:.3f} bits/dim  {psnr}"

    def with_further(self, **values: float) -> ValidationScores:
        """With more of them."""
        return replace(self, further={**self.further, **values})

    def score(self, by: BestBy) -> float | None:
        """By which checkpoints are compared, higher being better; None where it was not computed.

        elbo is −(distortion + rate): the ELBO, or a deterministic autoencoder's log-density.
        """
        match by:
            case "elbo":
                return -(self.distortion_nats + self.rate_nats)
            case "psnr":
                return self.psnr_db
            case "ssim":
                return self.ssim
            case _:
                distance = self.further.get(by)
                return None if distance is None else -distance


@torch.no_grad()
def validate(
    vae: VAE,
    reader: Reader,
    accelerator: Accelerator,
    batch_size: int,
    seed: int,
    each: Callable[[Iterator[Batch]], Iterator[Batch]] = iter,
    comparisons: Sequence[Comparison] = (),
) -> ValidationScores:
    """Score every image of the reader's split exactly once, whatever the number of processes. A collective.

    The batches go through `each`, such as the signs of life of a training loop.
    """
    names = [name for comparison in comparisons for name in comparison.names]
    sums = torch.zeros(6 + len(names), dtype=torch.float64, device=accelerator.device)
    for batch in each(pass_over("validation", reader, accelerator, batch_size)):
        x = vae.from_uint8(upload(batch.images, accelerator.device)).contiguous(memory_format=torch.channels_last)
        noise = upload(noise_of_images(seed, batch.indices.tolist(), vae.config.latent_shape), x.device)
        with accelerator.autocast():
            # Uncompiled: without gradients, and for the last batch's size, a compiled model would compile anew.
            terms = vae.forward(x, noise)
            recon = vae.likelihood.to_unit(vae.reconstruct(x))
        unit = vae.likelihood.to_unit(x)
        scores: tuple[Tensor, ...] = (
            terms.distortion, rate(terms.kl), mse(recon, unit), psnr_db(recon, unit), ssim(recon, unit),
            *(values for comparison in comparisons for values in comparison.compare(recon, unit)),
            torch.ones_like(terms.distortion),
        )  # fmt: skip
        sums += torch.stack([score.double().sum() for score in scores])
    *totals, count = sum_over_processes(accelerator, sums).tolist()
    distortion, mean_rate, mean_mse, mean_psnr, mean_ssim, *rest = (total / count for total in totals)
    elbo = -distortion - mean_rate if vae.config.variational else None
    return ValidationScores(
        elbo_nats=elbo,
        distortion_nats=distortion,
        rate_nats=mean_rate,
        bits_per_dim=None if elbo is None else vae.likelihood.bits_per_dim(-elbo, vae.config.num_pixels),
        mse=mean_mse,
        psnr_db=mean_psnr,
        ssim=mean_ssim,
        further=dict(zip(names, rest, strict=True)),
    )
