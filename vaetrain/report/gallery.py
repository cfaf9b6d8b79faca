"""The pictures of a run's figures folder, each with what it shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vaetrain.report.page import absent, columns, fold, picture, side_by_side, subheading
from vaetrain.runs.record import RunRecord

CAPTIONS = {
    "reconstructions": "Reconstructions: validation images above, what the decoder makes of their posterior modes below",
    "samples": "Samples: decoder means at latents drawn from the standard normal prior",
    "interpolations": "Interpolations: decoded latents on the straight line between the codes of two validation images",
    "priors": "Samples by prior: real images first, then a row for each prior fitted to the codes of the training images",
    "nearest": "Nearest: samples beside the training images closest to them, by pixels and by features",
    "latent_interpolations": "Interpolations along the straight line and along the great circle between two codes",
    "latent_traversals": "Latent traversals: the most active latent units, each moved by itself",
    "latent_pca": "Aggregate posterior: latents of validation images on their two widest principal axes, coloured by class",
    "losses": "Loss and distortion",
    "kl": "Rate",
}
"""By name of the file, in the order of the page; others follow."""

DRAWN_AS_CURVES = ("losses", "kl")
"""What the page draws itself, so that they may be folded away."""

IN_COLUMNS = ("reconstructions", "samples", "interpolations")
"""Grids without text, which need not be large."""

MAX_PICTURES = 50
"""A folder may hold any number, and each goes into the page."""

SIDE_BY_SIDE = ("reconstructions", "samples")
"""What is compared between runs."""


def gallery_of_run(recorded: RunRecord, *, leave_out: Sequence[str] = ()) -> str:
    """Every PNG of the run's figures."""
    files = _pictures(recorded)
    if not files:
        return absent(
            f"There are no pictures in {recorded.run.figures.name}/: training draws them at its first validation."
        )
    left_out = len(files) - MAX_PICTURES
    files = [file for file in files[:MAX_PICTURES] if file.stem not in leave_out]
    curves = "".join(_shown(file) for file in files if file.stem in DRAWN_AS_CURVES)
    said = []
    if left_out > 0:
        said.append(absent(f"{left_out:,} more pictures are left out."))
    if not recorded.run.evaluation_file.is_file():
        said.append(absent("Latent traversals, priors and nearest training images are drawn by vaetrain/evaluate.py."))
    small = [_shown(file) for file in files if file.stem in IN_COLUMNS]
    large = [_shown(file) for file in files if file.stem not in (*IN_COLUMNS, *DRAWN_AS_CURVES)]
    return "".join([*said, columns(small), *large, fold("Curves as training drew them", curves) if curves else ""])


def gallery_of_runs(runs: Sequence[RunRecord], labels: Sequence[str]) -> str:
    """The same picture of every run, side by side."""
    parts = []
    for stem in SIDE_BY_SIDE:
        found = [
            subheading(label) + picture(recorded.run.figures / f"{stem}.png", CAPTIONS[stem])
            for recorded, label in zip(runs, labels, strict=True)
        ]
        parts.append(side_by_side(found))
    return "".join(parts)


def _pictures(recorded: RunRecord) -> list[Path]:
    order = {stem: place for place, stem in enumerate(CAPTIONS)}
    return sorted(recorded.run.figures.glob("*.png"), key=lambda file: (order.get(file.stem, len(order)), file.stem))


def _shown(file: Path) -> str:
    return picture(file, CAPTIONS.get(file.stem, file.stem.replace("_", " ")))
