"""LPIPS equals torch-fidelity's on the same weights, and weight files are read safely or refused with the remedy."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor
from torch_fidelity import sample_similarity_lpips as theirs

from linear_gaussian import MemoryReader
from lpips_weights import write_random_lpips_weights
from vaetrain.metrics.lpips_config import BACKBONES, LpipsConfig
from vaetrain.metrics.perceptual_distance import PerceptualDistance, reconstruction_lpips, unit_length
from vaetrain.metrics.reconstruction import mse
from vaetrain.model.autoencoder import VAE
from vaetrain.model.config import ModelConfig


@pytest.fixture(scope="module")
def alex(tmp_path_factory: pytest.TempPathFactory) -> LpipsConfig:
    return write_random_lpips_weights(tmp_path_factory.mktemp("alex"), "alex")


@pytest.fixture(scope="module")
def vgg(tmp_path_factory: pytest.TempPathFactory) -> LpipsConfig:
    return write_random_lpips_weights(tmp_path_factory.mktemp("vgg"), "vgg")


def pictures(num: int, channels: int, size: int, seed: int) -> Tensor:
    """uint8."""
    return torch.randint(
        0, 256, (num, channels, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def test_vgg_equals_torch_fidelity_on_the_same_weights(vgg: LpipsConfig) -> None:
    state = torch.load(vgg.backbone, weights_only=True)
    with torch.device("meta"):
        backbone = torchvision.models.vgg16(weights=None)
    backbone.features.to_empty(device="cpu")
    backbone.features.load_state_dict({name.removeprefix("features."): value for name, value in state.items()})
    heads = torch.load(vgg.heads, weights_only=True)
    with (
        patch.object(theirs, "load_state_dict_from_url", lambda *_, **__: heads),
        patch.object(theirs, "torchvision_load_pretrained_vgg16", lambda: backbone),
        patch.object(theirs.SampleSimilarityLPIPS, "load_state_dict", load_heads),
    ):
        network = theirs.SampleSimilarityLPIPS("lpips")
    a, b = pictures(3, 3, 32, 0), pictures(3, 3, 32, 1)
    b[0] = a[0]
    b[1] = (a[1].float() * 0.9).to(torch.uint8)
    ours = PerceptualDistance(vgg)(a / 255, b / 255)
    torch.testing.assert_close(ours, network(a, b).flatten(), rtol=1e-4, atol=1e-6)
    assert ours[0] == 0
    assert 0 < ours[1] < ours[2]


def load_heads(self, state, strict=True, assign=False):
    """Their constructor loads the heads before it makes the backbone."""
    return torch.nn.Module.load_state_dict(self, state, strict, assign)


def test_alex_reads_the_five_layers_after_their_relus(alex: LpipsConfig) -> None:
    """Written out from torchvision's classifier: the activations that its ReLUs return, in order."""
    distance = PerceptualDistance(alex)
    with torch.device("meta"):
        features = torchvision.models.alexnet(weights=None).features
    features.to_empty(device="cpu")
    state = torch.load(alex.backbone, weights_only=True)
    features.load_state_dict({name.removeprefix("features."): value for name, value in state.items()})
    heads = list(torch.load(alex.heads, weights_only=True).values())
    a, b = pictures(2, 3, 48, 0) / 255, pictures(2, 3, 48, 1) / 255
    mean, std = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    expected = torch.zeros(2)
    activations = []
    for image in (a, b):
        h = (image * 2 - 1 - mean[:, None, None]) / std[:, None, None]
        taken = []
        for layer in features[:12]:  # no pooling after the last
            h = layer(h)
            if isinstance(layer, torch.nn.ReLU):
                taken.append(torch.nn.functional.normalize(h.clone(), dim=1))
        activations.append(taken)
    for head, first, second in zip(heads, *activations, strict=True):
        expected += torch.nn.functional.conv2d((first - second) ** 2, head).mean((1, 2, 3))
    torch.testing.assert_close(distance(a, b), expected, rtol=1e-4, atol=1e-6)


