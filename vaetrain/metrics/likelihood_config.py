"""How closely the likelihood and the latent of a VAE are looked at, without importing torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LikelihoodConfig:
    """The importance-weighted bound on log p(x), and the split of the rate into mutual information and marginal KL."""

    num_images: int | None = 100
    """Images of the val split, drawn by `seed`, whose log p(x) is bounded; None: all. Each costs `num_samples` decoder
    passes: with the defaults a minute for 28-pixel digits on one CPU core, six for 64-pixel cats; all of MNIST's 10,000
    images at 5,000 samples are seven hours."""

    num_samples: int = 1000
    """Latents per image in the importance-weighted bound (k; papers use up to 5,000). The bound rises with k towards log p(x);
    it is also reported at every power of ten below."""

    batch_size: int = 128
    """Latents decoded at a time, per process; memory and speed only, not the score."""

    num_posteriors: int | None = 10_000
    """Images, drawn by `seed`, whose posteriors make up the aggregate posterior q(z); None: the whole split. Work grows with the
    square. Fewer images bias the mutual information down (it cannot exceed the logarithm of this number) and the marginal
    KL up by as much."""

    latents_per_image: int = 1
    """Latents drawn from each of those posteriors; more lower the noise of the estimates, not their bias."""

    seed: int = 0
    """Picks the images and draws the latents."""

    def __post_init__(self) -> None:
        """Refuse counts that estimate nothing."""
        for name, least in (("num_images", 2), ("num_posteriors", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(
                    f"--likelihood.{name.replace('_', '-')} is {value}; a standard error needs at least {least}, "
                    "None takes the whole split"
                )
        for name in ("num_samples", "batch_size", "latents_per_image"):
            if getattr(self, name) < 1:
                raise ValueError(f"--likelihood.{name.replace('_', '-')} is {getattr(self, name)}; give at least 1")
        if self.seed < 0:
            raise ValueError(f"--likelihood.seed is {self.seed}; it must not be negative")

    @property
    def sample_counts(self) -> tuple[int, ...]:
        """The k at which the bound is reported: powers of ten below `num_samples`, and `num_samples`."""
        powers = (10**power for power in range(len(str(self.num_samples))))
        return (*(power for power in powers if power < self.num_samples), self.num_samples)
