"""Extractors: weights are read safely or refused with the remedy, and a user's module is held to what it promises."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor
from torch_fidelity.feature_extractor_clip import FeatureExtractorCLIP

from inception_weights import random_inception_weights
from torchscript_extractor import TinyExtractor, write_torchscript_extractor
from vaetrain.metrics.config import FidConfig
from vaetrain.metrics.extractor import KNOWN, FeatureExtractor, PublishedWeights, missing_weights
from vaetrain.metrics.weights import read_weights

CPU = torch.device("cpu")


def pictures(num: int, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num, channels, 16, 16), generator=generator, dtype=torch.uint8)


def inception(weights: Path | None) -> FeatureExtractor:
    return FeatureExtractor(FidConfig(weights=weights), CPU)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return random_inception_weights()


@pytest.fixture(scope="module")
def extractor(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> FeatureExtractor:
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(state, path)
    return inception(path)


def test_features_are_float32_under_autocast_and_grayscale_is_repeated(extractor: FeatureExtractor) -> None:
    gray = pictures(2, channels=1)
    plain = extractor(gray.repeat(1, 3, 1, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        repeated = extractor(gray)
    assert torch.equal(repeated.features, plain.features)
    assert plain.features.dtype == torch.float32
    assert plain.features.shape == (2, 2048)
    assert plain.logits is not None
    assert plain.logits.shape == (2, 1008)


def test_weights_are_hashed_and_random_ones_are_not_taken_for_the_published(extractor: FeatureExtractor) -> None:
    facts = extractor.describe()
    assert (facts["extractor"], facts["layer"]) == ("torch-fidelity inception-v3-compat", "2048")
    assert len(str(facts["weights_sha256"])) == 64
    assert facts["weights_are_published"] is False


def test_safetensors_weights_give_the_same_tensors(state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(state, path)
    read, sha256 = read_weights(path, "--fid.weights", "")
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], state[name]) for name in state)
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("missing", [None, Path("nowhere") / "inception.pth"])
def test_missing_weights_say_what_to_put_where(missing: Path | None) -> None:
    with pytest.raises((FileNotFoundError, ValueError)) as caught:
        inception(missing)
    assert "weights-inception-2015-12-05-6726825d.pth" in str(caught.value)
    assert "--fid.weights FILE" in str(caught.value)
    assert missing is None or str(missing) in str(caught.value)


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_every_known_extractor_says_which_file_it_needs(name: str) -> None:
    assert KNOWN[name].url in str(missing_weights(FidConfig(extractor=name)))
    assert missing_weights(FidConfig(extractor=name, weights=Path("w.pth"))) is None
    with pytest.raises(FileNotFoundError, match="is no file"):
        FeatureExtractor(FidConfig(extractor=name, weights=Path("nowhere.pth")), CPU)


def test_published_weights_are_known_by_their_hash() -> None:
    assert KNOWN["inception-v3-compat"].sha256 == "6726825d"
    assert KNOWN["vgg16"].sha256 == "397923af"
    assert len(KNOWN["clip-vit-b-32"].sha256) == 64


def test_weights_of_another_network_are_refused_naming_keys(state: dict[str, Tensor], tmp_path: Path) -> None:
    wrong = {name: tensor for name, tensor in state.items() if not name.startswith("Mixed_5b")}
    wrong["head.weight"] = torch.zeros(1)
    wrong["fc.bias"] = torch.zeros(10)
    path = tmp_path / "wrong.pth"
    torch.save(wrong, path)
    with pytest.raises(ValueError, match="does not hold torch-fidelity's inception-v3-compat") as caught:
        inception(path)
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
        inception(path)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("name", "content"), [("w.pth", b""), ("w.pth", b"no weights"), ("w.safetensors", b"no weights")]
)
def test_damaged_weights_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as tensors alone"):
        inception(tmp_path / name)


def test_weights_that_are_no_dictionary_of_tensors_are_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="no dictionary of tensors"):
        inception(tmp_path / "w.pth")


def test_vgg16_takes_torchvisions_state_dict_and_has_no_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With narrow layers in place of half a gigabyte of them."""

    def narrow(**options: object) -> torchvision.models.VGG:
        model = torchvision.models.VGG(torchvision.models.vgg.make_layers([4, "M", 512]), num_classes=5)
        model.classifier = torch.nn.Sequential(
            torch.nn.Linear(512 * 49, 6), *(torch.nn.Identity() for _ in range(2)), torch.nn.Linear(6, 6),
            *(torch.nn.Identity() for _ in range(3)),
        )  # fmt: skip
        return model

    monkeypatch.setattr(torchvision.models, "vgg16", narrow)
    torch.save(narrow().state_dict(), tmp_path / "vgg16.pth")
    vgg16 = FeatureExtractor(FidConfig(extractor="vgg16", weights=tmp_path / "vgg16.pth"), CPU)
    found = vgg16(pictures(2))
    assert found.features.shape == (2, 6)
    assert found.features.min() >= 0
    assert found.logits is None
    assert not vgg16.weights_are_published


