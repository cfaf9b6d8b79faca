"""Terms of the loss beyond the ELBO: any by name, and LPIPS, which has a gradient and costs nothing at weight 0."""

import itertools
import json

import pytest
import torch
from torch import Tensor
from torch.nn.parameter import Parameter

import vaetrain.training.logger
from launching import TINY
from lpips_weights import write_random_lpips_weights
from vaetrain.command_line import parse
from vaetrain.config import Config
from vaetrain.data.readers.batch import Batch
from vaetrain.data.readers.order import BatchLayout
from vaetrain.data.readers.reader import open_reader
from vaetrain.model.autoencoder import VAE, ElboTerms
from vaetrain.runs.checkpoint_names import list_checkpoints
from vaetrain.scaling.short_training import short_training
from vaetrain.training import perceptual
from vaetrain.training.memory import train_on_dummies
from vaetrain.training.perceptual import PerceptualTerm, loss_terms
from vaetrain.training.step import LossTerm, TrainStep

CPU = torch.device("cpu")
BATCH_SIZE = 4


@pytest.fixture(scope="module")
def term_options(tmp_path_factory):
    """Of the command line: a term of random AlexNet weights."""
    files = write_random_lpips_weights(tmp_path_factory.mktemp("lpips"), "alex")
    options = {"weight": 200.0, "net": "alex", "resize": 32, "backbone": files.backbone, "heads": files.heads}
    return [str(word) for name, value in options.items() for word in (f"--objective.perceptual.{name}", value)]


def config(*arguments: object) -> Config:
    return parse(Config, None, [*TINY, "--data.train", "shards", "--train.compile", "False", *map(str, arguments)])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(settings: Config, accelerator, seed: int = 0) -> TrainStep:
    """A step whose model has gradients everywhere: new ones end their residual branches in zeros."""
    step = TrainStep.build(settings, BatchLayout.of(BATCH_SIZE, 2, 0, 1), accelerator)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in step.vae.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return step


