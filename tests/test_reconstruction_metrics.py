"""MSE, PSNR and SSIM against independent implementations and known values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from vaetrain.metrics.reconstruction import MAX_PSNR_DB, mse, psnr_db, ssim


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def noisy(x: Tensor, scale: float, seed: int = 1) -> Tensor:
    return (x + scale * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))).clamp(0, 1)


def ssim_by_scipy(a: np.ndarray, b: np.ndarray, radius: int = 5) -> float:
    """Wang et al. 2004 for one (c, h, w) pair: truncate = radius/σ gives windows of 2·radius + 1."""

    def blur(plane: np.ndarray) -> np.ndarray:
        return gaussian_filter(plane, sigma=1.5, truncate=radius / 1.5)[radius:-radius, radius:-radius]

    channels = []
    for p, q in zip(a.astype(np.float64), b.astype(np.float64), strict=True):
        mean_p, mean_q = blur(p), blur(q)
        var_p, var_q = blur(p * p) - mean_p**2, blur(q * q) - mean_q**2
        cov = blur(p * q) - mean_p * mean_q
        numerator = (2 * mean_p * mean_q + 0.0001) * (2 * cov + 0.0009)
        channels.append((numerator / ((mean_p**2 + mean_q**2 + 0.0001) * (var_p + var_q + 0.0009))).mean())
    return float(np.mean(channels))


def test_mse_and_psnr_of_a_constant_error_are_the_textbook_values_per_image() -> None:
    x = images(2, 3, 8, 8) * 0.5
    recon = x.clone()
    recon[0] += 0.1
    recon[1] += 0.01
    torch.testing.assert_close(mse(recon, x), torch.tensor([1e-2, 1e-4]), rtol=1e-4, atol=0)
    torch.testing.assert_close(psnr_db(recon, x), torch.tensor([20.0, 40.0]), rtol=1e-4, atol=0)


def test_psnr_of_a_perfect_reconstruction_is_finite() -> None:
    x = images(2, 1, 16, 16)
    assert psnr_db(x, x).tolist() == [MAX_PSNR_DB] * 2
    one_level = x.clone()
    one_level[0, 0, 0, 0] += 1 / 255
    assert 60 < psnr_db(one_level, x)[0].item() < MAX_PSNR_DB


@pytest.mark.parametrize("shape", [(3, 3, 32, 24), (2, 1, 28, 28), (1, 3, 11, 11)])
@pytest.mark.parametrize("scale", [0.02, 0.3])
def test_ssim_agrees_with_scipy(shape: tuple[int, ...], scale: float) -> None:
    smooth = torch.nn.functional.avg_pool2d(images(shape[0], shape[1], shape[2] + 4, shape[3] + 4), 5, stride=1)
    recon = noisy(smooth, scale)
    expected = [ssim_by_scipy(a, b) for a, b in zip(recon.numpy(), smooth.numpy(), strict=True)]
    torch.testing.assert_close(ssim(recon, smooth), torch.tensor(expected), rtol=0, atol=1e-6)
    assert max(expected) < 0.99


def test_ssim_of_constant_images_is_their_luminance_term() -> None:
    a, b = 0.2, 0.7
    value = ssim(torch.full((1, 3, 16, 16), a), torch.full((1, 3, 16, 16), b))
    assert math.isclose(value.item(), (2 * a * b + 1e-4) / (a * a + b * b + 1e-4), rel_tol=1e-5)


def test_ssim_is_one_for_equal_images_symmetric_and_falls_with_noise() -> None:
    x = images(2, 3, 32, 32)
    torch.testing.assert_close(ssim(x, x), torch.ones(2))
    light, heavy = noisy(x, 0.05), noisy(x, 0.5)
    torch.testing.assert_close(ssim(light, x), ssim(x, light))
    assert (ssim(heavy, x) < ssim(light, x)).all()
    assert ssim(1 - x, x).max() < 0


def test_ssim_of_an_image_smaller_than_the_window_uses_the_largest_odd_one() -> None:
    x = images(2, 1, 8, 8)
    recon = noisy(x, 0.2)
    expected = [ssim_by_scipy(a, b, radius=3) for a, b in zip(recon.numpy(), x.numpy(), strict=True)]
    torch.testing.assert_close(ssim(recon, x), torch.tensor(expected), rtol=0, atol=1e-6)
    assert ssim(x[..., :1, :1], x[..., :1, :1]).tolist() == [1.0, 1.0]


def test_an_image_s_values_do_not_depend_on_its_batch() -> None:
    x = images(5, 3, 16, 16)
    recon = noisy(x, 0.1)
    for metric in (mse, psnr_db, ssim):
        alone = torch.cat([metric(recon[i : i + 1], x[i : i + 1]) for i in range(5)])
        torch.testing.assert_close(metric(recon, x), alone, rtol=1e-6, atol=1e-7)
