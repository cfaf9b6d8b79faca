"""What test_priors.py has one and two processes do; each writes what it got to OUT/rank-R.safetensors."""

from functools import partial

import torch
from safetensors.torch import save_file

from vaetrain.data.readers.reader import open_reader
from vaetrain.distributed import processes
from vaetrain.evaluation.memorization import draw_images, encoder_features, nearest_images, pixels
from vaetrain.export import load_run
from vaetrain.priors.config import FITTED_PRIORS, PriorFitConfig
from vaetrain.priors.fit import fitted_priors
from vaetrain.runs.directory import RunDirectory
from vaetrain.sample import SampleConfig, sample
from vaetrain.sampling.generate import gather_samples

FIT = PriorFitConfig(num_codes=80, gmm_components=(1, 2), flow_steps=20)


def scenario(run, run_with_priors, out, accelerator):
    """Fit all priors to `run`; with those of `run_with_priors`: draw samples, search neighbours, write a sample set."""
    trained = load_run(run, device=accelerator.device)
    open_split = partial(open_reader, RunDirectory.open(run).config().data, device=accelerator.device)
    fitted_priors(run, trained, FITTED_PRIORS, accelerator, open_split, FIT)
    priors = fitted_priors(run_with_priors, trained, FITTED_PRIORS, accelerator, open_split, FIT)
    result = {
        f"samples of {name}": gather_samples(trained.vae, accelerator, 21, seed=3, batch_size=4, prior=saved.prior)
        for name, saved in priors.items()
    }
    result["drawn images"], result["drawn labels"] = draw_images(open_split("val"), 10, accelerator)
    found = nearest_images(
        result["samples of gmm"], open_split("train"), accelerator,
        {"pixel": pixels, "feature": encoder_features(trained.vae)}, num_shown=5, batch_size=16,
    )  # fmt: skip
    for space, neighbours in found.items():
        result |= {f"{space} {name}": getattr(neighbours, name) for name in ("distance", "index", "image")}
    sample(
        SampleConfig(run_with_priors, out / "set", 21, seed=3, prior="flow", batch_size=4, images_per_shard=5, fit=FIT),
        accelerator,
    )
    out.mkdir(exist_ok=True)
    save_file({n: t.contiguous() for n, t in result.items()}, out / f"rank-{accelerator.process_index}.safetensors")


def scenario_together(run, run_with_priors, out):
    """`scenario` after joining the other processes."""
    accelerator = processes.start()
    with torch.no_grad(), processes.finishing(accelerator):
        scenario(run, run_with_priors, out, accelerator)
