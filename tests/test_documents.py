"""JSON and YAML of strangers: checked values, or a sentence, within bounds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NotRequired, TypedDict

import pytest

from vaetrain.documents import MAX_YAML_BYTES, json_lines, parse_json, parse_yaml, read_json, read_yaml

LISTS = (
    "[&i [&h [&g [&f [&e [&d [&c [&b [&a [x,x,x,x,x],*a,*a,*a],*b,*b,*b],*c,*c,*c],*d,*d],*e,*e],*f,*f],*g,*g],*h,*h]]"
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{','.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 9))


class Record(TypedDict):
    step: int
    name: NotRequired[str | None]
    inner: list[dict[str, int]]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (LISTS.replace("x,x", "x," * 4000 + "x"), "more than 100,000 values"), (MERGES, "more than 100,000 values"),
        ("&a [*a]", "an alias names what it is a part of"), ("[" * 3000, "nested more than 50 deep"),
        ("a: " + "9" * 400, "a whole number of more than 20 digits"), ("a: 1" + ":1" * 20_000, "more than 20 digits"),
        ("a: 1\nb: .inf", r"line 2: \.inf is no finite number"), ("a: !!python/object/apply:os.system [id]", "is no plain value"),
        ("a: !!set {x, y}", "is no plain value"), ("{[a]: 1}", "a key is a list or a mapping"), ("a: !!bool x", "x"),
        ("a: !!seq x", "a list that is none"), ("a: \0", "special characters"), ("a: 1\n---\nb: 2", "single document"),
    ],
)  # fmt: skip
def test_yaml_without_bounds_is_refused(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        parse_yaml(text)


def test_plain_yaml_is_read_as_ever() -> None:
    text = "a: [1, 2.5, null, yes, 0x10]\nb: &b {c: 3e-4, d: 1.0e-3}\ne: *b\nf: {<<: *b, c: 1}\n5: 2024-01-01\n"
    assert parse_yaml(text) == {
        "a": [1, 2.5, None, True, 16], "b": {"c": "3e-4", "d": 0.001}, "e": {"c": "3e-4", "d": 0.001}, "f": {"c": 1, "d": 0.001},
        "5": "2024-01-01",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[" * 100_000, "nested more than 50 deep"), ('{"a":' * 60 + "1" + "}" * 60, "nested more than 50 deep"),
        ("9" * 400, "more than 20 digits"), ("NaN", "no finite number"), ("[1e999]", "no finite number"), (b"\xff", "utf-8"),
        (b"\0" * 300, "Expecting value"), ("", "Expecting value"),
    ],
)  # fmt: skip
def test_json_without_bounds_is_refused(text: str | bytes, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        parse_json(text)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[]", r"the file is \[\], not a mapping"), ("{}", "lacks"), ('{"step": true, "inner": []}', "step is True, not int"),
        ('{"step": 1, "inner": [{"a": null}]}', r"inner\[0\]\.a is None, not int"),
        ('{"step": 1, "inner": [], "name": 3}', "name is 3, not str"), ('{"step": 1, "inner": [', "Expecting"),
    ],
)  # fmt: skip
def test_another_type_is_named_with_file_and_remedy(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "some.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=rf"some\.json is damaged: .*{told}.*; do this"):
        read_json(file, Record, remedy="do this")


def test_a_typed_mapping_keeps_what_else_there_is(tmp_path: Path) -> None:
    file = tmp_path / "some.json"
    file.write_text('{"step": 1, "inner": [{"a": 2}], "more": [NaN]}')
    assert read_json(file, Record, remedy="", nulls=True) == {"step": 1, "inner": [{"a": 2}], "more": [None]}


def test_only_plain_files_of_bounded_size_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is no plain file; do this"):
        read_json(tmp_path / "pipe", remedy="do this")
    (tmp_path / "large").write_bytes(b" " * (MAX_YAML_BYTES + 1))
    with pytest.raises(ValueError, match=r"large has 262,145 bytes, of 262,144 at most; do this"):
        read_yaml(tmp_path / "large", remedy="do this")
    with pytest.raises(FileNotFoundError, match="absent does not exist; do this"):
        read_json(tmp_path / "absent", remedy="do this")


def test_lines_that_are_no_records_are_told_apart(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    file.write_bytes(b'{"a": 1}\n' + b"\0" * 5000 + b'\n[]\n\n{"a": NaN}\n{"a": 2}' + b"\n" + b'{"cut')
    found = list(json_lines(file, remedy=""))
    assert found == [(1, {"a": 1}), (2, None), (3, None), (5, {"a": None}), (6, {"a": 2})]
