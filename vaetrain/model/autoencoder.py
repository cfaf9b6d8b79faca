"""The encoder, the decoder and the VAE that joins them with a posterior, a prior and a likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from einops.layers.torch import Rearrange
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from vaetrain.model.autoencoder_kl import KLDecoder, KLEncoder
from vaetrain.model.blocks import Attention, Blocks, Downsample, GroupNorm, ResBlock, Upsample
from vaetrain.model.config import ModelConfig
from vaetrain.model.likelihood import build_likelihood, from_uint8
from vaetrain.model.posterior import DiagonalGaussian, PointMass, Posterior
from vaetrain.model.prior import ClassPrior, Prior, StandardNormal
from vaetrain.model.tiling import TiledLayers
from vaetrain.upload import upload


class ConvEncoder(nn.Module):
    """(b, c, h, w) → `num_moments` numbers for each entry of the latent: residual levels, each half the last's resolution."""

    def __init__(self, config: ModelConfig, num_moments: int) -> None:
        super().__init__()
        channels = [config.base_channels * mult for mult in config.channel_mult]
        resolution = config.image_size // config.patch_size
        self.patch_size = config.patch_size
        self.conv_in = nn.Conv2d(config.in_channels * config.patch_size**2, channels[0], 3, padding=1)
        self.blocks = Blocks(config.checkpoint_levels)
        for level, width in enumerate(channels):
            if level > 0:
                self.blocks.add(Downsample(channels[level - 1], width), level)
                resolution //= 2
            for _ in range(config.num_res_blocks):
                self.blocks.add(ResBlock(width, width), level)
                if resolution in config.attention_resolutions:
                    self.blocks.add(Attention(width), level)
        self.norm_out = GroupNorm(channels[-1])
        outputs = num_moments * config.latent_channels
        self.out: nn.Module
        if len(config.latent_shape) == 3:
            self.out = nn.Conv2d(channels[-1], outputs, 3, padding=1)
        else:
            self.out = nn.Sequential(nn.Flatten(), nn.Linear(channels[-1] * resolution**2, outputs))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b m *latent"]:
        """Moments of the posterior, stacked on dimension 1."""
        h = self.conv_in(rearrange(x, "b c (h p) (w q) -> b (c p q) h w", p=self.patch_size, q=self.patch_size))
        return self.out(F.silu(self.norm_out(self.blocks(h))))

    def in_tiles(self, x: Float[Tensor, "b c h w"], tile_size: int) -> Float[Tensor, "b m lh lw"]:
        """The same for a spatial latent, without attention, in tiles of `tile_size` pixels; see tiling.py."""
        patches = rearrange(x, "b c (h p) (w q) -> b (c p q) h w", p=self.patch_size, q=self.patch_size)
        layers = TiledLayers(patches, tile_size // self.patch_size, self.conv_in.weight.device)
        layers.convolve(self.conv_in)
        for block in self.blocks:
            layers.apply(block)
        layers.convolve(self.out, norm=self.norm_out)
        return layers.x


class ConvDecoder(nn.Module):
    """Latent → (b, c·k, h, w), the likelihood's parameters; the encoder mirrored, with one more block per level."""

    def __init__(self, config: ModelConfig, params_per_channel: int) -> None:
        super().__init__()
        channels = [config.base_channels * mult for mult in reversed(config.channel_mult)]
        resolution = config.image_size // config.downsample_factor
        self.patch_size = config.patch_size
        self.conv_in: nn.Module
        if len(config.latent_shape) == 3:
            self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        else:
            self.conv_in = nn.Sequential(
                nn.Linear(config.latent_channels, channels[0] * resolution**2),
                Rearrange("b (c h w) -> b c h w", h=resolution, w=resolution),
            )
        self.blocks = Blocks(config.checkpoint_levels)
        for number, width in enumerate(channels):
            level = len(channels) - 1 - number  # 0 is the highest resolution, as in the encoder
            if number > 0:
                self.blocks.add(Upsample(channels[number - 1], width), level)
                resolution *= 2
            for _ in range(config.num_res_blocks + 1):
                self.blocks.add(ResBlock(width, width), level)
                if resolution in config.attention_resolutions:
                    self.blocks.add(Attention(width), level)
        self.norm_out = GroupNorm(channels[-1])
        outputs = config.in_channels * params_per_channel * config.patch_size**2
        self.conv_out = nn.Conv2d(channels[-1], outputs, 3, padding=1)

    @property
    def last_layer(self) -> Tensor:
        """Weight of the last convolution."""
        return self.conv_out.weight

    def features(self, z: Float[Tensor, "b *latent"]) -> Float[Tensor, "b d h2 w2"]:
        """Input of the last layer."""
        return F.silu(self.norm_out(self.blocks(self.conv_in(z))))

    def head(self, features: Float[Tensor, "b d h2 w2"]) -> Float[Tensor, "b ck h w"]:
        """Parameters of p(x|z) from the input of the last layer."""
        h = self.conv_out(features)
        return rearrange(h, "b (c p q) h w -> b c (h p) (w q)", p=self.patch_size, q=self.patch_size)

    def forward(self, z: Float[Tensor, "b *latent"]) -> Float[Tensor, "b ck h w"]:
        """Parameters of p(x|z)."""
        return self.head(self.features(z))

    def in_tiles(self, z: Float[Tensor, "b c h w"], tile_size: int) -> Float[Tensor, "b ck h2 w2"]:
        """The same for a spatial latent, without attention, in tiles of `tile_size` pixels; see tiling.py."""
        levels = sum(isinstance(block, Upsample) for block in self.blocks)
        layers = TiledLayers(z, tile_size // (self.patch_size * 2**levels), self.conv_out.weight.device)
        layers.convolve(self.conv_in)
        for block in self.blocks:
            layers.apply(block)
        layers.convolve(self.conv_out, norm=self.norm_out)
        return rearrange(layers.x, "b (c p q) h w -> b c (h p) (w q)", p=self.patch_size, q=self.patch_size)


def dense_layers(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers through the given widths with SiLU between them."""
    layers: list[nn.Module] = []
    for in_features, out_features in pairwise(widths):
        layers += [nn.Linear(in_features, out_features), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


class DenseEncoder(nn.Sequential):
    """(b, c, h, w) → (b, num_moments · latent_channels) through fully connected layers."""

    def __init__(self, config: ModelConfig, num_moments: int) -> None:
        outputs = num_moments * config.latent_channels
        super().__init__(nn.Flatten(), *dense_layers([config.num_pixels, *config.hidden_features, outputs]))


class DenseDecoder(nn.Sequential):
    """(b, latent_channels) → (b, c·k, h, w), the likelihood's parameters, through fully connected layers."""

    def __init__(self, config: ModelConfig, params_per_channel: int) -> None:
        outputs = config.num_pixels * params_per_channel
        super().__init__(
            *dense_layers([config.latent_channels, *reversed(config.hidden_features), outputs]),
            Rearrange("b (ck h w) -> b ck h w", h=config.image_size, w=config.image_size),
        )

    @property
    def last_layer(self) -> Tensor:
        """Weight of the last fully connected layer."""
        last = self[-2]
        assert isinstance(last, nn.Linear)
        return last.weight

    def features(self, z: Float[Tensor, "b latent"]) -> Float[Tensor, "b d"]:
        """Input of the last layer."""
        for layer in list(self)[:-2]:
            z = layer(z)
        return z

    def head(self, features: Float[Tensor, "b d"]) -> Float[Tensor, "b ck h w"]:
        """Parameters of p(x|z) from the input of the last layer."""
        *_, last_layer, arrange = self
        params: Tensor = arrange(last_layer(features))
        return params


Decoder = ConvDecoder | DenseDecoder | KLDecoder

NETWORKS: dict[str, tuple[type[nn.Module], type[Decoder]]] = {
    "conv": (ConvEncoder, ConvDecoder), "dense": (DenseEncoder, DenseDecoder), "autoencoder-kl": (KLEncoder, KLDecoder),
}  # fmt: skip
"""By kind."""


class ElboTerms(NamedTuple):
    """What `VAE.forward` returns; everything a loss or a score is made of."""

    distortion: Float[Tensor, " b"]
    """−log p(x|z) in nats per image."""
    kl: Float[Tensor, "b *latent"]
    """KL(q(z|x) ‖ p(z)) in nats per latent dimension; the sum is the image's rate."""
    params: Float[Tensor, "b ck h w"]
    """The likelihood's parameters; `vae.likelihood.mean(params)` is the reconstruction."""
    features: Float[Tensor, "b d *place"] | None = None
    """Input of the decoder's last layer, if `vae.keeps_features`."""


class VAE(nn.Module):
    """A variational autoencoder, or with `variational=False` a deterministic one.

    Images are float in the likelihood's pixel range ([-1, 1]; [0, 1] for Bernoulli), see `from_uint8`.
    """

    prior: Prior | None = None
    """Where `sample` draws latents, if not from N(0, I): the one trained on this model's latents, if `vaetrain.load` found it."""

    keeps_features = False
    """Whether `forward` returns the input of the decoder's last layer, too."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.likelihood = build_likelihood(config)
        num_moments = 2 if config.variational else 1
        encoder, decoder = NETWORKS[config.kind]
        self.encoder = encoder(config, num_moments)
        self.decoder: Decoder = decoder(config, self.likelihood.params_per_channel)

    @property
    def last_layer(self) -> Tensor:
        """Weight of the decoder's last layer, at which the gradients of parts of a loss are compared."""
        last_layer = self.decoder.last_layer
        assert isinstance(last_layer, Tensor)
        return last_layer

    def train_only(self, part: Literal["encoder", "decoder", "all"]) -> None:
        """Let gradients reach one part alone. The likelihood's own parameters, such as σ, go with the decoder."""
        self.encoder.requires_grad_(part != "decoder")
        for module in (self.decoder, self.likelihood):
            module.requires_grad_(part != "encoder")

    def encode(self, x: Float[Tensor, "b c h w"], *, tile_size: int | None = None) -> Posterior:
        """q(z|x); in training call the (wrapped) model instead, or DDP will not reduce the gradients.

        A convolutional model with a spatial latent and without attention takes images of any size that its downsampling divides,
        rectangles too; with `tile_size` in overlapping tiles of so many pixels a side, for images (anywhere, such as in the host's
        memory) that are too large for the device as a whole. Without gradients, then. Raises ValueError for other sizes and models.
        """
        self.config.latent_shape_of(*x.shape[2:])
        if tile_size is None:
            moments = self.encoder(x)
        else:
            self.config.check_tiles(tile_size)
            assert isinstance(self.encoder, ConvEncoder)
            with torch.no_grad():
                moments = self.encoder.in_tiles(x, tile_size)
        return DiagonalGaussian.from_moments(moments) if self.config.variational else PointMass(moments.float())

    def decode(self, z: Float[Tensor, "b *latent"], *, tile_size: int | None = None) -> Float[Tensor, "b c h w"]:
        """E[x|z] in the pixel range; of latents of other sizes, too, and in tiles of `tile_size` pixels, as `encode`."""
        self.config.check_latent(tuple(z.shape[1:]))
        if tile_size is None:
            return self.likelihood.mean(self.decoder(z))
        self.config.check_tiles(tile_size)
        assert isinstance(self.decoder, ConvDecoder)
        with torch.no_grad():
            return self.likelihood.mean(self.decoder.in_tiles(z, tile_size))

    def forward(self, x: Float[Tensor, "b c h w"], noise: Float[Tensor, "b *latent"]) -> ElboTerms:
        """One-sample estimate of the ELBO's terms, z drawn with the given standard normal `noise`."""
        posterior = self.encode(x)
        z = posterior.sample(noise=noise)
        kept = self.decoder.features(z) if self.keeps_features else None
        params = self.decoder(z) if kept is None else self.decoder.head(kept)
        return ElboTerms(-self.likelihood.log_prob(params, x), posterior.kl(), params, kept)

    def from_uint8(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Stored images as the floats this model is trained on."""
        return from_uint8(images, self.likelihood.pixel_range)

    def reconstruct(self, x: Float[Tensor, "b c h w"], *, tile_size: int | None = None) -> Float[Tensor, "b c h w"]:
        """Decode the posterior's mode; images in and out in the pixel range. Sizes and tiles: as `encode`."""
        return self.decode(self.encode(x, tile_size=tile_size).mode(), tile_size=tile_size)

    def sample(
        self, num_images: int, *, seed: int = 0, start: int = 0, temperature: float = 1.0, class_: str | None = None
    ) -> Float[Tensor, "b c h w"]:
        """Images number `start`, `start` + 1, … of the endless set that `seed` names, in the pixel range; of one class, if named.

        Decoder means at latents of `prior`, or N(0, temperature² I) where there is none; image i is the same whatever `start` and
        `num_images` are. Raises ValueError for a class without a prior that knows it.
        """
        prior = StandardNormal(self.config.latent_shape) if self.prior is None else self.prior
        if class_ is not None:
            if not isinstance(prior, ClassPrior):
                raise ValueError(
                    f"class_ is {class_!r}, and no prior that knows classes was trained; vaetrain/train_prior.py trains one"
                )
            prior = prior.of_class(class_)
        z = prior.sample(seed, range(start, start + num_images), temperature)
        return self.decode(upload(z, next(self.parameters()).device))
