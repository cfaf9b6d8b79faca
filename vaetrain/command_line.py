"""Command lines and YAML files: default < YAML < command line, for every entry point and tool.

A YAML file is a saved command line: its keys become `--section.key value` arguments that stand before the user's own, so
that both go through the same parser (tyro) and a later value wins. It may be somebody else's: what executes code or writes outside
the working directory is taken from the user's own command line alone. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import io
import math
import os
import re
import sys
import traceback
import types
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml

from vaetrain.documents import Scalar, read_yaml_as_written, shorten

T = TypeVar("T")

WRITTEN = ("run_dir", "out", "json", "cache_dir", "keep_samples")
"""Last parts of the names of options that say where files are written."""

EXECUTED = ("fid.extractor", "train.rfid.extractor")
"""Options that may name a file of code."""

MAX_WHOLE = 2**63

ABOUT_CONFIG_FILES = """
--config FILE, which may be repeated, reads options from a YAML file (section: {key: value}); default < YAML < command line."""


def parse(cls: type[T], description: str | None, argv: Sequence[str] | None = None, *, flags: bool = False) -> T:
    """Build the dataclass `cls` from the command line and the YAML files that `--config FILE` names.

    `flags` makes booleans plain flags (`--gray`, the tools' form) in place of `--gray True` (the form W&B sweeps write).
    Leaves the process with code 0 after `--help`, and with code 2 and a message naming key, value and nearest valid key
    when something does not fit.
    """
    arguments, config_files = split_config_files(sys.argv[1:] if argv is None else argv)
    with user_errors(exit_code=2):
        given = {word.partition("=")[0].removeprefix("--").replace("-", "_") for word in arguments if word[:2] == "--"}
        saved = [argument for file in config_files for argument in yaml_arguments(file, cls, trusted=given)]
    markers = () if flags else (tyro.conf.FlagConversionOff,)
    help_text = f"{description.strip()}\n{ABOUT_CONFIG_FILES}" if description else None
    with user_errors(exit_code=2), _words_as_they_are():  # the environment, too, may give a default that is refused
        config = tyro.cli(cls, description=help_text, args=[*saved, *arguments], config=markers)
    with user_errors(exit_code=2):
        check_numbers(config)
        _refuse_line_breaks(config)
    return config


def read_config(cls: type[T], file: Path) -> T:
    """The dataclass `cls` from a YAML file alone, as a record of what was: where it says to write, the caller must not.

    Raises FileNotFoundError, and ValueError naming the file and what does not fit; nothing is printed.
    """
    try:
        return _parsed(cls, tuple(yaml_arguments(file, cls)))  # type: ignore[arg-type]  # a class is hashable, mypy #11470
    except ValueError as error:
        raise ValueError(f"{file} does not fit this vaetrain: {error}") from error


@functools.lru_cache(maxsize=64)
def _parsed(cls: type[T], arguments: tuple[str, ...]) -> T:
    """The dataclass `cls` of these arguments; kept, since a report or a comparison asks for a run's config several times."""
    said = io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said), _words_as_they_are():
            config = tyro.cli(cls, args=arguments, config=(tyro.conf.FlagConversionOff,))
    except SystemExit as error:
        raise ValueError(_told_by_parser(said.getvalue())) from error
    check_numbers(config)
    return config


def _told_by_parser(text: str) -> str:
    """What tyro says in its frame, on one line, without the help."""
    text = re.split(r"Argument helptext|For full helptext", text)[0]
    return shorten(" ".join(re.sub(r"[─│╭╮╰╯]|-{5,}", " ", text).split()), 500)


def check_numbers(config: Any, prefix: str = "--") -> None:
    """Raise ValueError, naming the option, for a number that is not finite or needs over 64 bits."""
    for key, value in flatten(plain(config)):
        for number in value if isinstance(value, list) else [value]:
            fits = math.isfinite(number) if isinstance(number, float) else True
            if not fits or (isinstance(number, int) and not -MAX_WHOLE <= number < MAX_WHOLE):
                raise ValueError(
                    f"{prefix}{key.replace('_', '-')} is {shorten(str(number))}; give a finite number of 64 bits"
                )


QUOTE = "\0"
"""Begins a word of a YAML file that the parser would otherwise take for an option (-x) or for nothing (None); no argument of a
process has a NUL."""

GIVEN_UP = {"data.allow_pipe": False}
"""Keys that configs of older runs have, with the values that changed nothing: those are passed over."""


def split_config_files(argv: Sequence[str]) -> tuple[list[str], list[Path]]:
    """Take every `--config FILE` and `--config=FILE` out of a command line."""
    rest: list[str] = []
    files: list[Path] = []
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--config":
            file = next(arguments, None)
            if file is None:
                print("error: --config needs a YAML file, for example configs/demo.yaml", file=sys.stderr)
                raise SystemExit(2)
            files.append(Path(file))
        elif argument.startswith("--config="):
            files.append(Path(argument.removeprefix("--config=")))
        else:
            rest.append(argument)
    return rest, files


