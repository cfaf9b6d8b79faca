"""Training, validation, samples and scores on a device that is none (fake_cuda.py says what that proves and what it does not)."""

import itertools
import json
from pathlib import Path
from unittest.mock import NonCallableMock

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from torch import nn

from fake_cuda import CUDA, FakeCuda, backward, on_device
from launching import ROOT, TINY
from vaetrain.command_line import parse
from vaetrain.config import Config
from vaetrain.data.config import DataConfig
from vaetrain.data.readers.batch import Batch
from vaetrain.data.readers.order import BatchLayout
from vaetrain.data.readers.reader import open_reader
from vaetrain.evaluation.latent_figures import decode, encode_moments
from vaetrain.evaluation.memorization import encoder_features, nearest_images, pixels
from vaetrain.latents.reader import LatentBatch
from vaetrain.metrics.active_units import latent_activity
from vaetrain.metrics.elbo_gap import mean_elbo
from vaetrain.metrics.elbo_surgery import elbo_surgery
from vaetrain.metrics.extractor import INCEPTION, FeatureExtractor
from vaetrain.metrics.features import extract
from vaetrain.metrics.generation import reconstruct
from vaetrain.metrics.importance_bound import importance_bound
from vaetrain.metrics.kid import interaction_variance, kernel_sums
from vaetrain.metrics.likelihood_config import LikelihoodConfig
from vaetrain.metrics.validation import validate
from vaetrain.model.autoencoder import VAE
from vaetrain.model.posterior import PointMass
from vaetrain.priors.aggregate import encode
from vaetrain.priors.config import FlowSettings, PriorFitConfig
from vaetrain.priors.flow_matching.config import NetworkConfig, PriorTraining
from vaetrain.priors.flow_matching.model import FlowMatching, draw_held_out
from vaetrain.priors.flow_matching.ode import integrate
from vaetrain.priors.flow_matching.prior import FlowMatchingPrior
from vaetrain.priors.flow_matching.step import FlowMatchingStep
from vaetrain.sampling.generate import generate
from vaetrain.training.ema import ExponentialMovingAverage
from vaetrain.training.figures import save_interpolations, save_reconstructions, save_samples
from vaetrain.training.memory import InArithmetic, ScaledOptimizer, ThisProcess
from vaetrain.training.meters import Meters
from vaetrain.training.noise_scale import GradientNoiseProbe
from vaetrain.training.optimizer import build_optimizer
from vaetrain.training.spikes import SpikeDetector
from vaetrain.training.step import TrainStep

pytestmark = pytest.mark.filterwarnings(
    "ignore:Accessing the data pointer of FakeTensor:UserWarning"
)  # copy.deepcopy's
PRECISIONS = ("fp32", "bf16", "fp16")


@pytest.fixture
def gpu():
    with FakeCuda(value=23) as gpu:  # as many images as tiny_shards has for validation, for who asks for their number
        yield gpu


@pytest.fixture
def accelerator_of_gpu():
    return NonCallableMock(
        spec=Accelerator, device=CUDA, num_processes=1, process_index=0, is_main_process=True,
        gather=lambda tensor: tensor,         autocast=lambda: torch.autocast("cuda", torch.bfloat16),
    )  # fmt: skip


class Engine(ThisProcess):
    """What Accelerate does in a process alone, with gradients from `fake_cuda.backward`."""

    optimizer: torch.optim.Optimizer

    def backward(self, loss):
        backward(self.scaler.scale(loss))

    def clip_grad_norm_(self, parameters, max_norm):
        self.scaler.unscale_(self.optimizer)
        return super().clip_grad_norm_(parameters, max_norm)


def new_step(config, precision, layout, *, noise_probe=False):
    vae, engine = on_device(lambda: VAE(config.model)), Engine(CUDA, precision)
    engine.optimizer = build_optimizer(vae, config.optim)
    model = InArithmetic(vae, precision)
    return TrainStep(
        config, layout, engine, vae, model, ScaledOptimizer(engine.optimizer, engine.scaler),
        ema=ExponentialMovingAverage(vae, config.train.ema_half_life_images),
        spikes=SpikeDetector(config.train.skip_above, CUDA),
        noise_probe=GradientNoiseProbe(model, engine.optimizer, layout, 1) if noise_probe else None,
    )  # fmt: skip


