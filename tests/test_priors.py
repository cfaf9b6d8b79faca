import json
import math
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.mixture import GaussianMixture
from torch.distributions import MultivariateNormal
from torch.utils.flop_counter import FlopCounterMode

from prior_scenario import FIT, scenario, scenario_together
from together import succeed_together
from vaetrain.data.readers.reader import open_reader
from vaetrain.export import load_run
from vaetrain.model.prior import StandardNormal
from vaetrain.priors.aggregate import AggregatePosterior, Posteriors, gather_aggregate
from vaetrain.priors.codes import MeanCode, RandomCode
from vaetrain.priors.config import FITTED_PRIORS, PRIOR_NAMES, PriorFitConfig
from vaetrain.priors.fit import fit_prior, fitted_priors, nats_per_dim, prior_table, priors_for
from vaetrain.priors.flow import build_flow
from vaetrain.priors.gaussian import WhitenedCodes
from vaetrain.priors.mixture import expectation_maximisation
from vaetrain.priors.whitening import Whitening
from vaetrain.runs.directory import RunDirectory

NUM_CODES = 1000


def aggregate_of(codes, std=0.0, val=None):
    """The aggregate posterior of these posterior means, all with one deviation; every second one is validation."""
    codes = codes.float()
    means, val = (codes, val.float()) if val is not None else (codes[0::2], codes[1::2])
    return AggregatePosterior(
        latent_shape=(codes.shape[1],),
        train=Posteriors(means, torch.full_like(means, std)),
        val=Posteriors(val, torch.full_like(val, std)),
    )


@pytest.fixture(scope="module")
def gaussian_codes():
    generator = torch.Generator().manual_seed(0)
    factor = torch.tensor([[2.0, 0, 0], [1.0, 0.5, 0], [0.3, 0.2, 0.1]])
    codes = torch.randn(2 * NUM_CODES, 3, generator=generator) @ factor.T + torch.tensor([1.0, -2, 3])
    return codes, MultivariateNormal(torch.tensor([1.0, -2, 3]), scale_tril=factor)


@pytest.fixture(scope="module")
def ring_codes():
    """Three clusters on a bent band: neither Gaussian nor a few Gaussians describe it exactly, and all differ."""
    generator = torch.Generator().manual_seed(1)
    angle = 2 * math.pi * torch.rand(2 * NUM_CODES, generator=generator)
    radius = 3 + 0.1 * torch.randn(2 * NUM_CODES, generator=generator)
    return torch.stack([radius * angle.cos(), radius * angle.sin(), angle.sin() * angle.cos()], dim=1)


def test_gaussian_prior_is_the_gaussian_of_the_codes(gaussian_codes):
    codes, truth = gaussian_codes
    prior, _ = fit_prior("gaussian", aggregate_of(codes), PriorFitConfig())
    z = codes[:100]
    assert prior.log_density(z).float() == pytest.approx(truth.log_prob(z).numpy(), abs=0.3)
    samples = prior.sample(0, range(4000))
    assert samples.mean(0) == pytest.approx(truth.mean.numpy(), abs=0.15)
    assert torch.cov(samples.T) == pytest.approx(truth.covariance_matrix.numpy(), rel=0.1, abs=0.02)
    assert torch.equal(prior.sample(0, [5], temperature=0.0)[0], prior.whitening.mean.float())


def test_posterior_variance_widens_the_gaussian(gaussian_codes):
    """q(z) of means 0.1 apart with deviation 2 is as wide as the deviation says, not the means."""
    prior, _ = fit_prior("gaussian", aggregate_of(0.1 * gaussian_codes[0], std=2.0), PriorFitConfig())
    expected = torch.cov(0.1 * gaussian_codes[0][0::2].T) + 4 * torch.eye(3)
    assert torch.cov(prior.sample(0, range(4000)).T) == pytest.approx(expected.numpy(), rel=0.1, abs=0.25)


