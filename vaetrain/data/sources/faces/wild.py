"""Wild animals: small amber eyes with round pupils, set in pale brows, and a long bridge of the nose.

Big cats have a broad muzzle and round ears set wide; foxes and wolves a narrow one, flared pale cheeks and upright ears.
"""

from __future__ import annotations

from dataclasses import replace

from vaetrain.data.sources.faces.anatomy import Breed, Build, Ears, Eyes, Head, Nose
from vaetrain.data.sources.faces.palette import coat, irises, rgb

_AMBER = irises("d8a02f", "e0b040", "c88a28", "b9a04a")

_BIG = Build(
    head=Head(
        width=0.57, height=0.54, cheek=0.62, jaw=0.70, muzzle_width=0.35, muzzle_relief=1.1, fluff=0.05, ruff=0.0
    ),
    ears=Ears(kind="round", x=0.44, y=-0.34, length=0.36, width=0.21, tilt=0.42),
    eyes=Eyes(
        x=0.26,
        y=-0.12,
        radius=0.095,
        openness=0.78,
        slant=0.20,
        pupil_width=0.36,
        pupil_height=0.36,
        rim=0.024,
        iris=_AMBER[0],
    ),
    nose=Nose(
        y=0.24, width=0.135, height=0.07, roundness=0.15, colour=rgb("a8665a"), smile=0.24, tongue=0.0, whiskers=0.42
    ),
)
_FOX = Build(
    head=Head(
        width=0.58, height=0.47, cheek=0.69, jaw=0.63, muzzle_width=0.20, muzzle_relief=1.0, fluff=0.07, ruff=0.0
    ),
    ears=Ears(kind="pointed", x=0.40, y=-0.34, length=0.60, width=0.22, tilt=0.24),
    eyes=_BIG.eyes,
    nose=Nose(
        y=0.34, width=0.095, height=0.065, roundness=0.8, colour=rgb("241f20"), smile=0.18, tongue=0.0, whiskers=0.0
    ),
)

WILD = (
    Breed(
        "lion",
        1.5,
        1.0,
        replace(_BIG, head=replace(_BIG.head, ruff=0.42), ears=replace(_BIG.ears, x=0.47, y=-0.36, length=0.30)),
        (
            coat("cf9a58", "f0d9ae", "5e3516", muzzle=0.85, brows=0.6, mane=0.9),
            coat("d8ab6b", "f4e2bd", "8a5524", muzzle=0.85, brows=0.6, mane=0.9),
            coat("c08a4c", "ead0a2", "33200f", muzzle=0.85, brows=0.6, mane=0.9),
        ),
        _AMBER,
    ),
    Breed("lioness", 1.0, 1.14, _BIG, (coat("cf9f62", "f2dfba", "8a5b30", muzzle=0.9, brows=0.7, ears=0.25),), _AMBER),
    Breed(
        "tiger",
        2.5,
        1.08,
        replace(_BIG, head=replace(_BIG.head, cheek=0.70, fluff=0.07, ruff=0.10)),
        (
            coat("dd8430", "fbf3e6", "1c1412", "tiger", 1.0, muzzle=0.95, cheeks=0.9, brows=0.95, ears=0.4),
            coat("cf7422", "f9eedd", "1c1412", "tiger", 1.0, muzzle=0.95, cheeks=0.9, brows=0.95, ears=0.4),
            coat("eeebe6", "ffffff", "2b2727", "tiger", 0.95, muzzle=0.9, cheeks=0.9, brows=0.9, ears=0.4),
        ),
        _AMBER,
    ),
    Breed(
        "leopard",
        2.0,
        1.14,
        _BIG,
        (
            coat("dfae68", "f7e8cc", "251a14", "rosettes", 1.0, patch="b87a38", muzzle=0.9, brows=0.5, scale=1.55),
            coat("cf984e", "f4e0bc", "251a14", "rosettes", 1.0, patch="a86a2c", muzzle=0.9, brows=0.5, scale=1.55),
            coat("cfcdc8", "f6f5f2", "36353a", "rosettes", 0.9, patch="a8a6a4", muzzle=0.9, brows=0.5, scale=1.7),
        ),
        irises("b9a04a", "a8b070", "d8a02f"),
    ),
    Breed(
        "cheetah",
        1.5,
        1.2,
        replace(
            _BIG,
            head=replace(_BIG.head, width=0.54, height=0.50, cheek=0.54, jaw=0.62, muzzle_width=0.28, fluff=0.03),
            ears=replace(_BIG.ears, length=0.26, width=0.17),
            eyes=replace(_BIG.eyes, radius=0.10),
            nose=replace(_BIG.nose, width=0.11, height=0.06, colour=rgb("4a342c")),
        ),
        (coat("dfb678", "f9eed6", "221813", "spots", 1.0, muzzle=0.9, brows=0.5, tears=1.0, scale=1.1),),
        _AMBER,
    ),
    Breed(
        "fox",
        2.5,
        1.06,
        replace(_FOX, eyes=replace(_BIG.eyes, radius=0.10, y=-0.06, slant=0.32, pupil_width=0.28, pupil_height=0.6)),
        (
            coat("cf7836", "fbf4ea", "3a2620", muzzle=0.95, cheeks=1.0, ears=0.35),
            coat("b9662f", "f6ead8", "32211c", muzzle=0.95, cheeks=1.0, ears=0.35),
            coat("b58d5a", "f4e8d2", "5a4434", muzzle=0.9, cheeks=0.95, ears=0.3),
        ),
        _AMBER,
    ),
    Breed(
        "wolf",
        2.0,
        1.02,
        replace(
            _FOX,
            head=replace(_FOX.head, width=0.57, cheek=0.70, muzzle_width=0.25, fluff=0.10, ruff=0.16),
            ears=replace(_FOX.ears, length=0.52, width=0.20, tilt=0.28),
            eyes=replace(_BIG.eyes, radius=0.09, slant=0.30),
            nose=replace(_FOX.nose, y=0.32, width=0.125, height=0.085),
        ),
        (
            coat("8e8b86", "e2ddd2", "46433f", cap=0.55, muzzle=0.8, cheeks=0.85, brows=0.5, ears=0.3),
            coat("a3917a", "ece2cf", "54473a", cap=0.55, muzzle=0.8, cheeks=0.85, brows=0.5, ears=0.3),
            coat("c4c2be", "f4f2ee", "7a7873", cap=0.5, muzzle=0.8, cheeks=0.85, brows=0.5, ears=0.3),
        ),
        _AMBER,
    ),
)