def what_trains():
    """The shipped configurations, of those that train the same network by the same objective the first."""
    found = {}
    for file in sorted((ROOT / "configs").glob("*.yaml")):
        settings = yaml.safe_load(file.read_text())
        what = (settings["model"], settings.get("objective"), settings["data"].get("horizontal_flip"))
        found.setdefault(json.dumps(what, sort_keys=True), file.stem)
    return sorted(found.values())


def tiny_config(*arguments):
    return parse(Config, None, [*TINY, "--data.train", "x", *arguments])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", what_trains())
def test_a_step_leaves_the_host_free(name, precision, gpu, accelerator_of_gpu):
    """Forward, loss, backward, clipping, spikes, skips, AdamW, average and meters of each shipped configuration."""
    config = parse(Config, None, ["--config", str(ROOT / f"configs/{name}.yaml"), "--data.train", "x"])
    layout = BatchLayout(2, 2, rank=0, num_processes=1)
    step = new_step(config, precision, layout)
    meters = Meters(step.names_of_sums, accelerator_of_gpu)
    size, channels = config.model.image_size, config.model.in_channels
    numbers = torch.arange(2)
    batch = Batch(torch.zeros(2, size, size, channels, dtype=torch.uint8).permute(0, 3, 1, 2), numbers, numbers)

    gpu.forget()
    step.accumulate(itertools.repeat(batch), 0, config.objective.beta)
    result = step.update(config.optim.lr, layout.global_batch_size)
    meters.add_step(result)

    assert gpu.waits == []
    assert gpu.blocking_uploads == []
    assert gpu.uploads == 1, "the images"
    assert all(weight.grad is not None for weight in step.vae.parameters()), "a weight that nothing trains"
    kept = [*result.sums.values(), result.skipped, meters.sums, *step.ema.module.parameters()]
    kept += [moment for state in step.engine.optimizer.state.values() for moment in state.values()]
    assert {tensor.device for tensor in kept} == {CUDA}


