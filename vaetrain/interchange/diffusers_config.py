"""config.json of diffusers' AutoencoderKL, and the `--model.*` of the same network. Without torch.

A folder that `AutoencoderKL.from_pretrained` reads is config.json and diffusion_pytorch_model.safetensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vaetrain.documents import read_json
from vaetrain.model.config import NUM_GROUPS, ModelConfig

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"

AS_IT_IS: dict[str, Any] = {"act_fn": "silu", "norm_num_groups": NUM_GROUPS, "mid_block_add_attention": True}
"""What this network has no other of."""

DEFAULTS: dict[str, Any] = AS_IT_IS | {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "latent_channels": 4,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}
"""Of the library, for what a config leaves out, as old ones do."""


REMEDY = "bring the folder back from a copy"


def is_diffusers_folder(folder: Path) -> bool:
    """Whether there is a config.json of one of diffusers' models."""
    file = folder / "config.json"
    return file.is_file() and "_class_name" in read_json(file, remedy=REMEDY)


def config_of(model: ModelConfig) -> dict[str, Any]:
    """The content of config.json, without what is known of the latents."""
    num_levels = len(model.channel_mult)
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.31.0",  # that of the format: from there on `use_quant_conv` is read
        "in_channels": model.in_channels,
        "out_channels": model.in_channels,
        "down_block_types": ["DownEncoderBlock2D"] * num_levels,
        "up_block_types": ["UpDecoderBlock2D"] * num_levels,
        "block_out_channels": [model.base_channels * mult for mult in model.channel_mult],
        "layers_per_block": model.num_res_blocks,
        "latent_channels": model.latent_channels,
        "sample_size": model.image_size,
        "use_quant_conv": model.quant_conv,
        "use_post_quant_conv": model.quant_conv,
        "force_upcast": True,  # nobody has tried whether it stays within the range of fp16
        **AS_IT_IS,
    }


def model_of(folder: Path) -> dict[str, Any]:
    """The fields of `ModelConfig` that a folder's config.json decides.

    Raises ValueError for another class, and for a network that an autoencoder-kl is not.
    """
    file = folder / "config.json"
    content = DEFAULTS | read_json(file, remedy=REMEDY)
    if content.get("_class_name") != "AutoencoderKL":
        raise ValueError(f"{file} is of diffusers' {content.get('_class_name')}; what can be read is an AutoencoderKL")
    widths = content["block_out_channels"]
    expected = AS_IT_IS | {
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "out_channels": content["in_channels"],
        "use_post_quant_conv": content["use_quant_conv"],
    }
    for name, value in expected.items():
        if content[name] != value:
            raise ValueError(f"{file} has {name} {content[name]}; an autoencoder-kl has {value}")
    if any(width % widths[0] for width in widths):
        raise ValueError(
            f"{file} has block_out_channels {widths}; they are multiples of the first in an autoencoder-kl"
        )
    return {
        "kind": "autoencoder-kl",
        "in_channels": content["in_channels"],
        "base_channels": widths[0],
        "channel_mult": tuple(width // widths[0] for width in widths),
        "num_res_blocks": content["layers_per_block"],
        "latent_channels": content["latent_channels"],
        "quant_conv": content["use_quant_conv"],
    }


def check_fits(folder: Path, model: ModelConfig) -> None:
    """Refuse, with ValueError, a folder whose weights are not this model's; the message has the options of one they are.

    Raises FileNotFoundError where the weights are not, or only as a pickle, which could run code.
    """
    if not (folder / WEIGHTS_FILE).is_file():
        pickled = folder / Path(WEIGHTS_FILE).with_suffix(".bin")
        remedy = "; torch pickles are not read: save it anew with safe_serialization=True" if pickled.is_file() else ""
        raise FileNotFoundError(f"{folder} is a diffusers folder without {WEIGHTS_FILE}{remedy}")
    wanted = model_of(folder)
    if any(getattr(model, name) != value for name, value in wanted.items()):
        raise ValueError(f"{folder} does not fit this --model.*; pass {as_options(wanted)}")


def as_options(fields: dict[str, Any]) -> str:
    """Fields of `ModelConfig` as a command line."""
    values = ((name, value if isinstance(value, tuple) else (value,)) for name, value in fields.items())
    return " ".join(f"--model.{name.replace('_', '-')} {' '.join(map(str, value))}" for name, value in values)
