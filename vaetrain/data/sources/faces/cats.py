"""Cats: wide skull, tall triangular ears, large eyes with upright pupils, a small pink nose."""

from __future__ import annotations

from dataclasses import replace

from vaetrain.data.sources.faces.anatomy import Breed, Build, Ears, Eyes, Head, Nose
from vaetrain.data.sources.faces.palette import coat, irises, rgb

_GREEN_TO_ORANGE = irises("a9b84a", "8fbf5a", "d9b13c", "e09a30", "6fae8c")

_CAT = Build(
    head=Head(
        width=0.66, height=0.56, cheek=0.70, jaw=0.58, muzzle_width=0.26, muzzle_relief=0.6, fluff=0.05, ruff=0.0
    ),
    ears=Ears(kind="pointed", x=0.43, y=-0.36, length=0.58, width=0.27, tilt=0.30),
    eyes=Eyes(
        x=0.30,
        y=-0.04,
        radius=0.165,
        openness=0.82,
        slant=0.16,
        pupil_width=0.30,
        pupil_height=0.85,
        rim=0.022,
        iris=_GREEN_TO_ORANGE[0],
    ),
    nose=Nose(
        y=0.23, width=0.075, height=0.045, roundness=0.0, colour=rgb("d98a86"), smile=0.17, tongue=0.0, whiskers=0.62
    ),
)

CATS = (
    Breed(
        "tabby",
        4.0,
        1.0,
        _CAT,
        (
            coat("dd9a55", "f7e2c0", "a9561f", "tabby", 0.75, muzzle=0.9, brows=0.5, cheeks=0.3),
            coat("a58560", "e2d0b0", "3d2c20", "tabby", 0.85, muzzle=0.8, brows=0.6),
            coat("9c9c9a", "e4e4e0", "3c3d42", "tabby", 0.8, muzzle=0.85, brows=0.4),
            coat("c6c9cb", "f4f4f2", "4a4c52", "tabby", 0.75, muzzle=0.8, brows=0.5),
            coat("e6c79c", "faf0dc", "b98a58", "tabby", 0.6, muzzle=0.8, blaze=0.06),
        ),
        _GREEN_TO_ORANGE,
    ),
    Breed(
        "tuxedo",
        2.0,
        1.0,
        _CAT,
        (
            coat("2c2a2d", "f3f0ea", "161517", muzzle=1.0, blaze=0.10),
            coat("7d828b", "f5f3ef", "585c66", muzzle=1.0, blaze=0.13, cheeks=0.5),
            coat("d58d48", "fbf2e4", "a85a24", "tabby", 0.6, muzzle=1.0, blaze=0.14),
        ),
        _GREEN_TO_ORANGE,
    ),
    Breed(
        "calico",
        1.5,
        1.0,
        _CAT,
        (coat("f4efe6", "fbf8f2", "33292a", "patches", 0.95, patch="d98a3e", muzzle=0.9),),
        _GREEN_TO_ORANGE,
    ),
    Breed(
        "siamese",
        1.5,
        1.0,
        replace(
            _CAT,
            head=replace(_CAT.head, width=0.60, cheek=0.62, jaw=0.62, fluff=0.03),
            ears=replace(_CAT.ears, length=0.66, width=0.29, tilt=0.38),
            eyes=replace(_CAT.eyes, slant=0.28, openness=0.76),
            nose=replace(_CAT.nose, colour=rgb("5d4038")),
        ),
        (
            coat("ead9c0", "f5ead8", "49352b", mask=0.95, ears=0.9),
            coat("e9e4de", "f5f2ee", "6f7480", mask=0.9, ears=0.85),
        ),
        irises("5aa3e0", "6fb4ea", "4a8fd0"),
    ),
    Breed(
        "solid",
        2.0,
        1.0,
        _CAT,
        (
            coat("2a282c", "3a373b", "151416"),
            coat("f3efe8", "ffffff", "cfc8bc"),
            coat("7f8794", "9aa2ae", "565d69"),
            coat("6a4a38", "86624c", "42291e"),
        ),
        irises("d9b13c", "e09a30", "8fbf5a", "6fb4ea"),
    ),
    Breed(
        "persian",
        1.5,
        1.0,
        replace(
            _CAT,
            head=replace(_CAT.head, width=0.70, cheek=0.80, jaw=0.55, muzzle_width=0.30, fluff=0.10, ruff=0.12),
            ears=replace(_CAT.ears, x=0.50, y=-0.34, length=0.40, width=0.22, tilt=0.55),
            eyes=replace(_CAT.eyes, radius=0.18, openness=0.95, slant=0.0, pupil_width=0.5, pupil_height=0.75),
            nose=replace(_CAT.nose, y=0.14, width=0.085),
        ),
        (
            coat("f2eee6", "ffffff", "cfc6b6"),
            coat("e3b98a", "f8e6c8", "b98652", muzzle=0.6, cheeks=0.4),
            coat("8f949d", "b9bec6", "666b75", muzzle=0.4),
        ),
        irises("e0852c", "d99a34", "c9742a"),
    ),
)