def images() -> itertools.cycle:
    pixels = torch.randint(0, 256, (2, 2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    numbers = torch.zeros(2, dtype=torch.int64)
    return itertools.cycle([Batch(each, numbers, numbers) for each in pixels])


def gradients(step: TrainStep) -> list[Tensor]:
    step.accumulate(images(), 0, 1.0)
    return [parameter.grad.clone() for parameter in step.vae.parameters()]


class Brightness:
    """A term as anybody might write it: the reconstruction's mean."""

    name = "brightness"

    def __init__(self, vae: VAE) -> None:
        self.vae, self.weight, self.made_of = vae, 30.0, {}

    def __call__(self, x: Tensor, terms: ElboTerms) -> Tensor:
        assert x.shape == terms.params.shape
        return self.vae.likelihood.raw_mean(terms.params).mean((1, 2, 3))


def test_a_term_is_added_by_its_weight_logged_by_its_name_and_its_gradient_counts(accelerator):
    step = build(config(), accelerator)
    plain = gradients(step)
    plain_totals = step.update(0.0, BATCH_SIZE).totals
    term = Brightness(step.vae)
    assert isinstance(term, LossTerm)
    step.terms = (term,)
    with_term = gradients(step)
    totals = step.update(0.0, BATCH_SIZE).totals
    assert step.names_of_sums == ("loss", "distortion_nats", "rate_nats", "brightness", "grad_norm")
    assert totals["distortion_nats"] == plain_totals["distortion_nats"]
    assert totals["brightness"].abs() > 0.1
    torch.testing.assert_close(totals["loss"], plain_totals["loss"] + 30 * totals["brightness"])

    term.weight = 60.0
    with_twice_the_weight = gradients(step)
    differences = [(b - a, c - b) for a, b, c in zip(plain, with_term, with_twice_the_weight, strict=True)]
    assert sum(bool(once.any()) for once, _ in differences) == len(plain) - 1  # all but the shared σ
    for once, again in differences:
        torch.testing.assert_close(again, once, rtol=1e-3, atol=1e-6)
    accelerator.free_memory()


def test_the_perceptual_term_has_a_gradient(term_options, accelerator):
    """Some trainers compute it under no_grad: it then has a value, and trains nothing."""
    step = build(config(*term_options), accelerator)
    [term] = step.terms
    x, noise = draw(2, 3, 16, 16).clamp(-1, 1), draw(2, *step.config.model.latent_shape)
    terms = step.vae(x, noise)
    params = terms.params.detach().clone()
    params[:, :, :8] += 3.0  # beyond the range, where the mean that is shown has no gradient
    params.requires_grad_()
    (gradient,) = torch.autograd.grad(term(x, terms._replace(params=params)).sum(), params)
    assert gradient[:, :, :8].ne(0).all()

    own = torch.autograd.grad(term(x, terms).sum(), list(step.vae.parameters()), allow_unused=True)
    silent = {name for (name, _), each in zip(step.vae.named_parameters(), own, strict=True) if each is None}
    assert silent == {"likelihood.scaled_log_sigma"}
    assert all(each.ne(0).any() for each in own if each is not None)

    with_term = gradients(step)
    step.terms = ()
    plain = gradients(step)
    assert all(not torch.equal(a, b) for a, b in zip(plain[1:], with_term[1:], strict=True))
    accelerator.free_memory()


def test_its_network_is_frozen_in_eval_mode_and_outside_the_model(term_options, accelerator):
    step = build(config(*term_options), accelerator)
    [term] = step.terms
    step.model.train()
    gradients(step)
    weights = list(term.distance.parameters())
    assert weights
    assert all(weight.grad is None and not weight.requires_grad for weight in weights)
    assert not any(module.training for module in term.distance.modules())
    trained: set[Parameter] = {
        *step.model.parameters(),
        *itertools.chain(*(g["params"] for g in step.optimizer.param_groups)),
    }
    assert not trained & set(weights)
    assert all(parameter.grad is not None for parameter in step.model.parameters())  # or DDP would wait for it
    accelerator.free_memory()


def test_it_is_fp32_under_autocast_and_finite_in_bf16(term_options):
    settings = config(*term_options)
    torch.manual_seed(0)
    vae = VAE(settings.model)
    [term] = loss_terms(settings, vae.likelihood, CPU)
    x, noise = draw(2, 3, 16, 16).clamp(-1, 1), draw(2, *settings.model.latent_shape)
    with torch.autocast("cpu", torch.bfloat16):
        terms = vae(x, noise)
        assert terms.params.dtype == torch.bfloat16
        value = term(x, terms)
    assert value.dtype == torch.float32
    assert value.equal(term(x, terms._replace(params=terms.params.float())))
    value.sum().backward()
    assert all(weight.grad.isfinite().all() for weight in vae.parameters() if weight.grad is not None)
    assert any(weight.grad is not None and weight.grad.any() for weight in vae.encoder.parameters())


@pytest.mark.parametrize("likelihood", ["gaussian-shared", "bernoulli"])
def test_it_is_lpips_of_the_enlarged_pair_in_either_pixel_range(likelihood, term_options):
    settings = config(*term_options, "--model.likelihood", likelihood)
    vae = VAE(settings.model)
    [term] = loss_terms(settings, vae.likelihood, CPU)
    x, params = vae.from_uint8(next(images()).images), 0.5 * draw(2, 3, 16, 16)
    terms = ElboTerms(torch.zeros(2), torch.zeros(2, 1), params)
    pair = [
        torch.nn.functional.interpolate(vae.likelihood.to_unit(each), 32, mode="bilinear")
        for each in (vae.likelihood.mean(params), x)
    ]
    inside = params.abs().amax((1, 2, 3)) < 1
    expected = term.distance(*pair)
    (compared,) = term.compare(vae.likelihood.to_unit(vae.likelihood.mean(params)), vae.likelihood.to_unit(x))
    torch.testing.assert_close(compared, expected)
    if likelihood == "bernoulli" or inside.all():
        torch.testing.assert_close(term(x, terms), expected)
    else:
        torch.testing.assert_close(term(x, terms._replace(params=params.clamp(-1, 1))), expected)


def test_nothing_is_loaded_or_computed_at_weight_0(term_options, monkeypatch, accelerator):
    def load(*_):
        raise AssertionError("weights were read")

    monkeypatch.setattr(perceptual, "PerceptualDistance", load)
    files = [word if word != "200.0" else "0" for word in term_options]
    step = build(config(*files), accelerator)
    assert (step.terms, step.comparisons) == ((), ())
    assert step.names_of_totals == ("loss", "distortion_nats", "rate_nats")
    with pytest.raises(AssertionError, match="weights were read"):
        build(config(*term_options), accelerator)
    accelerator.free_memory()


def test_short_trainings_and_the_memory_probe_train_on_it_too(term_options, tiny_shards, accelerator, monkeypatch):
    called = []
    original = PerceptualTerm.__call__
    monkeypatch.setattr(PerceptualTerm, "__call__", lambda *a: (called.append(1), original(*a))[1])
    settings = config(*term_options, "--data.train", tiny_shards)
    train_on_dummies(settings, accelerator, 2)
    assert len(called) == 2
    reader = open_reader(settings.data, "train", device=CPU)
    with short_training(settings, accelerator, reader) as training:
        loss = training.step(1e-3).loss
    assert len(called) == 3
    plain = config("--data.train", tiny_shards)
    with short_training(plain, accelerator, reader) as training:
        assert training.step(1e-3).loss < loss
    reader.close()


def records(run_dir, split):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    every = [record for record in map(json.loads, lines) if record["split"] == split]
    return [{key: value for key, value in record.items() if not key.startswith("perf/")} for record in every]


def weights(run_dir):
    [*_, newest] = list_checkpoints(run_dir / "checkpoints")
    return (newest / "model.safetensors").read_bytes(), (newest / "ema.safetensors").read_bytes()


def test_a_run_records_it_is_resumed_to_the_bit_and_not_with_other_files(
    term_options, train_tiny, monkeypatch, tmp_path
):
    whole = train_tiny(*term_options, run_dir="whole")
    for record in records(whole, "train"):
        parts = record["train/distortion_nats"] + record["train/rate_nats"] + 200 * record["train/perceptual"]
        assert record["train/loss"] == pytest.approx(parts, rel=1e-6)
    assert all(record["val/lpips"] > 0 for record in records(whole, "val"))

    class Killed(Exception):
        pass

    def die_later(self, progress, *arguments, **keywords):
        if progress.step == 8:
            raise Killed
        return original(self, progress, *arguments, **keywords)

    original = vaetrain.training.logger.RunLogger.log_training
    monkeypatch.setattr(vaetrain.training.logger.RunLogger, "log_training", die_later)
    with pytest.raises(Killed):
        train_tiny(*term_options, run_dir="broken")
    monkeypatch.undo()

    files = write_random_lpips_weights(tmp_path, "alex")
    heads = torch.load(files.heads, weights_only=True)
    torch.save({name: 2 * value for name, value in heads.items()}, files.heads)
    with pytest.raises(ValueError, match=r"--objective.perceptual.heads of SHA-256 .*Use the same file"):
        train_tiny(*term_options, "--objective.perceptual.heads", files.heads, run_dir="broken")

    # The weights of the same content may have moved.
    broken = train_tiny(*term_options, "--objective.perceptual.backbone", files.backbone, run_dir="broken")
    assert weights(broken) == weights(whole)
    assert [records(broken, split) for split in ("train", "val")] == [
        records(whole, split) for split in ("train", "val")
    ]
    made = json.loads((broken / "provenance.json").read_text())
    assert made["loss_terms"] == made["resumes"][0]["loss_terms"]
    assert len(made["loss_terms"]["perceptual"]["heads_sha256"]) == 64


def test_the_weight_may_come_and_go_on_a_resume(term_options, train_tiny, copy_of_tiny_run):
    run_dir = copy_of_tiny_run()
    assert train_tiny(*term_options, epochs=2) == run_dir
    assert "train/perceptual" in records(run_dir, "train")[-1]
    train_tiny(epochs=3)
    assert "train/perceptual" not in records(run_dir, "train")[-1]
    assert "val/lpips" not in records(run_dir, "val")[-1]
