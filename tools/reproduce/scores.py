"""What a finished run measured, as one flat table of numbers; and means over seeds with their errors."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vaetrain.runs.record import RunRecord

Scores = dict[str, float]


def scores_of(run: Path) -> Scores:
    """The last validation record and the evaluation; what each prior scored stands under PRIOR/eval/…"""
    recorded = RunRecord.read(run).require_whole()
    found = dict(recorded.last_validation)
    if recorded.evaluation is not None:
        found |= recorded.evaluation
        for prior, scores in recorded.evaluation.get("priors", {}).items():
            found |= {f"{prior}/{name}": value for name, value in scores.items()}
    if recorded.images_per_s is not None:
        found["perf/images_per_s"] = recorded.images_per_s
    return {
        name: float(value)
        for name, value in found.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


@dataclass(frozen=True)
class Mean:
    """Of one number over seeds."""

    value: float
    error: float | None
    """Standard error of the mean; None with one seed."""
    num_seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """From the number of each seed, at least one."""
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        return cls(statistics.fmean(values), error, len(values))

    def __str__(self) -> str:
        """To the digits that its error leaves, four without one."""
        if self.error is None:
            return f"{self.value:,.4g}"
        digits = max(0, 1 - math.floor(math.log10(self.error))) if self.error > 0 else 2
        return f"{self.value:,.{digits}f} ± {self.error:,.{digits}f}"


def clearly_differs(a: Mean, b: Mean) -> bool:
    """Whether two means lie further apart than twice the error of their difference; False where an error is unknown."""
    if a.error is None or b.error is None:
        return False
    return abs(a.value - b.value) > 2 * math.hypot(a.error, b.error)


def order_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rank correlation, ties sharing their rank; 0 where one side does not vary."""
    ranks = [_ranks(x), _ranks(y)]
    if len(set(ranks[0])) < 2 or len(set(ranks[1])) < 2:
        return 0.0
    return statistics.correlation(*ranks)


def _ranks(values: Sequence[float]) -> list[float]:
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2 for value in values
    ]
