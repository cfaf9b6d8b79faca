"""The page's computations, without a page: who draws image i, what sliders move, where interpolations end."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from launching import run_here
from vaetrain.evaluation.latent_figures import decode
from vaetrain.exploration.directions import most_active_units, principal_directions
from vaetrain.exploration.explorer import BLOCK, Draw, Explorer, tiled
from vaetrain.export import export
from vaetrain.model.autoencoder import VAE
from vaetrain.model.config import ModelConfig
from vaetrain.model.prior import StandardNormal
from vaetrain.priors.codes import MeanCode
from vaetrain.priors.config import FlowSettings
from vaetrain.priors.flow_matching.config import NetworkConfig
from vaetrain.priors.flow_matching.model import FlowMatching
from vaetrain.priors.flow_matching.prior import FlowMatchingPrior

CPU = torch.device("cpu")
FLOW = FlowSettings(steps=2)


def model(latent: str) -> VAE:
    """A VAE of random weights for 16×16 images."""
    torch.manual_seed(0)
    config = ModelConfig(
        image_size=16, base_channels=16, channel_mult=(1, 2), num_res_blocks=1, latent_channels=4, latent=latent
    )
    vae = VAE(config).eval().requires_grad_(False)
    for parameter in vae.parameters():  # also those that begin at zero
        parameter.add_(0.05 * torch.randn_like(parameter))
    return vae


@pytest.fixture(params=["vector", "spatial"])
def explorer(request):
    """One with a flow-matching prior of random weights for cats and dogs, and with the codes of 40 random images measured."""
    vae = model(request.param)
    shape = vae.config.latent_shape
    network = FlowMatching(NetworkConfig(width=16, depth=1, heads=2), shape, 2).eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    flow = FlowMatchingPrior(network, ("cat", "dog"), knows_no_class=True)
    codes = MeanCode(shape, torch.randn(20, *shape).flatten(1), 4)
    explorer = Explorer(vae, {"standard": StandardNormal(shape), "flow-matching": flow, "mean-code": codes}, "a test")
    images = torch.randint(256, (40, 3, 16, 16), dtype=torch.uint8)
    explorer.measure(torch.randn(40, explorer.codes(images).shape[1]), 3, "noise")
    return explorer


@pytest.mark.parametrize("prior", ["standard", "flow-matching", "mean-code"])
def test_image_i_is_a_function_of_seed_and_i(explorer, prior):
    draw = Draw(prior, seed=3, flow=FLOW if prior == "flow-matching" else FlowSettings())
    many = explorer.samples(draw, 2 * BLOCK + 1)
    fresh = Explorer(explorer.vae, explorer.priors, "again")
    assert torch.equal(fresh.samples(draw, 3), many[:3])
    assert torch.equal(fresh.samples(draw, BLOCK + 2), many[: BLOCK + 2])
    assert not torch.equal(fresh.samples(replace(draw, seed=4), 3), many[:3])
    assert len(many.flatten(1).unique(dim=0)) == len(many)


def test_class_guidance_steps_and_temperature_reach_the_prior(explorer):
    def drawn(**settings) -> torch.Tensor:
        temperature = settings.pop("temperature", 1.0)
        return explorer.latents(Draw("flow-matching", 0, temperature, FlowSettings(**{"steps": 2} | settings)), 4)

    for other in (
        {"class_": "dog"},
        {"class_": "cat", "guidance": 3.0},
        {"class_": "cat", "steps": 3},
        {"class_": "cat", "temperature": 0.5},
    ):
        assert not torch.allclose(drawn(class_="cat"), drawn(**other), atol=1e-4), other
    with pytest.raises(ValueError, match="no class 'fox'"):
        drawn(class_="fox")
    with pytest.raises(ValueError, match="only --prior flow-matching has it"):
        explorer.samples(Draw("standard", flow=FLOW), 1)
    with pytest.raises(ValueError, match="has no prior gmm; it has standard, flow-matching, mean-code"):
        explorer.samples(Draw("gmm"), 1)


def test_each_slider_moves_the_picture_and_zero_does_not(explorer):
    still = explorer.samples(Draw(), 2)
    assert torch.equal(explorer.samples(Draw(), 2, (0.0, 0.0, 0.0)), still)
    moved = [explorer.samples(Draw(), 2, tuple(float(place == at) * 3 for place in range(3))) for at in range(3)]
    for number, images in enumerate(moved):
        assert (images != still).flatten(1).any(1).all(), number
    assert not torch.equal(moved[0], moved[1])
    with pytest.raises(ValueError, match="2 shifts are given for 3 directions"):
        explorer.samples(Draw(), 1, (1.0, 2.0))


def test_a_slider_moves_its_unit_by_standard_deviations(explorer):
    z = explorer.latents(Draw(), 2)
    moved = explorer.directions.moved(z, (0.0, 2.0, 0.0))
    torch.testing.assert_close((moved - z).flatten(1), 2 * explorer.directions.steps[1:2].expand(2, -1))


def test_active_units_are_the_widest_and_idle_ones_have_no_slider():
    codes = torch.randn(2000, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.01, 2.0, 0.5, 1.0])
    found = most_active_units(codes, 8)
    assert [name.split(" ·")[0] for name in found.names] == ["unit 1", "unit 3", "unit 2"]
    torch.testing.assert_close(found.steps[0], torch.tensor([0.0, codes[:, 1].std(), 0.0, 0.0]))
    assert len(most_active_units(codes, 2).names) == 2
    assert most_active_units(torch.zeros(9, 4), 8).names == ()


@pytest.mark.parametrize("num_images", [30, 3])
def test_principal_directions_are_those_of_the_covariance(num_images):
    """Against the eigenvectors of the covariance itself, with more and with fewer images than dimensions."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(num_images, 6, generator=generator) @ torch.randn(6, 6, generator=generator) + 5
    found = principal_directions(codes, 4)
    values, vectors = torch.linalg.eigh(codes.double().T.cov())
    assert len(found.names) == min(4, num_images - 1)
    for number, step in enumerate(found.steps.double()):
        value, vector = values[-1 - number], vectors[:, -1 - number]
        assert float(step.norm() ** 2) == pytest.approx(float(value), rel=1e-4)
        assert float((step / step.norm()) @ vector) ** 2 == pytest.approx(1, abs=1e-4)
        assert step[step.abs().argmax()] > 0
    assert found.names[0] == f"direction 1 · {float(values[-1] / values.sum()):.1%} of the variance"


