"""Draw new images from a trained VAE into a sample set, on any number of processes.

accelerate launch --config_file launch/gpu1.yaml vaetrain/sample.py --run RUN --num-images 2000 --out DIR [--prior gmm]
(launch/ has layouts for more processes, too)
"""

from __future__ import annotations

if __name__ == "__main__":
    from vaetrain.distributed.launcher import end_with_launcher

    end_with_launcher()  # before anything that takes time

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from vaetrain.command_line import parse, user_errors
from vaetrain.priors.config import FlowSettings, PriorFitConfig, PriorName, Solver


@dataclass(frozen=True)
class SampleConfig:
    """A sample set: image i of it depends on the run, the prior, the seed, the temperature and i alone. A killed command,
    started again with as many processes, goes on where it stopped."""

    run: Path
    """Run directory of the trained model."""

    out: Path
    """Folder for shards and manifest; must not hold another sample set. When it holds this very one, nothing is done."""

    num_images: int = 2000
    """Images to draw."""

    seed: int = 0
    """Names the set: another seed, other images."""

    prior: PriorName = "standard"
    """Where latents come from. standard: N(0, I), which the model was trained against. flow-matching: trained by
    vaetrain/train_prior.py. The others are fitted to the codes of the training images, once per checkpoint, and kept in
    RUN/priors. gaussian: full covariance. gmm: Gaussian mixture. flow: RealNVP. mean-code: the mean of a few training images'
    codes. random-code: each latent dimension uniform between its lowest and highest training code."""

    class_: Annotated[str | None, tyro.conf.arg(name="class")] = None
    """Class to draw, of a flow-matching prior. None: classes as often as among the training images."""

    guidance: float = 1.0
    """Of a flow-matching prior: above 1 more typical of the class and less varied. 1: the distribution that was learned."""

    steps: int = 30
    """Of the solver of a flow-matching prior."""

    solver: Solver = "heun"
    """Of a flow-matching prior: heun takes two velocities a step, euler one."""

    temperature: float = 1.0
    """Factor on the latents' noise (standard: their standard deviation); below 1 safer and more alike."""

    checkpoint: Literal["best", "last"] = "best"
    """Checkpoint with the best validation score, or the newest. EMA weights either way."""

    batch_size: int = 64
    """Images decoded at a time by one process."""

    images_per_shard: int = 1000
    """Images in one tar file."""

    data: str | None = None
    """Shard set to fit the prior to: the one the run was trained on, if it has moved. None: where the run found it."""

    timeout_s: float = 3600.0
    """Seconds that processes wait for each other, as for the main one while it fits a prior, before all end."""

    fit: PriorFitConfig = field(default_factory=PriorFitConfig)

    def __post_init__(self) -> None:
        """Refuse counts that mean nothing."""
        for name in ("num_images", "batch_size", "images_per_shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if self.timeout_s <= 0:
            raise ValueError(f"--timeout-s is {self.timeout_s}; it must be positive")
        if self.temperature < 0:
            raise ValueError(f"--temperature is {self.temperature}; it must not be negative")
        self.flow.check(self.prior)
        if self.prior in ("mean-code", "random-code") and self.temperature != 1:
            raise ValueError(
                f"--temperature is {self.temperature}; --prior {self.prior} has no noise to scale, leave it at 1"
            )

    @property
    def flow(self) -> FlowSettings:
        """How a flow-matching prior is drawn from."""
        return FlowSettings(self.class_, self.guidance, self.steps, self.solver)


if __name__ == "__main__":
    CONFIG = parse(SampleConfig, __doc__)  # before the imports below, which take seconds

    from vaetrain.preflight import check_run, refusing

    with refusing():
        check_run(CONFIG.run)

import contextlib
from dataclasses import replace

from accelerate import Accelerator

from vaetrain.data.format.writer import ShardWriter
from vaetrain.data.readers.reader import Reader, open_split
from vaetrain.distributed import exchange, processes
from vaetrain.export import TrainedModel, load_run
from vaetrain.priors.fit import fitted_priors
from vaetrain.priors.saved import SavedPrior
from vaetrain.progress_bar import ProgressBar
from vaetrain.runs.directory import RunDirectory
from vaetrain.runs.provenance import provenance
from vaetrain.sampling.encode import with_png
from vaetrain.sampling.generate import generate
from vaetrain.sampling.manifest import content_of, manifest_of
from vaetrain.sampling.sample_set import RankShard, is_finished, refuse_other_content, write_manifest, write_request
from vaetrain.strict_json import to_json


def sample(config: SampleConfig, accelerator: Accelerator) -> None:
    """Write `config.num_images` PNG images (decoder means, rounded to the nearest of 256 levels) and the manifest.

    Every process calls this and writes shards of its own, rank-RRRR-NNNNNN.tar; the manifest is written last. A set that is
    already whole is left as it is, so that a job put back into the queue succeeds. Raises FileExistsError for another one.
    """
    trained = load_run(config.run, checkpoint=config.checkpoint, device=accelerator.device)

    def content(saved: SavedPrior | None) -> dict[str, Any]:
        return content_of(
            config.run, trained, config.prior, saved, temperature=config.temperature, seed=config.seed,
            count=config.num_images, batch_size=config.batch_size, flow=config.flow,
        )  # fmt: skip

    known = content(None)
    del known["prior_sha256"]
    is_finished(config.out, known)  # raises before a prior is fitted for nothing
    saved = fitted_prior(config, trained, accelerator)
    what = content(saved)
    if is_finished(config.out, what):
        if accelerator.is_main_process:
            print(f"{config.out} already holds these {config.num_images:,} samples, nothing is left to do")
        return
    layout = {"images_per_shard": config.images_per_shard, "num_processes": accelerator.num_processes}
    request = {**what, **layout, "device": accelerator.device.type}
    refuse_other_content(config.out, request)
    exchange.meet(f"all processes to look into {config.out}")  # nobody writes before everybody has
    if accelerator.is_main_process:
        write_request(config.out, request)
    exchange.meet(f"the main process to write into {config.out}")
    share = RankShard(
        accelerator.process_index,
        accelerator.num_processes,
        config.num_images,
        config.batch_size,
        config.images_per_shard,
    )
    whole = share.whole_shards(config.out)
    num_whole = sum(shard.num_images for shard in whole)
    with ShardWriter(config.out, share.prefix, config.images_per_shard, first_shard=len(whole)) as writer:
        blocks = generate(
            trained.vae, accelerator, config.num_images, seed=config.seed, temperature=config.temperature,
            batch_size=config.batch_size, prior=saved.prior if saved else None, skip=num_whole,
        )  # fmt: skip
        with ProgressBar("sampling", len(share.indices()), done=num_whole, quiet=share.rank != 0) as bar:
            for indices, _, files in with_png(blocks):
                for index, file in zip(indices, files, strict=True):
                    writer.write(f"{index:08d}", file, "png", {"index": index, "seed": config.seed})
                bar.update(len(indices))
    mine = [to_json(shard) for shard in [*whole, *writer.shards]]
    shards = exchange.gather_objects(mine, "all processes to draw their samples")
    if accelerator.is_main_process:
        made_by = provenance(accelerator, trained.dataset["train"]["fingerprint"])
        write_manifest(config.out, manifest_of(what, saved, trained, made_by, shards))
        print(f"{config.num_images:,} samples in {len(shards)} shard(s) written to {config.out}")


def fitted_prior(config: SampleConfig, trained: TrainedModel, accelerator: Accelerator) -> SavedPrior | None:
    """The prior that was asked for, fitted now if it has not been; None for the standard normal, which needs no fit."""
    if config.prior == "standard":
        return None
    data = RunDirectory.open(config.run).config().data.as_recorded()
    if config.data is not None:
        data = replace(data, train=config.data, val=None)
    with contextlib.ExitStack() as opened:

        def reader_of(split: Literal["train", "val"]) -> Reader:
            reader = open_split(data, accelerator, split)
            opened.callback(reader.close)
            return reader

        saved = fitted_priors(config.run, trained, [config.prior], accelerator, reader_of, config.fit)[config.prior]
        return saved.drawn(config.flow)


def main(config: SampleConfig) -> None:
    """Join the other processes and sample."""
    with user_errors():
        accelerator = processes.start(timeout_s=config.timeout_s, timeout_option="--timeout-s")
        with processes.finishing(accelerator):
            sample(config, accelerator)


if __name__ == "__main__":
    main(CONFIG)
