"""Which priors there are and how they are fitted, without importing torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

PriorName = Literal["standard", "gaussian", "gmm", "flow", "flow-matching", "mean-code", "random-code"]

PRIOR_NAMES: tuple[PriorName, ...] = (
    "standard",
    "gaussian",
    "gmm",
    "flow",
    "flow-matching",
    "mean-code",
    "random-code",
)
"""In the order of tables and pictures."""

FITTED_PRIORS: tuple[PriorName, ...] = tuple(name for name in PRIOR_NAMES if name != "flow-matching")
"""Those that need no training of their own."""


Solver = Literal["heun", "euler"]


@dataclass(frozen=True)
class FlowSettings:
    """How a flow-matching prior is drawn from."""

    class_: str | None = None
    """The class to draw; None: each latent's own, as often as among the training latents."""

    guidance: float = 1.0
    """1: the velocity of the class; w: v(none) + w · (v(class) − v(none)) (Ho & Salimans 2022)."""

    steps: int = 30
    """Of the solver."""

    solver: Solver = "heun"
    """heun takes two velocities a step, euler one."""

    def __post_init__(self) -> None:
        """Refuse what integrates nothing."""
        if self.steps < 1:
            raise ValueError(f"--steps is {self.steps}; it must be at least 1")
        if not math.isfinite(self.guidance):
            raise ValueError(f"--guidance is {self.guidance}; give a finite number")

    def check(self, prior: PriorName) -> None:
        """Raise ValueError where another prior is asked for what only this one can."""
        if prior != "flow-matching" and self != FlowSettings():
            given = [
                f"--{field.name.rstrip('_')}" for field in fields(self) if getattr(self, field.name) != field.default
            ]
            raise ValueError(f"{', '.join(given)}: only --prior flow-matching has it, and --prior is {prior}")

    def record(self, prior: PriorName) -> dict[str, Any]:
        """For the manifest of a sample set: nothing for priors that do not look at it."""
        if prior != "flow-matching":
            return {}
        return {"class": self.class_, "guidance": self.guidance, "steps": self.steps, "solver": self.solver}


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
        if prior == "flow-matching":  # trained, not fitted: its own config is in its file
            return []
        others = {name for names in OWN_SETTINGS.values() for name in names} - set(OWN_SETTINGS.get(prior, ()))
        return [setting.name for setting in fields(self) if setting.name not in others]
