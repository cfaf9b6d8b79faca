"""Latent diffusion's network against diffusers': names, values, folders there and back, and a published VAE trained further."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import train_only_scenario
import vaetrain
from together import script_succeeds, succeed_together
from train_only_scenario import SMALL_KL
from vaetrain.config import TrainConfig
from vaetrain.data.config import DataConfig
from vaetrain.data.readers.reader import open_reader
from vaetrain.export import export, export_diffusers, load_run
from vaetrain.interchange.diffusers_config import WEIGHTS_FILE, check_fits, config_of, model_of
from vaetrain.interchange.diffusers_weights import diffusers_tensors, load_diffusers
from vaetrain.metrics.latent_statistics import latent_statistics
from vaetrain.model.autoencoder import VAE
from vaetrain.model.config import ModelConfig
from vaetrain.runs.checkpoint_names import list_checkpoints
from vaetrain.training.checkpoint import best

SMALL = ModelConfig(
    kind="autoencoder-kl", image_size=16, base_channels=32, channel_mult=(1, 2), num_res_blocks=1, latent_channels=4
)
PUBLISHED = {
    "Stable Diffusion": ({"latent_channels": 4}, 83_653_863),
    "SDXL": ({"latent_channels": 4, "sample_size": 1024, "scaling_factor": 0.13025}, 83_653_863),
    "FLUX": ({"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}, 83_819_683),
}


def library(model: ModelConfig, **options: object) -> AutoencoderKL:
    """The library's own network of this shape, with its random weights."""
    torch.manual_seed(0)
    known = {name: value for name, value in config_of(model).items() if not name.startswith("_")}
    return AutoencoderKL(**known | options).eval()


def ours(model: ModelConfig) -> VAE:
    """With weights that are nowhere zero."""
    torch.manual_seed(1)
    vae = VAE(model)
    for parameter in vae.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return vae.to(memory_format=torch.channels_last).eval().requires_grad_(False)


def images(model: ModelConfig, num_images: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.rand(num_images, model.in_channels, *[model.image_size] * 2, generator=generator) * 2 - 1


@torch.no_grad()
def assert_equal_networks(theirs: AutoencoderKL, vae: VAE) -> None:
    """Encoder and decoder within 1e-5."""
    x = images(vae.config)
    expected, found = theirs.encode(x).latent_dist, vae.encode(x)
    for name in ("mean", "logvar"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-5)
    assert expected.mean.std() > 0.01
    torch.testing.assert_close(vae.decoder(expected.mean), theirs.decode(expected.mean).sample, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(vae.decode(expected.mean), theirs.decode(expected.mean).sample.clamp(-1, 1))


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_networks_have_these_tensors(name):
    options, num_parameters = PUBLISHED[name]
    quant_conv = options.get("use_quant_conv", True)
    model = ModelConfig(
        kind="autoencoder-kl", image_size=256, base_channels=128, channel_mult=(1, 2, 4, 4), num_res_blocks=2,
        latent_channels=options["latent_channels"], quant_conv=quant_conv,
    )  # fmt: skip
    with torch.device("meta"):
        theirs = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, **options,
        )  # fmt: skip
        vae = VAE(model)
    expected = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert sum(shape.numel() for shape in expected.values()) == num_parameters
    found = {name.replace("encoder.quant", "quant").replace("decoder.post", "post"): tensor.shape
             for name, tensor in vae.state_dict().items() if not name.startswith("likelihood")}  # fmt: skip
    assert found == expected


@pytest.mark.parametrize(
    "model",
    [
        SMALL,
        replace(SMALL, latent_channels=16, quant_conv=False, channel_mult=(1, 1, 2), in_channels=1),
        replace(SMALL, channel_mult=(1,), num_res_blocks=2, checkpoint_levels=(0,)),
    ],
    ids=["quant", "no quant, 16 channels, gray", "one level"],
)
def test_a_folder_of_the_library_is_loaded_and_one_of_ours_loads_there(model, tmp_path):
    theirs, vae = library(model), ours(model)
    theirs.save_pretrained(tmp_path / "theirs")
    check_fits(tmp_path / "theirs", model)
    before = vae.likelihood.scaled_log_sigma.clone()
    load_diffusers(vae, tmp_path / "theirs")
    assert vae.likelihood.scaled_log_sigma.equal(before)
    assert_equal_networks(theirs, vae)
    own = ours(model)
    (tmp_path / "ours").mkdir()
    save_file(diffusers_tensors(own), tmp_path / "ours" / WEIGHTS_FILE)
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config_of(model)))
    loaded, info = AutoencoderKL.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert_equal_networks(loaded, own)


