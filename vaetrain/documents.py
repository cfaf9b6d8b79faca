"""JSON and YAML that somebody else may have written or damaged, read within bounds and into checked types.

Whatever a file holds ends in values of the types that were asked for or in a ValueError of one sentence. What is bounded: bytes,
depth of nesting, digits of whole numbers, aliases of YAML and what they expand to. Numbers are finite. Without importing torch.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from vaetrain.files import read_bytes
from vaetrain.strict_json import from_json

MAX_JSON_BYTES = 64 << 20
MAX_LINE_BYTES = 1 << 20
"""Of one record in a file of JSON lines."""
MAX_LINES_BYTES = 1 << 30
"""Of such a file."""
MAX_YAML_BYTES = 256 << 10
"""PyYAML reads some 200 KB a second."""
MAX_DEPTH = 50
MAX_DIGITS = 20
"""Of a whole number: 64 bits, as seeds have them."""
MAX_YAML_NODES = 100_000
"""Values and keys, those behind aliases counted each time they are named."""


def read_json(path: Path, kind: Any = dict, *, remedy: str, nulls: bool = False) -> Any:
    """A JSON file as `kind` (see strict_json.py), by default any mapping; `nulls` reads numbers that are not finite as null.

    Raises FileNotFoundError, and ValueError, naming the file, what is wrong with it, and the `remedy`.
    """
    content = read_bytes(path, MAX_JSON_BYTES, remedy)
    try:
        return from_json(kind, parse_json(content, nulls=nulls))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; {remedy}") from error


def parse_json(content: bytes | str, *, nulls: bool = False) -> Any:
    """Plain values from JSON, which may be hostile; raises ValueError."""
    try:
        text = content.decode("utf-8") if isinstance(content, bytes) else content
        number = partial(_finite, nulls=nulls)
        value = json.loads(text, parse_int=_whole, parse_float=number, parse_constant=number)
    except RecursionError as error:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep") from error
    _check_depth(value)
    return value


def json_lines(path: Path, *, remedy: str) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """The records of a file of JSON lines with their numbers, counted from 1; None for a line that holds none.

    A last line without an end, cut short by a kill, is left out. Raises ValueError for a file that is too large.
    """
    lines = read_bytes(path, MAX_LINES_BYTES, remedy).split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):
        if not line.strip():
            continue
        try:
            record = parse_json(line, nulls=True) if len(line) <= MAX_LINE_BYTES else None
        except ValueError:
            record = None
        yield number, record if isinstance(record, dict) else None


def read_yaml(path: Path, *, remedy: str) -> Any:
    """The plain values of a YAML file; None for an empty one.

    Raises FileNotFoundError, and ValueError, naming the file, what is wrong with it, and the `remedy`.
    """
    content = read_bytes(path, MAX_YAML_BYTES, remedy)
    try:
        return parse_yaml(content.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid YAML: {error}; {remedy}") from error


def read_yaml_as_written(path: Path, *, remedy: str) -> Any:
    """The same with a `Scalar` in the place of each value that is no mapping or list."""
    content = read_bytes(path, MAX_YAML_BYTES, remedy)
    try:
        return parse_yaml(content.decode("utf-8"), _ScalarLoader)
    except ValueError as error:
        raise ValueError(f"{path} is not valid YAML: {error}; {remedy}") from error


def parse_yaml(text: str, kind: type[_BoundedLoader] | None = None) -> Any:
    """Mappings with text as keys, lists, text, numbers, booleans and null from YAML, which may be hostile; raises ValueError.

    A date stays the text that it is.
    """
    return deepcopy(_parsed(text, kind or _BoundedLoader))  # type: ignore[arg-type]  # a class is hashable, mypy #11470


@functools.lru_cache(maxsize=16)
def _parsed(text: str, kind: type[_BoundedLoader]) -> Any:
    """The values of a text; kept, since a run's config is read several times by one command, and a page of it takes 40 ms."""
    try:
        loader = kind(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except (yaml.YAMLError, RecursionError, OverflowError, TypeError, LookupError) as error:
        raise ValueError(shorten(str(error), 500)) from error


def shorten(text: str, length: int = 60) -> str:
    """The beginning of a text, for messages."""
    return text if len(text) <= length else text[:length] + "…"


class _BoundedLoader(yaml.SafeLoader):
    """PyYAML's loader of plain values, which refuses what would not end: depth, aliases of aliases, numbers without end."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._num_nodes = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Count what this node stands for, and refuse too much of it before anything is built."""
        is_alias = self.check_event(yaml.AliasEvent)
        if self._depth >= MAX_DEPTH:
            raise yaml.YAMLError(f"it is nested more than {MAX_DEPTH} deep")
        before, self._depth = self._num_nodes, self._depth + 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if is_alias:
            if id(node) not in self._sizes:
                raise yaml.YAMLError("an alias names what it is a part of")
            self._num_nodes += self._sizes[id(node)]
        else:
            self._num_nodes += 1
            self._sizes[id(node)] = self._num_nodes - before
        if self._num_nodes > MAX_YAML_NODES:
            raise yaml.YAMLError(f"it has more than {MAX_YAML_NODES:,} values, those behind aliases counted")
        return node

    def construct_plain(self, node: yaml.Node) -> Any:
        """A number within bounds, or its text."""
        if not isinstance(node, yaml.ScalarNode):
            raise _refusal(node, "something is marked as a number that is none")
        text = str(self.construct_scalar(node))
        if node.tag.endswith(":int"):
            if len(text) > MAX_DIGITS + 1:
                raise _refusal(node, f"{shorten(text)} is a whole number of more than {MAX_DIGITS} digits")
            return self.construct_yaml_int(node)
        if node.tag.endswith(":float"):
            number = float(self.construct_yaml_float(node))
            if not math.isfinite(number):
                raise _refusal(node, f"{shorten(text)} is no finite number; write null where a limit is to be left out")
            return number
        return text  # a date

    def construct_text_mapping(self, node: yaml.Node) -> dict[str, Any]:
        """A mapping whose keys are text, whatever they look like."""
        if not isinstance(node, yaml.MappingNode):
            raise _refusal(node, "something is marked as a mapping that is none")
        self.flatten_mapping(node)
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _refusal(key_node, "a key is a list or a mapping")
            found[str(key_node.value)] = self.construct_object(value_node, deep=True)
        return found

    def construct_list(self, node: yaml.Node) -> list[Any]:
        """A list."""
        if not isinstance(node, yaml.SequenceNode):
            raise _refusal(node, "something is marked as a list that is none")
        return [self.construct_object(item, deep=True) for item in node.value]

    def refuse(self, node: yaml.Node) -> Any:
        """A tag that names no plain value, such as !!python/object."""
        raise _refusal(node, f"{shorten(str(node.tag))} is no plain value")


def _refusal(node: yaml.Node, what: str) -> yaml.YAMLError:
    return yaml.YAMLError(f"line {node.start_mark.line + 1:,}: {what}")


class Scalar(NamedTuple):
    """A scalar of a YAML file."""

    value: Any
    """As YAML 1.1 has it: no is False, 007 is 7."""
    text: str
    """As it is written."""
    is_quoted: bool = False

    def __str__(self) -> str:
        """As it is written, for keys."""
        return self.text


class _ScalarLoader(_BoundedLoader):
    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        value = super().construct_object(node, deep)
        return Scalar(value, node.value, node.style is not None) if isinstance(node, yaml.ScalarNode) else value


for _tag in (f"tag:yaml.org,2002:{_name}" for _name in ("int", "float", "timestamp")):
    _BoundedLoader.add_constructor(_tag, _BoundedLoader.construct_plain)
_BoundedLoader.add_constructor("tag:yaml.org,2002:map", _BoundedLoader.construct_text_mapping)
_BoundedLoader.add_constructor("tag:yaml.org,2002:seq", _BoundedLoader.construct_list)
for _name in ("binary", "omap", "pairs", "set"):
    _BoundedLoader.add_constructor(f"tag:yaml.org,2002:{_name}", _BoundedLoader.refuse)
_BoundedLoader.add_constructor(None, _BoundedLoader.refuse)


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS + 1:
        raise ValueError(f"{shorten(text)} is a whole number of more than {MAX_DIGITS} digits")
    return int(text)


def _finite(text: str, *, nulls: bool) -> float | None:
    number = float(text)
    if math.isfinite(number):
        return number
    if nulls:
        return None
    raise ValueError(f"{shorten(text)} is no finite number")


def _check_depth(value: Any) -> None:
    """Without recursion, level by level."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            inner
            for item in level
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
