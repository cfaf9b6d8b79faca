"""Which priors there are and how they are fitted, without importing torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

PriorName = Literal["standard", "gaussian", "gmm", "flow", "mean-code", "random-code"]

PRIOR_NAMES: tuple[PriorName, ...] = ("standard", "gaussian", "gmm", "flow", "mean-code", "random-code")
"""In the order of tables and pictures."""


OWN_SETTINGS: dict[PriorName, tuple[str, ...]] = {
    "gmm": ("gmm_components", "leading_dims"),
    "flow": ("flow_steps", "leading_dims"),
    "mean-code": ("mean_code_images",),
}
"""Settings that some priors alone look at; the others concern which images are encoded."""


@dataclass(frozen=True)
class PriorFitConfig:
    """How priors are fitted to the latents of the training images; `standard` needs no fit."""

    num_codes: int = 50_000
    """Training images, drawn at random, that priors are fitted to; at most as many validation images choose and judge."""

    mean_code_images: int = 4
    """mean-code: training images whose codes are averaged into one latent. 1 repeats reconstructions of training images,
    many approach the one mean of all codes."""

    gmm_components: tuple[int, ...] = (5, 10, 20, 40)
    """gmm: numbers of components tried, rising, until the held-out likelihood falls."""

    leading_dims: int = 128
    """gmm and flow: latent dimensions they model, those along which the codes vary most; the rest stays Gaussian."""

    flow_steps: int = 2000
    """flow: most optimizer steps; it stops earlier when the held-out likelihood has stopped rising."""

    seed: int = 0
    """Picks the images and every random start of a fit."""

    def __post_init__(self) -> None:
        """Refuse counts that mean nothing."""
        for name in ("num_codes", "mean_code_images", "leading_dims", "flow_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--fit.{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if not self.gmm_components or min(self.gmm_components) < 1:
            raise ValueError(f"--fit.gmm-components is {self.gmm_components}; give one or more counts of at least 1")
        if self.seed < 0:
            raise ValueError(f"--fit.seed is {self.seed}; it must not be negative")

    def settings_of(self, prior: PriorName) -> list[str]:
        """Names of those that decide the fit of this prior."""
        others = {name for names in OWN_SETTINGS.values() for name in names} - set(OWN_SETTINGS.get(prior, ()))
        return [setting.name for setting in fields(self) if setting.name not in others]
