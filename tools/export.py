"""Export a run's trained model: safetensors, a config and a model card that `vaetrain.load` reads anywhere.

python tools/export.py RUN OUT
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from vaetrain.command_line import parse, user_errors


@dataclass(frozen=True)
class ExportArguments:
    """What to export, and where to."""

    run: tyro.conf.Positional[Path]
    """Run directory of the trained model."""

    out: tyro.conf.Positional[Path]
    """Folder for model.safetensors, config.json and README.md."""

    checkpoint: Literal["best", "last"] = "best"
    """Checkpoint with the best validation score, or the newest. EMA weights either way."""


if __name__ == "__main__":
    ARGUMENTS = parse(ExportArguments, __doc__, flags=True)

    from vaetrain.preflight import check_run

    with user_errors():
        check_run(ARGUMENTS.run)

    from vaetrain.export import export  # imports torch, which --help and a wrong path need not wait for

    with user_errors():
        out = export(ARGUMENTS.run, ARGUMENTS.out, checkpoint=ARGUMENTS.checkpoint)
        print(f"exported to {out}")
