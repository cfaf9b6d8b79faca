"""Damaged files end in a result or in an error that is meant for the user, whatever bytes are wrong."""

import io
import json
import shutil
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vaetrain.data.format.decode import decode_into
from vaetrain.data.format.index import pack_index
from vaetrain.data.format.manifest import Encoding, Manifest
from vaetrain.data.format.shard_set import ShardSet
from vaetrain.data.readers.batch import load_batch
from vaetrain.data.readers.selection import Selection
from vaetrain.data.sources.preprocess import UNREADABLE, Preprocessing, decode_picture
from vaetrain.files import sha256_of_file
from vaetrain.strict_json import sha256_of_json

quickly = settings(
    deadline=None, derandomize=True, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
edits = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from(["set", "cut", "add", "end"]), st.binary(max_size=8)),
    min_size=1,
    max_size=6,
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def mutated(content: bytes, changes: list[tuple[float, str, bytes]]) -> bytes:
    result = bytearray(content)
    for where, kind, new in changes:
        at = int(where**2 * len(result))  # more often near the start, where headers are
        match kind:
            case "set":
                result[at : at + len(new)] = new
            case "add":
                result[at:at] = new
            case "cut":
                del result[at : at + 1 + len(new)]
            case "end":
                del result[at + 1 :]
    return bytes(result)


def encoded(image_format: str, channels: int = 3) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert("RGB" if channels == 3 else "L").save(file, image_format)
    return file.getvalue()


@contextmanager
def fine_or_told(folder: Path) -> Iterator[None]:
    """Nothing is raised, or an error that names the folder."""
    told = ""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        told = str(error)
    assert not told or str(folder) in told


@pytest.fixture
def copy(tiny_shards: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_shards, tmp_path / "copy", dirs_exist_ok=True)
    return tmp_path / "copy"


@quickly
@given(changes=edits)
def test_damaged_manifests(copy: Path, tiny_shards: Path, changes: list[tuple[float, str, bytes]]) -> None:
    (copy / "manifest.json").write_bytes(mutated((tiny_shards / "manifest.json").read_bytes(), changes))
    with fine_or_told(copy):
        ShardSet.open(copy).verify()


@quickly
@given(data=st.data(), value=json_values)
def test_manifests_with_another_value_somewhere(
    copy: Path, tiny_shards: Path, data: st.DataObject, value: object
) -> None:
    content = json.loads((tiny_shards / "manifest.json").read_text())
    inner = content
    while True:
        key = data.draw(st.sampled_from(sorted(inner) if isinstance(inner, dict) else range(len(inner))))
        if not isinstance(inner[key], dict | list) or not inner[key] or data.draw(st.booleans()):
            break
        inner = inner[key]
    inner[key] = value
    (copy / "manifest.json").write_text(json.dumps(content))
    with fine_or_told(copy):
        ShardSet.open(copy).verify()


def vouch_for_index(folder: Path, tiny_shards: Path) -> ShardSet:
    """A manifest that vouches for whatever the index is, as a hostile one would."""
    manifest = Manifest.read(tiny_shards / "manifest.json")
    sha256 = sha256_of_file(folder / "index.safetensors")
    replace(manifest, index_sha256=sha256, fingerprint="").write(folder)
    return ShardSet.open(folder)


@quickly
@given(changes=edits)
def test_damaged_indices_that_a_manifest_vouches_for(
    copy: Path, tiny_shards: Path, changes: list[tuple[float, str, bytes]]
) -> None:
    (copy / "index.safetensors").write_bytes(mutated((tiny_shards / "index.safetensors").read_bytes(), changes))
    with fine_or_told(copy):
        selection = Selection.of(vouch_for_index(copy, tiny_shards), "train")
        load_batch(selection, np.arange(selection.num_images))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_bytes", 0), ("num_bytes", -(2**62)), ("offset", 2**63 - 1), ("offset", -5),
        ("label", -1), ("label", 2**45), ("label", 2**63 - 1), ("shard", -1), ("shard", 2 * 10**7), ("shard", 2**31 - 1),
    ],
)  # fmt: skip
def test_indices_that_lead_outside(copy: Path, tiny_shards: Path, field: str, value: int) -> None:
    shard_set = ShardSet.open(tiny_shards)
    indices = {name: shard_set.index(name) for name in ("train", "val")}
    column = getattr(indices["train"], field).copy()
    column[3] = value
    indices["train"] = replace(indices["train"], **{field: column})
    (copy / "index.safetensors").write_bytes(pack_index(indices))
    hostile = vouch_for_index(copy, tiny_shards)
    tracemalloc.start()  # which numpy's arrays are counted by
    with pytest.raises(ValueError, match="is no valid index"):
        hostile.index("train")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("image_size", 10**7, "image_size is 10000000; it must be 1 to 8,192 pixels"),
        ("num_bytes", 10**19, "cannot hold"),
        ("num_bytes", 1024, "cannot hold"),
    ],
)
def test_manifests_that_claim_what_cannot_be(copy: Path, field: str, value: int, told: str) -> None:
    content = json.loads((copy / "manifest.json").read_text())
    (content if field == "image_size" else content["splits"]["train"]["shards"][1])[field] = value
    content["fingerprint"] = sha256_of_json({k: v for k, v in content.items() if k not in ("tool", "fingerprint")})
    (copy / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"is no valid manifest: .*{told}"):
        ShardSet.open(copy)


def test_manifests_nested_without_end(copy: Path) -> None:
    (copy / "manifest.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match="is no valid manifest"):
        ShardSet.open(copy)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@quickly
@given(changes=edits, channels=st.sampled_from([1, 3]))
def test_damaged_images_in_shards(image_format: str, channels: int, changes: list[tuple[float, str, bytes]]) -> None:
    content = bytearray(mutated(encoded(image_format), changes))
    with suppress(ValueError):
        decode_into(content, np.empty((16, 16, channels), dtype=np.uint8))


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM"])
@quickly
@given(changes=edits)
def test_damaged_originals(image_format: str, changes: list[tuple[float, str, bytes]]) -> None:
    try:
        image = Preprocessing(8, 3, Encoding("png", None, None)).apply(
            decode_picture(mutated(encoded(image_format), changes))
        )
    except UNREADABLE:
        return
    assert decode_picture(image).size == (8, 8)


def test_pngs_that_claim_to_be_huge_take_no_memory() -> None:
    png = bytearray(encoded("PNG"))
    png[16:24] = b"\x00\x00\xff\xff" * 2
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4)
    with pytest.raises(ValueError, match="not a readable image: Image size"):
        decode_into(png, np.empty((8, 8, 3), dtype=np.uint8))
