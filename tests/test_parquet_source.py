import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from test_make_shards import content, decoded, make, records
from test_make_share import share
from vaetrain.data.sources.open_source import open_source
from vaetrain.data.sources.preprocess import UNREADABLE

pa = pytest.importorskip("pyarrow", reason="Parquet is optional: pip install 'vaetrain[parquet]'")
pq = pytest.importorskip("pyarrow.parquet")

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(number: int, side: int = 16) -> bytes:
    encoded = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(encoded, "PNG")
    return encoded.getvalue()


def write(file: Path, columns: dict[str, pa.Array], features: dict[str, Any] | None = None, **options: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if features else None
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), file, **options)
    return file


def structs(numbers: range, names: bool = True) -> pa.Array:
    return pa.array([{"bytes": png(n), "path": f"{n}.png" if names else None} for n in numbers], STRUCT)


FEATURES = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["dog", "cat", "fox"]}}


def as_datasets_writes(file: Path, numbers: range, **options: Any) -> Path:
    """As `Dataset.to_parquet` and the hub do it."""
    return write(
        file,
        {"image": structs(numbers), "label": pa.array([n % 3 for n in numbers])},
        FEATURES,
        row_group_size=7,
        **options,
    )


def test_a_file_of_datasets(tmp_path: Path) -> None:
    file = as_datasets_writes(tmp_path / "pets.parquet", range(30))
    manifest = make(file, tmp_path / "out", format="png", val_count=5)
    assert manifest.classes == ("dog", "cat", "fox")
    assert {name: split.num_images for name, split in manifest.splits.items()} == {"train": 25, "val": 5}
    for record, picture in zip(records(tmp_path / "out", "train"), decoded(tmp_path / "out"), strict=True):
        name, row, original = record["source"].split(":")
        assert (name, original) == ("pets.parquet", f"{row}.png")
        assert record["class"] == ("dog", "cat", "fox")[int(row) % 3]
        assert np.array_equal(np.asarray(picture), np.asarray(Image.open(io.BytesIO(png(int(row))))))


def test_a_folder_gives_the_same_images_for_any_workers_and_tasks(tmp_path: Path) -> None:
    for number in range(3):
        as_datasets_writes(tmp_path / "data" / f"part-{number}.parquet", range(10 * number, 10 * number + 10))
    (tmp_path / "data" / "README.md").write_text("# pets")
    manifest = make(tmp_path / "data", tmp_path / "out", val_count=9)
    assert sum(split.num_images for split in manifest.splits.values()) == 30
    sources = {record["source"] for split in ("train", "val") for record in records(tmp_path / "out", split)}
    assert "part-2.parquet:9:29.png" in sources
    make(tmp_path / "data", tmp_path / "two", val_count=9, workers=2)
    for task in (2, 1, 0):
        share(tmp_path / "data", tmp_path / "shared", task, 3)
    assert content(tmp_path / "two") == content(tmp_path / "shared") == content(tmp_path / "out")


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (
            ["data/train-00000-of-00002", "data/train-00001-of-00002", "data/test-00000-of-00001"],
            ["val", "train", "train"],
        ),
        (["train-0", "validation-0", "test-0"], ["test", "train", "val"]),
        (["train/0000", "test/0000"], ["val", "train"]),
        (["default/train/0000", "default/test/0000"], ["val", "train"]),
        (["partial-train/0000", "test/0000"], ["train", "val"]),
        (["training-00000", "test-00000"], ["val", "train"]),
        (["pets_train", "pets_test"], ["val", "train"]),
        (["train-0", "train-1"], [None, None]),
        (["test-0", "testing-1"], [None, None]),
    ],
)
def test_splits_are_in_the_names_of_files(tmp_path: Path, names: list[str], splits: list[str | None]) -> None:
    for number, name in enumerate(names):
        as_datasets_writes(tmp_path / "pets" / f"{name}.parquet", range(3 * number, 3 * number + 3))
    source = open_source(str(tmp_path / "pets"))
    assert [item.split for item in source.listing().items[::3]] == splits


