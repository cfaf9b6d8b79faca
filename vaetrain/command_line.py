"""Command lines and YAML files: default < YAML < command line, for every entry point and tool.

A YAML file is a saved command line: its keys become `--section.key value` arguments that stand before the user's own, so
that both go through the same parser (tyro) and a later value wins. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import sys
import traceback
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml

T = TypeVar("T")

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
        saved = [argument for file in config_files for argument in yaml_arguments(file, cls)]
    markers = () if flags else (tyro.conf.FlagConversionOff,)
    help_text = f"{description.strip()}\n{ABOUT_CONFIG_FILES}" if description else None
    return tyro.cli(cls, description=help_text, args=[*saved, *arguments], config=markers)


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


def yaml_arguments(file: Path, cls: type) -> list[str]:
    """A YAML file as command-line arguments for `cls`; an unknown key is refused here, naming the file."""
    if not file.is_file():
        raise FileNotFoundError(f"config file {file} does not exist")
    try:
        content = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not valid YAML: {error}") from error
    if content is None:
        return []
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds {type(content).__name__}; a config is a mapping of keys to values")
    known = known_keys(cls)
    arguments: list[str] = []
    for key, value in flatten(content):
        if key in GIVEN_UP and value == GIVEN_UP[key]:
            continue
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else f"; valid keys: {', '.join(sorted(known))}"
            raise ValueError(f"{file}: unknown key {key}{hint}")
        arguments.append(f"--{key.replace('_', '-')}")
        arguments.extend(str(item) for item in (value if isinstance(value, list) else [value]))
    return arguments


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings as (dotted.key, value); keys may be written with - or _."""
    for key, value in mapping.items():
        name = prefix + str(key).replace("-", "_")
        if isinstance(value, dict):
            yield from flatten(value, f"{name}.")
        else:
            yield name, value


def known_keys(cls: type, prefix: str = "") -> set[str]:
    """Dotted names of all leaves of a nested dataclass."""
    types = typing.get_type_hints(cls)
    keys: set[str] = set()
    for field in dataclasses.fields(cls):
        kind = types[field.name]
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            keys |= known_keys(kind, f"{prefix}{field.name}.")
        else:
            keys.add(prefix + field.name)
    return keys


def plain(value: Any) -> Any:
    """A config as mappings, lists, strings and numbers that YAML and JSON hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def to_yaml(config: Any) -> str:
    """A config as YAML that `--config` reads back to an equal one."""
    return yaml.safe_dump(plain(config), sort_keys=False, default_flow_style=None, width=120)


@contextmanager
def user_errors(exit_code: int = 1) -> Iterator[None]:
    """Turn the errors that are meant for the user into `error: …` and an exit code; `VAETRAIN_TRACEBACK=1` shows where."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        print_traceback_if_asked()
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", []))  # which of several processes it was
        print(f"error: {error}{notes}", file=sys.stderr)
        raise SystemExit(exit_code) from error


def print_traceback_if_asked() -> None:
    """Where the exception that is being handled came from, with `VAETRAIN_TRACEBACK=1`."""
    if os.environ.get("VAETRAIN_TRACEBACK"):
        traceback.print_exc()
