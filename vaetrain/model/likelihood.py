"""p(x|z): the decoder's last word, as proper log-densities or log-probabilities in nats.

A likelihood turns the decoder's output `params` (b, c·k, h, w), k numbers a pixel and channel, into log p(x|z) and into an
image. Everything here runs in float32 whatever the precision of the network, because a density in bf16 has two digits.

How the lecture's "MSE + weight · KL" maps onto it is written down in docs/objective.md.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from vaetrain.model.config import ModelConfig

BIN_WIDTH = 2 / 255
"""Distance of two neighbouring grey levels on the [-1, 1] pixel scale."""

MIN_LOG_SIGMA = math.log(BIN_WIDTH / 2)
"""A density narrower than half a grey level would reward knowing the rounding, and reach +∞ on constant pixels."""

LOG_SIGMA_SPEED = 10.0
"""The one shared log σ is stored divided by this, so that Adam, whose steps have the size of the learning rate, moves it
ten times as fast as a weight: a few hundred steps instead of a few thousand to find the scale of the residuals."""


def image_sum(x: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Sum over an image's channels and pixels."""
    return reduce(x, "b c h w -> b", "sum")


MAX_LOG_SCALE = 5.0
"""A logistic of 148 times half the pixel range is flat; a far wider one would give the levels inside it probability 0."""


def soft_lower_bound(x: Tensor, bound: float) -> Tensor:
    """Smooth max(x, bound) whose gradient fades below the bound instead of stopping there (as in Chua et al. 2018)."""
    return bound + F.softplus(x - bound)


def from_uint8(images: UInt8[Tensor, "b c h w"], pixel_range: tuple[float, float]) -> Float[Tensor, "b c h w"]:
    """Stored images as float32; level 0 becomes the lower and level 255 the upper end of `pixel_range`."""
    low, high = pixel_range
    return images.float() * ((high - low) / 255) + low