def test_files_beside_splits_are_refused(tmp_path: Path) -> None:
    for name in ("train-0", "test-0", "more"):
        as_datasets_writes(tmp_path / f"{name}.parquet", range(1))
    with pytest.raises(ValueError, match=r"files of splits \(test, train\) and more\.parquet, which is of none"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["trainable", "test-0"], r"files of splits \(test\) and trainable\.parquet, which is of none"),
        (["validation-0", "test-0"], "test and val and none to train on"),
        (["a/train-0", "a/test-0", "b/train-0", "b/test-0"], r"several configurations \(a, b\), each with splits"),
    ],
)
def test_files_whose_splits_are_not_clear_are_refused(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        as_datasets_writes(tmp_path / f"{name}.parquet", range(3))
    with pytest.raises(ValueError, match=message):
        open_source(str(tmp_path))


def test_other_types_of_bytes_and_text(tmp_path: Path) -> None:
    images, labels = [png(n) for n in range(4)], ["cat", "dog"] * 2
    views = {"image": pa.array(images, pa.binary_view()), "label": pa.array(labels, pa.string_view())}
    manifest = make(write(tmp_path / "views", views), tmp_path / "out", format="png")  # a Parquet file by its bytes
    assert manifest.splits["train"].class_counts == {"cat": 2, "dog": 2}
    expected = {np.asarray(Image.open(io.BytesIO(image))).tobytes() for image in images}
    assert {np.asarray(picture).tobytes() for picture in decoded(tmp_path / "out")} == expected


def test_columns_that_may_be_of_classes_are_asked_about(tmp_path: Path) -> None:
    columns = {"img": structs(range(2)), "fine_label": pa.array([0, 1]), "coarse_label": pa.array([1, 0])}
    file = write(tmp_path / "two.parquet", columns)
    with pytest.raises(
        ValueError, match=r"has fine_label, coarse_label, which may be of classes; name one with --label-column"
    ):
        open_source(str(file))
    assert classes_of(file, label_column="fine_label") == (("0", "1"), ["0", "1"])
    assert classes_of(file, label_column="none")[0] == ("two",)


def classes_of(file: Path, **columns: str) -> tuple[tuple[str, ...], list[str]]:
    listing = open_source(str(file), **columns).listing()
    return listing.classes, [listing.classes[item.label] for item in listing.items]


def test_columns_of_other_writers(tmp_path: Path) -> None:
    images = pa.array([png(n) for n in range(3)], pa.large_binary())
    plain = write(tmp_path / "plain.parquet", {"jpeg": images, "class": pa.array(["b", "a", "b"])})
    assert classes_of(plain) == (("a", "b"), ["b", "a", "b"])
    numbers = write(
        tmp_path / "numbers.parquet", {"pic": structs(range(3), names=False), "labels": pa.array([10, 9, 10])}
    )
    assert classes_of(numbers) == (("9", "10"), ["10", "9", "10"])
    assert [item.source for item in open_source(str(numbers)).listing().items][2] == "numbers.parquet:2"
    assert classes_of(numbers, label_column="none") == (("numbers",), ["numbers"] * 3)
    no_labels = write(tmp_path / "photos.parquet", {"image": structs(range(2))})
    assert classes_of(no_labels) == (("photos",), ["photos"] * 2)
    words = write(
        tmp_path / "words.parquet", {"x": structs(range(2)), "kind": pa.array(["u", "v"]).dictionary_encode()}
    )
    assert classes_of(words, label_column="kind") == (("u", "v"), ["u", "v"])


def test_several_columns_must_be_chosen_from(tmp_path: Path) -> None:
    two = write(
        tmp_path / "two.parquet",
        {"a": structs(range(2)), "b": structs(range(2, 4)), "fine": pa.array([0, 1]), "coarse": pa.array([0, 0])},
        {name: {"_type": "ClassLabel", "names": ["x", "y"]} for name in ("fine", "coarse")},
    )
    with pytest.raises(
        ValueError, match=r"2 columns that may be images; name one .*--image-column: a \(struct<.*coarse"
    ):
        open_source(str(two))
    with pytest.raises(ValueError, match=r"several columns of labels \(fine, coarse\); name one with --label-column"):
        open_source(str(two), image_column="b")
    manifest = make(two, tmp_path / "out", image_column="b", label_column="fine", format="png")
    assert manifest.splits["train"].class_counts == {"x": 1, "y": 1}
    expected = {np.asarray(Image.open(io.BytesIO(png(n)))).tobytes() for n in (2, 3)}
    assert {np.asarray(picture).tobytes() for picture in decoded(tmp_path / "out")} == expected
    with pytest.raises(ValueError, match="no column c of images"):
        open_source(str(two), image_column="c")
    with pytest.raises(ValueError, match="no column c; name one with --label-column"):
        open_source(str(two), image_column="a", label_column="c")
    with pytest.raises(ValueError, match="column b is of struct"):
        open_source(str(two), image_column="a", label_column="b")
    text = write(tmp_path / "text.parquet", {"text": pa.array(["no image"])})
    with pytest.raises(ValueError, match=r"no columns that may be images.*text \(string\)"):
        open_source(str(text))
    with pytest.raises(ValueError, match=r"are for Parquet files, and .* is none"):
        open_source(__file__, label_column="c")


@pytest.mark.parametrize("label", [None, 3, -1])
def test_labels_that_are_no_class_are_refused(tmp_path: Path, label: int | None) -> None:
    file = write(tmp_path / "x.parquet", {"image": structs(range(2)), "label": pa.array([0, label])}, FEATURES)
    with pytest.raises(
        ValueError, match=rf"1 row\(s\) whose label is no class, such as {label}; .*--label-column none"
    ):
        open_source(str(file)).listing()


def test_classes_of_one_name_are_refused_before_the_work(tmp_path: Path) -> None:
    features = {"label": {"_type": "ClassLabel", "names": ["crane", "crane"]}}
    file = write(tmp_path / "x.parquet", {"image": structs(range(2)), "label": pa.array([0, 1])}, features)
    with pytest.raises(ValueError, match="classes of the same name: crane, crane"):
        open_source(str(file)).listing()


def test_rows_without_an_image_are_rejected_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(0))
    rows = [
        {"bytes": png(1), "path": None},
        {"bytes": None, "path": str(tmp_path / "secret.png")},  # must not be followed
        None,
        {"bytes": b"", "path": None},
        {"bytes": b"no picture", "path": "b.png"},
    ]
    file = write(tmp_path / "x.parquet", {"image": pa.array(rows, STRUCT)})
    source = open_source(str(file))
    items = source.listing().items
    pictures = source.staged(tmp_path / "staged.tar", items)
    reasons = []
    for item in items:
        try:
            pictures.open(item)
        except UNREADABLE as error:
            reasons.append(str(error))
    assert reasons == ["its row holds no bytes (files that a row only names are not followed)"] * 3 + [
        "it is none of JPEG, PNG, WEBP, BMP, GIF, TIFF, PPM"
    ]


