"""How close a reconstruction is to its image: MSE, PSNR and SSIM, one value per image, on [0, 1] pixels."""

from __future__ import annotations

import torch
from einops import reduce
from jaxtyping import Float, Float64
from torch import Tensor

MAX_PSNR_DB = 100.0
"""PSNR of an image reproduced exactly, which would be infinite and take every mean with it. For scale: one value of a
128×128 colour image off by one of 255 levels is 95 dB."""

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
SSIM_C1 = 0.01**2
SSIM_C2 = 0.03**2


def mse(recon: Float[Tensor, "b c h w"], x: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Mean squared error of [0, 1] images, averaged over channels and pixels, one float32 value per image."""
    return reduce((recon.float() - x.float()).square(), "b c h w -> b", "mean")


def psnr_db(recon: Float[Tensor, "b c h w"], x: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Peak signal-to-noise ratio 10·log10(1 / MSE) of [0, 1] images in decibels, one float32 value per image.

    Capped at `MAX_PSNR_DB`. The mean over images of this is not the PSNR of the mean MSE; it is what papers report.
    """
    return (-10 * mse(recon, x).log10()).clamp(max=MAX_PSNR_DB)


def ssim(recon: Float[Tensor, "b c h w"], x: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Structural similarity of [0, 1] images, one float32 value in [-1, 1] per image (Wang et al. 2004, Eq. 13 and 17).

    Local statistics are weighted by an 11×11 Gaussian window of σ = 1.5 pixels, K1 = 0.01, K2 = 0.03; the map is
    averaged over channels and over the positions where the whole window lies inside the image. An image with a side
    under 11 pixels gets the largest odd window that fits that side, so its value does not compare with larger images'.
    """
    # A variance is a difference of nearly equal numbers here; float64 costs a third more than float32 and settles it.
    a, b = recon.double(), x.double()
    mean_a, mean_b = _window_mean(a), _window_mean(b)
    var_a = _window_mean(a.square()) - mean_a.square()
    var_b = _window_mean(b.square()) - mean_b.square()
    cov = _window_mean(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + SSIM_C1) / (mean_a.square() + mean_b.square() + SSIM_C1)
    contrast_structure = (2 * cov + SSIM_C2) / (var_a + var_b + SSIM_C2)
    return reduce(luminance * contrast_structure, "b c h w -> b", "mean").float()


def _window_mean(x: Float64[Tensor, "b c h w"]) -> Float64[Tensor, "b c h2 w2"]:
    """Gaussian-weighted mean around every position at which the window fits.

    Two matrix products, because PyTorch's float64 depthwise convolution is 13 times slower on a CPU.
    """
    return _window_matrix(x.shape[-2], x.device) @ x @ _window_matrix(x.shape[-1], x.device).T


def _window_matrix(size: int, device: torch.device) -> Float64[Tensor, "positions size"]:
    """One row per position of the one-dimensional window along `size` pixels; rows sum to 1."""
    window = min(SSIM_WINDOW, size - 1 + size % 2)
    starts = torch.arange(size - window + 1, device=device, dtype=torch.float64)
    pixels = torch.arange(size, device=device, dtype=torch.float64)
    distance = pixels - (starts[:, None] + window // 2)
    weights = torch.exp(-0.5 * (distance / SSIM_SIGMA).square()) * (distance.abs() <= window // 2)
    return weights / weights.sum(1, keepdim=True)