def test_names_of_old_and_other_types_are_read(tmp_path):
    theirs = library(SMALL).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    for name in [name for name in tensors if ".attentions." in name and "group_norm" not in name]:
        new = next(each for each in old if each in name)
        tensor = tensors.pop(name)
        is_weight = tensor.ndim == 2
        tensors[name.replace(new, old[new])] = tensor[:, :, None, None].contiguous() if is_weight else tensor
    assert len([name for name in tensors if "query" in name]) == 4
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    vae = ours(SMALL)
    load_diffusers(vae, tmp_path)
    assert_equal_networks(theirs.float(), vae)


def test_what_does_not_fit_is_refused_with_the_options_that_do(tmp_path):
    library(replace(SMALL, latent_channels=16, quant_conv=False)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"does not fit this --model.\*; pass --model.kind autoencoder-kl") as refusal:
        check_fits(tmp_path, SMALL)
    assert (
        "--model.channel-mult 1 2 --model.num-res-blocks 1 --model.latent-channels 16 --model.quant-conv False"
        in str(refusal.value)
    )
    config = json.loads((tmp_path / "config.json").read_text())
    for name, value in (("norm_num_groups", 16), ("mid_block_add_attention", False), ("act_fn", "gelu"),
                        ("block_out_channels", [32, 48]), ("use_post_quant_conv", True), ("_class_name", "VQModel")):  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises(ValueError, match=str(value) if name != "block_out_channels" else r"\[32, 48\]"):
            check_fits(tmp_path, SMALL)
    (tmp_path / WEIGHTS_FILE).rename(tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="torch pickles are not read"):
        check_fits(tmp_path, SMALL)
    with pytest.raises(ValueError, match="is a diffusers folder"):
        vaetrain.load(tmp_path)


def test_what_a_config_leaves_out_is_what_the_library_takes(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    theirs = AutoencoderKL().config
    assert model_of(tmp_path) == {
        "kind": "autoencoder-kl", "in_channels": theirs.in_channels, "base_channels": theirs.block_out_channels[0],
        "channel_mult": (1,), "num_res_blocks": theirs.layers_per_block, "latent_channels": theirs.latent_channels,
        "quant_conv": theirs.use_quant_conv,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch_size": 2}, "--model.patch-size is 2"),
        ({"attention_resolutions": (8,)}, "--model.attention-resolutions"),
        ({"latent": "vector"}, "--model.latent is vector"),
        ({"variational": False}, "--model.variational is False"),
        ({"likelihood": "logistic-mixture"}, "--model.likelihood is logistic-mixture"),
        ({"base_channels": 48}, r"make widths of \[48, 96\]; those of an autoencoder-kl are multiples of 32"),
        ({"image_size": 15}, "--model.image-size 15 is not a multiple of 2"),
    ],
)
def test_other_networks_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **fields)


@pytest.fixture(scope="module")
def kl_run(tiny_shards, accelerator, tmp_path_factory):
    """The run directory of a tiny autoencoder-kl. Do not write."""
    from unittest.mock import patch

    from launching import TINY
    from vaetrain.command_line import parse
    from vaetrain.config import Config
    from vaetrain.train import train
    from vaetrain.training.figures import RunFigures

    run_dir = tmp_path_factory.mktemp("kl_run") / "run"
    own = ["--data.train", tiny_shards, "--train.epochs", 1, "--run-dir", run_dir]
    with patch.object(RunFigures, "draw"):
        train(parse(Config, None, [str(argument) for argument in (*TINY, *SMALL_KL, *own)]), accelerator)
    accelerator.free_memory()
    return run_dir


@torch.no_grad()
def latents_of(vae: VAE, shards: object) -> tuple[Tensor, Tensor]:
    """Mean and variance of q(z|x) of all training images."""
    reader = open_reader(DataConfig(train=str(shards)), "train", device=torch.device("cpu"))
    posterior = vae.encode(vae.from_uint8(reader.first(100).images))
    reader.close()
    return posterior.mean.double(), posterior.logvar.double().exp()


