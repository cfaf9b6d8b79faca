"""The lecture's experiments: which figure, which config, on what, and what it showed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from reproduce.datasets import Scale

CONFIGS = Path("configs/lecture")


@dataclass(frozen=True)
class Experiment:
    """One training of the lecture and the figures that it filled."""

    name: str
    """Of its config below configs/lecture."""
    figures: str
    title: str
    lecture: str
    """What the lecture did and showed."""
    data_full: str
    data_small: str
    """Shard sets of datasets.py."""
    small: str
    """What is smaller at the small scale."""
    pictures: tuple[tuple[str, str], ...]
    """File below the run's figures, and its caption."""
    num_images: tuple[int, int] = (2000, 2000)
    """On each side of the distance, at full and at small scale."""
    priors: tuple[str, ...] = ("standard",)

    def data(self, scale: Scale) -> str:
        """The shard set at a scale."""
        return self.data_full if scale == "full" else self.data_small

    def configs(self, scale: Scale) -> list[str]:
        """Config files, the later over the earlier."""
        own = [str(CONFIGS / f"{self.name}.yaml")]
        return own if scale == "full" else [*own, str(CONFIGS / "small" / f"{self.name}.yaml")]


RECONSTRUCTIONS = ("reconstructions.png", "Validation images and their reconstructions")
SAMPLES = ("samples.png", "Samples: codes drawn from N(0, I)")
INTERPOLATIONS = ("interpolations.png", "Between the codes of two validation images")
TRAVERSALS = ("latent_traversals.png", "Along the most active latent dimensions")
PCA = ("latent_pca.png", "Codes of validation images on their principal axes")
PRIORS = ("priors.png", "The same decoder, codes drawn in different ways")
LOSSES = ("losses.png", "Losses")
CATS_ONLY = "64×64, a quarter of the network, fewer epochs; where only cats are at hand, 500 of them are held out"
DRAWN = "64×64 drawn faces stand in for the photographs, a quarter of the network, fewer epochs"

EXPERIMENTS = (
    Experiment(
        "ae_dense_mnist", "Fig. 1", "Autoencoder without convolutions, MNIST",
        "20 epochs; digits come back recognisable and blurred.", "mnist", "mnist", "5 epochs",
        (RECONSTRUCTIONS, INTERPOLATIONS, PCA),
    ),
    Experiment(
        "ae_conv_mnist", "Fig. 2", "Convolutional autoencoder, MNIST", "20 epochs; sharper than without convolutions.",
        "mnist", "mnist", "1 epoch", (RECONSTRUCTIONS, INTERPOLATIONS, PCA),
    ),
    Experiment(
        "ae_faces_gray", "Fig. 3", "Autoencoder, Animal Faces, grayscale", "Faces come back with their pose.", "afhq128gray",
        "cats64gray", CATS_ONLY, (RECONSTRUCTIONS, INTERPOLATIONS),
    ),
    Experiment(
        "ae_faces", "Figs. 3–4", "Autoencoder, Animal Faces, colour, and what its decoder makes of codes nobody encoded",
        "Faces come back; random codes decode to clutter, mean codes to an average face.", "afhq128", "cats64", CATS_ONLY,
        (RECONSTRUCTIONS, INTERPOLATIONS, PRIORS), priors=("standard", "mean-code", "random-code", "gmm"),
    ),
    Experiment(
        "vae_mnist", "Figs. 6–7", "VAE, MNIST", "20 epochs; new digits, some of them between two.", "mnist", "mnist",
        "2 epochs", (RECONSTRUCTIONS, SAMPLES, INTERPOLATIONS, TRAVERSALS, PCA), priors=("standard", "gmm"),
    ),
    Experiment(
        "vae_cats", "Figs. 8–10", "VAE, cats", "5,153 / 500 images, 40 epochs; blurred cats.", "afhq128", "cats64", CATS_ONLY,
        (RECONSTRUCTIONS, SAMPLES, INTERPOLATIONS, TRAVERSALS, PRIORS), priors=("standard", "gmm"),
    ),
    Experiment(
        "vae_wild", "Figs. 11–13", "VAE, wild animals", "4,738 / 500 images, 70 epochs.", "afhq128", "faces64", DRAWN,
        (RECONSTRUCTIONS, SAMPLES, INTERPOLATIONS, TRAVERSALS), num_images=(2000, 800), priors=("standard", "gmm"),
    ),
    Experiment(
        "vae_all", "Figs. 14–18", "VAE, all three classes",
        "14,630 / 1,500 images, 100 epochs; FID 269.98 (Fig. 18: pytorch-fid, 2,000 samples against 2,000 images).", "afhq128",
        "faces64", DRAWN, (RECONSTRUCTIONS, SAMPLES, INTERPOLATIONS, TRAVERSALS, PCA, PRIORS), priors=("standard", "gmm"),
    ),
)  # fmt: skip
