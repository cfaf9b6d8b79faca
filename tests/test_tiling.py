"""Images of other sizes than the model was trained on, whole and in tiles."""

import pytest
import torch

from vaetrain.model.autoencoder import VAE
from vaetrain.model.config import ModelConfig
from vaetrain.model.tiling import TiledLayers

SMALL = {"image_size": 16, "base_channels": 32, "channel_mult": (1, 2, 2), "num_res_blocks": 1, "latent_channels": 4}
FREE = {
    "conv": SMALL,
    "patches": SMALL | {"patch_size": 2, "channel_mult": (1, 3), "likelihood": "gaussian-pixel"},
    "one-level": SMALL | {"patch_size": 4, "channel_mult": (2,), "num_res_blocks": 2, "in_channels": 1},
    "deterministic": SMALL | {"variational": False, "likelihood": "logistic-mixture"},
}
FIXED = {
    "dense": ({"kind": "dense", "image_size": 16, "latent_channels": 4}, "fully connected"),
    "vector": (SMALL | {"latent": "vector"}, "latent is a vector"),
    "attention": (SMALL | {"attention_resolutions": (8, 4)}, "--model.attention-resolutions 8 4"),
}


def build(options):
    """A model with no branch that begins at zero, and norms that do more than to normalise."""
    torch.manual_seed(0)
    vae = VAE(ModelConfig(**options)).eval()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return vae


def images(vae, height, width):
    """Of another brightness and contrast in each quarter, so that norms of tiles by themselves would differ."""
    x = 0.3 * torch.randn(2, vae.config.in_channels, height, width, generator=torch.Generator().manual_seed(1))
    x[..., : height // 2, :] += 0.5
    x[..., : width // 2] *= 0.2
    return x.clamp(-1, 1)


@pytest.mark.parametrize("name", FREE)
@pytest.mark.parametrize(("size", "tile"), [((16, 16), 8), ((40, 24), 8), ((24, 40), 16), ((32, 16), 64), ((8, 4), 4)])
@torch.no_grad()
def test_tiles_equal_the_whole_everywhere(name, size, tile):
    vae = build(FREE[name])
    x = images(vae, *size)
    whole, tiled = vae.encode(x), vae.encode(x, tile_size=tile)
    assert whole.mean.shape == (2, 4, *(side // vae.config.downsample_factor for side in size))
    assert vae.config.latent_shape_of(*size) == whole.mean.shape[1:]
    torch.testing.assert_close(tiled.mean, whole.mean, atol=2e-5, rtol=1e-5)
    if vae.config.variational:
        torch.testing.assert_close(tiled.logvar, whole.logvar, atol=2e-5, rtol=1e-5)
    decoded = vae.decode(whole.mode())
    assert decoded.shape == x.shape
    torch.testing.assert_close(vae.decode(whole.mode(), tile_size=tile), decoded, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(vae.reconstruct(x, tile_size=tile), vae.reconstruct(x), atol=5e-5, rtol=1e-5)


@torch.no_grad()
def test_the_device_holds_a_tile_at_a_time(monkeypatch):
    vae = build(SMALL)
    largest = []
    cut = TiledLayers._cut

    def seen(self, *edges):
        part = cut(self, *edges)
        largest.append((part.shape[2], part.shape[3]))
        return part

    monkeypatch.setattr(TiledLayers, "_cut", seen)
    vae.reconstruct(images(vae, 64, 96), tile_size=16)
    assert max(largest) == (20, 20), "tiles with a margin of 2 on each side"
    assert len(largest) > 24


@pytest.mark.parametrize("name", FIXED)
@torch.no_grad()
def test_models_of_one_size_refuse_others_and_say_why(name):
    options, why = FIXED[name]
    vae = build(options)
    x = images(vae, 16, 16)
    z = vae.encode(x).mode()
    assert vae.decode(z).shape == x.shape
    for refused in (
        lambda: vae.encode(images(vae, 16, 32)),
        lambda: vae.encode(x, tile_size=8),
        lambda: vae.decode(torch.cat([z, z], dim=-1)),
        lambda: vae.decode(z, tile_size=8),
    ):
        with pytest.raises(ValueError, match=why):
            refused()


@torch.no_grad()
def test_sizes_that_do_not_divide_are_refused_with_the_nearest():
    vae = build(SMALL)
    with pytest.raises(ValueError, match=r"30×18 pixels.*multiples of 4.*32×16"):
        vae.encode(images(vae, 30, 18))
    with pytest.raises(ValueError, match=r"multiple of 4, the model's downsampling, such as 8"):
        vae.encode(images(vae, 16, 16), tile_size=7)
    with pytest.raises(ValueError, match=r"takes \(4, height, width\)"):
        vae.decode(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"takes \(4, height, width\)"):
        vae.decode(torch.zeros(1, 4))
