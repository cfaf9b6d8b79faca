"""The VAE as a whole: shapes, precision, independence of images, sampling, and that it learns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vaetrain.model.autoencoder import VAE
from vaetrain.model.config import ModelConfig
from vaetrain.model.posterior import DiagonalGaussian, PointMass
from vaetrain.objective.elbo import negative_elbo

SMALL = {"image_size": 16, "base_channels": 16, "channel_mult": (1, 2), "num_res_blocks": 1, "latent_channels": 4}
ARCHITECTURES = {
    "conv": SMALL,
    "gray": SMALL | {"in_channels": 1, "likelihood": "bernoulli"},
    "patches": SMALL | {"patch_size": 2, "likelihood": "gaussian-pixel"},
    "one-level": SMALL | {"patch_size": 4, "channel_mult": (1,)},
    "attention": SMALL | {"attention_resolutions": (8, 16), "base_channels": 64},
    "vector": SMALL | {"latent": "vector", "likelihood": "logistic-mixture"},
    "odd-sized": SMALL | {"image_size": 28, "in_channels": 1},
    "autoencoder-kl": SMALL | {"kind": "autoencoder-kl", "base_channels": 32},
    "dense": {"kind": "dense", "image_size": 12, "hidden_features": (32, 16), "latent_channels": 4},
    "dense-gray": {"kind": "dense", "image_size": 12, "in_channels": 1, "likelihood": "discretized-logistic"},
    "deterministic": SMALL | {"variational": False, "likelihood": "gaussian-fixed"},
    "dense-deterministic": {"kind": "dense", "image_size": 12, "variational": False},
}
LATENT_SHAPES = {
    "conv": (4, 8, 8),
    "gray": (4, 8, 8),
    "patches": (4, 4, 4),
    "one-level": (4, 4, 4),
    "attention": (4, 8, 8),
    "vector": (4,),
    "odd-sized": (4, 14, 14),
    "autoencoder-kl": (4, 8, 8),
    "dense": (4,),
    "dense-gray": (16,),
    "deterministic": (4, 8, 8),
    "dense-deterministic": (16,),
}


def build(name: str, seed: int = 0) -> VAE:
    torch.manual_seed(seed)
    return VAE(ModelConfig(**ARCHITECTURES[name]))


def blobs(vae: VAE, num_images: int) -> Tensor:
    """Smooth coloured blobs, in the pixel range of the model."""
    config = vae.config
    generator = torch.Generator().manual_seed(7)
    coarse = torch.rand(num_images, config.in_channels, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=config.image_size, mode="bicubic").clamp(0, 1)
    return vae.from_uint8((smooth * 255).round().to(torch.uint8))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_shapes(name):
    vae = build(name)
    x = blobs(vae, 3)
    assert vae.config.latent_shape == LATENT_SHAPES[name]
    posterior = vae.encode(x)
    assert posterior.mode().shape == (3, *LATENT_SHAPES[name])
    terms = vae(x, draw(3, *LATENT_SHAPES[name]))
    assert terms.distortion.shape == (3,)
    assert terms.kl.shape == (3, *LATENT_SHAPES[name])
    assert terms.params.shape == (3, x.shape[1] * vae.likelihood.params_per_channel, *x.shape[2:])
    for images in (vae.reconstruct(x), vae.decode(posterior.mode()), vae.sample(3)):
        assert images.shape == x.shape
        assert images.min() >= vae.likelihood.pixel_range[0]
        assert images.max() <= vae.likelihood.pixel_range[1]


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_forward_is_its_parts(name):
    vae = build(name)
    x, noise = blobs(vae, 3), draw(3, *LATENT_SHAPES[name])
    posterior = vae.encode(x)
    params = vae.decoder(posterior.sample(noise=noise))
    terms = vae(x, noise)
    torch.testing.assert_close(terms.params, params)
    torch.testing.assert_close(terms.distortion, -vae.likelihood.log_prob(params, x))
    torch.testing.assert_close(terms.kl, posterior.kl())
    torch.testing.assert_close(vae.reconstruct(x), vae.likelihood.mean(vae.decoder(posterior.mode())))


@pytest.mark.parametrize("name", ["deterministic", "dense-deterministic"])
@torch.no_grad()
def test_a_deterministic_autoencoder_has_no_noise_and_no_rate(name):
    vae = build(name)
    x, shape = blobs(vae, 3), LATENT_SHAPES[name]
    posterior = vae.encode(x)
    assert isinstance(posterior, PointMass)
    assert posterior.sample().equal(posterior.mode())
    terms = vae(x, draw(3, *shape))
    assert terms.kl.eq(0).all()
    assert terms.distortion.equal(vae(x, draw(3, *shape, seed=1)).distortion)
    assert negative_elbo(terms.distortion, terms.kl, beta=5.0).equal(terms.distortion)


@torch.no_grad()
def test_a_variational_one_has_both():
    vae = build("conv")
    x, shape = blobs(vae, 3), LATENT_SHAPES["conv"]
    assert isinstance(vae.encode(x), DiagonalGaussian)
    terms = vae(x, draw(3, *shape))
    assert (terms.kl > 0).all()
    assert not terms.distortion.equal(vae(x, draw(3, *shape, seed=1)).distortion)


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_the_decoders_output_is_linear_in_its_last_layer(name):
    vae = build(name)
    z = draw(2, *LATENT_SHAPES[name])
    whole = vae.decoder(z)
    assert any(vae.last_layer is parameter for parameter in vae.decoder.parameters())
    vae.last_layer.mul_(2)
    doubled = vae.decoder(z)
    vae.last_layer.zero_()
    without = vae.decoder(z)
    assert (whole - without).abs().max() > 0.01
    torch.testing.assert_close(doubled - without, 2 * (whole - without), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["conv", "attention", "autoencoder-kl", "vector", "dense"])
@torch.no_grad()
def test_an_image_does_not_see_the_others_of_its_batch(name):
    vae = build(name)
    x, noise = blobs(vae, 4), draw(4, *LATENT_SHAPES[name])
    whole = vae(x, noise).params
    other_company = vae(torch.cat([x[:1], -x[1:]]), noise).params
    torch.testing.assert_close(other_company[:1], whole[:1])
    torch.testing.assert_close(vae(x[:1], noise[:1]).params, whole[:1], rtol=1e-4, atol=1e-5)


def test_attention_lets_distant_pixels_see_each_other():
    # One level and one block: two 3×3 convolutions, twice, reach few pixels; attention reaches all.
    reach = {}
    for resolutions in ((), (16,)):
        torch.manual_seed(0)
        vae = VAE(ModelConfig(**SMALL | {"channel_mult": (1,), "attention_resolutions": resolutions}))
        for name, parameter in vae.named_parameters():
            if "out.weight" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        vae.encoder.norm_out = torch.nn.Identity()  # norms see the whole image, too
        for module in vae.encoder.blocks:
            if hasattr(module, "norm1"):
                module.norm1, module.norm2 = torch.nn.Identity(), torch.nn.Identity()
            else:
                module.norm = torch.nn.Identity()
        x = blobs(vae, 1).requires_grad_()
        (gradient,) = torch.autograd.grad(vae.encode(x).mean[0, :, 0, 0].sum(), x)
        reach[resolutions] = gradient[0, :, -1, -1].abs().sum().item()
    assert reach[()] == 0
    assert reach[(16,)] > 0


@pytest.mark.parametrize("name", ["conv", "attention", "patches", "autoencoder-kl", "vector", "dense"])
@torch.no_grad()
def test_bf16_autocast_comes_close_to_fp32_and_returns_float32_terms(name):
    vae = build(name)
    x, noise = blobs(vae, 3), draw(3, *LATENT_SHAPES[name])
    expected = vae(x, noise)
    with torch.autocast("cpu", torch.bfloat16):
        terms = vae(x, noise)
    assert terms.params.dtype == torch.bfloat16
    assert terms.distortion.dtype == terms.kl.dtype == torch.float32
    torch.testing.assert_close(terms.distortion, expected.distortion, rtol=0.02, atol=0)
    torch.testing.assert_close(terms.kl.flatten(1).sum(1), expected.kl.flatten(1).sum(1), rtol=0.05, atol=0)


@pytest.mark.parametrize("name", ["conv", "vector", "dense"])
@torch.no_grad()
def test_sample_i_is_the_same_whatever_the_start_and_the_count(name):
    vae = build(name)
    samples = vae.sample(8, seed=3)
    torch.testing.assert_close(vae.sample(3, seed=3, start=4), samples[4:7], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vae.sample(1, seed=3, start=7), samples[7:], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(vae.sample(8, seed=4), samples, atol=1e-3)


@torch.no_grad()
def test_temperature_scales_the_latent():
    vae = build("dense")
    torch.testing.assert_close(vae.sample(2, temperature=0.0), vae.decode(torch.zeros(2, 4)))
    assert vae.sample(64, temperature=2.0).std(0).mean() > vae.sample(64, temperature=0.5).std(0).mean()


@pytest.mark.parametrize("name", ["conv", "vector", "dense", "dense-gray", "deterministic"])
def test_four_images_are_soon_learned_by_heart(name):
    vae = build(name)
    x = blobs(vae, 4)
    optimizer = torch.optim.Adam(vae.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(90):
        terms = vae(x, torch.randn(4, *vae.config.latent_shape, generator=generator))
        optimizer.zero_grad()
        (negative_elbo(terms.distortion, terms.kl, beta=1.0).mean() / vae.config.num_pixels).backward()
        optimizer.step()
    unit, recon = vae.likelihood.to_unit(x), vae.likelihood.to_unit(vae.reconstruct(x))
    error_of_the_mean_image = unit.var(0, unbiased=False).mean()
    assert (recon - unit).square().mean() < error_of_the_mean_image / 5


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"in_channels": 2}, "--model.in-channels is 2"),
        ({"image_size": 0}, "--model.image-size is 0"),
        ({"latent_channels": 0}, "--model.latent-channels is 0"),
        ({"sigma": 0.0}, "--model.sigma is 0.0"),
        ({"channel_mult": ()}, r"--model.channel-mult is \(\)"),
        ({"image_size": 60}, "--model.image-size 60 is not a multiple of 8"),
        ({"image_size": 24, "patch_size": 2}, "--model.image-size 24 is not a multiple of 16"),
        ({"attention_resolutions": (16, 12)}, r"--model.attention-resolutions \[12\].*it has \[64, 32, 16, 8\]"),
        ({"kind": "dense", "hidden_features": ()}, "--model.hidden-features is empty"),
    ],
)
def test_models_that_cannot_be_built_are_refused(field, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**field)


@pytest.mark.parametrize(
    ("image_size", "channels", "message"),
    [(128, 3, "128×128 pixels.*pass --model.image-size 128"), (64, 1, r"1 channel\(s\).*pass --model.in-channels 1")],
)
def test_images_that_do_not_fit_are_refused(image_size, channels, message):
    ModelConfig().check_images(64, 3)
    with pytest.raises(ValueError, match=message):
        ModelConfig().check_images(image_size, channels)
