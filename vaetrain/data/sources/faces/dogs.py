"""Dogs: narrow skull, long broad muzzle with a large black nose, dark round eyes, mostly hanging ears."""

from __future__ import annotations

from dataclasses import replace

from vaetrain.data.sources.faces.anatomy import Breed, Build, Ears, Eyes, Head, Nose
from vaetrain.data.sources.faces.palette import coat, irises, rgb

_BROWN = irises("6b3f1f", "7d4e26", "4d2e1a")

_DOG = Build(
    head=Head(
        width=0.54, height=0.52, cheek=0.52, jaw=0.70, muzzle_width=0.32, muzzle_relief=1.2, fluff=0.035, ruff=0.0
    ),
    ears=Ears(kind="floppy", x=0.50, y=-0.36, length=0.60, width=0.19, tilt=0.32),
    eyes=Eyes(
        x=0.25,
        y=-0.12,
        radius=0.105,
        openness=0.88,
        slant=0.05,
        pupil_width=0.55,
        pupil_height=0.55,
        rim=0.018,
        iris=_BROWN[0],
    ),
    nose=Nose(
        y=0.24, width=0.145, height=0.095, roundness=1.0, colour=rgb("2b2526"), smile=0.27, tongue=0.0, whiskers=0.0
    ),
)

DOGS = (
    Breed(
        "retriever",
        3.0,
        1.16,
        _DOG,
        (
            coat("d9ac6a", "f3dcb0", "b07f43", muzzle=0.5, ears=0.6),
            coat("ecd9b4", "faf0da", "cfae78", muzzle=0.4, ears=0.6),
            coat("5b3824", "6f4830", "3f2416", ears=0.5),
            coat("302d2f", "423e40", "1c1a1b", ears=0.5),
            coat("b5713a", "d9a56c", "85491f", muzzle=0.4, ears=0.6),
        ),
        _BROWN,
    ),
    Breed(
        "beagle",
        2.5,
        1.16,
        replace(
            _DOG,
            head=replace(_DOG.head, width=0.50),
            ears=replace(_DOG.ears, y=-0.28, length=0.72, width=0.20, tilt=0.24),
        ),
        (
            coat("bd7a40", "f8f2e8", "8c4f26", muzzle=1.0, blaze=0.10, ears=0.7),
            coat("c98a4e", "fbf6ec", "3a2a22", muzzle=1.0, blaze=0.07, cap=0.6, ears=0.55),
        ),
        _BROWN,
    ),
    Breed(
        "spaniel",
        2.0,
        1.16,
        replace(
            _DOG,
            head=replace(_DOG.head, width=0.50, jaw=0.66, fluff=0.05),
            ears=replace(_DOG.ears, x=0.54, y=-0.26, length=0.78, width=0.22, tilt=0.26),
            eyes=replace(_DOG.eyes, x=0.23, radius=0.115),
            nose=replace(_DOG.nose, width=0.125, height=0.085),
        ),
        (
            coat("9a5c36", "c48a5c", "74401f", ears=0.6),
            coat("f6f1e8", "fdfaf4", "9a4d20", "patches", 0.9, scale=1.5, muzzle=1.0, blaze=0.16, ears=1.0),
            coat("2b2628", "f4efe6", "171415", muzzle=0.9, blaze=0.09),
        ),
        _BROWN,
    ),
    Breed(
        "dalmatian",
        1.5,
        1.16,
        _DOG,
        (
            coat("f3f1ee", "ffffff", "262426", "spots", 0.95, scale=2.0, ears=0.9),
            coat("f4efe8", "ffffff", "6a3f24", "spots", 0.95, scale=2.0, ears=0.9),
        ),
        _BROWN,
    ),
    Breed(
        "pug",
        1.5,
        1.16,
        replace(
            _DOG,
            head=replace(
                _DOG.head,
                width=0.62,
                height=0.55,
                cheek=0.66,
                jaw=0.60,
                muzzle_width=0.38,
                muzzle_relief=0.6,
                fluff=0.015,
            ),
            ears=replace(_DOG.ears, x=0.56, y=-0.40, length=0.30, width=0.15, tilt=0.35),
            eyes=replace(_DOG.eyes, x=0.31, y=-0.08, radius=0.14, openness=0.95, slant=-0.1),
            nose=replace(_DOG.nose, y=0.12, width=0.12, height=0.07, smile=0.30),
        ),
        (
            coat("dcb987", "eed6ae", "2c2422", mask=0.95, ears=0.95),
            coat("c9a06e", "e0c095", "2c2422", mask=0.95, ears=0.95),
        ),
        _BROWN,
    ),
    Breed(
        "terrier",
        2.0,
        1.16,
        replace(
            _DOG,
            head=replace(_DOG.head, width=0.50, cheek=0.47, muzzle_width=0.28, fluff=0.05),
            ears=replace(_DOG.ears, kind="folded", x=0.38, y=-0.38, length=0.42, width=0.22, tilt=0.42),
            nose=replace(_DOG.nose, width=0.12, height=0.08),
        ),
        (
            coat("f5f0e6", "fffaf2", "8a5530", "patches", 0.9, patch="c08a52", scale=1.5, muzzle=1.0, ears=0.8),
            coat("b58a58", "ead6b0", "4a3a30", cap=0.75, muzzle=0.6, ears=0.6),
            coat("efe9de", "fffaf2", "3a3234", "patches", 0.9, patch="efe9de", scale=1.6, muzzle=1.0, ears=0.9),
        ),
        _BROWN,
    ),
    Breed(
        "husky",
        1.2,
        1.12,
        replace(
            _DOG,
            head=replace(_DOG.head, width=0.58, cheek=0.60, jaw=0.68, muzzle_width=0.27, fluff=0.06),
            ears=replace(_DOG.ears, kind="pointed", x=0.36, y=-0.44, length=0.46, width=0.18, tilt=0.10),
            eyes=replace(_DOG.eyes, slant=0.18, pupil_width=0.38, pupil_height=0.38),
            nose=replace(_DOG.nose, width=0.12, height=0.085, tongue=0.14),
        ),
        (
            coat("f2f2f2", "ffffff", "34363c", cap=0.95, muzzle=0.9, cheeks=0.9, brows=0.9, ears=0.7),
            coat("f2ece4", "ffffff", "80502f", cap=0.9, muzzle=0.9, cheeks=0.9, brows=0.9, ears=0.7),
        ),
        irises("79c3f0", "8fd0f5"),
    ),
    Breed(
        "poodle",
        1.5,
        1.16,
        replace(
            _DOG,
            head=replace(_DOG.head, width=0.60, height=0.62, cheek=0.50, muzzle_width=0.25, fluff=0.11),
            ears=replace(_DOG.ears, x=0.52, y=-0.26, length=0.60, width=0.25, tilt=0.20),
            eyes=replace(_DOG.eyes, radius=0.10),
            nose=replace(_DOG.nose, width=0.115, height=0.08),
        ),
        (
            coat("d6a06a", "e9c596", "b57b45", ears=0.4),
            coat("efe9df", "ffffff", "cfc4b2", ears=0.4),
            coat("3a3436", "4a4446", "242022", ears=0.4),
            coat("a9a5a5", "c2bfbf", "7b7778", ears=0.4),
        ),
        _BROWN,
    ),
)
