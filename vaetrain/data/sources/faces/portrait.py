"""Face → picture: from the backdrop to the whiskers, each layer painted over the one before."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import UInt8

from vaetrain.data.sources.faces import fur
from vaetrain.data.sources.faces.anatomy import Face
from vaetrain.data.sources.faces.drawing import (
    Colour,
    Field,
    Planes,
    blend,
    bump,
    cover,
    ellipse,
    fade,
    planes,
    stroke,
    taper,
    wedge,
)
from vaetrain.data.sources.faces.view import View, look_at


def render(face: Face, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Draw a face as an RGB picture; the same face at any size is the same picture."""
    view = look_at(face, size)
    image = _backdrop(view)
    shade = _relief(view)
    pelt = fur.pelt(view)
    _body(image, view, pelt)
    if face.ears.kind in ("pointed", "round"):
        _ears(image, view, pelt)
    head = pelt.copy()
    fur.add_markings(head, view)
    # What the lamp leaves dark, the surroundings fill a little with their own colour.
    bounce = planes(face.backdrop.bottom) * 0.3
    edge = fade(view.outline, 0.4 * face.head.fluff + 1.2 * view.pixel)
    blend(image, head * (shade + bounce * (1 - shade)), edge)
    _mouth(image, view, shade)
    _nose(image, view)
    _eyes(image, view)
    if face.ears.kind in ("floppy", "folded"):
        _ears(image, view, pelt)
    _whiskers(image, view)
    return _develop(image, view)


def _backdrop(view: View) -> Planes:
    backdrop = view.face.backdrop
    along = view.y * math.cos(backdrop.angle) + view.x * math.sin(backdrop.angle)
    image = np.empty((3, *view.x.shape), np.float32)
    image[:] = planes(backdrop.top)
    blend(image, backdrop.bottom, fade(-along, 2.0))
    for blob in backdrop.blobs:
        dx, dy = view.x - blob.x, view.y - blob.y
        blend(image, blob.colour, 0.8 * fade(np.hypot(dx, dy) - blob.radius, 0.9 * blob.radius))
    return image


def _relief(view: View) -> Field:
    """Brightness of the head's fur: a lamp on bumps whose slopes are known in closed form."""
    face, light = view.face, view.face.light
    head, eyes, nose = face.head, face.eyes, face.nose
    dx, dy = np.zeros_like(view.u), np.zeros_like(view.u)
    bumps = [
        (0.75, view.u, view.v, 0.85, 0.85),  # skull
        (0.16 * head.muzzle_relief, view.u, view.v - nose.y - 0.1, 0.8 * head.muzzle_width, 0.3),
        (0.07 * head.muzzle_relief, view.u, view.v - 0.5 * (nose.y + eyes.y), 0.16, 0.3),  # bridge of the nose
    ]
    for mirror in (-1, 1):
        bumps.append((0.10, view.u - mirror * 0.6 * head.cheek, view.v - 0.25, 0.25, 0.25))
        bumps.append((-0.06, view.u - mirror * eyes.x, view.v - eyes.y, 1.5 * eyes.radius, 1.4 * eyes.radius))
        bumps.append((0.05, view.u - mirror * eyes.x, view.v - eyes.y + 1.7 * eyes.radius, 0.2, 0.12))  # brow
    for height, x, y, width, length in bumps:
        slope = (-2 * height) * bump(x, y, width, length)
        dx += slope * x / width**2
        dy += slope * y / length**2
    dx -= 0.10 * view.hair
    towards = 1 / math.sqrt(1 + light.x**2 + light.y**2)
    facing = towards * (1 - light.x * dx - light.y * dy) / np.sqrt(1 + dx * dx + dy * dy)
    edge = fade(-0.12 - view.outline, 0.3)
    return np.clip(1 + light.strength * (facing - towards) - 0.16 * edge, 0.15, 1.5, dtype=np.float32)


def _body(image: Planes, view: View, pelt: Planes) -> None:
    """Neck, chest and mane behind the head, in its shadow."""
    face, head, coat = view.face, view.face.head, view.face.coat
    shadow = 1 - 0.45 * fade(view.outline - 0.02, 0.5)
    neck = ellipse(view.u, view.v - 1.15, 0.85 * head.cheek + 0.25, 0.95) - 0.03 * view.hair
    chest = pelt.copy()
    blend(chest, coat.light, 0.85 * coat.muzzle * bump(view.u, view.v - 1.0, 0.35, 0.5))
    lamp = 1 + 0.25 * face.light.strength * np.clip(face.light.x * view.u, -1, 1)
    blend(image, chest * (0.86 * lamp * shadow), cover(neck, view.pixel))
    if head.ruff > 0:
        reach = np.hypot(view.u / (head.cheek + head.ruff), (view.v - 0.08) / (0.62 + 1.05 * head.ruff)) - 1
        lock = 0.11 * view.hair + 0.05 * view.noise(view.u * 5, view.v * 5)
        mane = pelt.copy()
        blend(mane, coat.dark, coat.mane * fade(-0.25 - reach, 0.6))
        mane *= (1 + 0.35 * view.hair) * lamp * (0.25 + 0.75 * shadow)
        blend(image, mane, fade((reach + lock) * 0.8, 0.06 + view.pixel))


