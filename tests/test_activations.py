"""What a forward pass moves and keeps for the backward pass, counted on CUDA tensors that are fake and so need no GPU."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from launching import ROOT
from vaetrain.command_line import parse
from vaetrain.config import Config
from vaetrain.model.autoencoder import VAE
from vaetrain.model.blocks import GroupNorm
from vaetrain.model.config import ModelConfig
from vaetrain.runs.directory import RunDirectory

MIB = 2**20
NUM_IMAGES = 8
VIEWS = ("view", "alias", "detach", "transpose", "permute", "t", "slice", "select", "split", "unbind", "expand", "unsqueeze",
         "squeeze", "reshape", "_unsafe_view", "empty", "as_strided", "device")  # fmt: skip
"""Operations that move nothing."""


class Forward(NamedTuple):
    """Of one forward pass, per image."""

    moved_mib: float
    """Read and written by all kernels; a group norm reads its input twice."""
    saved_mib: float
    """Kept for the backward pass, without weights."""
    casts: Counter[tuple[torch.dtype, torch.dtype]]
    """Of feature maps, from and to."""


class Recorder(TorchDispatchMode):
    def __init__(self, weights: set[torch.Size]) -> None:
        super().__init__()
        self.weights = weights
        self.num_bytes = 0
        self.casts: Counter[tuple[torch.dtype, torch.dtype]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            read, written = (
                [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)] for tree in ((args, kwargs), out)
            )
            self.num_bytes += sum(tensor.nbytes for tensor in [*read, *written])
            if name == "native_group_norm":
                self.num_bytes += read[0].nbytes
            if name == "_to_copy" and read[0].ndim == 4 and read[0].shape not in self.weights:
                self.casts[read[0].dtype, written[0].dtype] += 1
        return out


@contextmanager
def autocast_on_cuda(dtype):
    """Which torch.autocast would refuse without a GPU."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()


def forward(config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> Forward:
    saved: dict[int, torch.UntypedStorage] = {}

    def remember(tensor):
        if not isinstance(tensor, nn.Parameter):
            saved[id(tensor.untyped_storage())] = tensor.untyped_storage()
        return tensor

    with FakeTensorMode(), torch.device("cuda"):
        vae = VAE(config)
        images = torch.empty(NUM_IMAGES, config.in_channels, config.image_size, config.image_size)
        noise = torch.empty(NUM_IMAGES, *config.latent_shape)
        with (
            autocast_on_cuda(dtype),
            Recorder({parameter.shape for parameter in vae.parameters()}) as recorder,
            torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor),
        ):
            vae(images.contiguous(memory_format=torch.channels_last), noise)
    saved_bytes = sum(storage.nbytes() for storage in saved.values())
    return Forward(recorder.num_bytes / NUM_IMAGES / MIB, saved_bytes / NUM_IMAGES / MIB, recorder.casts)


@pytest.fixture(scope="module")
def afhq() -> ModelConfig:
    return parse(Config, None, ["--config", str(ROOT / "configs/afhq.yaml"), "--data.train", "x"]).model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_feature_maps_keep_the_dtype_of_the_network(afhq, dtype):
    """Images come in as float32, the likelihood goes back to it; of attention a machine without a GPU has no fused kernel."""
    casts = forward(replace(afhq, attention_resolutions=()), dtype).casts
    assert casts == {(torch.float32, dtype): 1, (dtype, torch.float32): 1}


def test_bytes_of_an_image_are_bounded(afhq):
    """Of configs/afhq.yaml, where group norms in float32 moved 241 MiB and kept 60."""
    found = forward(afhq)
    assert 60 < found.moved_mib < 130
    assert 20 < found.saved_mib < 42


def test_a_norm_of_low_precision_sums_in_float32():
    """65,536 values about 100: in bf16 their sum, and their variance even more, would be off by per cents."""
    norm = GroupNorm(16)
    x = (100 + 4 * torch.randn(2, 16, 64, 64, generator=torch.Generator().manual_seed(0))).bfloat16()
    for memory_format in (torch.contiguous_format, torch.channels_last):
        found = norm(x.contiguous(memory_format=memory_format))
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), norm(x.float()), rtol=2**-7, atol=2**-7)


LARGE = ModelConfig(
    image_size=256, patch_size=2, base_channels=64, channel_mult=(1, 2, 4, 4), attention_resolutions=(16,)
)


def test_checkpointed_levels_keep_a_fraction_of_the_bytes():
    everything, top, none = (
        forward(replace(LARGE, checkpoint_levels=levels)).saved_mib for levels in ((), (0, 1), (0, 1, 2, 3))
    )
    assert top < everything / 2
    assert none < everything / 4


@pytest.mark.parametrize("kind", ["spatial", "vector", "autoencoder-kl"])
def test_checkpointed_gradients_are_the_same_to_the_bit(kind):
    small = ModelConfig(image_size=16, base_channels=32, channel_mult=(1, 2), num_res_blocks=1, latent_channels=4)
    if kind == "autoencoder-kl":
        small = replace(small, kind=kind)
    else:
        small = replace(small, latent=kind, base_channels=16, attention_resolutions=(8,))
    gradients = []
    for levels in ((), (0,), (0, 1)):
        torch.manual_seed(0)
        vae = VAE(replace(small, checkpoint_levels=levels)).to(memory_format=torch.channels_last)
        for name, parameter in vae.named_parameters():
            if parameter.eq(0).all() and name.endswith("weight"):  # where branches start at zero, no gradient goes back
                nn.init.normal_(parameter, std=0.1)
        images = torch.rand(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
        terms = vae(images, torch.randn(2, *small.latent_shape))
        (terms.distortion.sum() + terms.kl.sum()).backward()
        gradients.append({name: parameter.grad for name, parameter in vae.named_parameters()})
    for found in gradients[1:]:
        assert found.keys() == gradients[0].keys()
        for name, gradient in found.items():
            assert gradient is not None
            assert gradient.equal(gradients[0][name]), name


def test_levels_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match=r"--model.checkpoint-levels \[4\] are no levels of this model; it has \[0, 1"):
        ModelConfig(checkpoint_levels=(0, 4))


def test_a_run_goes_on_with_other_levels(copy_of_tiny_run, train_tiny):
    losses = []
    for name, levels in (("plain", []), ("checkpointed", ["--model.checkpoint-levels", 0, 1])):
        copy_of_tiny_run(name)
        run_dir = train_tiny(*levels, run_dir=name)
        losses.append(
            [record["train/loss"] for record in RunDirectory(run_dir).metrics() if record["split"] == "train"]
        )
    assert losses[0] == losses[1]