def test_it_is_symmetric_per_image_float32_under_autocast_and_repeats_gray(alex: LpipsConfig) -> None:
    distance = PerceptualDistance(alex)
    a, b = pictures(4, 1, 32, 0) / 255, pictures(4, 1, 32, 1) / 255
    plain = distance(a, b)
    torch.testing.assert_close(distance(b, a), plain)
    torch.testing.assert_close(torch.cat([distance(a[[i]], b[[i]]) for i in range(4)]), plain)
    torch.testing.assert_close(distance(a.repeat(1, 3, 1, 1), b.repeat(1, 3, 1, 1)), plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert distance(a, b).equal(plain)
    assert plain.dtype == torch.float32


def test_zero_features_have_a_finite_gradient_and_the_score_is_the_authors(vgg: LpipsConfig) -> None:
    """Theirs is f / (‖f‖ + 1e-10), whose root has no derivative at 0."""
    features = torch.zeros(1, 4, 1, 2)
    features[..., 0] = torch.tensor([3.0, 0.0, 4.0, 0.0])[None, :, None]
    features.requires_grad_()
    scaled = unit_length(features)
    torch.testing.assert_close(scaled, features / (features.norm(dim=1, keepdim=True) + 1e-10))
    (gradient,) = torch.autograd.grad((scaled - torch.ones(1, 4, 1, 2)).square().sum(), features)
    assert gradient.isfinite().all()

    distance, a, b = PerceptualDistance(vgg), pictures(4, 3, 32, 0) / 255, pictures(4, 3, 32, 1) / 255
    ours = distance(a, b)
    with patch(
        "vaetrain.metrics.perceptual_distance.unit_length", lambda f: f / (f.square().sum(1, True).sqrt() + 1e-10)
    ):
        torch.testing.assert_close(ours, distance(a, b), rtol=1e-6, atol=1e-6)


def test_images_without_any_feature_have_a_finite_gradient(alex: LpipsConfig) -> None:
    distance = PerceptualDistance(alex)
    for layer in distance.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.bias.fill_(-1e4)
    recon = (pictures(2, 3, 32, 0) / 255).requires_grad_()
    (gradient,) = torch.autograd.grad(distance(recon, pictures(2, 3, 32, 1) / 255).sum(), recon)
    assert gradient.eq(0).all()


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_the_weights_are_those_that_torchvision_publishes(net: str) -> None:
    weights = {"alex": torchvision.models.AlexNet_Weights, "vgg": torchvision.models.VGG16_Weights}[net]
    assert BACKBONES[net].url == weights.IMAGENET1K_V1.url


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_images_too_small_for_the_backbone_are_refused(net: str, request: pytest.FixtureRequest) -> None:
    distance = PerceptualDistance(request.getfixturevalue(net))
    size = BACKBONES[net].min_size
    assert distance(torch.zeros(1, 3, size, size), torch.ones(1, 3, size, size)).isfinite().all()
    with pytest.raises(ValueError, match=f"at least {size} pixels .* {size - 1}×{size - 1}"):
        distance(torch.zeros(1, 3, size - 1, size - 1), torch.zeros(1, 3, size - 1, size - 1))


@pytest.mark.parametrize("likelihood", ["gaussian-fixed", "bernoulli"])
def test_the_score_of_a_split_is_the_mean_over_its_images_in_either_pixel_range(likelihood, alex, accelerator) -> None:
    torch.manual_seed(0)
    vae = VAE(
        ModelConfig(kind="dense", image_size=32, in_channels=1, hidden_features=(8,), likelihood=likelihood)
    ).eval()
    reader, distance = MemoryReader(pictures(5, 1, 32, 0)), PerceptualDistance(alex)
    estimate = reconstruction_lpips(vae, reader, accelerator, distance, batch_size=2)
    x = vae.from_uint8(reader.images)
    recon, unit = vae.likelihood.to_unit(vae.reconstruct(x)), reader.images / 255
    assert 0.1 < mse(recon, unit).mean() ** 0.5 < 0.6
    assert estimate.mean == pytest.approx(distance(recon, unit).mean().item(), rel=1e-5)
    assert estimate.num_images == 5


def test_safetensors_files_are_the_same_and_hashes_are_kept(alex: LpipsConfig, tmp_path: Path) -> None:
    converted = LpipsConfig("alex", tmp_path / "backbone.safetensors", tmp_path / "heads.safetensors")
    for name in ("backbone", "heads"):
        safetensors.torch.save_file(torch.load(getattr(alex, name), weights_only=True), getattr(converted, name))
    a, b = pictures(2, 3, 32, 0) / 255, pictures(2, 3, 32, 1) / 255
    distance = PerceptualDistance(converted)
    assert distance(a, b).equal(PerceptualDistance(alex)(a, b))
    assert len({distance.backbone_sha256, distance.heads_sha256}) == 2


@pytest.mark.parametrize("name", ["backbone", "heads"])
def test_a_missing_file_says_what_to_put_where(alex: LpipsConfig, tmp_path: Path, name: str) -> None:
    files = {"backbone": alex.backbone, "heads": alex.heads, name: tmp_path / "nowhere.pth"}
    with pytest.raises(FileNotFoundError) as caught:
        PerceptualDistance(LpipsConfig("alex", **files))
    for part in (f"--lpips.{name}", "nowhere.pth is no file", "alexnet-owt-7be5be79.pth", "weights/v0.1/alex.pth"):
        assert part in str(caught.value)


def test_files_of_another_network_or_swapped_are_refused(alex: LpipsConfig, vgg: LpipsConfig) -> None:
    for backbone, heads, message in (
        (vgg.backbone, alex.heads, "does not hold torchvision's alexnet"),
        (alex.backbone, vgg.heads, "does not hold the LPIPS heads of alex"),
        (alex.heads, alex.backbone, "does not hold torchvision's alexnet"),
    ):
        with pytest.raises(ValueError, match=message):
            PerceptualDistance(LpipsConfig("alex", backbone, heads))


class Intruder:
    """Unpickling it writes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.trace,)


def test_a_file_with_a_python_object_is_refused_unexecuted(alex: LpipsConfig, tmp_path: Path) -> None:
    path, trace = tmp_path / "heads.pth", tmp_path / "executed"
    torch.save({"lin0.model.1.weight": torch.zeros(1), "extra": Intruder(trace)}, path)
    with pytest.raises(ValueError, match="cannot be read as tensors alone"):
        PerceptualDistance(LpipsConfig("alex", alex.backbone, path))
    assert not trace.exists()


@pytest.mark.parametrize("given", ["backbone", "heads"])
def test_one_file_alone_is_refused(given: str) -> None:
    with pytest.raises(ValueError, match=f"--lpips.{given} is given without"):
        LpipsConfig(**{given: Path("file.pth")})


def test_no_files_at_all_name_both() -> None:
    with pytest.raises(ValueError, match=r"--lpips.backbone is not given.*alexnet-owt.*alex\.pth"):
        PerceptualDistance(LpipsConfig())


def test_batch_size_is_checked() -> None:
    with pytest.raises(ValueError, match=r"--lpips\.batch-size is 0"):
        LpipsConfig(batch_size=0)