class Likelihood(nn.Module, ABC):
    """p(x|z) of an image x whose pixels lie in `pixel_range`."""

    params_per_channel: int
    pixel_range: tuple[float, float] = (-1.0, 1.0)
    is_density: bool
    """True: log_prob is a log-density, which needs the bin width to become bits; False: log-probability of the levels."""

    @abstractmethod
    def log_prob(self, params: Float[Tensor, "b ck h w"], x: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
        """log p(x|z) in nats, summed over channels and pixels, one value per image, float32."""

    @abstractmethod
    def raw_mean(self, params: Float[Tensor, "b ck h w"]) -> Float[Tensor, "b c h w"]:
        """E[x|z] wherever it lies, float32: what a loss takes, for a clamp has no gradient outside the range."""

    def mean(self, params: Float[Tensor, "b ck h w"]) -> Float[Tensor, "b c h w"]:
        """E[x|z], clamped to the pixel range: the reconstruction or sample that is shown and scored."""
        return self.raw_mean(params).clamp(*self.pixel_range)

    def to_unit(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """From the pixel range to [0, 1], where MSE, PSNR and SSIM are defined."""
        low, high = self.pixel_range
        return ((x - low) / (high - low)).clamp(0, 1)

    def to_uint8(self, x: Float[Tensor, "b c h w"]) -> UInt8[Tensor, "b c h w"]:
        """From the pixel range to the nearest of the 256 levels (halves go to the even level)."""
        return (self.to_unit(x) * 255).round().to(torch.uint8)

    def bits_per_dim(self, nats: float, num_pixels: int) -> float:
        """Negative log-likelihood of an image in nats → bits per channel and pixel.

        A density is multiplied by the width of a grey level, which approximates the probability of the level: good while
        the density is wider than a level, and stated as an approximation wherever it is reported.
        """
        bits = nats / num_pixels / math.log(2)
        return bits - math.log2(BIN_WIDTH) if self.is_density else bits


class SharedScale(Likelihood):
    """A density around params whose width is one number for all pixels, fixed or learned, kept as its standard deviation σ."""

    params_per_channel = 1
    is_density = True
    min_log_sigma: float
    """Below it a learned width does not go."""

    def __init__(self, sigma: float, learned: bool) -> None:
        super().__init__()
        scaled_log_sigma = torch.tensor(math.log(sigma) / LOG_SIGMA_SPEED)
        if learned:
            self.scaled_log_sigma = nn.Parameter(scaled_log_sigma)
        else:
            self.register_buffer("scaled_log_sigma", scaled_log_sigma, persistent=False)
        self.learned = learned

    @property
    def log_sigma(self) -> Float[Tensor, ""]:
        """log σ on the [-1, 1] scale; bounded below when it is learned."""
        log_sigma = self.scaled_log_sigma.float() * LOG_SIGMA_SPEED
        return soft_lower_bound(log_sigma, self.min_log_sigma) if self.learned else log_sigma

    def raw_mean(self, params: Float[Tensor, "b ck h w"]) -> Float[Tensor, "b c h w"]:
        """See `Likelihood.raw_mean`."""
        return params.float()


class Gaussian(SharedScale):
    """N(x; mean, σ²) with σ fixed (`gaussian-fixed`) or one learned number (`gaussian-shared`, Rybkin et al. 2021).

    −log p(x|z) = Σ (x − mean)² / 2σ² + D (log σ + ½ log 2π): with fixed σ, MSE up to a factor and a constant.
    The best shared σ² is the mean of (x − mean)² over images, pixels and channels.
    """

    min_log_sigma = MIN_LOG_SIGMA

    def log_prob(self, params: Float[Tensor, "b ck h w"], x: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
        """See `Likelihood.log_prob`."""
        log_sigma = self.log_sigma
        squared_error = image_sum((x - params.float()).square())
        num_pixels = x[0].numel()
        return -0.5 * squared_error * (-2 * log_sigma).exp() - num_pixels * (log_sigma + 0.5 * math.log(2 * math.pi))


class Laplace(SharedScale):
    """Laplace(x; mean, b) with one learned b = σ/√2 (`laplace-shared`): the L1 loss of latent diffusion, as a density.

    −log p(x|z) = Σ |x − mean| / b + D log 2b. The best shared b is the mean of |x − mean| over images, pixels and channels,
    where the first part is D.
    """

    min_log_sigma = MIN_LOG_SIGMA + 0.5 * math.log(2)  # b of half a level: a perfect reconstruction then counts 0 bits

    @property
    def log_b(self) -> Float[Tensor, ""]:
        """log b on the [-1, 1] scale."""
        return self.log_sigma - 0.5 * math.log(2)

    def log_prob(self, params: Float[Tensor, "b ck h w"], x: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
        """See `Likelihood.log_prob`."""
        log_b = self.log_b
        return -image_sum((x - params.float()).abs()) * (-log_b).exp() - x[0].numel() * (log_b + math.log(2))


class PixelGaussian(Likelihood):
    """N(x; mean, σ²) with mean and σ for every pixel and channel: the lecture's Assumption 3."""

    params_per_channel = 2
    is_density = True

    def log_prob(self, params: Float[Tensor, "b ck h w"], x: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
        """See `Likelihood.log_prob`."""
        mean, log_sigma = params.float().chunk(2, dim=1)
        log_sigma = soft_lower_bound(log_sigma, MIN_LOG_SIGMA)
        return image_sum(-0.5 * (x - mean).square() * (-2 * log_sigma).exp() - log_sigma - 0.5 * math.log(2 * math.pi))

    def raw_mean(self, params: Float[Tensor, "b ck h w"]) -> Float[Tensor, "b c h w"]:
        """See `Likelihood.raw_mean`."""
        return params.float().chunk(2, dim=1)[0]


class Bernoulli(Likelihood):
    """x ∈ {0, 1} with probability sigmoid(params) of 1; made for MNIST.

    For grey pixels in [0, 1] log_prob is the expected log-probability of the image binarised at random with its greys as
    probabilities, so that −log_prob is the usual binary cross-entropy. Bits per dimension are those of the binary image.
    """

    params_per_channel = 1
    pixel_range = (0.0, 1.0)
    is_density = False

    def log_prob(self, params: Float[Tensor, "b ck h w"], x: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
        """See `Likelihood.log_prob`."""
        return -image_sum(F.binary_cross_entropy_with_logits(params.float(), x, reduction="none"))

    def raw_mean(self, params: Float[Tensor, "b ck h w"]) -> Float[Tensor, "b c h w"]:
        """See `Likelihood.raw_mean`."""
        return params.float().sigmoid()


class LogisticMixture(Likelihood):
    """Probability of each of the 256 levels under a mixture of logistics cut into bins (Salimans et al. 2017, Eq. 2).

    Channels are independent given z. The lowest and highest bin reach to ∓∞, so that the 256 levels sum to 1 exactly, and
    the ELBO is a true bound in bits per dimension. `discretized-logistic` is the case of one component.
    """

    is_density = False

    def __init__(self, num_mixtures: int) -> None:
        super().__init__()
        self.num_mixtures = num_mixtures
        # One component needs no mixture weight.
        self.params_per_channel = 3 * num_mixtures if num_mixtures > 1 else 2

    def split(self, params: Float[Tensor, "b ck h w"]) -> tuple[Tensor, Tensor, Tensor]:
        """Mixture log-weights, means and log-scales, each (k, b, c, h, w), float32."""
        params = rearrange(params.float(), "b (p k c) h w -> p k b c h w", k=self.num_mixtures, c=self.channels(params))
        logits = params[2] if self.num_mixtures > 1 else torch.zeros_like(params[0])
        # A logistic's standard deviation is 1.8 scales: the same lower bound as for the Gaussians, about.
        log_scale = soft_lower_bound(params[1] - 2, MIN_LOG_SIGMA - 0.6).clamp(max=MAX_LOG_SCALE)
        return logits.log_softmax(dim=0), params[0], log_scale

    def channels(self, params: Tensor) -> int:
        """Image channels that `params` describes."""
        return params.shape[1] // self.params_per_channel

    def log_prob(self, params: Float[Tensor, "b ck h w"], x: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
        """See `Likelihood.log_prob`; x must lie on the 256 levels."""
        log_weights, mean, log_scale = self.split(params)
        inverse_scale = (-log_scale).exp()
        upper = (x - mean + BIN_WIDTH / 2) * inverse_scale
        lower = (x - mean - BIN_WIDTH / 2) * inverse_scale
        # log(sigmoid(u) − sigmoid(l)) = log sigmoid(u) + log sigmoid(−l) + log(1 − e^(l−u)): exact, and stable in both tails.
        log_below, log_above = F.logsigmoid(upper), F.logsigmoid(-lower)
        log_width = torch.log(-torch.expm1(-BIN_WIDTH * inverse_scale))
        log_prob = log_below + log_above + log_width
        log_prob = torch.where(x < -1 + BIN_WIDTH / 2, log_below, log_prob)
        log_prob = torch.where(x > 1 - BIN_WIDTH / 2, log_above, log_prob)
        return image_sum((log_weights + log_prob).logsumexp(dim=0))

    def raw_mean(self, params: Float[Tensor, "b ck h w"]) -> Float[Tensor, "b c h w"]:
        """See `Likelihood.raw_mean`; that of a logistic whose tails are gathered at the ends of the range.

        E = −1 + ∫ P(X > t) dt over [−1, 1], the levels' sum up to half a level where the scale is narrower than one.
        """
        log_weights, mean, log_scale = self.split(params)
        scale = log_scale.exp()
        component_means = scale * (F.softplus((mean + 1) / scale) - F.softplus((mean - 1) / scale)) - 1
        return (log_weights.exp() * component_means).sum(dim=0)


def build_likelihood(config: ModelConfig) -> Likelihood:
    """The likelihood that `--model.likelihood` names."""
    match config.likelihood:
        case "gaussian-fixed":
            return Gaussian(config.sigma, learned=False)
        case "gaussian-shared":
            return Gaussian(config.sigma, learned=True)
        case "gaussian-pixel":
            return PixelGaussian()
        case "laplace-shared":
            return Laplace(config.sigma, learned=True)
        case "bernoulli":
            return Bernoulli()
        case "discretized-logistic":
            return LogisticMixture(num_mixtures=1)
        case "logistic-mixture":
            return LogisticMixture(config.num_mixtures)