@pytest.mark.parametrize("free_bytes", [2**40, 0], ids=["on the device", "in host memory"])
def test_the_resident_reader_leaves_the_host_free(free_bytes, gpu, accelerator_of_gpu, tiny_shards, monkeypatch):
    """Micro-batches and subsets; with the gradient noise scale watched, and activations computed twice."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (free_bytes, 2**40))
    layout = BatchLayout(20, 10, rank=0, num_processes=1)
    config = tiny_config("--log.noise-scale", "True", "--model.checkpoint-levels", "0", "1")
    step = new_step(config, "bf16", layout, noise_probe=True)
    meters = Meters(step.names_of_sums, accelerator_of_gpu)
    reader = open_reader(DataConfig(str(tiny_shards), reader="resident"), "train", device=CUDA)
    assert ("resident on cuda" in reader.description) == bool(free_bytes)
    batches = reader.train_batches(0, 80, layout)

    gpu.forget()
    step.accumulate(batches, 80, 1.0)
    meters.add_step(step.update(1e-3, 100))
    batch = next(iter(reader.subset(np.array([3, 5, 8])).eval_batches(2, 0, 1)))
    assert gpu.waits == []
    assert gpu.blocking_uploads == []
    assert gpu.uploads == (3 if free_bytes else 2), "one a micro-batch: images, or where they are"
    assert batch.images.device.type == ("cuda" if free_bytes else "cpu")
    assert batch.images.is_pinned() == (not free_bytes)


def validation(vae, reader, accelerator, batch_size):
    return validate(vae, reader, accelerator, batch_size, seed=0)


def elbo_of_some(vae, reader, accelerator, batch_size):
    return mean_elbo(vae, reader, accelerator, np.arange(0, reader.num_images, 2), batch_size, seed=0)


def bound(vae, reader, accelerator, batch_size):
    config = LikelihoodConfig(num_images=8, num_samples=10, batch_size=25 * batch_size)
    return importance_bound(vae, reader, accelerator, config)


def units(vae, reader, accelerator, batch_size):
    return latent_activity(vae, reader, accelerator, batch_size)


def surgery(vae, reader, accelerator, batch_size):
    return elbo_surgery(vae, reader, accelerator, LikelihoodConfig(num_posteriors=20), batch_size)


def neighbours(vae, reader, accelerator, batch_size):
    spaces = {"pixel": pixels, "feature": encoder_features(vae)}
    queries = reader.first(5).images.cpu().contiguous()
    return nearest_images(queries, reader, accelerator, spaces, num_shown=3, batch_size=batch_size)


def features(vae, reader, accelerator, batch_size):
    extractor = FeatureExtractor.__new__(FeatureExtractor)  # without Inception, whose weights are its authors'
    extractor.device, extractor.name, extractor.weights_are_published = CUDA, INCEPTION, True
    extractor.network = lambda images: images.flatten(1)[:, :23].float()
    found = extract(
        extractor, reconstruct(vae, reader, accelerator, batch_size), reader.num_images, accelerator,
        batch_size=batch_size, what="reconstructions",
    )  # fmt: skip
    blocks = found.features.tensor_split(3)  # of KID
    return found.gaussian(), interaction_variance(kernel_sums(blocks, blocks), blocks, blocks)


SCORES = (validation, elbo_of_some, bound, units, surgery, neighbours, features)


@pytest.mark.parametrize(
    ("score", "kind"), [*((score, "resident") for score in SCORES), (validation, "indexed"), (neighbours, "indexed")]
)
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_a_score_waits_for_its_result_alone(score, kind, gpu, accelerator_of_gpu, tiny_shards):
    """However many batches it takes, the host asks for values equally often: at the end."""
    vae = on_device(lambda: VAE(tiny_config().model)).eval().requires_grad_(False)
    reader = open_reader(DataConfig(str(tiny_shards), reader=kind, num_workers=0), "val", device=CUDA)
    counts = []
    for batch_size in (23, 8):
        gpu.forget()
        with torch.no_grad():
            score(vae, reader, accelerator_of_gpu, batch_size)
        assert gpu.blocking_uploads == []
        assert gpu.uploads > 0
        counts.append(len(gpu.waits))
    assert counts[0] == counts[1] > 0, gpu.waits


@torch.no_grad()
def test_samples_and_codes_go_up_without_waiting(gpu, accelerator_of_gpu, tiny_shards, tmp_path):
    """And come down block by block, which is what they are made for."""
    vae = on_device(lambda: VAE(tiny_config().model)).eval().requires_grad_(False)
    reader = open_reader(DataConfig(str(tiny_shards), reader="resident"), "val", device=CUDA)
    gpu.forget()
    blocks = list(generate(vae, accelerator_of_gpu, 10, seed=0, temperature=1.0, batch_size=4))
    assert [images.device for _, images in blocks] == [CUDA] * 3
    assert gpu.waits == []
    encode(vae, reader, accelerator_of_gpu, PriorFitConfig(num_codes=10), what="codes")
    images = reader.first(8).images.cpu()
    _, latents = encode_moments(vae, images)
    decode(vae, latents)
    x = vae.from_uint8(reader.first(8).images)
    save_reconstructions(vae, x, tmp_path / "reconstructions.png")
    save_interpolations(vae, x, tmp_path / "interpolations.png")
    save_samples(vae, 8, tmp_path / "samples.png")
    assert gpu.blocking_uploads == []
    assert all("_to_copy" in wait for wait in gpu.waits), "only for what is to be on the host"


@pytest.mark.parametrize(
    ("do", "noted"),
    [
        (lambda host, device: device.sum().item(), "waits"),
        (lambda host, device: bool((device > 0).all()), "waits"),
        (lambda host, device: device.cpu(), "waits"),
        (lambda host, device: device.tolist(), "waits"),
        (lambda host, device: host.copy_(device), "waits"),
        (lambda host, device: device.__setitem__(device > 0, device[:1]), "waits"),
        (lambda host, device: torch.linalg.cholesky(device.outer(device)), "waits"),
        (lambda host, device: host.to(CUDA), "blocking_uploads"),
        (lambda host, device: host.to(CUDA, non_blocking=True), "blocking_uploads"),
        (lambda host, device: host.pin_memory().to(CUDA), "blocking_uploads"),
        (lambda host, device: device.copy_(host), "blocking_uploads"),
        (lambda host, device: torch.tensor([1, 2], device=CUDA), "blocking_uploads"),
        (lambda host, device: device[torch.tensor([0, 1])], "blocking_uploads"),
        (lambda host, device: host.pin_memory()[1:].to(CUDA, non_blocking=True), None),
        (lambda host, device: torch.empty(3, pin_memory=True).copy_(device, non_blocking=True), None),
        (lambda host, device: device * 2 + torch.tensor(3.0), None),
        (lambda host, device: torch.where(device > 0, device, 0.0), None),
        (lambda host, device: device[torch.zeros(2, dtype=torch.int64, device=CUDA)], None),
    ],
)  # fmt: skip
def test_the_pretended_device_notes_what_makes_the_host_wait(gpu, do, noted):
    """Otherwise the tests above could not fail."""
    host, device = torch.ones(3), torch.ones(3, device=CUDA)
    do(host, device)
    assert bool(gpu.waits) == (noted == "waits"), gpu.waits
    assert bool(gpu.blocking_uploads) == (noted == "blocking_uploads"), gpu.blocking_uploads


def test_the_pretended_device_refuses_what_mixes_devices(gpu):
    with pytest.raises(RuntimeError, match=r"same device|two devices"):
        torch.ones(3, device=CUDA) + torch.ones(3)
    with pytest.raises(RuntimeError, match=r"dynamic|data-dependent|nonzero"):
        torch.ones(3, device=CUDA).nonzero()


def test_gradients_node_by_node_are_those_of_autograd():
    """On the CPU, where both can be had: with weights used twice, broadcast, and in more than one dtype."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.SiLU(), nn.Flatten(), nn.Linear(8, 1))
    scale = nn.Parameter(torch.tensor(2.0))
    x = torch.randn(3, 1, 4, 4)

    def loss():
        with torch.autocast("cpu", torch.bfloat16):
            first = model(x)
        return (first.float() * scale + model(x.flip(-1)) / scale).square().sum()

    loss().backward()
    expected = [weight.grad for weight in (*model.parameters(), scale)]
    for weight in (*model.parameters(), scale):
        weight.grad = None
    backward(loss())
    for weight, gradient in zip((*model.parameters(), scale), expected, strict=True):
        assert torch.allclose(weight.grad, gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(6,), (4, 4, 4)], ids=["vector", "spatial"])