def test_an_unused_direction_is_no_trouble(gaussian_codes):
    codes = torch.cat([gaussian_codes[0], torch.full((2 * NUM_CODES, 2), 7.0)], dim=1)
    prior, _ = fit_prior("gaussian", aggregate_of(codes), PriorFitConfig())
    assert prior.sample(0, range(50))[:, 3:] == pytest.approx(torch.full((50, 2), 7.0).numpy(), abs=0.02)
    with pytest.raises(ValueError, match="same code"):
        fit_prior("gaussian", aggregate_of(torch.ones(10, 2)), PriorFitConfig())


def test_leading_white_coordinates_are_those_of_the_widest_axes(gaussian_codes):
    whitening = Whitening.of(aggregate_of(gaussian_codes[0] * torch.tensor([1, 1, 100.0])))
    z = gaussian_codes[0][:50] * torch.tensor([1, 1, 100.0])
    w = whitening.whiten(z)
    assert torch.allclose(whitening.unwhiten(w).float(), z, rtol=1e-4, atol=1e-4)
    along = (z.double() - whitening.mean) @ whitening.axes
    assert along.var(0).argmax() == 0
    assert torch.allclose(w[:, 0], along[:, 0] / whitening.cholesky[0, 0])
    volume = torch.linalg.slogdet(whitening.axes @ whitening.cholesky).logabsdet
    assert whitening.log_volume == pytest.approx(float(volume))


def test_leading_white_coordinates_are_whitened_alone():
    generator = torch.Generator().manual_seed(3)
    codes = torch.randn(400, 40, generator=generator) @ torch.randn(40, 40, generator=generator)
    whitening, z = Whitening.of(aggregate_of(codes, std=0.1)), codes[:16]
    assert torch.allclose(whitening.whiten(z, 5), whitening.whiten(z)[:, :5], rtol=1e-12, atol=1e-12)
    assert torch.equal(whitening.whiten(z, 40), whitening.whiten(z))
    with FlopCounterMode(display=False) as counter:
        whitening.whiten(z, 5)
    assert counter.get_total_flops() == 2 * 16 * 40 * 5, "a matrix product with the leading axes alone"


def test_a_fit_whitens_the_codes_that_judge_it_once(ring_codes, monkeypatch):
    whitened = []
    original = Whitening.whiten

    def whiten(self, z, leading=None):
        whitened.append((len(z), leading))
        return original(self, z, leading)

    monkeypatch.setattr(Whitening, "whiten", whiten)
    aggregate = aggregate_of(ring_codes)
    config = PriorFitConfig(flow_steps=110, gmm_components=(2, 3), leading_dims=2)
    for name in ("flow", "gmm"):
        _, details = fit_prior(name, aggregate, config)
        assert len(details["selection_nats_per_dim" if name == "flow" else "tried"]) > 2
        assert [leading for _, leading in whitened].count(None) == 1
        assert {leading for _, leading in whitened} == {None, 2}
        whitened.clear()


def test_priors_are_fitted_where_the_model_is(fit_all, accelerator, monkeypatch):
    fit, *_ = fit_all
    devices, made = [], []
    original, of = AggregatePosterior.to, Whitening.of.__func__
    monkeypatch.setattr(AggregatePosterior, "to", lambda self, device: devices.append(device) or original(self, device))
    monkeypatch.setattr(Whitening, "of", classmethod(lambda cls, aggregate: made.append(1) or of(cls, aggregate)))
    fit(["gaussian", "gmm", "flow"])
    assert devices == [accelerator.device]
    assert len(made) == 1, "one whitening for all"


