"""Runs side by side: configuration, data, code, packages, machine and results, and whether their records are equal.

python tools/compare_runs.py RUN RUN [RUN ...]      (exports and sample sets too)
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from vaetrain.command_line import parse, user_errors
from vaetrain.files import replace_file
from vaetrain.runs.comparison import Comparison, Result


@dataclass(frozen=True)
class CompareArguments:
    """What to compare, and how much of it to show."""

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """Two or more run directories, exports or sample sets."""

    all: bool = False
    """Show what is the same, too."""

    json: Path | None = None
    """Also write everything to this file."""


def main(arguments: CompareArguments) -> None:
    """Print what differs, then the table."""
    if len(arguments.paths) < 2:
        raise ValueError("name at least two run directories")
    comparison = Comparison(tuple(Result.read(path) for path in arguments.paths))
    print(comparison.headline())
    if between := comparison.code_between(Path(__file__).parent):
        print(between)
    print(f"\n{comparison.table(everything=arguments.all)}")
    if arguments.json is not None:
        replace_file(arguments.json, (json.dumps(comparison.to_json(), indent=2) + "\n").encode())
        print(f"\nwritten to {arguments.json}")


if __name__ == "__main__":
    ARGUMENTS = parse(CompareArguments, __doc__, flags=True)
    with user_errors():
        main(ARGUMENTS)