def test_a_step_of_a_prior_leaves_the_host_free(shape, gpu, accelerator_of_gpu):
    config = PriorTraining(Path("first_stage"), model=NetworkConfig(width=32, depth=1, heads=2))
    layout = BatchLayout(2, 2, rank=0, num_processes=1)
    model, engine = on_device(lambda: FlowMatching(config.model, shape, 3)), Engine(CUDA, "fp32")
    engine.optimizer = build_optimizer(model, config.optim)
    step = FlowMatchingStep(
        config, layout, engine, model, model, ScaledOptimizer(engine.optimizer, engine.scaler),
        ema=ExponentialMovingAverage(model, 100), spikes=SpikeDetector(config.train.skip_above, CUDA),
    )  # fmt: skip
    meters = Meters(step.names_of_sums, accelerator_of_gpu)
    z, labels = torch.zeros(2, *shape, device=CUDA), torch.zeros(2, dtype=torch.int64, device=CUDA)
    batch = LatentBatch(z, PointMass(z), labels, labels)
    prior = FlowMatchingPrior(
        model, ("a", "b", "c"), knows_no_class=True, settings=FlowSettings(class_="a", guidance=2.0, steps=2)
    )
    noise, times = draw_held_out(0, [0, 1], 0, shape, CUDA)

    gpu.forget()
    step.accumulate(itertools.repeat(batch), 0)
    meters.add_step(step.update(config.optim.lr, layout.global_batch_size))
    with torch.no_grad():
        model.forward(z, noise, times, labels)
        integrate(lambda x, t: prior.velocity(x, t, labels), noise, 2, "heun")
    assert gpu.waits == []
    assert gpu.blocking_uploads == []
    assert gpu.uploads == 0
    assert all(weight.grad is not None for weight in model.parameters()), "a weight that nothing trains"