def test_a_flow_is_fitted_on_the_codes_device_without_mixing_devices(monkeypatch):
    """On the device meta nothing is computed, but every operation checks that its operands are all there."""
    monkeypatch.setattr(WhitenedCodes, "nats_per_dim", lambda self, log_density, num_dims: float(len(log_density)))
    monkeypatch.setattr(Whitening, "log_volume", 0.0)
    eye = torch.eye(6, dtype=torch.float64, device="meta")
    codes = Posteriors(torch.zeros(20, 6), torch.ones(20, 6))
    aggregate = AggregatePosterior((6,), codes, codes).to(torch.device("meta"))
    config = PriorFitConfig(flow_steps=3, leading_dims=1)  # in more, zuko asks where its masks are not zero
    prior, details = fit_prior("flow", aggregate, config, lambda: Whitening(eye[0], eye, eye))
    assert details["selection_nats_per_dim"] == [(0, 10.0), (3, 10.0)]
    assert {tensor.device.type for name, tensor in prior.tensors().items() if name != "flow_rank"} == {"meta"}
    assert prior.log_density(aggregate.heldout_codes(0)).device.type == "meta"


def test_mixture_recovers_a_mixture():
    generator = torch.Generator().manual_seed(2)
    centres = torch.tensor([[0.0, 0], [8, 0], [0, 8], [8, 8]])
    which = torch.multinomial(torch.tensor([0.1, 0.2, 0.3, 0.4]), 2 * NUM_CODES, replacement=True, generator=generator)
    codes = centres[which] + 0.5 * torch.randn(2 * NUM_CODES, 2, generator=generator)
    prior, details = fit_prior("gmm", aggregate_of(codes), PriorFitConfig(gmm_components=(1, 2, 4)))
    assert details["chosen"]["components"] == 4
    order = prior.mixture.weights.argsort()
    assert prior.mixture.weights[order] == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.05)
    fitted = prior.whitening.unwhiten(prior.mixture.means[order].float())
    assert fitted.float() == pytest.approx(centres.numpy(), abs=0.15)
    samples = prior.sample(0, range(2000))
    distance, nearest = torch.cdist(samples, centres).min(1)
    assert distance.square().mean() == pytest.approx(2 * 0.5**2, rel=0.1)
    assert torch.bincount(nearest) / 2000 == pytest.approx(np.array([0.1, 0.2, 0.3, 0.4]), abs=0.06)
    assert torch.cdist(prior.sample(0, range(50), temperature=0.0).double(), fitted).min(1).values.max() < 1e-4
    # A density: its integral over a grid that holds nearly all of it.
    steps = torch.linspace(-4, 12, 161)
    grid = torch.cartesian_prod(steps, steps)
    assert float(prior.log_density(grid).exp().sum()) * 0.1**2 == pytest.approx(1, abs=0.01)
    with pytest.raises(ValueError, match="all more than the 5 codes"):
        fit_prior("gmm", aggregate_of(codes[:10]), PriorFitConfig(gmm_components=(6, 7)))


@pytest.mark.parametrize("covariance", ["full", "diag"])
def test_em_finds_what_scikit_learn_finds(ring_codes, covariance):
    codes = ring_codes[:600].double()
    mixture, facts = expectation_maximisation(codes, 6, covariance, 7)
    theirs = GaussianMixture(
        6, covariance_type=covariance, reg_covar=1e-3, max_iter=60, init_params="k-means++", random_state=7
    ).fit(codes.numpy())
    assert facts == {"covariance": covariance, "components": 6, "em_iterations": theirs.n_iter_}
    assert 2 < theirs.n_iter_ < 60
    assert mixture.weights == pytest.approx(theirs.weights_, rel=1e-9)
    assert mixture.means == pytest.approx(theirs.means_, rel=1e-9, abs=1e-9)
    assert mixture.log_density(codes) == pytest.approx(theirs.score_samples(codes.numpy()), rel=1e-9)


def test_flow_and_mixture_find_what_a_gaussian_cannot(ring_codes):
    aggregate = aggregate_of(ring_codes[:, :2])
    config = PriorFitConfig(flow_steps=120, gmm_components=(8,))
    held_out = aggregate.heldout_codes(0)
    scores = {
        name: nats_per_dim(fit_prior(name, aggregate, config)[0], held_out) for name in ("gaussian", "gmm", "flow")
    }
    assert scores["gmm"] > scores["gaussian"] + 0.4
    assert scores["flow"] > scores["gaussian"] + 0.4


