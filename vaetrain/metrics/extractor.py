"""Networks whose features FID and its kin compare, their weights read safely from local files.

torch-fidelity itself downloads weights, or unpickles any file it is pointed at (`weights_only=False`). Here a file is read
as tensors and nothing else, its hash is kept for the score's record, and the network is never reached.
"""

from __future__ import annotations

import hashlib
import io
import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_clip import MODEL_METADATA as CLIP_MODELS
from torch_fidelity.feature_extractor_clip import MODEL_URLS as CLIP_URLS
from torch_fidelity.feature_extractor_clip import FeatureExtractorCLIP
from torch_fidelity.feature_extractor_dinov2 import MODEL_METADATA as DINOV2_MODELS
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.feature_extractor_vgg16 import FeatureExtractorVGG16
from torchvision.models import VGG16_Weights

from vaetrain.distributed.arithmetic import ieee_fp32
from vaetrain.metrics.config import FidConfig
from vaetrain.metrics.weights import read_weights
from vaetrain.upload import upload

INCEPTION = "inception-v3-compat"


@dataclass(frozen=True)
class PublishedWeights:
    """A network of torch-fidelity that a local file can give its weights to."""

    kind: type[FeatureExtractorBase]
    url: str
    """Where the weights are published; nothing here ever downloads them."""
    sha256: str
    """How the hash of the published file begins."""
    layer: str
    """The features torch-fidelity computes FID from."""
    logits: str | None = None
    """The layer of the inception score; only a classifier has one."""
    is_torchscript: bool = False
    """Published as a TorchScript archive, of which only the published bytes are loaded."""


KNOWN = {
    INCEPTION: PublishedWeights(
        # The pooled features FID is defined on (Heusel et al. 2017).
        FeatureExtractorInceptionV3, URL_INCEPTION_V3, Path(URL_INCEPTION_V3).stem.rsplit("-", 1)[1], "2048",
        logits="logits_unbiased",
    ),
    "vgg16": PublishedWeights(
        FeatureExtractorVGG16, VGG16_Weights.IMAGENET1K_V1.url,
        Path(VGG16_Weights.IMAGENET1K_V1.url).stem.rsplit("-", 1)[1], "fc2_relu",
    ),
    **{
        name: PublishedWeights(FeatureExtractorCLIP, CLIP_URLS[name], CLIP_MODELS[name]["hash"], "clip", is_torchscript=True)
        for name in CLIP_MODELS
    },
}  # fmt: skip


class Features(NamedTuple):
    """What an extractor says of a batch of images."""

    features: Float32[Tensor, "b d"]
    logits: Float32[Tensor, "b classes"] | None
    """Of the inception score, from a classifier."""


def how_to_get_weights(name: str) -> str:
    """Which file to put where."""
    also = "; pytorch-fid's pt_inception-2015-12-05-6726825d.pth is the same file" if name == INCEPTION else ""
    return f"Download {KNOWN[name].url}, put it anywhere on this machine and pass --fid.weights FILE{also}."


def missing_weights(config: FidConfig) -> str | None:
    """Why there can be no features, with the remedy, when an extractor given by name was given no weights."""
    if config.weights is None and config.extractor in KNOWN:
        return f"no weights of {config.extractor} were given. {how_to_get_weights(config.extractor)}"
    return None


