"""Differentiable augmentation of what a discriminator sees (the policies of Zhao et al. 2020 and their code).

Each image has its own draws, functions of (seed, images seen); an image and its reconstruction share them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

DRAWS = {"colour": 3, "translation": 2, "cutout": 2}
"""Numbers in [0, 1) that each takes."""
LARGEST_SHIFT = 1 / 8
"""Of the side, in either direction; what is shifted in is 0, mid grey."""
CUTOUT = 1 / 2
"""Side of the square that is set to 0, as a share of the image's."""


def num_draws(policy: Sequence[str]) -> int:
    """Numbers in [0, 1) for each image."""
    return sum(DRAWS[name] for name in policy)


def augment(
    images: Float[Tensor, "b c h w"], policy: Sequence[str], draws: Float[Tensor, "b n"]
) -> Float[Tensor, "b c h w"]:
    """Images on [-1, 1] changed by each of `policy` in turn; gradients pass through."""
    start = 0
    for name in policy:
        numbers = draws[:, start : start + DRAWS[name]].unbind(1)
        match name:
            case "colour":
                images = colour(images, *numbers)
            case "translation":
                images = translation(images, *numbers)
            case "cutout":
                images = cutout(images, *numbers)
        start += DRAWS[name]
    return images


def colour(
    images: Float[Tensor, "b c h w"],
    bright: Float[Tensor, " b"],
    saturated: Float[Tensor, " b"],
    contrast: Float[Tensor, " b"],
) -> Float[Tensor, "b c h w"]:
    """Brightness by up to ±½, saturation times 0 to 2, contrast times ½ to 1½."""
    bright, saturated, contrast = (each.view(-1, 1, 1, 1) for each in (bright, saturated, contrast))
    images = images + (bright - 0.5)
    grey = images.mean(1, keepdim=True)
    images = (images - grey) * (2 * saturated) + grey
    mean = images.mean((1, 2, 3), keepdim=True)
    return (images - mean) * (contrast + 0.5) + mean


def translation(
    images: Float[Tensor, "b c h w"], down: Float[Tensor, " b"], right: Float[Tensor, " b"]
) -> Float[Tensor, "b c h w"]:
    """Whole pixels in each direction, as products with shifted identities: their gradient is the same to the bit every time."""
    rows, columns = (shift_matrix(draw, side) for draw, side in zip((down, right), images.shape[2:], strict=True))
    return rows[:, None] @ images @ columns[:, None].mT


def shift_matrix(draw: Float[Tensor, " b"], side: int) -> Float[Tensor, "b side side"]:
    """Those whose product with a column of pixels moves it by up to an eighth of its length."""
    shift = whole(draw, 2 * int(side * LARGEST_SHIFT + 0.5) + 1) - int(side * LARGEST_SHIFT + 0.5)
    place = torch.arange(side, device=draw.device)
    return (place[None, :, None] - place[None, None, :] == shift[:, None, None]).float()


def cutout(
    images: Float[Tensor, "b c h w"], down: Float[Tensor, " b"], right: Float[Tensor, " b"]
) -> Float[Tensor, "b c h w"]:
    """A square, part of which may lie outside, becomes mid grey."""
    rows, columns = (covered(draw, side) for draw, side in zip((down, right), images.shape[2:], strict=True))
    return images * ~(rows[:, None, :, None] & columns[:, None, None, :])


def covered(draw: Float[Tensor, " b"], side: int) -> Tensor:
    """Which of a side's pixels the square covers, (b, side)."""
    length = int(side * CUTOUT + 0.5)
    centre = whole(draw, side + 1 - length % 2)
    place = torch.arange(side, device=draw.device)
    first = centre[:, None] - length // 2
    return (place >= first) & (place < first + length)


def whole(draw: Float[Tensor, " b"], count: int) -> Int64[Tensor, " b"]:
    """One of `count` whole numbers from 0, for each number in [0, 1)."""
    return (draw * count).long().clamp(max=count - 1)