def test_a_flow_is_a_density_its_samples_follow(ring_codes):
    aggregate = aggregate_of(ring_codes[:, :2])
    prior, details = fit_prior("flow", aggregate, PriorFitConfig(flow_steps=60))
    assert details["best_step"] in dict(details["selection_nats_per_dim"])
    steps = torch.linspace(-8, 8, 161)
    assert float(prior.log_density(torch.cartesian_prod(steps, steps)).exp().sum()) * 0.1**2 == pytest.approx(
        1, abs=0.03
    )
    z = prior.sample(0, range(64))
    noise = prior.flow().transform(prior.whitening.whiten(z).float())
    assert prior.draw(noise, torch.zeros(64).double()) == pytest.approx(prior.whitening.whiten(z).numpy(), abs=1e-3)


def test_a_flow_starts_as_the_gaussian_and_never_ends_worse(gaussian_codes):
    x = torch.randn(7, 5)
    assert torch.equal(build_flow(5)().transform(x), x)
    assert torch.allclose(build_flow(1)().transform(x[:, :1]), x[:, :1], atol=1e-6)
    few = aggregate_of(gaussian_codes[0][:30])  # 15 codes: every step overfits
    config = PriorFitConfig(flow_steps=60)
    flow, details = fit_prior("flow", few, config)
    selection = few.selection_codes(config.seed)
    assert nats_per_dim(flow, selection) >= nats_per_dim(fit_prior("gaussian", few, config)[0], selection) - 1e-6
    assert details["best_step"] <= 50


def test_the_same_seed_gives_the_same_fit(ring_codes):
    aggregate = aggregate_of(ring_codes[:400], std=0.1)
    config = PriorFitConfig(flow_steps=15, gmm_components=(3,))
    for name in ("gmm", "flow"):
        torch.manual_seed(1)  # must not matter
        one = fit_prior(name, aggregate, config)[0].tensors()
        torch.manual_seed(2)
        state = torch.get_rng_state()
        two = fit_prior(name, aggregate, config)[0].tensors()
        assert torch.equal(torch.get_rng_state(), state), "a fit leaves the global generator alone"
        other = fit_prior(name, aggregate, PriorFitConfig(flow_steps=15, gmm_components=(3,), seed=1))[0].tensors()
        assert all(torch.equal(one[key], two[key]) for key in one)
        assert not all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", FITTED_PRIORS)
def test_a_latent_depends_on_seed_and_index_alone(name, ring_codes):
    prior, _ = fit_prior(name, aggregate_of(ring_codes, std=0.1), PriorFitConfig(flow_steps=20, gmm_components=(2,)))
    eight = prior.sample(0, range(8))
    assert eight.shape == (8, 3)
    assert torch.equal(prior.sample(0, [5, 1, 7, 0, 2, 3, 4, 6]), eight[[5, 1, 7, 0, 2, 3, 4, 6]])
    assert torch.equal(prior.sample(0, range(4, 12))[:4], eight[4:])
    assert not torch.equal(prior.sample(1, range(8)), eight)
    assert len(eight.unique(dim=0)) == 8


