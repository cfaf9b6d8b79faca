"""The built-in dataset: endless animal faces in the three classes of Animal Faces HQ, drawn from numbers.

Face i of a seed depends on (seed, i) alone. Sampling (`sample_face`) chooses every factor; drawing (`render`, in portrait.py)
turns them into a picture of any size.
"""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any, Literal, TypeVar

import numpy as np
from jaxtyping import UInt8

from vaetrain.data.sources.faces.anatomy import Backdrop, Blob, Breed, Coat, Ears, Eyes, Face, Head, Light, Nose, Pose
from vaetrain.data.sources.faces.cats import CATS
from vaetrain.data.sources.faces.dogs import DOGS
from vaetrain.data.sources.faces.drawing import Colour
from vaetrain.data.sources.faces.portrait import render
from vaetrain.data.sources.faces.wild import WILD

CLASSES: tuple[Literal["cat"], Literal["dog"], Literal["wild"]] = ("cat", "dog", "wild")
_BREEDS: dict[str, tuple[Breed, ...]] = {"cat": CATS, "dog": DOGS, "wild": WILD}

Part = TypeVar("Part", Head, Ears, Eyes, Nose, Coat)


def draw_face(seed: int, index: int, size: int) -> tuple[UInt8[np.ndarray, "size size 3"], Face]:
    """Face `index` of dataset `seed` as an RGB picture of `size` pixels, and the factors that made it."""
    face = sample_face(seed, index)
    return render(face, size), face


def sample_face(seed: int, index: int) -> Face:
    """Choose every factor of face `index` of dataset `seed`; its class is `CLASSES[index % 3]`.

    Raises ValueError when the seed or the index is negative.
    """
    if seed < 0 or index < 0:
        raise ValueError(f"seed {seed} and index {index} of a face must not be negative")
    rng = np.random.default_rng((seed, index))
    class_name = CLASSES[index % len(CLASSES)]
    breeds = _BREEDS[class_name]
    weights = np.array([breed.weight for breed in breeds])
    breed = breeds[rng.choice(len(breeds), p=weights / weights.sum())]
    return Face(
        class_name=class_name,
        breed=breed.name,
        pose=_pose(breed, rng),
        light=_light(rng),
        backdrop=_backdrop(rng),
        head=_vary(breed.build.head, 0.055, rng),
        ears=_vary(breed.build.ears, 0.08, rng),
        eyes=_eyes(breed, rng),
        nose=_nose(breed, rng),
        coat=_coat(breed, rng),
    )


def _number(value: float) -> float:
    return round(float(value), 4)


def _normal(rng: np.random.Generator, spread: float) -> float:
    """A normal deviate cut at two standard deviations, so that no individual is a monster."""
    return _number(spread * np.clip(rng.normal(), -2, 2))


def _uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return _number(rng.uniform(low, high))


def _vary(part: Part, spread: float, rng: np.random.Generator) -> Part:
    """An individual: every length, angle and strength of the typical `part` times exp(normal)."""
    values = {field.name: getattr(part, field.name) for field in fields(part)}
    varied: dict[str, Any] = {
        name: _number(value * math.exp(_normal(rng, spread)))
        for name, value in values.items()
        if isinstance(value, float)
    }
    return replace(part, **varied)


def _tint(colour: Colour, spread: float, rng: np.random.Generator) -> Colour:
    """A colour a little lighter or darker, warmer or cooler."""
    value, cast = 1 + _normal(rng, spread), _normal(rng, 0.5 * spread)
    red, green, blue = colour
    r, g, b = (_number(np.clip(c, 0, 1)) for c in (red * (value + cast), green * value, blue * (value - cast)))
    return r, g, b


def _pose(breed: Breed, rng: np.random.Generator) -> Pose:
    return Pose(
        x=_normal(rng, 0.035),
        y=_number(0.10 + _normal(rng, 0.035)),
        scale=_number(breed.scale * math.exp(_normal(rng, 0.045))),
        roll=_normal(rng, 0.09),
        yaw=_normal(rng, 0.095),
        pitch=_normal(rng, 0.05),
    )


def _light(rng: np.random.Generator) -> Light:
    return Light(
        x=_uniform(rng, -0.8, 0.8),
        y=_uniform(rng, -0.9, -0.3),
        strength=_uniform(rng, 0.35, 0.85),
        warmth=_normal(rng, 0.04),
        exposure=_number(1 + _normal(rng, 0.06)),
    )


def _hue(rng: np.random.Generator, hue: float) -> Colour:
    """A muted colour around `hue` (in turns)."""
    value, saturation = rng.uniform(0.25, 0.85), rng.uniform(0.1, 0.5)
    turn = np.cos(2 * np.pi * (hue + rng.normal(0, 0.05) - np.array([0, 1 / 3, 2 / 3])))
    red, green, blue = (_number(value * (1 - saturation * (0.5 - 0.5 * c))) for c in turn)
    return red, green, blue


def _backdrop(rng: np.random.Generator) -> Backdrop:
    hue = rng.uniform()
    blobs = tuple(
        Blob(
            x=_uniform(rng, -1.1, 1.1),
            y=_uniform(rng, -1.1, 0.6),
            radius=_uniform(rng, 0.15, 0.45),
            colour=_hue(rng, hue + rng.choice([0, 0.12, 0.5])),
        )
        for _ in range(rng.integers(1, 5))
    )
    return Backdrop(top=_hue(rng, hue), bottom=_hue(rng, hue + 0.1), angle=_uniform(rng, -0.9, 0.9), blobs=blobs)


def _eyes(breed: Breed, rng: np.random.Generator) -> Eyes:
    eyes = _vary(breed.build.eyes, 0.06, rng)
    iris = breed.irises[rng.integers(len(breed.irises))]
    # In the dark a slit widens and a round pupil grows.
    dilation = math.exp(_normal(rng, 0.22))
    return replace(eyes, iris=_tint(iris, 0.08, rng), pupil_width=_number(eyes.pupil_width * dilation))


def _nose(breed: Breed, rng: np.random.Generator) -> Nose:
    nose = _vary(breed.build.nose, 0.06, rng)
    panting = breed in DOGS and rng.uniform() < 0.35
    tongue = _uniform(rng, 0.05, 0.2) if panting else nose.tongue
    return replace(nose, tongue=tongue, colour=_tint(nose.colour, 0.08, rng), roundness=min(nose.roundness, 1.0))


def _coat(breed: Breed, rng: np.random.Generator) -> Coat:
    coat = _vary(breed.coats[rng.integers(len(breed.coats))], 0.10, rng)
    strengths = ("pattern_strength", "muzzle", "cheeks", "brows", "cap", "mask", "tears", "ears", "mane")
    bounded: dict[str, Any] = {name: min(getattr(coat, name), 1.0) for name in strengths}
    return replace(
        coat,
        **bounded,
        base=_tint(coat.base, 0.07, rng),
        light=_tint(coat.light, 0.03, rng),
        dark=_tint(coat.dark, 0.10, rng),
        patch=_tint(coat.patch, 0.08, rng),
        texture=int(rng.integers(2**31)),
    )