def test_clip_loads_the_published_archive_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_torchscript_extractor(tmp_path / "clip.pt")
    config = FidConfig(extractor="clip-vit-b-32", weights=path)
    with pytest.raises(ValueError, match="is not the published file of clip-vit-b-32"):
        FeatureExtractor(config, CPU)
    opened: list[str] = []

    class Recorder(FeatureExtractorCLIP):
        def __init__(self, name: str, layers: list[str], feature_extractor_weights_path: str) -> None:
            torch.nn.Module.__init__(self)
            opened.append(feature_extractor_weights_path)

    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(KNOWN, "clip-vit-b-32", PublishedWeights(Recorder, "", sha256, "clip", is_torchscript=True))
    assert FeatureExtractor(config, CPU).weights_are_published
    assert opened == [str(path)]


def test_a_users_module_gives_its_features(tmp_path: Path) -> None:
    path = write_torchscript_extractor(tmp_path / "mine.pt")
    extractor = FeatureExtractor(FidConfig(extractor=str(path)), CPU)
    found = extractor(pictures(3, channels=1))
    expected = TinyExtractor(8)(pictures(3, channels=1).repeat(1, 3, 1, 1))
    torch.testing.assert_close(found.features, expected)
    assert found.logits is None
    assert extractor.weights_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert extractor.describe()["extractor"] == str(path)


class PerPixel(torch.nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float()


class NotANumber(torch.nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean((2, 3)).log() * 0 + float("nan")


@pytest.mark.parametrize(("module", "message"), [(PerPixel(), r"not \(b, d\)"), (NotANumber(), "not finite")])
def test_a_users_module_that_returns_no_features_is_named(
    tmp_path: Path, module: torch.nn.Module, message: str
) -> None:
    path = tmp_path / "mine.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.trace(module, pictures(1)).save(str(path))
    extractor = FeatureExtractor(FidConfig(extractor=str(path)), CPU)
    with pytest.raises(ValueError, match=f"mine.pt returned .*{message}"):
        extractor(pictures(2))


def test_what_is_no_extractor_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.pt").write_bytes(b"no module")
    with pytest.raises(ValueError, match="is no TorchScript module"):
        FeatureExtractor(FidConfig(extractor=str(tmp_path / "mine.pt")), CPU)
    with pytest.raises(FileNotFoundError, match="neither inception-v3-compat, vgg16, clip-rn50"):
        FeatureExtractor(FidConfig(extractor="inception"), CPU)
    with pytest.raises(ValueError, match="brings its own weights"):
        FeatureExtractor(FidConfig(extractor="mine.pt", weights=tmp_path / "w.pth"), CPU)
    with pytest.raises(ValueError, match=r"dinov2_vits14.*--fid\.extractor dinov2\.pt"):
        FeatureExtractor(FidConfig(extractor="dinov2-vit-s-14"), CPU)
