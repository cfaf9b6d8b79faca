"""Inception v3 with random weights: every step of FID runs, and no number that comes out is a FID.

As a command: python tests/inception_weights.py FILE.safetensors
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3


class UntrainedInception(FeatureExtractorInceptionV3):
    """The architecture, built without a weights file."""

    def __init__(self) -> None:
        nothing = io.BytesIO()
        torch.save({}, nothing)
        nothing.seek(0)
        super().__init__("inception-v3-compat", ["2048"], feature_extractor_weights_path=nothing)

    def load_state_dict(self, state_dict, strict=True, assign=False):
        """Let the constructor load nothing."""
        return super().load_state_dict(state_dict, strict=False, assign=assign)


def random_inception_weights(seed: int = 0) -> dict[str, Tensor]:
    """A state dict that torch-fidelity accepts, He-initialised so that features neither vanish nor explode."""
    network = UntrainedInception()
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network.state_dict()


def write_random_inception_weights(path: Path, seed: int = 0) -> Path:
    """Write them as .safetensors or .pth, by the file's suffix, and return the path."""
    weights = random_inception_weights(seed)
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(weights, path)
    else:
        torch.save(weights, path)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Write Inception v3 weights drawn at random, to try FID without the real file."
    )
    parser.add_argument("file", type=Path, help=".safetensors or .pth file to write (95 MB)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(f"Random Inception weights are in {write_random_inception_weights(arguments.file, arguments.seed)}")
