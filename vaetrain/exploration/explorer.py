"""A trained model to play with: grids of samples from each of its priors, moved along directions, and interpolations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torchvision.utils import make_grid

from vaetrain import export
from vaetrain.data.config import DataConfig
from vaetrain.data.format.manifest import Encoding
from vaetrain.data.readers.reader import open_reader
from vaetrain.data.remote.url import remote_folder
from vaetrain.data.sources.preprocess import UNREADABLE, Preprocessing, decode_picture
from vaetrain.evaluation.image_grid import GAP, SMALLEST_CELL
from vaetrain.evaluation.latent_figures import decode, slerp
from vaetrain.exploration.directions import Directions, most_active_units, principal_directions
from vaetrain.metrics.subset import choose_images, subset_batches
from vaetrain.model.autoencoder import VAE
from vaetrain.model.prior import Prior, StandardNormal
from vaetrain.priors.config import PRIOR_NAMES, FlowSettings, PriorFitConfig, PriorName
from vaetrain.priors.flow_matching.prior import FlowMatchingPrior
from vaetrain.priors.saved import load_prior, prior_file, prior_of_export, read_prior_file
from vaetrain.progress_bar import ProgressBar
from vaetrain.runs.directory import RunDirectory
from vaetrain.strict_json import from_json
from vaetrain.upload import upload

BLOCK = 8
"""Latents drawn at a time, always so many: in batches of another size a matrix product may round differently."""

KEPT_BLOCKS = 64
"""Blocks of latents kept, so that a slider costs a decoding and no sampling."""

CODING_BATCH = 64

MOST_DRAWN = 256
"""Images that the model itself draws where training images are not at hand: a flow-matching prior on a CPU takes its time."""

QUICK = FlowSettings(steps=8, solver="euler")
"""How they are drawn."""

InterpolationPath = Literal["straight", "spherical"]


@dataclass(frozen=True)
class Draw:
    """What a grid of samples is drawn by."""

    prior: PriorName = "standard"
    seed: int = 0
    temperature: float = 1.0
    flow: FlowSettings = field(default_factory=FlowSettings)
    """For the flow-matching prior alone."""


class Explorer:
    """A model in evaluation mode with the priors and directions that belong to it."""

    def __init__(self, vae: VAE, priors: Mapping[PriorName, Prior], name: str) -> None:
        self.vae, self.priors, self.name = vae, dict(priors), name
        self.directions = Directions((), torch.empty(0, math.prod(vae.config.latent_shape)))
        self.measured_on = ""
        """What the directions are those of, in words."""
        self._block = lru_cache(maxsize=KEPT_BLOCKS)(self._sample_block)

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        checkpoint: export.CheckpointName = "best",
        data: str | None = None,
        num_images: int = 1000,
        num_directions: int = 8,
        device: torch.device,
    ) -> Explorer:
        """Of a run directory or an export.

        Directions are measured on the posterior means of `num_images` images of the training split: of the shard set `data`, or
        where the run found it. If they are not there (any more), or are others, then on images that the model draws.
        Raises FileNotFoundError and ValueError as `vaetrain.load` does, for a damaged prior, and for a `data` that cannot be read.
        """
        config: DataConfig | None = None
        fingerprint = None
        if (path / "config.json").is_file():
            vae = export.load(path, device=device)
            flow_matching = prior_of_export(path, vae.config.latent_shape)
            found: dict[PriorName, Prior] = {} if flow_matching is None else {"flow-matching": flow_matching}
            explorer = cls(vae, {"standard": StandardNormal(vae.config.latent_shape)} | found, f"export {path}")
        else:
            trained = export.load_run(path, checkpoint=checkpoint, device=device)
            explorer = cls(trained.vae, priors_of_run(path, trained), f"{path}, {trained.checkpoint.name}")
            config, fingerprint = (
                RunDirectory.open(path).config().data.as_recorded(),
                trained.dataset["train"]["fingerprint"],
            )
        for prior in explorer.priors.values():
            if isinstance(prior, FlowMatchingPrior):
                prior.to(device)
        if data is not None:
            config = DataConfig(train=data) if config is None else replace(config, train=data, val=None)
            codes, what = explorer.codes_of_split(config, num_images), f"training images of {data}"
        else:
            codes, what = explorer._codes_at_hand(config, fingerprint, num_images)
        explorer.measure(codes, num_directions, f"{len(codes):,} {what}")
        return explorer

    @property
    def best_prior(self) -> PriorName:
        """Where a newcomer begins: the flow-matching prior, if there is one."""
        return "flow-matching" if "flow-matching" in self.priors else "standard"

    @property
    def classes(self) -> tuple[str, ...]:
        """What the flow-matching prior knows by name."""
        prior = self.priors.get("flow-matching")
        return prior.classes if isinstance(prior, FlowMatchingPrior) else ()

    @property
    def can_guide(self) -> bool:
        """Whether guidance means anything to the flow-matching prior."""
        prior = self.priors.get("flow-matching")
        return isinstance(prior, FlowMatchingPrior) and bool(prior.classes) and prior.knows_no_class

    def measure(self, codes: Float[Tensor, "n d"], num_directions: int, what: str) -> None:
        """Take the directions of these posterior means: units of a vector latent, principal directions of a spatial one."""
        is_vector = len(self.vae.config.latent_shape) == 1
        self.directions = (most_active_units if is_vector else principal_directions)(codes, num_directions)
        self.measured_on = what

    def latents(self, draw: Draw, num_images: int) -> Float[Tensor, "n *latent"]:
        """Latents of the first images of the set that `draw` names; row i is a function of `draw` and i, to the bit."""
        blocks = [self._block(draw, start) for start in range(0, num_images, BLOCK)]
        return torch.cat(blocks)[:num_images]

    @torch.no_grad()
    def samples(self, draw: Draw, num_images: int, shifts: Sequence[float] = ()) -> UInt8[Tensor, "n c h w"]:
        """Decoder means at `latents`, moved by so many standard deviations along each direction.

        Image i depends on `draw`, `shifts` and i alone: blocks of one size are decoded, the last one too.
        """
        z = self.latents(draw, -(-num_images // BLOCK) * BLOCK)
        return torch.cat([decode(self.vae, self.directions.moved(block, shifts)) for block in z.split(BLOCK)])[
            :num_images
        ]

    @torch.no_grad()
    def codes(self, images: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
        """Posterior means, flattened, on the CPU."""
        device = next(self.vae.parameters()).device
        blocks = (self.vae.from_uint8(upload(block, device)) for block in images.split(CODING_BATCH))
        return torch.cat([self.vae.encode(x).mode().flatten(1).cpu() for x in blocks])

    def codes_of_split(
        self, config: DataConfig, num_images: int, fingerprint: str | None = None
    ) -> Float[Tensor, "n d"]:
        """Posterior means of images of a training split, at random; raises ValueError unless its fingerprint is the one given."""
        reader = open_reader(replace(config, reader="indexed", num_workers=0), "train", device=torch.device("cpu"))
        try:
            if fingerprint is not None and reader.manifest.fingerprint != fingerprint:
                raise ValueError(f"{config.train} holds other images than those the run was trained on")
            self.vae.config.check_images(reader.manifest.image_size, reader.manifest.channels)
            chosen = choose_images(reader.num_images, num_images, seed=0)
            with ProgressBar("encoding training images", len(chosen)) as bar:
                codes = []
                for batch in subset_batches(reader, chosen, CODING_BATCH):
                    codes.append(self.codes(batch.images))
                    bar.update(len(batch.images))
        finally:
            reader.close()
        return torch.cat(codes)

    def prepared(self, file: Path) -> UInt8[Tensor, "c h w"]:
        """A photograph as the model sees it: upright, its central square, in the size of the training images."""
        config = self.vae.config
        preprocessing = Preprocessing(
            config.image_size, config.in_channels, Encoding("png", quality=None, subsampling=None)
        )
        try:
            picture = preprocessing.prepare(decode_picture(file.read_bytes()))
        except UNREADABLE as error:
            raise ValueError(f"{file.name} cannot be used: {error}") from error
        pixels = torch.from_numpy(np.asarray(picture).copy())
        return pixels.view(config.image_size, config.image_size, config.in_channels).permute(2, 0, 1)

    @torch.no_grad()
    def interpolation(
        self,
        first: UInt8[Tensor, "c h w"],
        second: UInt8[Tensor, "c h w"],
        num_steps: int,
        path: InterpolationPath = "straight",
    ) -> UInt8[Tensor, "steps c h w"]:
        """Decoded latents between two images' posterior means; the first and the last are their reconstructions."""
        if num_steps < 2:
            raise ValueError(f"{num_steps} steps have no two ends; give at least 2")
        start, end = self.codes(torch.stack([first, second])).split(1)
        weights = torch.linspace(0, 1, num_steps)
        line = torch.lerp(start, end, weights[:, None]) if path == "straight" else slerp(start, end, weights)[0]
        return decode(self.vae, line.view(num_steps, *self.vae.config.latent_shape))

    def _sample_block(self, draw: Draw, start: int) -> Float[Tensor, "b *latent"]:
        if draw.prior not in self.priors:
            raise ValueError(f"{self.name} has no prior {draw.prior}; it has {', '.join(self.priors)}")
        prior = self.priors[draw.prior]
        if isinstance(prior, FlowMatchingPrior):
            prior = replace(prior, settings=draw.flow)
        else:
            draw.flow.check(draw.prior)
        indices = range(start, start + BLOCK)
        return prior.sample(draw.seed, indices, draw.temperature).view(BLOCK, *self.vae.config.latent_shape)

    def _codes_at_hand(
        self, config: DataConfig | None, fingerprint: str | None, num_images: int
    ) -> tuple[Float[Tensor, "n d"], str]:
        """Of the run's own training images if they are on this machine, else of images drawn from the best prior."""
        if config is None:
            reason = "an export knows no training images"
        elif remote_folder(config.train) is not None:
            reason = "the training images lie behind a URL"
        else:
            try:
                return self.codes_of_split(config, num_images, fingerprint), "training images"
            except (ValueError, OSError) as error:
                reason = str(error)
        prior = self.best_prior
        draw = Draw(prior, flow=QUICK if prior == "flow-matching" else FlowSettings())
        with ProgressBar("encoding drawn images"):
            codes = self.codes(self.samples(draw, min(num_images, MOST_DRAWN)))
        return codes, f"images that the model drew from its {prior} prior, since {reason}"