def test_damaged_and_unlike_files_are_refused(tmp_path: Path) -> None:
    file = as_datasets_writes(tmp_path / "pets" / "a.parquet", range(20), compression="none")
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match=r"a\.parquet is damaged or no Parquet file"):
        open_source(str(tmp_path / "pets"))
    file.write_bytes(whole[:40] + bytes(2000) + whole[2040:])
    with pytest.raises(ValueError, match=r"a\.parquet is damaged|cannot be read"):
        make(tmp_path / "pets", tmp_path / "out")
    file.write_bytes(whole)
    write(tmp_path / "pets" / "b.parquet", {"image": pa.array([png(0)]), "label": pa.array([0])}, FEATURES)
    with pytest.raises(ValueError, match=r"b\.parquet has no column image \(struct"):
        open_source(str(tmp_path / "pets"))
    write(tmp_path / "empty.parquet", {"image": structs(range(0))})
    with pytest.raises(ValueError, match=r"empty\.parquet has no rows"):
        open_source(str(tmp_path / "empty.parquet")).listing()


def test_other_rows_are_another_plan(tmp_path: Path) -> None:
    write(tmp_path / "x.parquet", {"image": structs(range(10), names=False)})
    make(tmp_path / "x.parquet", tmp_path / "out")
    write(tmp_path / "x.parquet", {"image": structs(range(10, 20), names=False)})
    with pytest.raises(FileExistsError, match="from other originals"):
        make(tmp_path / "x.parquet", tmp_path / "out")


def test_little_of_a_large_row_group_is_in_memory(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    num_rows, num_bytes = 400, 1 << 16
    noise = [rng.bytes(num_bytes) for _ in range(num_rows)]
    options = {"row_group_size": num_rows, "data_page_size": 1 << 20, "write_batch_size": 4, "use_dictionary": False}
    file = write(tmp_path / "x.parquet", {"image": pa.array(noise, pa.binary())}, **options)
    assert pq.ParquetFile(file).num_row_groups == 1
    source = open_source(str(file))
    items = source.listing().items
    pool = pa.default_memory_pool()
    before, peak = pool.bytes_allocated(), 0
    for row, found in enumerate(source._contents({int(item.member) for item in items})):
        assert bytes(found) == noise[row]
        peak = max(peak, pool.bytes_allocated() - before)
    assert row == num_rows - 1
    assert peak < num_rows * num_bytes / 4
    source.staged(tmp_path / "staged.tar", items[::-1][:3])
    assert (tmp_path / "staged.tar").stat().st_size == 3 * num_bytes  # a task stages its own images


def test_groups_of_duplicates(tmp_path: Path) -> None:
    numbers = [n % 10 for n in range(30)]
    file = write(tmp_path / "x.parquet", {"image": pa.array([png(n) for n in numbers])})
    make(file, tmp_path / "out", val_count=6, group_duplicates=True)
    found = [json.loads(line) for line in (tmp_path / "out" / "duplicates.jsonl").read_text().splitlines()]
    assert sorted(len(group["images"]) for group in found) == [3] * 10
    assert all(group["kind"] == "exact" and len(group["splits"]) == 1 for group in found)


def test_without_pyarrow_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_datasets_writes(tmp_path / "x.parquet", range(1))
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"install it: pip install 'vaetrain\[parquet\]'"):
        open_source(str(tmp_path / "x.parquet"))


def test_a_folder_of_images_with_a_table_in_it_far_below_is_a_folder_of_images(tmp_path: Path) -> None:
    for name in ("cat/0.png", "dog/1.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(png(0))
    as_datasets_writes(tmp_path / "cat" / "more" / "x.parquet", range(1))
    assert open_source(str(tmp_path)).listing().classes == ("cat", "dog")
    shutil.rmtree(tmp_path / "cat" / "more")