def _ears(image: Planes, view: View, pelt: Planes) -> None:
    face, ears, coat = view.face, view.face.ears, view.face.coat
    hanging = ears.kind == "floppy"
    cos, sin = math.cos(ears.tilt), math.sin(ears.tilt)
    dx, dy = view.side - ears.x, view.v - ears.y if hanging else ears.y - view.v
    across, along = cos * dx - sin * dy, cos * dy + sin * dx
    crease = 0.55 * ears.length
    ruffled = 0.35 * face.head.fluff * view.hair
    tinted = pelt.copy()
    blend(tinted, coat.dark, np.full_like(view.u, coat.ears))
    lamp = 1 + 0.3 * face.light.strength * np.clip(face.light.x * view.u + face.light.y * view.v, -0.8, 0.8)
    if ears.kind == "round":
        shape = ellipse(across, along - 0.3 * ears.length, ears.width, 0.7 * ears.length) - ruffled
        inside = ellipse(across, along - 0.35 * ears.length, 0.62 * ears.width, 0.42 * ears.length)
    elif hanging:
        bent = across + 0.22 * along * along / ears.length
        shape = taper(bent, along, (0.0, ears.length), 0.55 * ears.width, ears.width) - ruffled
        inside = None
    else:
        shape = wedge(across, along + 0.06, ears.width, ears.length + 0.06, 0.05) - ruffled
        if ears.kind == "folded":
            shape = np.maximum(shape, along - crease)
        inside = wedge(across + 0.02, along - 0.02, 0.6 * ears.width, 0.76 * ears.length, 0.05)
    if hanging or ears.kind == "folded":
        # In front of the head: a soft shadow parts the ear from it.
        blend(image, (0.08, 0.05, 0.04), 0.35 * fade(shape - 0.03, 0.14) * fade(view.outline, 0.1))
    edge = 1 - 0.3 * fade(-0.05 - shape, 0.12)
    blend(image, tinted * (lamp * edge), cover(shape, view.pixel))
    if ears.kind == "folded":
        # The tip falls forward and outward over the lower half; it is lit at the crease.
        below = crease - along
        flap = wedge(across - 0.25 * below, below + 0.03, 0.72 * ears.width, crease + 0.03, 0.08) - ruffled
        blend(image, (0.05, 0.03, 0.03), 0.35 * fade(flap - 0.02, 0.08) * cover(shape, view.pixel))
        blend(image, tinted * (lamp * (1.05 - 0.9 * np.clip(below, 0, 0.4))), cover(flap, view.pixel))
    elif inside is not None:
        flesh = tuple(0.55 * c + 0.45 * p for c, p in zip(coat.base, (0.86, 0.60, 0.55), strict=True))
        deep = np.clip(0.62 + 0.5 * along / ears.length, 0.4, 1.05)
        skin = planes((flesh[0], flesh[1], flesh[2])) * (deep * (1 + 0.2 * view.hair))
        blend(image, skin, (1 - 0.45 * coat.ears) * fade(inside, 0.06 + view.pixel))


def _mouth(image: Planes, view: View, shade: Field) -> None:
    nose, pixel = view.face.nose, view.pixel
    lip_y = nose.y + nose.height + 0.09
    ink: Colour = (0.13, 0.08, 0.08)
    corner = np.clip(view.side / nose.smile, 0, 1)
    lip = view.v - lip_y - 0.055 * np.sin(np.pi * np.sqrt(corner)) + 0.03 * corner
    if nose.tongue > 0:
        reach = 0.12 + nose.tongue
        opening = np.maximum(ellipse(view.u, view.v - lip_y - 0.04, 0.72 * nose.smile, reach * 0.75), -lip)
        blend(image, (0.25, 0.08, 0.09), cover(opening, pixel))
        tongue = np.maximum(taper(view.u, view.v - lip_y, (0.0, reach), 0.09, 0.105), -lip - 0.01)
        pink = planes((0.89, 0.47, 0.50)) * (1 - 0.25 * stroke(view.side, 0.03, pixel)) * (0.75 + 0.25 * shade)
        blend(image, pink * (0.72 + 0.28 * fade(lip_y + 0.08 - view.v, 0.14)), cover(tongue, pixel))
    line = stroke(np.abs(lip), 0.03, pixel) * fade(view.side - nose.smile, 0.06)
    philtrum = stroke(view.side, 0.025, pixel) * fade(np.abs(view.v - lip_y + 0.05) - 0.055, 0.03 + pixel)
    blend(image, ink, 0.75 * np.maximum(line, philtrum))


