"""FID from reduced sums equals torch-fidelity's own, and weights are read safely or refused with the remedy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch_fidelity
from inception_weights import random_inception_weights
from torch import Tensor
from torch.utils.data import Dataset

from vaetrain.metrics.config import FidConfig
from vaetrain.metrics.fidelity import FeatureStatistics, fid
from vaetrain.metrics.inception import FeatureExtractor, read_weights

NUM_GENERATED, NUM_REFERENCE = 12, 16
CPU = torch.device("cpu")


def pictures(num: int, seed: int, blur: int) -> Tensor:
    """uint8 noise, smooth at the scale of `blur` pixels."""
    noise = torch.rand(num, 3, 32 // blur, 32 // blur, generator=torch.Generator().manual_seed(seed))
    return (255 * torch.nn.functional.interpolate(noise, size=(32, 32), mode="bilinear")).to(torch.uint8)


class Pictures(Dataset):
    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def statistics_of(features: Tensor) -> FeatureStatistics:
    statistics = FeatureStatistics.empty(features.shape[1])
    statistics.update(features)
    return statistics


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return random_inception_weights()


@pytest.fixture(scope="module")
def weights(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def generated() -> Tensor:
    return pictures(NUM_GENERATED, seed=1, blur=8)


@pytest.fixture(scope="module")
def reference() -> Tensor:
    return pictures(NUM_REFERENCE, seed=2, blur=1)


@pytest.fixture(scope="module")
def extractor(weights: Path) -> FeatureExtractor:
    return FeatureExtractor(weights, CPU)


@pytest.fixture(scope="module")
def features(extractor: FeatureExtractor, generated: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    return extractor(generated), extractor(reference)


def test_fid_equals_torch_fidelity_on_the_same_images_and_weights(
    weights: Path, generated: Tensor, reference: Tensor, features: tuple[Tensor, Tensor]
) -> None:
    theirs = torch_fidelity.calculate_metrics(
        input1=Pictures(generated),
        input2=Pictures(reference),
        fid=True,
        cuda=False,
        batch_size=7,
        save_cpu_ram=True,
        feature_extractor_weights_path=str(weights),
        verbose=False,
    )[torch_fidelity.KEY_METRIC_FID]
    ours = fid(*map(statistics_of, features))
    assert theirs > 1
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_statistics_of_two_processes_reduced_equal_the_whole(features: tuple[Tensor, Tensor]) -> None:
    whole = statistics_of(features[0])
    first, second = statistics_of(features[0][:7]), statistics_of(features[0][7:])
    others = iter([torch.tensor(float(second.count)), second.sum, second.outer])
    reduced = first.reduce(lambda tensor: tensor + next(others))
    assert (first.count, reduced.count) == (7, NUM_GENERATED)
    np.testing.assert_allclose(reduced.mean(), whole.mean(), rtol=1e-9)
    np.testing.assert_allclose(
        reduced.covariance(), whole.covariance(), rtol=1e-6, atol=1e-12 * whole.covariance().max()
    )


def test_fid_does_not_depend_on_how_images_are_split_and_is_symmetric_and_zero_for_equal_sets() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(200, 48, generator=generator) * torch.arange(1, 49)
    b = torch.rand(150, 48, generator=generator) * 30
    whole, other = statistics_of(a), statistics_of(b)
    parts = FeatureStatistics.empty(48)
    for part in a.split(37):
        parts.update(part)
    assert fid(parts, other) == pytest.approx(fid(whole, other), rel=1e-6)
    assert fid(other, whole) == pytest.approx(fid(whole, other), rel=1e-6)
    assert abs(fid(whole, parts)) < 1e-6 * whole.covariance().trace()


def test_fid_of_diagonal_gaussians_is_the_closed_form() -> None:
    """Σ (μ₁ − μ₂)² + (σ₁ − σ₂)², with statistics made to have exactly these moments."""
    mean_1, mean_2 = torch.tensor([0.0, 1.0, -2.0]).double(), torch.tensor([0.5, 1.0, 1.0]).double()
    std_1, std_2 = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([1.0, 0.25, 3.0]).double()
    n = 11

    def exact(mean: Tensor, std: Tensor) -> FeatureStatistics:
        return FeatureStatistics(n, n * mean, (n - 1) * std.square().diag() + n * mean.outer(mean))

    expected = ((mean_1 - mean_2).square() + (std_1 - std_2).square()).sum().item()
    assert fid(exact(mean_1, std_1), exact(mean_2, std_2)) == pytest.approx(expected, rel=1e-9)


def test_covariance_is_numpy_s_unbiased_one_and_needs_two_images() -> None:
    features = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(statistics_of(features).covariance(), np.cov(features.numpy(), rowvar=False), rtol=1e-9)
    with pytest.raises(ValueError, match="at least 2 images; these statistics are of 1"):
        statistics_of(features[:1]).covariance()


def test_statistics_survive_a_file_and_other_files_are_refused(tmp_path: Path) -> None:
    statistics = statistics_of(torch.rand(5, 3, generator=torch.Generator().manual_seed(0)))
    path = tmp_path / "reference.safetensors"
    statistics.save(path)
    loaded = FeatureStatistics.load(path)
    assert loaded.count == 5
    assert torch.equal(loaded.sum, statistics.sum)
    assert torch.equal(loaded.outer, statistics.outer)
    assert [file.name for file in tmp_path.iterdir()] == ["reference.safetensors"]
    safetensors.torch.save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"holds \['weight'\]"):
        FeatureStatistics.load(path)
    path.write_bytes(b"half a fi")
    with pytest.raises(ValueError, match="no safetensors file"):
        FeatureStatistics.load(path)


def test_features_are_float32_under_autocast_and_grayscale_is_repeated(extractor: FeatureExtractor) -> None:
    gray = pictures(2, seed=3, blur=4)[:, :1]
    plain = extractor(gray.repeat(1, 3, 1, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(extractor(gray), plain)
    assert plain.dtype == torch.float32


def test_weights_are_hashed_and_random_ones_are_not_taken_for_the_published(extractor: FeatureExtractor) -> None:
    assert len(extractor.weights_sha256) == 64
    assert not extractor.weights_are_published


def test_safetensors_weights_give_the_same_tensors(state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(state, path)
    read, _ = read_weights(path)
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], state[name]) for name in state)


@pytest.mark.parametrize("missing", [None, Path("nowhere") / "inception.pth"])
def test_missing_weights_say_what_to_put_where(missing: Path | None) -> None:
    with pytest.raises((FileNotFoundError, ValueError)) as caught:
        FeatureExtractor(missing, CPU)
    assert "weights-inception-2015-12-05-6726825d.pth" in str(caught.value)
    assert "--fid.weights FILE" in str(caught.value)
    assert missing is None or str(missing) in str(caught.value)


def test_weights_of_another_network_are_refused_naming_keys(state: dict[str, Tensor], tmp_path: Path) -> None:
    wrong = {name: tensor for name, tensor in state.items() if not name.startswith("Mixed_5b")}
    wrong["head.weight"] = torch.zeros(1)
    wrong["fc.bias"] = torch.zeros(10)
    path = tmp_path / "wrong.pth"
    torch.save(wrong, path)
    with pytest.raises(ValueError, match="does not hold torch-fidelity's Inception v3") as caught:
        FeatureExtractor(path, CPU)
    message = str(caught.value)
    for part in ("wrong.pth", "Mixed_5b.branch1x1.conv.weight", "head.weight", "fc.bias", "--fid.weights"):
        assert part in message
    assert len(message) < 1500


class Intruder:
    """Unpickling it writes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.trace,)


def test_a_weights_file_with_a_python_object_is_refused_unexecuted(tmp_path: Path) -> None:
    path, trace = tmp_path / "weights.pth", tmp_path / "executed"
    torch.save({"fc.weight": torch.zeros(1), "extra": Intruder(trace)}, path)
    with pytest.raises(ValueError, match="could run code"):
        FeatureExtractor(path, CPU)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("name", "content"), [("w.pth", b""), ("w.pth", b"no weights"), ("w.safetensors", b"no weights")]
)
def test_damaged_weights_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as tensors alone"):
        read_weights(tmp_path / name)


def test_weights_that_are_no_dictionary_of_tensors_are_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="no dictionary of tensors"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize(("field", "value"), [("num_images", 1), ("batch_size", 0), ("seed", -1)])
def test_config_refuses_what_gives_no_distance(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"--fid.{field.replace('_', '-')} is {value}"):
        FidConfig(**{field: value})
