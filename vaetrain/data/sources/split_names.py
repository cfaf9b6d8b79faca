"""Which split a folder's or a file's name says: `Training`, `seg_test`, `val2017`, `partial-train`, `PublicTest`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

# Those of Hugging Face datasets (train training / validation valid dev val / test testing eval evaluation), and more.
SPLIT_WORDS = {
    "train": "train", "training": "train", "trn": "train", "trainval": "train", "trainvalidation": "train",
    "val": "val", "valid": "val", "validation": "val", "validate": "val",
    "dev": "val", "devel": "val", "development": "val",
    "test": "test", "testing": "test", "tst": "test", "eval": "test", "evaluation": "test",
    "evaluating": "test", "holdout": "test", "heldout": "test",
}  # fmt: skip
SHORT_WORDS = {"tr": "train", "ts": "test", "va": "val"}  # imagesTr beside imagesTs; alone, tr is Turkish
# Words that a class may be called by: valid beside invalid.
DOUBTFUL_ALONE = frozenset(["valid", "dev", "devel", "development"])
# What names of splits carry besides, and what no class is called.
FILLERS = frozenset(
    [
        "set", "sets", "data", "dataset", "datasets", "image", "images", "img", "imgs", "pic", "pics",
        "picture", "pictures", "photo", "photos", "jpeg", "jpg", "png", "split", "splits", "folder", "dir",
        "partial", "part", "full", "of", "shard", "file", "files", "sample", "samples", "parquet", "tar",
    ]
)  # fmt: skip
# Folders beside a split that are of none: to be predicted, searched in, or left for later.
UNMAPPED_WORDS = frozenset(
    [
        "unlabeled", "unlabelled", "unlabel", "pred", "predict", "prediction", "query", "gallery", "extra",
        "submission", "challenge", "unseen", "probe", "hold", "held",
    ]
)  # fmt: skip
GLUED = re.compile(rf"({'|'.join(SPLIT_WORDS)})(?:{'|'.join(FILLERS)})")
LETTERS = re.compile(r"[^\W\d_]+")
CAPITALISED = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^A-Za-z]+")


class SaidSplit(NamedTuple):
    """What a name says of its split."""

    split: str
    """train, val or test."""

    rest: tuple[str, ...]
    """Its other words but for FILLERS: `seg` in seg_train, `A` in trainA. Without any, nothing but a split is called so."""


def words(name: str) -> list[str]:
    """A name's words without numbers: split at signs, digits and capitals (PublicTest)."""
    found = []
    for run in LETTERS.findall(name):
        is_one = run.lower() in SPLIT_WORDS or GLUED.fullmatch(run.lower())
        found += [run] if is_one else CAPITALISED.findall(run)
    return found


def said_split(name: str) -> SaidSplit | None:
    """The split that a name says; None for one that says none, or both a split to train on and one to test on."""
    said, rest = set(), []
    found = words(re.sub(r"(?i)(hold|held)[\W_]out", r"\1out", name))
    known = SPLIT_WORDS | (SHORT_WORDS if any(word.lower() in FILLERS for word in found) else {})
    for word in found:
        glued = GLUED.fullmatch(word.lower())
        if split := known.get(glued[1] if glued else word.lower()):
            said.add(split)
        elif word.lower() not in FILLERS:
            rest.append(word)
    if said == {"train", "val"}:  # train_val, as PASCAL VOC has it beside test
        said = {"train"}
    return SaidSplit(said.pop(), tuple(rest)) if len(said) == 1 else None


def held_out(names: Iterable[str]) -> list[str]:
    """The names, sorted, that say nothing but a split which is not for training, though none to train on lies beside them."""
    said = ((name, said_split(name)) for name in names)
    return sorted(
        name for name, split in said
        if split and split.split != "train" and not split.rest
        and not {word.lower() for word in words(name)} & DOUBTFUL_ALONE
    )  # fmt: skip


def are_splits(names: Iterable[str]) -> bool:
    """Whether some of the names of folders beside each other are those of splits, to train on and to validate on.

    Either all say a split, or one to train on and one to validate on say nothing else (but `train` alone, which is a vehicle beside
    test_tube) or the same else, as seg_train and seg_test.
    """
    said = {name: said_split(name) for name in names}
    trains = {name: split.rest for name, split in said.items() if split and split.split == "train"}
    tests = [split.rest for split in said.values() if split and split.split != "train"]
    if not trains or not tests:
        return False
    return all(said.values()) or any(
        rest == test or not test or (not rest and name.lower() != "train")
        for name, rest in trains.items()
        for test in tests
    )


def is_unmapped(name: str) -> bool:
    """Whether a name is that of a part which is neither for training nor for validation."""
    return not UNMAPPED_WORDS.isdisjoint(word.lower() for word in words(name))


def merged(splits: set[str]) -> dict[str, str]:
    """What each split becomes in a shard set: `test` is validation where nothing else is."""
    return {split: "val" if split == "test" and "val" not in splits else split for split in splits}


def splits_of_files(files: Sequence[str], source: Path) -> dict[str, str | None]:
    """The split of each file by its name or a folder's, of files that are pieces of a set (Parquet, tars); None: of none.

    Splits are what has something to train on and something to validate on. Raises ValueError where it is not clear which file is
    of which.
    """
    paths = {file: PurePosixPath(file) for file in files}
    said: dict[str, str] = {}
    for file, path in paths.items():
        apart = [
            part
            for depth, part in enumerate(path.parts[:-1])
            if len({p.parts[depth : depth + 1] for p in paths.values()}) > 1
        ]
        found = {name.split for part in (*apart, path.name) if (name := said_split(part.split(".parquet")[0]))}
        if len(found) > 1:
            raise ValueError(f"{source}: {file} says that it is of {' and of '.join(sorted(found))}; rename it")
        said |= dict.fromkeys([file], *found) if found else {}
    kinds = set(said.values())
    unsaid = [file for file in files if file not in said]
    if kinds <= {"train"} or (len(kinds) == 1 and not unsaid):
        return dict.fromkeys(files)
    if unsaid:
        raise ValueError(
            f"{source} has files of splits ({', '.join(sorted(kinds))}) and {unsaid[0]}, which is of none; move it, name the "
            "file to read, or --splits none reads all as one"
        )
    if "train" not in kinds:
        raise ValueError(
            f"{source} has files of {' and '.join(sorted(kinds))} and none to train on; name the one to read"
        )
    return {file: merged(kinds)[split] for file, split in said.items()}
