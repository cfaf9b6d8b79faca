"""Pictures of images in rows and columns, every image pixel-exact, with a title and labels one can read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from vaetrain.files import write_png
from vaetrain.picture_text import as_it_is

DPI = 100
FONT_SIZE = 9
LINE_HEIGHT = 15
"""Of a line of text, in pixels; a letter is about half as wide."""
SMALLEST_CELL = 80
"""Smaller images are enlarged by a whole factor to at least this side, in pixels."""
GAP = 2


def save_labelled_grid(
    images: UInt8[Tensor, "rows columns c h w"],
    file: Path,
    *,
    title: str,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    captions: Sequence[str] = (),
    columns_per_group: int | None = None,
    rows_per_group: int | None = None,
) -> None:
    """Save a PNG of a grid of images; labels may have several lines, and groups are set apart by wider gaps.

    `captions` has one line for each image, written under it, row by row.
    """
    num_rows, num_columns, _, height, width = images.shape
    scale = -(-SMALLEST_CELL // width) if width < SMALLEST_CELL else 1
    lefts = cell_starts(num_columns, width * scale, columns_per_group)
    caption_height = LINE_HEIGHT if captions else 0
    tops = cell_starts(num_rows, height * scale + caption_height, rows_per_group)
    canvas = np.full((tops[-1] + height * scale + caption_height, lefts[-1] + width * scale, 3), 255, dtype=np.uint8)
    pixels = images.expand(-1, -1, 3, -1, -1).permute(0, 1, 3, 4, 2).cpu().numpy()
    for row, top in enumerate(tops):
        for column, left in enumerate(lefts):
            enlarged = pixels[row, column].repeat(scale, axis=0).repeat(scale, axis=1)
            canvas[top : top + height * scale, left : left + width * scale] = enlarged

    title_lines = title.split("\n")
    longest = max((len(line) for label in row_labels for line in label.split("\n")), default=0)
    margin_left = 10 + round(longest * LINE_HEIGHT * 0.56)
    label_lines = max((label.count("\n") + 1 for label in column_labels), default=0)
    margin_top = 12 + round((len(title_lines) + label_lines) * LINE_HEIGHT * 1.15)
    text_width = round(max(map(len, title_lines)) * LINE_HEIGHT * 0.52)
    total_width = max(margin_left + canvas.shape[1], text_width) + 10
    total_height = margin_top + canvas.shape[0] + 10

    figure = plt.figure(figsize=(total_width / DPI, total_height / DPI), dpi=DPI, facecolor="white")
    # In pixels from the top left corner, the way images are counted.
    figure.figimage(canvas, xo=margin_left, yo=10, origin="upper")

    def write(x: float, y: float, text: str, **style: Any) -> None:
        as_it_is(
            figure.text(x / total_width, 1 - y / total_height, text, fontsize=FONT_SIZE, linespacing=1.15, **style)
        )

    write(10.0, 6.0, title, va="top", weight="bold")
    for left, label in zip(lefts, column_labels, strict=False):
        write(margin_left + left + width * scale / 2, margin_top - 4.0, label, ha="center", va="bottom")
    for top, label in zip(tops, row_labels, strict=False):
        write(margin_left - 6.0, margin_top + top + height * scale / 2, label, ha="right", va="center")
    for number, caption in enumerate(captions):
        left, top = lefts[number % num_columns], tops[number // num_columns]
        y = margin_top + top + height * scale + 1.0
        write(margin_left + left + width * scale / 2, y, caption, ha="center", va="top")
    write_png(figure, file, dpi=DPI)
    plt.close(figure)


def cell_starts(count: int, side: int, per_group: int | None) -> list[int]:
    """Where each of `count` cells of `side` pixels starts; a group's end leaves a gap six times as wide."""
    starts = []
    for cell in range(count):
        groups_before = cell // per_group if per_group else 0
        starts.append(cell * (side + GAP) + groups_before * 5 * GAP)
    return starts
