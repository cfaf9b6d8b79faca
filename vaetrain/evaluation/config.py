"""What evaluate.py scores, without importing torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from vaetrain.data.config import DataConfig
from vaetrain.metrics.config import FidConfig
from vaetrain.metrics.likelihood_config import LikelihoodConfig
from vaetrain.metrics.lpips_config import LpipsConfig
from vaetrain.priors.config import PRIOR_NAMES, FlowSettings, PriorFitConfig, PriorName

ScoreName = Literal["elbo", "fid", "rfid", "likelihood", "lpips", "nearest", "latents"]

ALL_SCORES: tuple[ScoreName, ...] = ("elbo", "fid", "rfid", "likelihood", "lpips", "nearest", "latents")


@dataclass(frozen=True)
class EvaluateConfig:
    """What is scored, and how."""

    run: Path
    """Run directory of the trained model."""

    out: Path | None = None
    """JSON file for the scores; None: RUN/evaluation.json."""

    checkpoint: Literal["best", "last"] = "best"
    """Checkpoint with the best validation score, or the newest. EMA weights either way."""

    data: str | None = None
    """Shard set to score against (both splits); None: where the run found its own."""

    batch_size: int = 64
    """Images per forward pass and process."""

    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    """Arithmetic of the network; fp32 gives the numbers to publish. auto: bf16 where the device computes it natively."""

    seed: int = 0
    """Of the latent noise in the ELBO, and of the samples scored by FID."""

    scores: tuple[ScoreName, ...] = ALL_SCORES
    """elbo: ELBO and reconstruction of the val split. fid: samples against the train split, by FID, KID, inception score,
    precision and recall. rfid: the val split's reconstructions against its images. likelihood: importance-weighted bound on
    log p(x), mutual information, marginal KL, active units, gap between the splits (docs/likelihood_scores.md). lpips: LPIPS
    of reconstructions. nearest: how close samples are to training images. latents: pictures of the latent space."""

    priors: tuple[PriorName | Literal["all"], ...] = ("standard",)
    """Priors that samples are drawn from, fitted to the run's checkpoint where they have not been; `eval/fid` is of the first,
    the others' scores stand under `priors`, and figures/priors.png shows all side by side. all: with flow-matching where
    vaetrain/train_prior.py has trained one, whose settings are those of `--flow.*`."""

    temperature: float = 1.0
    """Factor on the latents' noise of the samples, as in sample.py."""

    samples: Path | None = None
    """Sample set of this checkpoint, drawn by sample.py, to score in place of samples drawn now."""

    keep_samples: Path | None = None
    """Folder to keep the scored samples in, as the sample set that sample.py writes; with several priors each in a folder
    of its own in it. None: they are not kept."""

    num_pictures: int = 500
    """Samples compared with their nearest training images, and validation images shown in pictures of the latent space."""

    nearest_features: Literal["auto", "extractor", "encoder"] = "auto"
    """Features in which `nearest` looks for training images: of the network behind FID, when one is loaded (it then sees every
    training image once), or the model's own posterior means. auto: the network's where --fid.protocol wants them anyway
    (standard, per-class)."""

    timeout_s: float = 3600.0
    """Seconds that processes wait for each other, as for the main one while it fits priors or draws pictures, before all end."""

    fid: FidConfig = field(default_factory=FidConfig)
    likelihood: LikelihoodConfig = field(default_factory=LikelihoodConfig)
    lpips: LpipsConfig = field(default_factory=LpipsConfig)
    fit: PriorFitConfig = field(default_factory=PriorFitConfig)
    flow: FlowSettings = field(default_factory=FlowSettings)

    @property
    def chosen_priors(self) -> tuple[PriorName, ...]:
        """The priors by name, in the order in which they were asked for, since the first is the one that `eval/fid` is of."""
        named = (name for asked in self.priors for name in (PRIOR_NAMES if asked == "all" else (asked,)))
        return tuple(dict.fromkeys(named))

    def data_of(self, trained_on: DataConfig) -> DataConfig:
        """What is scored against, of a run that was trained on `trained_on`."""
        recorded = trained_on.as_recorded()
        return recorded if self.data is None else replace(recorded, train=self.data, val=None)

    def __post_init__(self) -> None:
        """Refuse to score nothing, to keep samples that are not drawn, and samples that cannot be."""
        if not self.scores:
            raise ValueError("--scores names none; leave it out for all of them")
        if self.keep_samples is not None and "fid" not in self.scores:
            raise ValueError(f"--keep-samples {self.keep_samples}: only --scores fid draws samples")
        if not self.priors:
            raise ValueError("--priors names none; leave it out for the standard normal")
        if self.temperature < 0:
            raise ValueError(f"--temperature is {self.temperature}; it must not be negative")
        noiseless = [name for name in ("mean-code", "random-code") if name in self.chosen_priors]
        if noiseless and self.temperature != 1:
            raise ValueError(
                f"--temperature is {self.temperature}; --priors {' '.join(noiseless)} have no noise to scale: leave it at 1, "
                "or name other priors"
            )
        if self.samples is not None:
            self._check_samples(self.samples)
        if self.timeout_s <= 0:
            raise ValueError(f"--timeout-s is {self.timeout_s}; it must be positive")
        if self.num_pictures < 2:
            raise ValueError(f"--num-pictures is {self.num_pictures}; give at least 2")

    def _check_samples(self, folder: Path) -> None:
        """A sample set has its own prior, temperature and place."""
        if not {"fid", "nearest"} & set(self.scores):
            raise ValueError(f"--samples {folder}: only --scores fid and nearest look at samples")
        given = {
            "--priors": self.chosen_priors != ("standard",),
            "--temperature": self.temperature != 1,
            "--keep-samples": self.keep_samples is not None,
        }
        if refused := [name for name, is_given in given.items() if is_given]:
            raise ValueError(f"--samples {folder}: the set has been drawn already; leave out {', '.join(refused)}")
