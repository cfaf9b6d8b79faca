"""The built-in dataset: reproducible, the same picture at every size, and three classes that can be told apart."""

import hashlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vaetrain.data.sources.faces.anatomy import Face
from vaetrain.data.sources.faces.faces import CLASSES, draw_face, sample_face
from vaetrain.data.sources.faces.portrait import render
from vaetrain.strict_json import from_json

REPOSITORY = Path(__file__).parents[1]


def digest(seed: int, indices: range) -> str:
    return hashlib.sha256(b"".join(draw_face(seed, index, 24)[0].tobytes() for index in indices)).hexdigest()


def test_a_face_depends_on_seed_and_index_alone() -> None:
    image, face = draw_face(3, 17, 64)
    draw_face(3, 16, 32)
    again, same = draw_face(3, 17, 64)
    assert same == face
    np.testing.assert_array_equal(again, image)


def test_another_process_draws_the_same_faces() -> None:
    # Another hash seed and no other face drawn before: the pictures must not know.
    code = (
        "import hashlib\nfrom vaetrain.data.sources.faces.faces import draw_face\n"
        "print(hashlib.sha256(b''.join(draw_face(5, i, 24)[0].tobytes() for i in range(6))).hexdigest())\n"
        "import sys\nassert 'torch' not in sys.modules, 'faces.py imports torch'"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env={"PYTHONHASHSEED": "1"}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == digest(5, range(6))


def test_seeds_and_indices_make_different_individuals() -> None:
    images = [draw_face(seed, index, 32)[0].astype(float) for seed in (0, 1) for index in range(0, 30, 3)]
    for i, image in enumerate(images):
        for other in images[:i]:
            assert np.abs(image - other).mean() > 5


def test_factors_survive_json_and_draw_the_same_picture() -> None:
    for index in range(60):
        face = sample_face(2, index)
        read = from_json(Face, json.loads(json.dumps(face.to_json())))
        assert read == face
    np.testing.assert_array_equal(render(read, 32), render(face, 32))


def test_classes_take_turns_and_every_breed_appears() -> None:
    faces = [sample_face(0, index) for index in range(600)]
    assert [face.class_name for face in faces[:4]] == ["cat", "dog", "wild", "cat"]
    assert Counter(face.class_name for face in faces) == dict.fromkeys(CLASSES, 200)
    breeds = Counter(face.breed for face in faces)
    assert len(breeds) == 21
    assert min(breeds.values()) >= 5


@pytest.mark.parametrize("size", [16, 33, 64, 128])
def test_pictures_use_the_range_of_a_photograph(size: int) -> None:
    for index in range(9):
        image, _ = draw_face(1, index, size)
        assert image.shape == (size, size, 3)
        assert image.dtype == np.uint8
        assert image.flags.c_contiguous
        assert image.std() > 20
        assert ((image == 0) | (image == 255)).mean() < 0.15, "over- or underexposed"


def test_every_size_shows_the_same_face() -> None:
    errors = []
    for index in range(30):
        face = sample_face(7, index)
        small, large = render(face, 64).astype(float), render(face, 256).astype(float)
        errors.append(np.abs(small - large.reshape(64, 4, 64, 4, 3).mean((1, 3))).mean())
    # In levels of 255. Pictures of two individuals are more than ten times further apart.
    assert np.mean(errors) < 2
    assert max(errors) < 5


def test_the_pose_moves_the_face() -> None:
    face = sample_face(0, 0).to_json()
    placed = []
    for x in (-0.2, 0.2):
        face["pose"] = {**face["pose"], "x": x, "roll": 0.0, "yaw": 0.0}
        moved = from_json(Face, json.loads(json.dumps(face)))
        placed.append(render(moved, 64).astype(float))
    left, right = placed
    # 0.4 half frames are 12.8 pixels: shifted back by 13, the middle of the face is nearly the same.
    shifted = np.roll(right, -13, axis=1)
    assert np.abs(left - shifted)[16:48, 12:40].mean() < 0.5 * np.abs(left - right)[16:48, 12:40].mean()


def test_a_linear_classifier_tells_the_classes_apart() -> None:
    def features(indices: range) -> tuple[np.ndarray, np.ndarray]:
        rows = []
        for index in indices:
            small = Image.fromarray(draw_face(11, index, 32)[0]).resize((16, 16), Image.Resampling.BOX)
            rows.append(np.asarray(small, float).ravel() / 255 - 0.5)
        return np.c_[np.array(rows), np.ones(len(rows))], np.arange(len(rows)) % 3

    x, label = features(range(300))
    held_out, truth = features(range(300, 420))
    # Ridge regression onto one-hot labels, in its dual form: more pixels than pictures.
    weights = x.T @ np.linalg.solve(x @ x.T + 5 * np.eye(len(x)), np.eye(3)[label])
    accuracy = ((held_out @ weights).argmax(1) == truth).mean()
    assert accuracy > 0.75, f"accuracy {accuracy:.3f}; chance is 0.333"


def test_negative_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="index -1"):
        sample_face(0, -1)
