"""The coat: base colour, stripes, spots and patches, and the markings of the face."""

from __future__ import annotations

import math

import numpy as np

from vaetrain.data.sources.faces.drawing import Planes, blend, bump, ellipse, fade, planes, smooth_union
from vaetrain.data.sources.faces.view import View


def pelt(view: View) -> Planes:
    """The animal's fur without the markings of its face: base colour, pattern and strokes."""
    coat, noise = view.face.coat, view.noise
    image = np.empty((3, *view.u.shape), np.float32)
    image[:] = planes(coat.base)
    strength, scale = coat.pattern_strength, coat.pattern_scale
    wobble = noise(view.u * 3 + 9, view.v * 3 + 5)
    radius = np.hypot(view.side * 0.9, view.v - 0.12)
    if coat.pattern == "tabby":
        forehead = fade(view.v + 0.2, 0.3)
        angle = np.arctan2(view.side, 0.25 - view.v)
        along = np.where(view.v < 0.25, angle * 3.1, 0) * forehead + (radius * 3.2 + view.v) * (1 - forehead)
        wave = np.cos((along / scale + 0.14 * wobble) * 2 * np.pi)
        centre = fade(0.3 - radius, 0.4) + forehead * fade(-0.3 - view.v, 0.2)
        blend(image, coat.dark, strength * fade(0.25 - wave, 0.9) * np.clip(centre, 0, 1))
    elif coat.pattern == "tiger":
        wave = np.cos((radius * 4.6 / scale + 0.5 * wobble + 0.25 * view.v) * 2 * np.pi)
        gaps = noise(np.arctan2(view.side, view.v) * 3.5 + 20, radius * 3 + 3)
        away = fade(0.36 - radius, 0.3)
        blend(image, coat.dark, strength * away * fade(0.62 - wave - 0.6 * gaps, 0.5))
    elif coat.pattern in ("spots", "rosettes"):
        # Spots are small on the face and grow towards the neck.
        grow = 0.075 * scale * (0.75 + 0.7 * radius)
        cells = (view.u / grow + 31, view.v / grow + 31)
        distance = noise.spots(*cells)
        soft = math.hypot(0.25, 1.2 * view.pixel / (0.085 * scale))
        size = 0.3 + 0.1 * wobble
        away = strength * fade(0.26 - radius, 0.2)
        if coat.pattern == "rosettes":
            ring = np.abs(distance - size) - 0.12
            blend(image, coat.patch, 0.6 * away * fade(distance - size, soft))
            blend(image, coat.dark, away * fade(ring, soft))
        else:
            blend(image, coat.dark, away * fade(distance - size, soft))
    elif coat.pattern == "patches":
        coarse = noise(view.u * 1.9 / scale + 40, view.v * 1.6 / scale + 3) + 0.15 * wobble
        other = noise(view.u * 1.7 / scale + 17, view.v * 1.7 / scale + 50) + 0.15 * wobble
        blend(image, coat.patch, strength * fade(0.05 - coarse, 0.22))
        blend(image, coat.dark, strength * fade(0.12 - other, 0.22))
    image *= 1 + 0.13 * view.hair + 0.05 * wobble
    return image


def add_markings(head: Planes, view: View) -> None:
    """Paint the light and dark areas of the face itself over `head`, in place."""
    face, coat, eyes, nose = view.face, view.face.coat, view.face.eyes, view.face.nose
    ragged = 0.05 * view.hair + 0.04 * view.noise(view.u * 6 + 50, view.v * 6)
    if coat.cap:
        widow = view.v + 0.02 + 0.9 * np.abs(view.side - eyes.x) - 0.35 * fade(0.30 - view.side, 0.2) + ragged
        peak = np.minimum(widow, view.side * 2.2 + 0.9 * view.v - 0.10)
        blend(head, coat.dark, coat.cap * fade(np.minimum(peak, 0.55 - view.side + 0.3 * view.v), 0.2))
    if coat.cheeks:
        cheek = ellipse(view.side - 0.42, view.v - 0.36, 0.40, 0.24) + ragged
        blend(head, coat.light, coat.cheeks * fade(cheek, 0.2))
    if coat.brows:
        brow = ellipse(view.side - 0.9 * eyes.x, view.v - eyes.y + 1.9 * eyes.radius, 0.11, 0.09) + ragged
        blend(head, coat.light, coat.brows * fade(brow, 0.12))
    if coat.blaze:
        width = coat.blaze * (0.55 + 0.9 * np.clip(view.v + 0.5, 0, 1) ** 2) - 0.5 * np.maximum(-0.45 - view.v, 0)
        blend(head, coat.light, fade(view.side - width + ragged, 0.08))
    if coat.mask:
        blend(head, coat.dark, coat.mask * np.clip(1.25 * bump(view.u, view.v - nose.y, 0.36, 0.42) + ragged, 0, 1))
    if coat.muzzle:
        half = face.head.muzzle_width
        pad = ellipse(view.side - 0.45 * half, view.v - nose.y - 0.12, 0.62 * half, 0.17)
        chin = ellipse(view.u, view.v - face.head.jaw + 0.1, 0.85 * half, 0.16)
        pads = smooth_union(pad, chin, 0.1)
        blend(head, coat.light, coat.muzzle * fade(pads + 0.6 * ragged, 0.14))
    if coat.tears:
        path = view.side - 0.62 * eyes.x - 0.12 * (view.v - eyes.y) + 0.15 * np.maximum(view.v - nose.y, 0)
        along = fade(np.abs(view.v - 0.5 * (eyes.y + nose.y + 0.2)) - 0.5 * (nose.y + 0.1 - eyes.y), 0.1)
        blend(head, coat.dark, coat.tears * along * fade(np.abs(path) - 0.035, 0.04 + view.pixel))