class FeatureExtractor:
    """Images to features: float32 whatever surrounds it, gradients off.

    Attributes: `name`, `layer`, `weights_sha256`, and `weights_are_published`, False for any file but the one that is
    published for the network: what other weights give is a distance, yet no FID that could be compared with anybody's.
    """

    def __init__(self, config: FidConfig, device: torch.device) -> None:
        """Build `config.extractor` with the weights in `config.weights`.

        Raises FileNotFoundError or ValueError, saying what to put where, if a file is missing, is no plain dictionary of
        tensors, or belongs to another architecture.
        """
        self.device = device
        self.name = config.extractor
        if config.extractor in KNOWN:
            known = KNOWN[config.extractor]
            self.layer = known.layer
            self.weights_sha256, network = _build(config)
            self.weights_are_published = self.weights_sha256.startswith(known.sha256)
            self.network: torch.nn.Module = network.to(device=device, memory_format=torch.channels_last)
        else:
            self.layer = "output"
            self.weights_sha256, self.network = _load_torchscript(config, device)
            self.weights_are_published = False

    @torch.no_grad()
    def __call__(self, images: UInt8[Tensor, "b c h w"]) -> Features:
        """Features of images with 3 channels or, repeated to 3, one; the network resizes them as its authors did.

        Raises ValueError when a user's module returns anything but a row of finite numbers for each image.
        """
        # Of one layout, whichever the images have, and with it one order of sums.
        images = upload(images, self.device).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        # bf16 moves a FID by several points, and cuDNN's convolutions round to TF32 by default.
        with ieee_fp32(self.device):
            outputs = self.network(images)
        features, *logits = (outputs,) if isinstance(outputs, Tensor) else outputs
        if not (isinstance(features, Tensor) and features.ndim == 2 and len(features) == len(images)):
            found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"--fid.extractor {self.name} returned {found} for {len(images)} images, not (b, d)")
        # Not of published weights: the host would wait for the device after each batch.
        if not (self.weights_are_published or torch.isfinite(features).all()):
            raise ValueError(f"--fid.extractor {self.name} returned features that are not finite; check its weights")
        return Features(features.float(), logits[0] if logits else None)

    def describe(self) -> dict[str, object]:
        """What a score's record says about the network."""
        return {
            "extractor": f"torch-fidelity {self.name}" if self.name in KNOWN else self.name,
            "layer": self.layer,
            "weights_sha256": self.weights_sha256,
            "weights_are_published": self.weights_are_published,
        }


def _build(config: FidConfig) -> tuple[str, FeatureExtractorBase]:
    """The hash of the weights' file, and the network with them in it."""
    name, path, known = config.extractor, config.weights, KNOWN[config.extractor]
    if path is None:
        raise ValueError(f"--fid.extractor {name} needs weights: {missing_weights(config)}")
    layers = [layer for layer in (known.layer, known.logits) if layer is not None]
    if known.is_torchscript:
        sha256 = _check_published(path, known, name)
        return sha256, known.kind(name, layers, feature_extractor_weights_path=str(path))
    state, sha256 = read_weights(path, "--fid.weights", how_to_get_weights(name))
    # The constructor insists on loading a file with weights_only=False: it gets one that we have just written.
    verified = io.BytesIO()
    torch.save(state, verified)
    verified.seek(0)
    try:
        return sha256, known.kind(name, layers, feature_extractor_weights_path=verified)
    except RuntimeError as error:
        lines = [textwrap.shorten(line, 200, placeholder=" …") for line in str(error).splitlines()[:5]]
        raise ValueError(
            f"--fid.weights {path} does not hold torch-fidelity's {name}. {how_to_get_weights(name)}\n"
            + "\n".join(lines)
        ) from error


def _check_published(path: Path, known: PublishedWeights, name: str) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"--fid.weights {path} is no file. {how_to_get_weights(name)}")
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != known.sha256:
        raise ValueError(
            f"--fid.weights {path} is not the published file of {name}, a TorchScript archive, which could run code: its "
            f"SHA-256 is {sha256}, not {known.sha256}. {how_to_get_weights(name)}"
        )
    return sha256


def _load_torchscript(config: FidConfig, device: torch.device) -> tuple[str, torch.nn.Module]:
    """A user's own module: code, which the user has trusted by naming it."""
    name = config.extractor
    if config.weights is not None:
        raise ValueError(f"--fid.weights {config.weights}: a TorchScript --fid.extractor brings its own weights")
    if name in DINOV2_MODELS:
        raise ValueError(
            f"--fid.extractor {name}: torch-fidelity fetches DINOv2 as code from GitHub, which is not done here. Where there "
            f"is network: torch.hub.load('facebookresearch/dinov2', '{DINOV2_MODELS[name]}'), wrap it with its resizing "
            "and normalisation, save it with torch.jit.trace(…).save('dinov2.pt'), and pass --fid.extractor dinov2.pt"
        )
    path = Path(name)
    if not path.is_file():
        names = ", ".join(name for name in KNOWN if not name.startswith("clip-"))
        raise FileNotFoundError(f"--fid.extractor {name} is neither {names}, {', '.join(CLIP_MODELS)}, nor a file")
    content = path.read_bytes()  # once, so that the hash is that of the module in use
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", FutureWarning
            )  # TorchScript is deprecated, and what torch-fidelity's users have
            module = torch.jit.load(io.BytesIO(content), map_location=device)
    except RuntimeError as error:
        reason = textwrap.shorten(str(error), 200, placeholder=" …")
        raise ValueError(
            f"--fid.extractor {path} is no TorchScript module (torch.jit.save writes one): {reason}"
        ) from error
    return hashlib.sha256(content).hexdigest(), module.eval()
