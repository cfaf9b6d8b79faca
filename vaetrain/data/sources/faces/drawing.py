"""Drawing with signed distances: anti-aliased shapes, soft blends and value noise on planar float images.

A distance is negative inside a shape, in the unit of the coordinates it was given; `pixel` is the size of a pixel in that
unit. Everything is band-limited by `pixel`, so that the same scene at two sizes is the same picture.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float32

Field = Float32[np.ndarray, "h w"]
Planes = Float32[np.ndarray, "3 h w"]
Colour = tuple[float, float, float]


def planes(colour: Colour) -> Float32[np.ndarray, "3 1 1"]:
    """A colour in [0, 1] that broadcasts over planar images."""
    return np.array(colour, np.float32).reshape(3, 1, 1)


def blend(image: Planes, colour: Float32[np.ndarray, "3 #h #w"] | Colour, alpha: Field) -> None:
    """Paint `colour` over `image`, in place; `alpha` in [0, 1] is how much of each pixel it covers."""
    paint = planes(colour) if isinstance(colour, tuple) else colour
    image += alpha * (paint - image)


def cover(distance: Field, pixel: float) -> Field:
    """Fraction of a pixel inside a shape, exact for a straight axis-aligned edge."""
    return np.clip(0.5 - distance / pixel, 0, 1, dtype=np.float32)


def stroke(distance: Field, width: float, pixel: float) -> Field:
    """Fraction of a pixel covered by a line of `width` at (unsigned) `distance`; fades when thinner than a pixel."""
    return cover(distance - width / 2, pixel) - cover(distance + width / 2, pixel)


def fade(distance: Field, softness: float) -> Field:
    """1 inside, 0 outside, with a smooth edge `softness` wide centred on the outline."""
    t = np.clip(0.5 - distance / softness, 0, 1, dtype=np.float32)
    return t * t * (3 - 2 * t)


def bump(x: Field, y: Field, width: float, height: float) -> Field:
    """exp(−(x/width)² − (y/height)²)."""
    return np.exp(-((x / width) ** 2) - (y / height) ** 2)


def ellipse(x: Field, y: Field, width: float, height: float) -> Field:
    """Distance to an ellipse at the origin with these half axes, first order at the outline."""
    sx, sy = (x / width) ** 2, (y / height) ** 2
    radius = np.sqrt(sx + sy + 1e-9)
    return radius * (radius - 1) / np.sqrt(sx / width**2 + sy / height**2 + 1e-9 / (width * height))


def wedge(x: Field, y: Field, half_width: float, length: float, round_by: float) -> Field:
    """Distance to a triangle with rounded sides: base of ±half_width at y = 0, tip at y = length."""
    slope = half_width / length
    bulge = 0.22 * half_width * np.sin(np.pi * np.clip(y / length, 0, 1, dtype=np.float32))
    side = (np.abs(x) - bulge - slope * (length - y)) / math.hypot(1, slope)
    return -smooth_union(-side, y + round_by, round_by)


def taper(x: Field, y: Field, end: tuple[float, float], start_radius: float, end_radius: float) -> Field:
    """Distance to a drop-shaped limb from the origin to `end`, as thick as the two radii."""
    ex, ey = end
    t = np.clip((x * ex + y * ey) / (ex * ex + ey * ey), 0, 1, dtype=np.float32)
    return np.hypot(x - t * ex, y - t * ey) - (start_radius + (end_radius - start_radius) * t)


def smooth_union(a: Field, b: Field, softness: float) -> Field:
    """Distance to the union of two shapes, with the crease between them filled over about `softness`."""
    h = np.maximum(softness - np.abs(a - b), 0) / softness
    return np.minimum(a, b) - h * h * (softness / 4)


class Noise:
    """Smooth value noise in [-1, 1] over a random lattice that repeats every 64 cells."""

    cells = 64

    def __init__(self, seed: int) -> None:
        lattice = np.random.default_rng(seed).uniform(-1, 1, (2, self.cells, self.cells)).astype(np.float32)
        self._values = lattice.reshape(2, -1)

    def _corner(self, column: Field, row: Field, layer: int = 0) -> Field:
        """The random value at a lattice point (whole numbers as floats, so that sums with it stay float32)."""
        mask = self.cells - 1
        at = (row.astype(np.int32) & mask) * self.cells + (column.astype(np.int32) & mask)
        return np.take(self._values[layer], at)

    def __call__(self, x: Field, y: Field) -> Field:
        """Value at (x, y) in lattice cells."""
        left, top = np.floor(x), np.floor(y)
        fx, fy = x - left, y - top
        fx, fy = fx * fx * (3 - 2 * fx), fy * fy * (3 - 2 * fy)
        upper = self._corner(left, top)
        upper += fx * (self._corner(left + 1, top) - upper)
        lower = self._corner(left, top + 1)
        lower += fx * (self._corner(left + 1, top + 1) - lower)
        return upper + fy * (lower - upper)

    def spots(self, x: Field, y: Field) -> Field:
        """Distance in lattice cells to the nearest of one jittered point a cell."""
        left, top = np.floor(x - 0.5), np.floor(y - 0.5)
        nearest = np.full_like(x, 4)
        for column in (left, left + 1):
            for row in (top, top + 1):
                dx = x - column - 0.5 - 0.27 * self._corner(column, row, 0)
                dy = y - row - 0.5 - 0.27 * self._corner(column, row, 1)
                nearest = np.minimum(nearest, dx * dx + dy * dy)
        return np.sqrt(nearest)