def priors_of_run(run: Path, trained: export.TrainedModel) -> dict[PriorName, Prior]:
    """N(0, I) and what lies in RUN/priors/CHECKPOINT, whatever it was fitted with. Raises ValueError for a damaged file."""
    priors: dict[PriorName, Prior] = {"standard": StandardNormal(trained.vae.config.latent_shape)}
    for name in PRIOR_NAMES:
        file = prior_file(run, trained, name)
        if not file.is_file():
            continue
        fit = PriorFitConfig()
        if name != "flow-matching":  # which is trained, and fitted by no setting
            facts, _, _ = read_prior_file(file, trained.vae.config.latent_shape, again=f"delete {file}")
            fit = from_json(PriorFitConfig, facts.fit, f"{file} is damaged: fit")
        priors[name] = load_prior(file, trained, export.weights_sha256(run, trained), fit).prior
    return priors


def tiled(images: UInt8[Tensor, "n c h w"], columns: int) -> UInt8[np.ndarray, "H W 3"]:
    """One picture of images in rows, pixel-exact, the small ones enlarged by a whole factor."""
    scale = max(1, -(-SMALLEST_CELL // images.shape[-1]))
    enlarged = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    return make_grid(enlarged, nrow=columns, padding=GAP, pad_value=255).permute(1, 2, 0).numpy()