def yaml_arguments(file: Path, cls: type, *, trusted: Collection[str] | None = None) -> list[str]:
    """A YAML file as command-line arguments for `cls`; an unknown key is refused here, naming the file.

    `trusted`, where it is given, are the keys that the user's own command line sets: of others, none may execute code or write
    outside the working directory or the file's own folder.
    """
    if not file.is_file():
        raise FileNotFoundError(f"config file {file} does not exist")
    content = read_yaml_as_written(file, remedy="mend it, or name another file")
    if content is None or content == Scalar(None, ""):
        return []
    if not isinstance(content, dict):
        kind = type(content.value if isinstance(content, Scalar) else content).__name__
        raise ValueError(f"{file} holds {kind}; a config is a mapping of keys to values")
    kinds = _leaf_types(cls)
    arguments: list[str] = []
    for key, value in flatten(content):
        scalars = value if isinstance(value, list) else [value]
        if not all(isinstance(scalar, Scalar) for scalar in scalars):
            raise ValueError(
                f"{file}: {shorten(key)} is a list of lists or of mappings; write one list of words or numbers"
            )
        if key in GIVEN_UP and value == Scalar(GIVEN_UP[key], value.text):
            continue
        if key not in kinds:
            nearest = difflib.get_close_matches(shorten(key), kinds, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else f"; valid keys: {', '.join(sorted(kinds))}"
            raise ValueError(f"{file}: unknown key {shorten(key)}{hint}")
        words = [_word(scalar, kinds[key]) for scalar in scalars]
        if trusted is not None and key not in trusted:
            _refuse_to_trust(key, [word.removeprefix(QUOTE) for word in words], file)
        arguments += [f"--{key.replace('_', '-')}", *words]
    return arguments


def _refuse_to_trust(key: str, words: Sequence[str], file: Path) -> None:
    """Raise ValueError for a value that only the user's own command line may give."""
    option = f"--{key.replace('_', '-')}"
    for word in words:
        if key.rpartition(".")[2] in WRITTEN and word != "None":
            place = os.path.abspath(os.path.expandvars(word))
            homes = (os.getcwd(), os.path.abspath(file.parent))
            if not any(os.path.commonpath((place, home)) == home for home in homes):
                raise ValueError(
                    f"{file}: {key} is {shorten(word)!r}, outside the working directory; a file may be somebody else's, so "
                    f"give {option} on the command line to write there"
                )
        if key in EXECUTED and ("/" in word or "." in word):
            raise ValueError(
                f"{file}: {key} is {shorten(word)!r}, a file of code; a file may be somebody else's, so give {option} on the "
                "command line to run it"
            )


def _word(scalar: Scalar, kind: Any) -> str:
    """A scalar as an argument for an option of a type: text is what is written there, whatever YAML takes it for."""
    if not _takes_text(kind) or (scalar.value is None and not scalar.is_quoted and _takes_none(kind)):
        return str(scalar.value)
    must_be_quoted = (
        not scalar.text or scalar.text.startswith(("-", QUOTE)) or (scalar.is_quoted and scalar.text == "None")
    )
    return f"{QUOTE}{scalar.text}" if must_be_quoted else scalar.text


def _takes_text(kind: Any) -> bool:
    """Whether an option's values are strings or paths, one or several, and nothing else but None."""
    if typing.get_origin(kind) in (tuple, types.UnionType, typing.Union, typing.Annotated):
        return all(_takes_text(part) for part in typing.get_args(kind) if part not in (Ellipsis, type(None)))
    return kind in (str, Path)


def _takes_none(kind: Any) -> bool:
    return type(None) in typing.get_args(kind)


def _words_as_they_are() -> tyro.constructors.ConstructorRegistry:
    """Rules of the parser for strings and paths that take QUOTE off."""
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def text_rule(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
        if info.type not in (str, Path):
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="STR" if info.type is str else "PATH",
            instance_from_str=lambda words: info.type(words[0].removeprefix(QUOTE)),
            is_instance=lambda value: isinstance(value, info.type),
            str_from_instance=lambda value: [str(value)],
        )

    return registry


def _refuse_line_breaks(config: Any) -> None:
    for key, value in flatten(plain(config)):
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and text.splitlines() not in ([], [text]):
                raise ValueError(f"--{key.replace('_', '-')} is {text!r}; give a value of one line")


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings as (dotted.key, value); keys may be written with - or _."""
    for key, value in mapping.items():
        name = prefix + str(key).replace("-", "_")
        if isinstance(value, dict):
            yield from flatten(value, f"{name}.")
        else:
            yield name, value


def _leaf_types(cls: type, prefix: str = "") -> dict[str, Any]:
    """The type of each leaf of a nested dataclass, by its dotted name."""
    hints = typing.get_type_hints(cls)
    leaves: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            leaves |= _leaf_types(kind, f"{prefix}{field.name}.")
        else:
            leaves[prefix + field.name] = kind
    return leaves


def plain(value: Any) -> Any:
    """A config as mappings, lists, strings and numbers that YAML and JSON hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def to_yaml(config: Any) -> str:
    """A config as YAML that `--config` reads back to an equal one."""
    return yaml.dump(plain(config), Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=120)


class _Dumper(yaml.SafeDumper):
    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style="'" if data == "None" else None)


_Dumper.add_representer(str, _Dumper.represent_str)


@contextmanager
def user_errors(exit_code: int = 1) -> Iterator[None]:
    """Turn the errors that are meant for the user into `error: …` and an exit code; `VAETRAIN_TRACEBACK=1` shows where."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        print_traceback_if_asked()
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", []))  # which of several processes it was
        print(f"error: {printable(f'{error}{notes}')}", file=sys.stderr)
        raise SystemExit(exit_code) from error


def printable(text: str) -> str:
    """A text as a terminal shows it and obeys none of it: control characters but line ends escaped."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", lambda found: ascii(found[0])[1:-1], text)


def print_traceback_if_asked() -> None:
    """Where the exception that is being handled came from, with `VAETRAIN_TRACEBACK=1`."""
    if os.environ.get("VAETRAIN_TRACEBACK"):
        traceback.print_exc()