def test_an_export_is_a_folder_that_diffusers_loads(kl_run, tiny_shards, accelerator, tmp_path):
    out = export_diffusers(kl_run, tmp_path / "out", accelerator, batch_size=32)
    assert {file.name for file in out.iterdir()} == {
        "config.json", WEIGHTS_FILE, "README.md", "provenance.json", "vaetrain.json",
    }  # fmt: skip
    vae = load_run(kl_run).vae
    theirs, info = AutoencoderKL.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert_equal_networks(theirs, vae)
    mean, variance = latents_of(vae, tiny_shards)
    assert len(mean) == 100
    channel = (mean.mean((0, 2, 3)), (mean.var((0, 2, 3), unbiased=False) + variance.mean((0, 2, 3))).sqrt())
    whole = float(mean.mean()), float((mean.var(unbiased=False) + variance.mean()).sqrt())
    config = theirs.config
    assert config.shift_factor == pytest.approx(whole[0], rel=1e-6)
    assert config.scaling_factor == pytest.approx(1 / whole[1], rel=1e-6)
    assert config.latents_mean is None
    assert config.latents_std is None
    latents = json.loads((out / "vaetrain.json").read_text())["latents"]
    assert latents["num_images"] == 100
    for name, expected in zip(("channel_mean", "channel_std"), channel, strict=True):
        assert latents[name] == pytest.approx(expected.tolist(), rel=1e-6)

    each = export_diffusers(kl_run, tmp_path / "each", accelerator, normalise="channels")
    config = AutoencoderKL.from_pretrained(each).config
    # As pipelines of Stable Diffusion XL do it, whose scaling factor comes on top of the deviations.
    shift, scale = (torch.tensor(values).view(1, -1, 1, 1) for values in (config.latents_mean, config.latents_std))
    normalised = (mean - shift) * config.scaling_factor / scale
    noise = variance * (config.scaling_factor / scale) ** 2
    torch.testing.assert_close(normalised.mean((0, 2, 3)), torch.zeros(4).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        normalised.var((0, 2, 3), unbiased=False) + noise.mean((0, 2, 3)), torch.ones(4).double(), atol=1e-5, rtol=0
    )
    assert config.shift_factor is None
    assert load_file(out / WEIGHTS_FILE).keys() == load_file(each / WEIGHTS_FILE).keys()

    with pytest.raises(FileExistsError, match="choose another folder"):
        export_diffusers(kl_run, out, accelerator)


def test_two_processes_measure_the_same_latents(kl_run, accelerator, tmp_path):
    one = export_diffusers(kl_run, tmp_path / "one", accelerator)
    said = script_succeeds("tools/export.py", kl_run, tmp_path / "two", "--format", "diffusers", num_processes=2)
    assert said.count("exported to") == 1
    one, two = (json.loads((tmp_path / name / "vaetrain.json").read_text())["latents"] for name in ("one", "two"))
    assert two["num_images"] == one["num_images"] == 100
    for name in ("mean", "std", "channel_mean", "channel_std"):
        assert two[name] == pytest.approx(one[name], rel=1e-6)  # encoded in other batches


def test_statistics_do_not_depend_on_the_batch_and_count_every_image_once(tiny_shards, accelerator):
    vae = ours(SMALL)
    reader = open_reader(DataConfig(train=str(tiny_shards)), "train", device=torch.device("cpu"))
    found = [latent_statistics(vae, reader, accelerator, size) for size in (7, 100)]
    reader.close()
    assert found[0].channel_mean == pytest.approx(found[1].channel_mean, rel=1e-6)
    mean, variance = latents_of(vae, tiny_shards)
    assert found[0].std == pytest.approx(float((mean.var(unbiased=False) + variance.mean()).sqrt()), rel=1e-6)


def test_other_models_and_other_images_are_not_exported(kl_run, tiny_run, tiny_gray_shards, accelerator, tmp_path):
    with pytest.raises(ValueError, match="is a conv model, and diffusers has no such network"):
        export_diffusers(tiny_run, tmp_path / "conv", accelerator)
    with pytest.raises(ValueError, match=r"was trained on .*; name those images with --data"):
        export_diffusers(kl_run, tmp_path / "gray", accelerator, data=str(tiny_gray_shards))
    assert not list(tmp_path.iterdir())


