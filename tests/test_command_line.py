"""default < YAML < command line, and what is refused."""

import dataclasses
from pathlib import Path

import pytest
import torch

from launching import ROOT
from vaetrain.command_line import parse, plain, to_yaml, user_errors, yaml_arguments
from vaetrain.config import Config
from vaetrain.model.autoencoder import VAE

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str) -> Path:
        file = tmp_path / "some.yaml"
        file.write_text(text)
        return file

    return write


def parse_config(*argv: object) -> Config:
    return parse(Config, None, [str(argument) for argument in argv])


def test_precedence(yaml_file):
    file = yaml_file("data: {train: shards}\noptim: {lr: 3e-4}\ntrain: {epochs: 7}\n")
    config = parse_config("--config", file, "--train.epochs", 9)
    assert (config.data.train, config.optim.lr, config.train.epochs) == ("shards", 3e-4, 9)
    assert config.train.global_batch_size == Config.__dataclass_fields__["train"].default_factory().global_batch_size


def test_the_later_yaml_wins(yaml_file, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text("train: {epochs: 2}\n")
    config = parse_config("--config", yaml_file("data: {train: a}\ntrain: {epochs: 7}\n"), f"--config={other}")
    assert (config.data.train, config.train.epochs) == ("a", 2)


def test_a_dumped_config_reads_back_equal(yaml_file):
    config = parse_config(
        "--data.train", "a b", "--data.classes", "cat", "wild", "--model.channel-mult", 1, 2, "--model.variational", "False",
        "--train.num-images", 640, "--optim.lr", "1e-4", "--optim.clip-norm", "None",
    )  # fmt: skip
    assert parse_config("--config", yaml_file(to_yaml(config))) == config
    assert plain(config)["model"]["channel_mult"] == [1, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "data: {train: a}\nmodel: {base_chanels: 3}",
            "unknown key model.base_chanels; did you mean model.base_channels?",
        ),
        ("data: {train: a}\nzzz: 3", "unknown key zzz"),
        ("- 1\n- 2", "holds list"),
        ("data: {train: [", "not valid YAML"),
    ],
)
def test_a_wrong_yaml_is_refused_naming_the_file(yaml_file, text, message):
    file = yaml_file(text)
    with pytest.raises(ValueError, match=r"some\.yaml") as error:
        yaml_arguments(file, Config)
    assert message in str(error.value)


def test_the_config_of_an_older_run_is_read_unless_it_asks_for_what_is_no_more(yaml_file):
    assert yaml_arguments(yaml_file("data: {train: a, allow_pipe: false}"), Config) == ["--data.train", "a"]
    with pytest.raises(ValueError, match=r"unknown key data\.allow_pipe"):
        yaml_arguments(yaml_file("data: {train: a, allow_pipe: true}"), Config)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data.train", "a", "--model.base-chanels", "3"], "--model.base-channels"),
        (["--data.train", "a", "--model.latent", "cubic"], "cubic"),
        (["--data.train", "a", "--model.image-size", "36"], "not a multiple of 8"),
        (["--data.train", "a", "--optim.lr", "fast"], "fast"),
        (["--data.train", "a", "--objective.beta", "-1"], "must not be negative"),
        (["--config", "no/such.yaml"], "no/such.yaml does not exist"),
        (["--config"], "--config needs a YAML file"),
        ([], "--data.train"),
    ],
)
def test_a_wrong_command_line_ends_with_code_2_and_a_message(argv, message, capsys):
    with pytest.raises(SystemExit) as end:
        parse_config(*argv)
    assert end.value.code == 2
    printed = capsys.readouterr()
    # The parser draws a box around its messages and wraps them.
    words = " ".join((printed.out + printed.err).replace("│", " ").split())
    assert message in words


def test_user_errors_become_a_message_and_a_code(capsys):
    with pytest.raises(SystemExit) as end, user_errors():
        raise FileNotFoundError("shard set x does not exist")
    assert end.value.code == 1
    assert capsys.readouterr().err == "error: shard set x does not exist\n"


def test_other_errors_keep_their_traceback():
    with pytest.raises(KeyError), user_errors():
        raise KeyError("a bug")


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_config_parses_and_builds(file):
    config = parse_config("--config", file)
    with torch.device("meta"):
        vae = VAE(config.model)
        x = torch.empty(2, config.model.in_channels, config.model.image_size, config.model.image_size)
        terms = vae(x, torch.empty(2, *config.model.latent_shape))
    assert terms.distortion.shape == (2,)
    assert config.run_dir == Path("runs") / file.stem, "runs of different configs must not share a folder"
    header = file.read_text().split("\n")[0:8]
    assert any("accelerate launch" in line for line in header), "the header says the command"
    assert any("easured" in line for line in header), "the header says the measured score, or that there is none yet"


def test_there_are_configs():
    assert {"demo", "mnist_ae_dense", "mnist_ae", "mnist_vae", "afhq_cat", "afhq_wild", "afhq"} <= {
        f.stem for f in CONFIGS
    }


def test_every_field_has_a_docstring_for_help():
    """tyro takes each option's help from the docstring under the field."""
    from tyro._docstrings import get_field_docstring

    def check(kind):
        for field in dataclasses.fields(kind):
            if isinstance(field.default_factory, type):  # a section
                check(field.default_factory)
            elif field.name != "data":
                assert get_field_docstring(kind, field.name, ()), f"{kind.__name__}.{field.name}"

    check(Config)
