"""Train, scale, score and ship convolutional variational autoencoders on image shards."""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vaetrain.latents.reader import LatentReader
    from vaetrain.model.autoencoder import VAE
    from vaetrain.priors.loading import load

# Threads of OpenMP that wait for each other spin, and on a machine that does something else besides they spin in the way of those
# they wait for: training was five times slower so. Read when torch is loaded; docs/benchmarks.md has the measurement.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

__version__ = version("vaetrain")
__all__ = ["VAE", "LatentReader", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """Import torch only for those who ask for a model or a reader, so that every command's --help answers at once."""
    if name == "load":
        from vaetrain.priors.loading import load

        return load
    if name == "VAE":
        from vaetrain.model.autoencoder import VAE

        return VAE
    if name == "LatentReader":
        from vaetrain.latents.reader import LatentReader

        return LatentReader
    raise AttributeError(f"module 'vaetrain' has no attribute {name!r}")