def weights_of(run_dir: object) -> dict[str, dict[str, Tensor]]:
    checkpoint = list_checkpoints(run_dir / "checkpoints")[-1]
    return {name: load_file(checkpoint / f"{name}.safetensors") for name in ("model", "ema", "optimizer")}


def part_of(name: str) -> str:
    return "encoder" if name.startswith("encoder.") else "decoder"


def assert_only(part: str, start: dict[str, Tensor], run_dir: object) -> None:
    """The other part has the bits it started with, in weights and average; all of this one has moved."""
    now = weights_of(run_dir)
    for kind in ("model", "ema"):
        for name, tensor in start.items():
            same = now[kind][name].numpy().tobytes() == tensor.numpy().tobytes()
            assert same == (part_of(name) != part), (kind, name)
    num_trained = sum(part_of(name) == part for name in now["model"])
    assert len({key.split(".")[0] for key in now["optimizer"]}) == num_trained


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_published_vae_is_trained_in_part(part, train_tiny, accelerator, tmp_path):
    model = replace(SMALL, channel_mult=(1, 1))
    folder = tmp_path / "published"
    library(model).save_pretrained(folder)
    vae = ours(model)
    load_diffusers(vae, folder)
    start = {name: tensor.contiguous() for name, tensor in vae.state_dict().items()}
    options = (*SMALL_KL, "--init-from", folder, "--train.only", part, "--optim.weight-decay", 0.5)
    run_dir = train_tiny(*options, epochs=1)
    assert_only(part, start, run_dir)
    run_dir = train_tiny(*options, epochs=2)  # goes on
    assert_only(part, start, run_dir)
    assert "resumes" in json.loads((run_dir / "provenance.json").read_text())
    other = "encoder" if part == "decoder" else "decoder"
    with pytest.raises(ValueError, match=f"was trained with --train.only {part}, now it is {other}"):
        train_tiny(*options, "--train.only", other, epochs=3)
    if part == "decoder":
        out = export_diffusers(run_dir, tmp_path / "out", accelerator)
        card = (out / "README.md").read_text()
        assert f"Started from the weights of `{folder}` (SHA-256 `" in card
        assert "Only the decoder was trained" in card
        theirs, published = AutoencoderKL.from_pretrained(out), AutoencoderKL.from_pretrained(folder)
        x = images(model)
        with torch.no_grad():
            assert theirs.encode(x).latent_dist.mean.equal(published.encode(x).latent_dist.mean)
        again = train_tiny(*SMALL_KL, "--init-from", out, run_dir="again", epochs=1)  # our own export
        assert json.loads((again / "provenance.json").read_text())["init_from"] == str(out)


def test_the_frozen_part_of_a_run_is_the_one_that_it_exports(kl_run, train_tiny, tmp_path):
    averages = load_file(best(kl_run) / "ema.safetensors")
    raw = load_file(best(kl_run) / "model.safetensors")
    assert any(not raw[name].equal(averages[name]) for name in raw if name.startswith("encoder."))
    run_dir = train_tiny(*SMALL_KL, "--init-from", kl_run, "--train.only", "decoder", run_dir="decoder", epochs=1)
    assert_only("decoder", averages, run_dir)
    exported = load_file(export(run_dir, tmp_path / "out") / "model.safetensors")
    assert all(exported[name].equal(averages[name]) for name in averages if name.startswith("encoder."))


def test_a_part_that_is_frozen_needs_weights():
    from vaetrain.config import Config

    with pytest.raises(
        ValueError, match=r"--train.only decoder freezes the rest at random; name its weights with --init-from"
    ):
        Config(data=DataConfig(train="shards"), train=TrainConfig(only="decoder"))


def test_two_processes_train_a_part_like_one(tiny_shards, kl_run, tmp_path):
    results = []
    for num_processes, name in enumerate(("one", "two"), start=1):
        (tmp_path / name).mkdir()
        succeed_together(
            train_only_scenario.train, str(tiny_shards), kl_run, tmp_path / name, num_processes=num_processes
        )
        results.append(json.loads((tmp_path / name / "results.json").read_text()))
    one, two = results
    for part in ("encoder", "decoder"):
        assert len(one[part]["losses"]) == 4
        assert two[part]["losses"] == pytest.approx(one[part]["losses"], rel=1e-5)
        assert two[part]["apart"] == 0