def test_mean_code_averages_codes_and_random_code_stays_in_range(ring_codes):
    codes = ring_codes[:50].float()
    single = MeanCode((3,), codes, 1).sample(0, range(200))
    assert {tuple(row) for row in single.tolist()} <= {tuple(row) for row in codes.tolist()}
    assert len(single.unique(dim=0)) > 40
    averaged = MeanCode((3,), codes, 4).sample(0, range(2000))
    assert averaged.mean(0) == pytest.approx(codes.mean(0).numpy(), abs=0.15)
    assert averaged.var(0) == pytest.approx((codes.var(0, correction=0) / 4).numpy(), rel=0.15)
    low, high = codes.amin(0), codes.amax(0)
    uniform = RandomCode((3,), low, high).sample(0, range(2000))
    assert ((uniform >= low) & (uniform <= high)).all()
    assert uniform.mean(0) == pytest.approx(((low + high) / 2).numpy(), abs=0.15)
    assert uniform.std(0) == pytest.approx(((high - low) / math.sqrt(12)).numpy(), rel=0.05)
    for prior in (MeanCode((3,), codes, 4), RandomCode((3,), low, high)):
        assert prior.log_density(codes) is None
        with pytest.raises(ValueError, match="leave it at 1"):
            prior.sample(0, range(3), temperature=0.5)


def test_the_standard_normal_knows_its_density(gaussian_codes):
    z = gaussian_codes[0][:10]
    truth = MultivariateNormal(torch.zeros(3), torch.eye(3)).log_prob(z)
    assert StandardNormal((3,)).log_density(z).float() == pytest.approx(truth.numpy(), rel=1e-5)


