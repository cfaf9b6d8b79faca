"""From pixels to the head: coordinates that turn with the pose, hair that follows them, and the outline of the skull.

The head is drawn flat and symmetrical in its own coordinates (u, v); a smooth warp from picture to head coordinates turns it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from vaetrain.data.sources.faces.anatomy import Face
from vaetrain.data.sources.faces.drawing import Field, Noise, bump, ellipse, smooth_union


@dataclass(frozen=True)
class View:
    """A face's coordinates on the pixel grid, and what every layer needs at each pixel."""

    face: Face
    x: Field
    """Picture coordinates, −1 to 1."""
    y: Field
    u: Field
    """Head coordinates, from the middle of the face to the viewer's right."""
    v: Field
    """Head coordinates, downwards."""
    side: Field
    """|u|: one drawing serves both halves of the face."""
    pixel: float
    """Size of a pixel in head coordinates."""
    noise: Noise
    hair: Field
    """Strokes of hair that run outwards from the nose, −1 to 1."""
    outline: Field
    """Distance to the head without its ears."""


def look_at(face: Face, size: int) -> View:
    """Pose the face before a square of size × size pixels."""
    pose, head = face.pose, face.head
    axis = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
    x, y = np.meshgrid(axis, axis)
    cos, sin = math.cos(pose.roll) / pose.scale, math.sin(pose.roll) / pose.scale
    dx, dy = x - pose.x, y - pose.y
    u, v = cos * dx + sin * dy, cos * dy - sin * dx
    # What is nearer to the viewer moves further when the head turns: the dome of the skull, and the muzzle on it.
    dome = bump(u, v, 0.8, 0.8) + 0.5 * head.muzzle_relief * bump(u, v - face.nose.y, 0.35, 0.35)
    u, v = u - pose.yaw * dome, v - pose.pitch * dome
    side = np.abs(u)
    pixel = 2 / size / pose.scale

    noise = Noise(face.coat.texture)
    radius = np.hypot(u, v - 0.05)
    turn = np.arctan2(u, v - 0.05) * (Noise.cells / (2 * math.pi))
    # A lock of hair is radius·2π/64 wide, a fine one half that: narrower than a pixel they would alias, so they fade.
    lock = radius * (2 * math.pi / Noise.cells) + 1e-3
    hair = 0.65 * noise(turn, radius * 5) * np.exp(-((0.7 * pixel / lock) ** 2))
    hair += 0.55 * noise(turn * 2, radius * 4 + 30) * np.exp(-((1.4 * pixel / lock) ** 2))

    skull = ellipse(u, v + 0.08, head.width, head.height)
    cheeks = ellipse(side - 0.5 * head.cheek, v - 0.2, 0.5 * head.cheek, 0.3)
    muzzle_y = 0.5 * (face.nose.y - 0.1 + head.jaw)
    muzzle = ellipse(u, v - muzzle_y, head.muzzle_width, head.jaw - muzzle_y)
    outline = smooth_union(smooth_union(skull, cheeks, 0.2), muzzle, 0.16)
    # The chin is short-haired.
    outline -= head.fluff * (0.5 + 0.5 * hair) * (1 - 0.8 * bump(u, v - head.jaw, 0.3, 0.25))
    return View(face, x, y, u, v, side, pixel, noise, hair, outline)