def _nose(image: Planes, view: View) -> None:
    nose, light, pixel = view.face.nose, view.face.light, view.pixel
    y = view.v - nose.y
    oval = ellipse(view.u, y, nose.width, nose.height)
    flat = wedge(view.u, y + nose.height, 1.15 * nose.width, 2.1 * nose.height, 0.5 * nose.height)
    shape = nose.roundness * oval + (1 - nose.roundness) * flat
    blend(image, (0.10, 0.06, 0.05), 0.5 * fade(shape - 0.01, 0.07))
    leather = planes(nose.colour) * (1 - 0.35 * np.clip(y / nose.height, -0.6, 1))
    blend(image, leather, cover(shape, pixel))
    nostril = ellipse(view.side - 0.52 * nose.width, y - 0.2 * nose.height, 0.24 * nose.width, 0.28 * nose.height)
    blend(image, (0.05, 0.03, 0.03), (0.45 + 0.4 * nose.roundness) * fade(nostril, 0.02 + pixel))
    gleam = ellipse(view.u - 0.25 * light.x * nose.width, y + 0.5 * nose.height, 0.42 * nose.width, 0.2 * nose.height)
    blend(image, (1.0, 1.0, 1.0), (0.15 + 0.3 * nose.roundness) * fade(gleam, 0.05))


def _eyes(image: Planes, view: View) -> None:
    eyes, light, pixel = view.face.eyes, view.face.light, view.pixel
    cos, sin = math.cos(eyes.slant), math.sin(eyes.slant)
    dx, dy = view.side - eyes.x, view.v - eyes.y
    x, y = cos * dx - sin * dy, cos * dy + sin * dx
    height = eyes.radius * eyes.openness
    # An almond lies between an ellipse and a wider, flatter one.
    opening = 0.5 * ellipse(x, y, eyes.radius, height) + 0.5 * ellipse(x, y, 1.25 * eyes.radius, 0.8 * height)
    blend(image, (0.07, 0.05, 0.05), cover(opening - eyes.rim, pixel))
    seen = cover(opening, pixel)

    radius = 0.96 * eyes.radius
    distance = np.hypot(dx, dy)
    depth = np.clip(distance / radius, 0, 1)
    glow = 0.62 + 0.55 * (1 - depth) + 0.5 * np.clip(dy / radius, -0.5, 0.6)
    glow *= 1 + 0.12 * view.noise(np.arctan2(dx, dy) * (view.noise.cells / (2 * math.pi)), depth * 2)
    blend(image, planes(eyes.iris) * glow, seen)
    blend(image, (0.04, 0.03, 0.03), 0.75 * seen * fade(0.06 * eyes.radius + radius - distance, 0.3 * radius))
    pupil = ellipse(dx, dy, eyes.pupil_width * radius, eyes.pupil_height * radius)
    blend(image, (0.03, 0.02, 0.03), seen * cover(pupil, pixel))
    lid = np.clip(-y / height, 0, 1) ** 2
    blend(image, (0.03, 0.02, 0.02), 0.55 * seen * lid)

    # Catchlights sit on the lamp's side of both eyes: they are not mirrored.
    real = np.sign(view.u) * dx
    gleam = np.hypot(real - 0.3 * light.x * eyes.radius, dy - 0.34 * light.y * eyes.radius) - 0.21 * eyes.radius
    blend(image, (1.0, 1.0, 1.0), 0.95 * seen * cover(gleam, pixel))
    echo = np.hypot(real + 0.3 * light.x * eyes.radius, dy - 0.42 * height) - 0.2 * eyes.radius
    blend(image, (1.0, 1.0, 1.0), 0.22 * seen * fade(echo, 0.2 * eyes.radius))


def _whiskers(image: Planes, view: View) -> None:
    nose = view.face.nose
    if not nose.whiskers:
        return
    start = 0.16
    reach = np.clip((view.side - start) / nose.whiskers, 0, 1)
    along = fade(np.abs(view.side - start - 0.5 * nose.whiskers) - 0.5 * nose.whiskers, 0.1)
    strands = np.zeros_like(view.u)
    for row, slope in enumerate((-0.16, 0.02, 0.2)):
        height = nose.y + 0.1 + 0.045 * row + nose.whiskers * (slope * reach + 0.16 * reach * reach)
        steepness = (slope + 0.32 * reach) ** 2
        strands = np.maximum(strands, stroke(np.abs(view.v - height) / np.sqrt(1 + steepness), 0.012, view.pixel))
    blend(image, (0.97, 0.96, 0.93), 0.6 * along * strands)


def _develop(image: Planes, view: View) -> UInt8[np.ndarray, "size size 3"]:
    light = view.face.light
    image *= planes((1 + light.warmth, 1 + 0.1 * light.warmth, 1 - light.warmth)) * light.exposure
    image *= 1 - 0.10 * (view.x * view.x + view.y * view.y)
    return np.ascontiguousarray((np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0))
