"""Strict JSON: dataclasses and typed mappings read back with every type checked, a hash of their content, and what differs."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import reprlib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

MAY_LACK = "may lack"
"""Marks, in a field's metadata, what files written before there was such a field lack."""


def may_lack(default: Any) -> Any:
    """A dataclass's field that JSON has only where it is not `default`."""
    return dataclasses.field(default=default, metadata={MAY_LACK: True})


def to_json(content: Any) -> Any:
    """Plain values of a dataclass, without fields made with `may_lack` that have their default."""
    if dataclasses.is_dataclass(content) and not isinstance(content, type):
        kept = [
            field for field in dataclasses.fields(content)
            if not (field.metadata.get(MAY_LACK) and getattr(content, field.name) == field.default)
        ]  # fmt: skip
        return {field.name: to_json(getattr(content, field.name)) for field in kept}
    if isinstance(content, dict):
        return {key: to_json(value) for key, value in content.items()}
    if isinstance(content, tuple | list):
        return type(content)(to_json(value) for value in content)
    return content


def from_json(kind: Any, value: Any, where: str = "") -> Any:
    """Build a dataclass, or what its fields hold, from JSON; raises ValueError naming the field that does not fit.

    A TypedDict stays a dictionary, keys beyond its own included. A whole number will do for a float. A field made with `may_lack`
    has its default where it is absent.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if typing.is_typeddict(kind):
        return _typed_mapping(kind, value, where)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        kinds = typing.get_type_hints(kind)
        if not isinstance(value, dict):
            raise ValueError(f"{where or 'the file'} holds {_shorten(value)}, not a mapping")
        optional = {field.name for field in dataclasses.fields(kind) if field.metadata.get(MAY_LACK)}
        if absent := kinds.keys() - value.keys() - optional:
            raise ValueError(f"{where or 'the file'} lacks {', '.join(sorted(absent))}")
        given = [name for name in kinds if name in value]
        fields = {name: from_json(kinds[name], value[name], f"{where}.{name}".lstrip(".")) for name in given}
        try:
            return kind(**fields)
        except ValueError as error:
            raise ValueError(f"{where}: {error}" if where else str(error)) from error
    if origin is tuple and isinstance(value, list):
        return tuple(from_json(arguments[0], item, f"{where}[{position}]") for position, item in enumerate(value))
    if origin is list and isinstance(value, list):
        return [from_json(arguments[0], item, f"{where}[{position}]") for position, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {key: from_json(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin in (types.UnionType, typing.Union):
        wanted = type(None) if value is None else next(argument for argument in arguments if argument is not type(None))
        return from_json(wanted, value, where)
    if kind is float and type(value) is int:
        return float(value)
    if kind is Any or (origin is Literal and value in arguments) or (origin is None and type(value) is kind):
        return value
    raise ValueError(f"{where or 'the file'} is {_shorten(value)}, not {getattr(kind, '__name__', kind)}")


def _typed_mapping(kind: Any, value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where or 'the file'} is {_shorten(value)}, not a mapping")
    found = dict(value)
    for name, (wanted, may_lack) in _keys_of(kind).items():
        if name in value:
            found[name] = from_json(wanted, value[name], f"{where}.{name}".lstrip("."))
        elif not may_lack:
            raise ValueError(f"{where or 'the file'} lacks {name}")
    return found


@functools.cache
def _keys_of(kind: Any) -> dict[str, tuple[Any, bool]]:
    """By name the type of a TypedDict's value, and whether it may be absent."""
    hints = typing.get_type_hints(kind, include_extras=True)
    optional = {name: typing.get_origin(hint) is typing.NotRequired for name, hint in hints.items()}
    return {
        name: (typing.get_args(hint)[0] if optional[name] else hint, optional[name]) for name, hint in hints.items()
    }


def sha256_of_json(content: Any) -> str:
    """SHA-256 over the canonical JSON of plain values: sorted keys, no spaces."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def differences(found: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """In words, what of `asked` a manifest or request has otherwise; empty when it is the same."""
    differing = sorted(name for name in asked if found.get(name) != asked[name])
    return "; ".join(f"{name} was {found.get(name)}, now {asked[name]}" for name in differing)


_BRIEF = reprlib.Repr()
_BRIEF.maxlist = _BRIEF.maxdict = _BRIEF.maxtuple = 20
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = 100


def _shorten(value: Any) -> str:
    text = _BRIEF.repr(value)  # which does not write out all of something large
    return text if len(text) <= 60 else text[:60] + "…"
