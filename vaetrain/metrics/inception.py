"""torch-fidelity's Inception v3 as a feature extractor, its weights read safely from a local file.

torch-fidelity itself downloads the weights or unpickles any file it is pointed at (`weights_only=False`). Here the file
is read as tensors and nothing else, its hash is kept for the score's record, and the network is never reached.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import textwrap
from pathlib import Path

import safetensors.torch
import torch
from jaxtyping import Float32, UInt8
from safetensors import SafetensorError
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

EXTRACTOR = "inception-v3-compat"
"""torch-fidelity's name of the network; with `LAYER` it belongs to every score's record."""

LAYER = "2048"
"""The pooled features FID is defined on (Heusel et al. 2017)."""

PUBLISHED_SHA256_START = Path(URL_INCEPTION_V3).stem.rsplit("-", 1)[1]
"""How the hash of the published weights begins; torch.hub writes it into their file name."""

HOW_TO_GET_WEIGHTS = (
    f"Download {URL_INCEPTION_V3} (95 MB), put it anywhere on this machine and pass --fid.weights FILE; "
    "pytorch-fid's pt_inception-2015-12-05-6726825d.pth is the same file."
)


class FeatureExtractor:
    """Images to the 2048 Inception features of FID: float32 whatever surrounds it, gradients off.

    Attributes: `weights_sha256`, and `weights_are_published`, False for any file but torch-fidelity's own .pth: what is
    computed with other weights is a Fréchet distance, yet no FID that could be compared with anybody's.
    """

    def __init__(self, weights: Path | None, device: torch.device) -> None:
        """Build the network from a .pth or .safetensors state dict.

        Raises FileNotFoundError or ValueError, saying what to put where, if the file is missing, is no plain dictionary
        of tensors, or belongs to another architecture.
        """
        state, self.weights_sha256 = read_weights(weights)
        self.weights_are_published = self.weights_sha256.startswith(PUBLISHED_SHA256_START)
        # The constructor insists on loading a file with weights_only=False: it gets one that we have just written.
        verified = io.BytesIO()
        torch.save(state, verified)
        verified.seek(0)
        try:
            network = FeatureExtractorInceptionV3(EXTRACTOR, [LAYER], feature_extractor_weights_path=verified)
        except RuntimeError as error:
            lines = [textwrap.shorten(line, 200, placeholder=" …") for line in str(error).splitlines()[:5]]
            raise ValueError(
                f"{weights} does not hold torch-fidelity's Inception v3. {HOW_TO_GET_WEIGHTS}\n" + "\n".join(lines)
            ) from error
        self.network = network.to(device=device, memory_format=torch.channels_last)
        self.device = device

    @torch.no_grad()
    def __call__(self, images: UInt8[Tensor, "b c h w"]) -> Float32[Tensor, "b 2048"]:
        """Features of images with 3 channels or, repeated to 3, one; resized to 299×299 as TensorFlow 1 did."""
        images = images.to(self.device).expand(-1, 3, -1, -1)
        # bf16 moves a FID by several points, and TF32 is on by default in cuDNN's convolutions.
        with (
            torch.autocast(self.device.type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False, fp32_precision="ieee"),
        ):
            features: Tensor = self.network(images)[0]
        return features


def read_weights(path: Path | None) -> tuple[dict[str, Tensor], str]:
    """The tensors of a .pth or .safetensors file by name, on the CPU, and the file's SHA-256.

    Raises FileNotFoundError or ValueError if the file is missing or is anything but a dictionary of tensors.
    """
    if path is None:
        raise ValueError(f"FID needs the Inception weights and none were given. {HOW_TO_GET_WEIGHTS}")
    if not path.is_file():
        raise FileNotFoundError(f"--fid.weights {path} is no file. {HOW_TO_GET_WEIGHTS}")
    content = path.read_bytes()  # once, so that the hash is that of the weights in use
    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load(content)
        else:
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"--fid.weights {path} cannot be read as tensors alone and is refused: it is damaged, a TorchScript "
            f"archive, or holds Python objects, which could run code. {HOW_TO_GET_WEIGHTS}"
        ) from error
    if not (isinstance(state, dict) and all(isinstance(value, Tensor) for value in state.values())):
        raise ValueError(f"--fid.weights {path} holds no dictionary of tensors. {HOW_TO_GET_WEIGHTS}")
    return state, hashlib.sha256(content).hexdigest()