@pytest.mark.parametrize("path", ["straight", "spherical"])
def test_an_interpolation_ends_in_the_reconstructions(explorer, path):
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    found = explorer.interpolation(*images, 5, path)
    vae = explorer.vae
    ends = vae.likelihood.to_uint8(vae.reconstruct(vae.from_uint8(images)))
    assert (found[[0, -1]].int() - ends.int()).abs().max() <= 1  # another batch may round differently
    assert not torch.equal(*ends)
    codes = explorer.codes(images).view(2, *vae.config.latent_shape)
    middle = decode(vae, codes.mean(0, keepdim=True))[0]
    assert ((found[2].int() - middle.int()).abs().max() <= 1) == (path == "straight")
    with pytest.raises(ValueError, match="at least 2"):
        explorer.interpolation(*images, 1, path)


def test_a_photograph_is_turned_upright_cut_and_shrunk(explorer, tmp_path):
    pixels = np.zeros((32, 64, 3), dtype=np.uint8)
    pixels[:, 32:] = (255, 0, 0)  # the right half
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down: the right half is the left one
    Image.fromarray(pixels).save(tmp_path / "p.png", exif=exif)
    found = explorer.prepared(tmp_path / "p.png")
    assert found.shape == (3, 16, 16)
    assert found[0, :, :6].min() > 240
    assert found[0, :, 10:].max() < 15
    (tmp_path / "q.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"q\.png cannot be used: it is none of JPEG"):
        explorer.prepared(tmp_path / "q.png")


def test_a_grid_shows_every_pixel():
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(-1, 1, 16, 16) * 10
    picture = tiled(images, 3)
    side = 80  # 16 pixels enlarged five times
    assert picture.shape == (2 * side + 6, 3 * side + 8, 3)
    assert [int(picture[2 + side // 2, 2 + side // 2 + at * (side + 2), 0]) for at in range(3)] == [0, 10, 20]


def test_a_run_is_opened_with_its_own_training_images(tiny_run):
    explorer = Explorer.open(tiny_run, num_images=30, num_directions=5, device=CPU)
    assert list(explorer.priors) == ["standard"]
    assert explorer.best_prior == "standard"
    assert explorer.measured_on == "30 training images"
    assert len(explorer.directions.names) == 5
    again = Explorer.open(tiny_run, num_images=30, num_directions=5, device=CPU)
    assert torch.equal(again.directions.steps, explorer.directions.steps)


def point_elsewhere(run: Path, shards: Path, other: Path) -> None:
    """In the run's own config; checkpoints are checked against their hashes."""
    file = run / "config.yaml"
    assert str(shards) in file.read_text()
    file.write_text(file.read_text().replace(str(shards), str(other)))


def test_without_the_training_images_drawn_ones_are_measured_and_it_is_said(copy_of_tiny_run, tiny_shards, tmp_path):
    run = copy_of_tiny_run()
    point_elsewhere(run, tiny_shards, tmp_path / "gone")
    explorer = Explorer.open(run, num_images=20, device=CPU)
    assert explorer.measured_on.startswith("20 images that the model drew from its standard prior, since ")
    assert "gone" in explorer.measured_on
    assert (
        Explorer.open(run, data=str(tiny_shards), num_images=20, device=CPU).measured_on
        == f"20 training images of {tiny_shards}"
    )
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Explorer.open(run, data=str(tmp_path / "nowhere"), device=CPU)
    out = export(run, tmp_path / "export")
    shipped = Explorer.open(out, num_images=20, device=CPU)
    assert "since an export knows no training images" in shipped.measured_on
    assert torch.equal(shipped.samples(Draw(seed=1), 2), explorer.samples(Draw(seed=1), 2))


def test_other_images_than_the_runs_are_not_taken_for_them(copy_of_tiny_run, tiny_shards, tiny_gray_shards):
    run = copy_of_tiny_run()
    point_elsewhere(run, tiny_shards, tiny_gray_shards)
    explorer = Explorer.open(run, num_images=20, device=CPU)
    assert f"{tiny_gray_shards} holds other images than those the run was trained on" in explorer.measured_on
    with pytest.raises(ValueError, match="channel"):
        Explorer.open(run, data=str(tiny_gray_shards), device=CPU)


def test_fitted_priors_of_the_checkpoint_are_offered(copy_of_tiny_run):
    run = copy_of_tiny_run()
    arguments = ("--run", run, "--num-images", 8, "--batch-size", 8, "--fit.num-codes", 90)
    assert run_here("vaetrain/sample.py", *arguments, "--prior", "gaussian", "--out", run / "samples") == 0
    explorer = Explorer.open(run, num_images=20, device=CPU)
    assert list(explorer.priors) == ["standard", "gaussian"]
    assert not torch.equal(explorer.samples(Draw("gaussian"), 2), explorer.samples(Draw("standard"), 2))
    file = next((run / "priors").rglob("gaussian.safetensors"))
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"gaussian\.safetensors is damaged or no prior"):
        Explorer.open(run, num_images=20, device=CPU)
