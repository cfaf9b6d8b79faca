"""What a model is: every architectural choice and the likelihood, without importing torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

MOST = {
    "image_size": 8192, "patch_size": 8192, "base_channels": 2**16, "num_res_blocks": 64, "latent_channels": 2**20,
    "num_mixtures": 1000,
}  # fmt: skip
"""Bounds of what a config, which may be somebody else's, can ask for."""

MOST_LAYERS = 64
"""Levels of a convolutional, hidden layers of a dense model."""

MOST_WEIGHTS = 2**32
"""16 GiB in fp32."""

LikelihoodName = Literal[
    "gaussian-fixed", "gaussian-shared", "gaussian-pixel", "laplace-shared",
    "bernoulli", "discretized-logistic", "logistic-mixture",
]  # fmt: skip


NUM_GROUPS = 32
"""Of every group normalisation of an autoencoder-kl."""

RAW_MEAN: tuple[LikelihoodName, ...] = ("gaussian-fixed", "gaussian-shared", "laplace-shared")
"""Likelihoods whose mean is the decoder's output as it is."""


@dataclass(frozen=True)
class ModelConfig:
    """The autoencoder: encoder, latent, decoder and the likelihood the decoder parameterises."""

    kind: Literal["conv", "dense", "autoencoder-kl"] = "conv"
    """`conv`: residual convolutions. `dense`: fully connected layers only (the lecture's "without CNN"). `autoencoder-kl`: latent
    diffusion's network, which diffusers loads (docs/first_stage.md); where a key below says conv, it is shaped by it too, but for
    patch-size and attention-resolutions."""

    image_size: int = 64
    """Height and width of the images in pixels; must equal the shard set's."""

    in_channels: int = 3
    """Image channels: 3 (colour) or 1 (grayscale); must equal the shard set's."""

    patch_size: int = 1
    """Pixels per side folded into channels before the first convolution (conv). 2 quarters the cost of the top level."""

    base_channels: int = 64
    """Channels of the highest-resolution level (conv)."""

    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    """Channels of each level as multiples of `base_channels`; each level after the first halves the resolution (conv)."""

    num_res_blocks: int = 2
    """Residual blocks per level in the encoder; the decoder has one more (conv)."""

    attention_resolutions: tuple[int, ...] = ()
    """Resolutions in pixels (e.g. 16 8) whose residual blocks are followed by self-attention (conv)."""

    checkpoint_levels: tuple[int, ...] = ()
    """Levels, 0 that of the highest resolution, whose blocks are computed once more in the backward pass in place of being kept in
    memory (conv): the same weights and gradients from less memory and more time (docs/scaling.md)."""

    quant_conv: bool = True
    """1×1 convolutions on both sides of the latent (autoencoder-kl): Stable Diffusion 1 to XL have them, 3 and FLUX have not."""

    hidden_features: tuple[int, ...] = (512, 256)
    """Widths of the encoder's hidden layers, mirrored in the decoder (dense)."""

    latent: Literal["spatial", "vector"] = "spatial"
    """`spatial`: a (latent_channels, h, w) map; `vector`: latent_channels numbers. A dense model's latent is a vector."""

    latent_channels: int = 16
    """Channels of a spatial latent, or the length of a vector latent."""

    variational: bool = True
    """True: a VAE with a diagonal Gaussian posterior. False: a deterministic autoencoder (rate 0)."""

    likelihood: LikelihoodName = "gaussian-shared"
    """p(x|z). gaussian-fixed: variance sigma² (the lecture's MSE). gaussian-shared: one learned variance (σ-VAE).
    gaussian-pixel: mean and variance per pixel (the lecture's Assumption 3). laplace-shared: the L1 loss, with one learned
    width. bernoulli: for near-binary images.
    discretized-logistic, logistic-mixture: mass functions on the 256 levels, true bits per dimension."""

    sigma: float = 0.1
    """Standard deviation of gaussian-fixed, and about where those of gaussian-shared and laplace-shared start, on the [-1, 1]
    pixel scale (0.1 is 12.75 of 255 levels)."""

    num_mixtures: int = 5
    """Components of logistic-mixture."""

    def __post_init__(self) -> None:
        """Refuse shapes that cannot be built."""
        if self.in_channels not in (1, 3):
            raise ValueError(f"--model.in-channels is {self.in_channels}; images have 3 channels or, grayscale, 1")
        for name in ("image_size", "patch_size", "base_channels", "num_res_blocks", "latent_channels", "num_mixtures"):
            if getattr(self, name) < 1:
                raise ValueError(f"--model.{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
            if getattr(self, name) > MOST[name]:
                raise ValueError(
                    f"--model.{name.replace('_', '-')} is {getattr(self, name):.6g}; it must be at most {MOST[name]:,}"
                )
        if self.sigma <= 0:
            raise ValueError(f"--model.sigma is {self.sigma}; a standard deviation is positive")
        if not 1e-6 <= self.sigma <= 1e6:
            raise ValueError(f"--model.sigma is {self.sigma}; give 1e-6 to 1e6")
        if not self.channel_mult or min(self.channel_mult) < 1:
            raise ValueError(f"--model.channel-mult is {self.channel_mult}; give one or more factors of at least 1")
        for name in ("channel_mult", "attention_resolutions", "checkpoint_levels", "hidden_features"):
            values: tuple[int, ...] = getattr(self, name)
            if len(values) > MOST_LAYERS or not all(0 <= value < 2**31 for value in values):
                raise ValueError(
                    f"--model.{name.replace('_', '-')} has {len(values)} numbers, up to {max(values):.6g}; give at most "
                    f"{MOST_LAYERS}, none negative or over 2^31"
                )
        if self.kind == "autoencoder-kl":
            self._check_autoencoder_kl()
        if self.kind != "dense":
            if self.image_size % self.downsample_factor:
                raise ValueError(
                    f"--model.image-size {self.image_size} is not a multiple of {self.downsample_factor}, the downsampling "
                    f"of --model.patch-size {self.patch_size} and the {len(self.channel_mult)} levels of "
                    "--model.channel-mult; use fewer levels or make shards of another size"
                )
            levels = {self.image_size // self.patch_size // 2**level for level in range(len(self.channel_mult))}
            if self.kind == "conv" and (unknown := set(self.attention_resolutions) - levels):
                raise ValueError(
                    f"--model.attention-resolutions {sorted(unknown)} are no resolutions of this model; "
                    f"it has {sorted(levels, reverse=True)}"
                )
            if unknown := set(self.checkpoint_levels) - set(range(len(self.channel_mult))):
                raise ValueError(
                    f"--model.checkpoint-levels {sorted(unknown)} are no levels of this model; "
                    f"it has {list(range(len(self.channel_mult)))}"
                )
        elif not self.hidden_features or not min(self.hidden_features):
            raise ValueError("--model.hidden-features is empty or 0; a dense model needs at least one hidden layer")
        if (num_weights := self._about_num_weights()) > MOST_WEIGHTS:
            raise ValueError(
                f"this --model.* has some {num_weights:.3g} weights, and {MOST_WEIGHTS:,} at most are built; take fewer "
                "channels, levels or hidden features"
            )

    def _about_num_weights(self) -> int:
        """Rather too many than too few, found without building anything."""
        moments = 2 * self.latent_channels
        params = 3 * self.num_mixtures if self.likelihood == "logistic-mixture" else 2  # of the likelihood, a channel
        if self.kind == "dense":
            encoder = (self.num_pixels, *self.hidden_features, moments)
            decoder = (self.latent_channels, *reversed(self.hidden_features), self.num_pixels * params)
            return sum(one * other for widths in (encoder, decoder) for one, other in pairwise(widths))
        widths = [self.base_channels * mult for mult in self.channel_mult]
        blocks = sum((2 * self.num_res_blocks + 1) * 22 * width**2 for width in widths)  # two convolutions, attention
        between = 2 * 9 * sum(one * other for one, other in pairwise(widths))
        ends = 9 * widths[0] * self.patch_size**2 * self.in_channels * (1 + params)
        latent = 9 if len(self.latent_shape) == 3 else (self.image_size // self.downsample_factor) ** 2
        return blocks + between + ends + 2 * latent * widths[-1] * moments

    def _check_autoencoder_kl(self) -> None:
        """Refuse what diffusers' network has not."""
        for name, value, wanted in (
            ("patch-size", self.patch_size, 1),
            ("attention-resolutions", self.attention_resolutions, ()),
            ("latent", self.latent, "spatial"),
            ("variational", self.variational, True),
        ):
            if value != wanted:
                raise ValueError(
                    f"--model.{name} is {value}; an autoencoder-kl has one network, which diffusers loads: leave it at {wanted}"
                )
        if self.likelihood not in RAW_MEAN:
            raise ValueError(
                f"--model.likelihood is {self.likelihood}; diffusers takes an autoencoder-kl's output for the image: use one of "
                f"{', '.join(RAW_MEAN)}"
            )
        widths = [self.base_channels * mult for mult in self.channel_mult]
        if any(width % NUM_GROUPS for width in widths):
            raise ValueError(
                f"--model.base-channels {self.base_channels} and --model.channel-mult {self.channel_mult} make widths of {widths}; "
                f"those of an autoencoder-kl are multiples of {NUM_GROUPS}"
            )

    def check_images(self, image_size: int, channels: int) -> None:
        """Raise ValueError unless images of this size and number of channels fit the model."""
        if image_size != self.image_size:
            raise ValueError(
                f"the shard set's images are {image_size}×{image_size} pixels but --model.image-size is {self.image_size}; "
                f"pass --model.image-size {image_size}, or make shards with --size {self.image_size}"
            )
        self.check_channels(channels)

    def check_channels(self, channels: int) -> None:
        """Raise ValueError unless images with this number of channels fit the model, whatever their size."""
        if channels != self.in_channels:
            raise ValueError(
                f"the shard set's images have {channels} channel(s) but --model.in-channels is {self.in_channels}; "
                f"pass --model.in-channels {channels}, or make shards {'with' if self.in_channels == 1 else 'without'} --gray"
            )

    @property
    def without_checkpointing(self) -> ModelConfig:
        """The same network as far as weights and losses go."""
        return replace(self, checkpoint_levels=())

    @property
    def downsample_factor(self) -> int:
        """Image pixels per side of one cell of the lowest-resolution feature map (conv)."""
        return int(self.patch_size * 2 ** (len(self.channel_mult) - 1))

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one image's latent: (channels,) or (channels, height, width)."""
        if self.kind == "dense" or self.latent == "vector":
            return (self.latent_channels,)
        side = self.image_size // self.downsample_factor
        return (self.latent_channels, side, side)

    def latent_shape_of(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of the latent of an image of any size; raises ValueError, saying why, for one that the model cannot encode."""
        if (height, width) == (self.image_size, self.image_size):
            return self.latent_shape
        size, factor = f"{height}×{width} pixels", self.downsample_factor
        if reason := self.why_size_is_fixed:
            raise ValueError(
                f"images of {size}: this model takes {self.image_size}×{self.image_size} alone, since {reason}"
            )
        if height % factor or width % factor or min(height, width) < factor:
            raise ValueError(
                f"images of {size}: height and width must be multiples of {factor}, the model's downsampling; crop or pad them to "
                f"{_nearest(height, factor)}×{_nearest(width, factor)}"
            )
        return (self.latent_channels, height // factor, width // factor)

    def check_latent(self, shape: tuple[int, ...]) -> None:
        """Raise ValueError for a latent, without its batch dimension, that the model cannot decode."""
        if shape == self.latent_shape:
            return
        if reason := self.why_size_is_fixed:
            raise ValueError(f"latents of shape {shape}: this model takes {self.latent_shape} alone, since {reason}")
        if len(shape) != 3 or shape[0] != self.latent_channels or min(shape) < 1:
            raise ValueError(f"latents of shape {shape}: this model takes ({self.latent_channels}, height, width)")

    def check_tiles(self, tile_size: int) -> None:
        """Raise ValueError unless the model works in tiles of so many pixels a side."""
        if self.kind == "autoencoder-kl":
            raise ValueError(
                "a model of --model.kind autoencoder-kl encodes and decodes other sizes whole, and not in tiles: its attention "
                "compares all positions; export it (--format diffusers) and use the library's enable_tiling, which blends"
            )
        if reason := self.why_size_is_fixed:
            raise ValueError(f"tile_size is {tile_size}, but this model does not work in tiles, since {reason}")
        factor = self.downsample_factor
        if tile_size < 1 or tile_size % factor:
            raise ValueError(
                f"tile_size is {tile_size}; it must be a multiple of {factor}, the model's downsampling, such as "
                f"{_nearest(tile_size, factor)}"
            )

    @property
    def why_size_is_fixed(self) -> str | None:
        """Why images of one size alone fit, and no tiles; None when others do, too."""
        if self.kind == "dense":
            return "its layers are fully connected (--model.kind dense)"
        if self.latent == "vector":
            return "its latent is a vector, of fully connected layers (--model.latent vector)"
        if self.attention_resolutions:
            resolutions = " ".join(map(str, self.attention_resolutions))
            return f"its attention compares all positions at fixed resolutions (--model.attention-resolutions {resolutions})"
        return None

    @property
    def num_pixels(self) -> int:
        """Dimensions of one image: channels × height × width."""
        return self.in_channels * self.image_size**2


def _nearest(size: int, factor: int) -> int:
    return max(factor, round(size / factor) * factor)