@pytest.fixture
def fit_all(tiny_run, accelerator, tmp_path):
    """Copy the run and make a function that fits priors to the copy; returns both and the loaded run."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    trained = load_run(run)
    open_split = partial(open_reader, RunDirectory.open(run).config().data, device=accelerator.device)

    def fit(names=FITTED_PRIORS, config=FIT):
        return fitted_priors(run, trained, names, accelerator, open_split, config)

    return fit, run, trained, open_split


def test_the_aggregate_is_that_of_all_images(fit_all, accelerator):
    _, _, trained, open_split = fit_all
    aggregate = gather_aggregate(trained.vae, open_split("train"), open_split("val"), accelerator, FIT)
    posteriors = [trained.vae.encode(trained.vae.from_uint8(open_split(s).first(100).images)) for s in ("train", "val")]
    means, variances = posteriors[0].mean.flatten(1), posteriors[0].logvar.exp().flatten(1)
    assert (len(aggregate.train), len(aggregate.val)) == (80, 23)
    distance, which = torch.cdist(aggregate.train.mean.double(), means.double()).min(1)
    assert distance.max() < 1e-4
    assert len(which.unique()) == 80
    assert (which.diff() > 0).all(), "in the split's order"
    assert aggregate.train.std == pytest.approx(variances.sqrt()[which].numpy(), rel=1e-3)
    assert aggregate.mean() == pytest.approx(means[which].mean(0).numpy(), abs=1e-5)
    expected = torch.cov(means[which].T) + variances[which].mean(0).diag()
    assert aggregate.covariance() == pytest.approx(expected.numpy(), abs=1e-4)
    assert len(aggregate.selection_codes(0)) + len(aggregate.heldout_codes(0)) == 23


def test_saved_priors_come_back_and_are_not_fitted_twice(fit_all, monkeypatch):
    fit, run, trained, _ = fit_all
    first = fit()
    files = {path.name for path in (run / "priors" / trained.checkpoint.name).iterdir()}
    assert files == {f"{name}.safetensors" for name in FITTED_PRIORS}
    monkeypatch.setattr("vaetrain.priors.fit.gather_aggregate", None)
    again = fit()
    for name in FITTED_PRIORS:
        assert torch.equal(again[name].prior.sample(0, range(5)), first[name].prior.sample(0, range(5)))
        assert first[name].prior.sample(0, range(5)).shape == (5, *trained.vae.config.latent_shape)
        assert again[name].sha256 == first[name].sha256
    facts = again["gmm"].facts
    assert facts.checkpoint == str(trained.checkpoint)
    assert facts.dataset_fingerprint == trained.dataset["train"]["fingerprint"]
    assert (facts.num_codes, facts.heldout_num_codes) == (80, 11)
    table = {row["prior"]: row["heldout_nats_per_dim"] for row in prior_table(again)}
    assert list(table) == list(FITTED_PRIORS)
    assert {name for name, score in table.items() if score is None} == {"mean-code", "random-code"}
    assert all(math.isfinite(score) for score in table.values() if score is not None)


def test_a_prior_of_something_else_is_refused(fit_all):
    fit, run, trained, _ = fit_all
    file = fit(["gaussian"])["gaussian"].file
    with pytest.raises(ValueError, match=r"made for --fit.*delete .*gaussian.safetensors"):
        fit(["gaussian"], PriorFitConfig(num_codes=7))
    file_of_codes = fit(["mean-code"])["mean-code"].file
    other_flow = replace(FIT, flow_steps=7, gmm_components=(3,))
    assert fit(["mean-code"], other_flow)["mean-code"].file == file_of_codes  # what it does not look at may change
    with pytest.raises(ValueError, match=r"made for --fit.mean-code-images 4, now it is 5; delete .*mean-code"):
        fit(["mean-code"], replace(FIT, mean_code_images=5))
    checksums = run / trained.checkpoint / "checksums.json"
    content = json.loads(checksums.read_text())
    checksums.write_text(json.dumps(content | {"ema.safetensors": "0" * 64}))
    with pytest.raises(ValueError, match=r"weights with SHA-256 .* now it is 0000.*delete"):
        fit(["gaussian"])
    checksums.write_text(json.dumps(content))
    for damage in (b"", file.read_bytes()[:-9], (run / trained.checkpoint / "ema.safetensors").read_bytes()):
        file.write_bytes(damage)
        with pytest.raises(ValueError, match=r"damaged or no prior .*delete"):
            fit(["gaussian"])
    file.unlink()
    trained.dataset["train"]["fingerprint"] = "another"
    with pytest.raises(ValueError, match="trained on the shard set with fingerprint another"):
        fit(["gaussian"])
    assert not file.exists()


def test_large_latents_get_the_priors_that_need_no_covariance(fit_all, monkeypatch):
    fit, _, trained, _ = fit_all
    assert priors_for((64, 64)) == PRIOR_NAMES
    assert priors_for((64, 65)) == ("standard", "flow-matching", "mean-code", "random-code")
    monkeypatch.setattr("vaetrain.priors.fit.MAX_COVARIANCE_DIMS", 255)
    assert math.prod(trained.vae.config.latent_shape) == 256
    with pytest.raises(ValueError, match="gmm would need the covariance of 256 latent dimensions"):
        fit(["gmm"])
    assert fit(["mean-code", "random-code"]).keys() == {"mean-code", "random-code"}


def test_two_processes_fit_draw_and_search_as_one_does(tiny_run, accelerator, tmp_path):
    one, two = (shutil.copytree(tiny_run, tmp_path / name) for name in ("one", "two"))
    for folder in ("alone", "together"):
        (tmp_path / folder).mkdir()
    scenario(one, one, tmp_path / "alone", accelerator)
    succeed_together(scenario_together, two, one, tmp_path / "together")
    folder = next((one / "priors").iterdir()).relative_to(one)
    for name in FITTED_PRIORS:
        mine, theirs = load_file(one / folder / f"{name}.safetensors"), load_file(two / folder / f"{name}.safetensors")
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in mine.items()), name
    alone = load_file(tmp_path / "alone" / "rank-0.safetensors")
    for rank in (0, 1):
        together = load_file(tmp_path / "together" / f"rank-{rank}.safetensors")
        assert together.keys() == alone.keys()
        for key, tensor in alone.items():
            assert torch.equal(tensor, together[key]), (rank, key)
    manifests = [json.loads((tmp_path / way / "set" / "manifest.json").read_text()) for way in ("alone", "together")]
    assert [len(manifest["shards"]) for manifest in manifests] == [5, 5]
    for manifest in manifests:
        assert manifest["prior"] == manifest["prior_facts"]["prior"] == "flow"
    assert manifests[0]["prior_sha256"] == manifests[1]["prior_sha256"]
