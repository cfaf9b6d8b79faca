"""What makes a face: every factor as a number or a name, so that a picture's JSON says how it came about.

Lengths are in half frames: the picture spans −1 to 1, y downwards, and a face at scale 1 is drawn around (0, 0). Colours are
sRGB in [0, 1]. Angles are in radians.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from vaetrain.data.sources.faces.drawing import Colour


@dataclass(frozen=True)
class Pose:
    """Where the head is and how it is turned."""

    x: float
    """Shift to the right."""
    y: float
    """Shift downwards."""
    scale: float
    """Size of the head."""
    roll: float
    """Tilt in the picture plane, clockwise."""
    yaw: float
    """Turn to the right: how far the middle of the face moves against its outline."""
    pitch: float
    """Nod downwards, in the same measure."""


@dataclass(frozen=True)
class Light:
    """One soft lamp and what the camera made of it."""

    x: float
    """Direction towards the lamp, to the right; (x, y, 1) before normalising."""
    y: float
    """Direction towards the lamp, downwards; negative is from above."""
    strength: float
    """Contrast between lit and shaded fur, 0 to 1."""
    warmth: float
    """Colour cast: positive is evening, negative is shade."""
    exposure: float
    """Factor on all values."""


@dataclass(frozen=True)
class Blob:
    """One out-of-focus patch of the background."""

    x: float
    y: float
    radius: float
    colour: Colour


@dataclass(frozen=True)
class Backdrop:
    """A gradient between two colours with blurred blobs on it."""

    top: Colour
    bottom: Colour
    angle: float
    """Direction of the gradient against the vertical."""
    blobs: tuple[Blob, ...]


@dataclass(frozen=True)
class Head:
    """Outline and relief of the head."""

    width: float
    """Half width of the skull."""
    height: float
    """Half height of the skull."""
    cheek: float
    """Half width at the cheeks, where they are widest."""
    jaw: float
    """How far the chin lies below the middle of the frame."""
    muzzle_width: float
    """Half width of the muzzle."""
    muzzle_relief: float
    """How far the muzzle stands out towards the viewer; steepens its shading and its parallax."""
    fluff: float
    """Length of the tufts along the outline."""
    ruff: float
    """How far a mane or collar of long hair reaches beyond the head; 0 is none."""


@dataclass(frozen=True)
class Ears:
    """Both ears; the second is the first one's mirror image."""

    kind: Literal["pointed", "round", "floppy", "folded"]
    x: float
    """Distance of the base from the middle of the head."""
    y: float
    """Height of the base (negative is up)."""
    length: float
    width: float
    """Half width at the base."""
    tilt: float
    """Angle outwards from straight up; a floppy ear, from straight down."""


@dataclass(frozen=True)
class Eyes:
    """Both eyes."""

    x: float
    y: float
    radius: float
    """Half width of the opening."""
    openness: float
    """Height of the opening over its width."""
    slant: float
    """Angle by which the outer corners are raised."""
    pupil_width: float
    """Half width of the pupil over that of the iris."""
    pupil_height: float
    """Half height of the pupil over that of the iris."""
    iris: Colour
    rim: float
    """Width of the dark lids around the opening."""


@dataclass(frozen=True)
class Nose:
    """Nose leather and mouth."""

    y: float
    width: float
    """Half width of the nose leather."""
    height: float
    """Half height of the nose leather."""
    roundness: float
    """0 is a cat's triangle, 1 is a dog's oval with nostrils."""
    colour: Colour
    smile: float
    """How wide the mouth is."""
    tongue: float
    """How far the tongue hangs out; 0 is a closed mouth."""
    whiskers: float
    """Length of the whiskers; 0 is none."""


@dataclass(frozen=True)
class Coat:
    """Colours of the fur and where they go; strengths run from 0 (absent) to 1."""

    base: Colour
    light: Colour
    """Muzzle, cheeks, brows, blaze, chest."""
    dark: Colour
    """Stripes, spots, cap, mask, ear backs."""
    patch: Colour
    """Second colour of a coat with patches, and the inside of rosettes."""
    pattern: Literal["plain", "tabby", "tiger", "rosettes", "spots", "patches"] = "plain"
    pattern_strength: float = 0.0
    pattern_scale: float = 1.0
    """Size of stripes, spots or patches; 1 is the species' own."""
    muzzle: float = 0.0
    """Light muzzle and chin."""
    cheeks: float = 0.0
    """Light cheeks and sides."""
    brows: float = 0.0
    """Light spots above the eyes."""
    blaze: float = 0.0
    """Half width of a light wedge up the forehead."""
    cap: float = 0.0
    """Dark forehead and temples."""
    mask: float = 0.0
    """Dark middle of the face."""
    tears: float = 0.0
    """Dark lines from the eyes to the mouth."""
    ears: float = 0.0
    """Dark ears."""
    mane: float = 0.0
    """Dark mane or collar, darkest at its rim."""
    texture: int = 0
    """Seed of hair strokes and of the pattern's irregularities."""


@dataclass(frozen=True)
class Build:
    """The shape of a head and its features."""

    head: Head
    ears: Ears
    eyes: Eyes
    nose: Nose


@dataclass(frozen=True)
class Breed:
    """A typical animal, and the colours it comes in."""

    name: str
    weight: float
    """How common it is within its class, relative to the other breeds."""
    scale: float
    """Size at which its face fills the frame."""
    build: Build
    coats: tuple[Coat, ...]
    irises: tuple[Colour, ...]


@dataclass(frozen=True)
class Face:
    """Every factor of one animal's picture."""

    class_name: Literal["cat", "dog", "wild"]
    breed: str
    pose: Pose
    light: Light
    backdrop: Backdrop
    head: Head
    ears: Ears
    eyes: Eyes
    nose: Nose
    coat: Coat

    def to_json(self) -> dict[str, Any]:
        """The factors as nested dictionaries of plain numbers, strings and lists."""
        return asdict(self)
