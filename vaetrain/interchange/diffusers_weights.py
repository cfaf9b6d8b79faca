"""The weights of an autoencoder-kl under the names that diffusers gives them."""

from __future__ import annotations

import re
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from vaetrain.interchange.diffusers_config import WEIGHTS_FILE
from vaetrain.model.autoencoder import VAE

MOVED = {"encoder.quant_conv.": "quant_conv.", "decoder.post_quant_conv.": "post_quant_conv."}
"""Here → there: diffusers has these two beside encoder and decoder."""

RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Of attention layers, before diffusers 0.12: many published files have these names still."""


def diffusers_tensors(vae: VAE) -> dict[str, Tensor]:
    """Encoder and decoder as contiguous CPU tensors under diffusers' names; what the likelihood learned has no place there."""
    tensors = {}
    for name, tensor in vae.state_dict().items():
        if not name.startswith("likelihood."):
            for here, there in MOVED.items():
                name = name.replace(here, there)
            tensors[name] = tensor.detach().cpu().contiguous()
    return tensors


def load_diffusers(vae: VAE, folder: Path) -> None:
    """Copy a folder's weights, of any floating-point type, into encoder and decoder.

    The likelihood stays as it is. Raises ValueError naming what does not fit.
    """
    file = folder / WEIGHTS_FILE
    tensors = {our_name(name): tensor for name, tensor in load_file(file).items()}
    shapes = {name: weight.shape for name, weight in vae.state_dict().items()}
    for name, tensor in tensors.items():
        if name in shapes and tensor.ndim == 4 and tensor.shape[2:] == (1, 1) and len(shapes[name]) == 2:
            tensors[name] = tensor[:, :, 0, 0]  # the 1×1 convolutions that attention once was made of
    likelihood = {name: weight for name, weight in vae.state_dict().items() if name.startswith("likelihood.")}
    try:
        vae.load_state_dict(tensors | likelihood)
    except RuntimeError as error:
        raise ValueError(f"{file} does not fit this --model.*: {error}") from error


def our_name(name: str) -> str:
    """The name here of a tensor in a diffusers file."""
    name = re.sub(r"(attentions\.0)\.(query|key|value|proj_attn)\.", lambda m: f"{m[1]}.{RENAMED[m[2]]}.", name)
    for here, there in MOVED.items():
        if name.startswith(there):
            return here + name.removeprefix(there)
    return name
