"""TF32, IEEE and determinism: what a process sets, what scores set for themselves, and what a GPU's peak is in each."""

import os

import pytest
import torch

import vaetrain.train as train_module
from vaetrain.config import Config, TrainConfig
from vaetrain.data.config import DataConfig
from vaetrain.distributed import arithmetic, processes
from vaetrain.distributed.arithmetic import ieee_fp32
from vaetrain.metrics import generation
from vaetrain.metrics.kid import kid
from vaetrain.training import precision
from vaetrain.training.throughput import peak_of

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    yield
    arithmetic.set_tf32(False)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


def settings():
    return torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision


def test_fp32_is_ieee_unless_tf32_was_asked_for(accelerator):
    assert processes.in_use(accelerator) == "fp32"
    assert "tf32" not in settings()
    arithmetic.set_tf32(True)
    assert settings() == ("tf32", "tf32")
    assert processes.in_use(accelerator) == "tf32"
    processes.start("fp32")
    assert "tf32" not in settings()


def test_scores_are_in_ieee_whatever_the_process_has_set():
    arithmetic.set_tf32(True)
    with torch.autocast("cpu", torch.bfloat16), ieee_fp32(CPU):
        assert settings() == ("ieee", "ieee")
        assert torch.backends.cudnn.deterministic
        assert not torch.is_autocast_enabled("cpu")
    assert settings() == ("tf32", "tf32")
    with pytest.raises(ZeroDivisionError), ieee_fp32(CPU):
        raise ZeroDivisionError
    assert settings() == ("tf32", "tf32")
    assert torch.get_float32_matmul_precision() == "high"  # which refuses to answer after a mixture of ways to set it


def test_distances_between_features_are_scores(monkeypatch):
    arithmetic.set_tf32(True)
    seen = []
    products = {torch.cdist: generation.precision_recall, torch.Tensor.__matmul__: kid}
    features = torch.randn(40, 8)
    for product, score in products.items():
        original = product

        def watched(*arguments, _original=original, **options):
            seen.append(settings())
            return _original(*arguments, **options)

        with monkeypatch.context() as patch:
            where = torch if product is torch.cdist else torch.Tensor
            patch.setattr(where, product.__name__, watched)
            score(features, features.flip(0) + 1)
        assert seen
        assert set(seen) == {("ieee", "ieee")}
        seen.clear()


def test_tf32_needs_a_gpu_that_has_it(monkeypatch, accelerator):
    with pytest.raises(ValueError, match=r"tf32 needs a GPU of compute capability 8\.0"):
        precision.choose("tf32")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(ValueError, match=r"tf32 needs a GPU"):
        precision.choose("tf32")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert precision.choose("tf32") is None


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_option_reaches_the_process(monkeypatch, tiny_shards, tmp_path, deterministic):
    class Started(Exception):
        pass

    def start(*_, **options):
        assert options["deterministic"] == deterministic
        raise Started

    monkeypatch.setattr(precision, "start", start)
    train = TrainConfig(deterministic=deterministic)
    with pytest.raises(Started):
        train_module.main(Config(DataConfig(train=str(tiny_shards)), train=train, run_dir=tmp_path / "run"))


def test_deterministic_algorithms_train(train_tiny, accelerator):
    processes.start(deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    train_tiny(epochs=1)


@pytest.mark.parametrize(
    ("name", "peaks"),
    [
        ("NVIDIA H100 80GB HBM3", (67e12, 494e12, 989e12)),
        ("NVIDIA H100 PCIe", (51e12, 378e12, 756e12)),
        ("NVIDIA H200 NVL", (60e12, 418e12, 835e12)),
        ("NVIDIA H20", (44e12, 74e12, 148e12)),
        ("NVIDIA GH200 480GB", (67e12, 494e12, 989e12)),
        ("NVIDIA B200", (75e12, 1125e12, 2250e12)),
        ("NVIDIA A100-SXM4-40GB", (19.5e12, 156e12, 312e12)),
        ("Tesla V100-SXM2-16GB", (15.7e12, None, 125e12)),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", (None, None, None)),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", (None, None, None)),
        ("NVIDIA A10G", (None, None, None)),
    ],
)
def test_the_peak_is_that_of_the_device_and_the_arithmetic(name, peaks):
    assert tuple(peak_of(name, each) for each in ("fp32", "tf32", "bf16")) == peaks
    assert peak_of(name, "fp16") == peaks[2]
