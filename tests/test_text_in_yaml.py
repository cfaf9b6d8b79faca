"""Any one-line text survives config.yaml and is read back equal, whatever YAML or the option parser would take it for."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vaetrain.command_line import parse, to_yaml
from vaetrain.config import Config


@dataclass(frozen=True)
class Section:
    """Every kind of option that takes text."""

    classes: tuple[str, ...] = ()
    """Words."""
    val: str | None = None
    """A word or none."""


@dataclass(frozen=True)
class Options:
    """A small command line: the real one takes a quarter of a second to build."""

    train: str
    """A word."""
    data: Section = field(default_factory=Section)
    """A section."""
    cache: Path | None = None
    """A path or none."""
    num: int | None = None
    """A number or none."""
    on: bool = False
    """A switch."""


AWKWARD = (
    "-x", "--", "--train", "-1", "no", "007", "1e3", "0x10", "None", "null", "~", "true", "$$", "A$^$B", " a ", "a  b", "#x",
    "a: b", "[x]", "{a}", "'", '"', "\\", "é", "e\u0301", "2021-01-01", "1_000", "=", "<<", "!x", "&x", "*x", "%x", "@x", "\t", "",
)  # fmt: skip
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=150)
TEXT = st.sampled_from(AWKWARD) | ANY_TEXT.filter(lambda text: text.splitlines() in ([], [text]))


@settings(max_examples=40, deadline=None, database=None)
@given(TEXT, st.lists(TEXT, max_size=4).map(tuple), st.none() | TEXT, st.none() | TEXT)
@example("-x", AWKWARD, "None", "-s")
@example("\udce9", ("\udce9",), None, None)
def test_text_is_read_back_equal(tmp_path_factory, train, classes, val, cache):
    options = Options(train, Section(classes, val), Path(cache) if cache is not None else None, 7, True)
    file = tmp_path_factory.getbasetemp() / "options.yaml"
    file.write_bytes(to_yaml(options).encode())
    assert parse(Options, None, ["--config", str(file)]) == options


def test_yaml_by_hand_means_what_it_says(tmp_path):
    file = tmp_path / "by_hand.yaml"
    file.write_text(
        "data: {train: 007, val: null, classes: [no, yes, 007, 1e3, -x, None, 2021-01-01, ~]}\n"
        "train: {epochs: 0x10, num_images: ~, compile: no}\nlog: {tensorboard: yes}\nresume: never\n"
    )
    config = parse(Config, None, ["--config", str(file)])
    assert config.data.train == "007"
    assert config.data.classes == ("no", "yes", "007", "1e3", "-x", "None", "2021-01-01", "~")
    assert (config.data.val, config.train.epochs, config.train.num_images) == (None, 16, None)
    assert (config.train.compile, config.log.tensorboard, config.resume) == (False, True, "never")
    file.write_text(to_yaml(config))
    assert parse(Config, None, ["--config", str(file)]) == config


@pytest.mark.parametrize("text", ["a\nb", "a\r", "a\u2028b", "\n"])
def test_line_breaks_are_refused(text, capsys):
    with pytest.raises(SystemExit) as end:
        parse(Options, None, ["--train", "a", "--data.classes", text])
    assert end.value.code == 2
    assert f"--data.classes is {text!r}; give a value of one line" in capsys.readouterr().err


def test_lists_of_lists_are_refused(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("train: a\ndata: {classes: [[cat], [dog]]}\n")
    with pytest.raises(SystemExit):
        parse(Options, None, ["--config", str(tmp_path / "a.yaml")])
    assert "data.classes is a list of lists" in capsys.readouterr().err


def test_the_command_line_holds_what_begins_with_a_dash():
    options = parse(Options, None, ["--train=-s", "--data.classes=-x"])
    assert dataclasses.astuple(options)[:2] == ("-s", (("-x",), None))
