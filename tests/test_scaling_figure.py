"""scaling.png where measurements failed: it is drawn all the same, and nothing runs off an axis."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from matplotlib.figure import Figure

from vaetrain.config import OptimConfig
from vaetrain.scaling.advice import Advice
from vaetrain.scaling.figure import Stretch, save_figure
from vaetrain.scaling.lr_range import LrCurve, LrRange
from vaetrain.scaling.lr_trials import LrTrial, LrTrials
from vaetrain.scaling.probe import Measurement, Probe

RATES = tuple(1e-4 * 2**number for number in range(30))
PROBE = Probe("fp32", False, (Measurement(1, 0.1, 1.0), Measurement(2, None, None)), 12.0, 10.0)


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """The four panels; warnings are errors."""
    drawn = []
    savefig = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (drawn.append(self), savefig(self, *args, **kwargs))
    )

    def panels(found=None, trials=None, noise=(), counts=(1, 2)):
        advice = [
            Advice(count, 64, 8, 1, OptimConfig(), 1000, 1.0, 0.1, 4 / count**0.5, count**-0.5, ()) for count in counts
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            save_figure([PROBE], found, trials, noise, None, advice, tmp_path / "scaling.png")
        assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
        _, lr, noise_scale, processes, *_ = drawn[-1].axes
        return lr, noise_scale, processes

    return panels


def test_a_first_loss_that_is_not_finite(draw):
    empty = LrCurve(0, (), (), reached_end=False)
    for curves in ((empty,), (empty, LrCurve(1, RATES, tuple(float(30 - n) for n in range(30)), reached_end=True))):
        lr, _, _ = draw(LrRange(curves))
        assert all(text.get_window_extent().x1 <= lr.get_window_extent().x1 for text in lr.texts)
        assert any("not finite before the first step" in " ".join(text.get_text().split()) for text in lr.texts)


def test_a_loss_that_never_falls(draw):
    lr, _, _ = draw(LrRange((LrCurve(0, RATES[:12], tuple(500.0 + 40 * n for n in range(12)), reached_end=False),)))
    assert any("lower --lr-range.lowest" in " ".join(text.get_text().split()) for text in lr.texts)


def test_trainings_that_all_broke(draw):
    found = LrRange((LrCurve(0, RATES, tuple(abs(n - 24) * 10.0 for n in range(30)), reached_end=True),))
    lr, _, _ = draw(found, LrTrials((LrTrial(1e-3, ()), LrTrial(2e-3, ()))))
    assert any("no short training ends with a finite loss" in " ".join(text.get_text().split()) for text in lr.texts)
    lr, _, _ = draw(found, LrTrials((LrTrial(1e-3, (1.0,)), LrTrial(2e-3, (2.0,)))))
    assert "suggested 1.00e-03, at the end of those tried" in lr.get_legend_handles_labels()[1]


def test_noise_scales_below_zero_are_gaps(draw):
    noise = [Stretch(10, 5.0, 4.0), Stretch(20, -3.0, None), Stretch(30, 6.0, 0.0), Stretch(40, 7.0, 8.0)]
    _, axes, _ = draw(noise=noise)
    simple, adam = (line.get_ydata() for line in axes.lines)
    np.testing.assert_array_equal(simple, [5.0, math.nan, 6.0, 7.0])
    np.testing.assert_array_equal(adam, [4.0, math.nan, math.nan, 8.0])


def test_perfect_is_relative_to_one_process_and_labels_stay_inside(draw):
    _, _, axes = draw(counts=(4, 64))
    _, perfect = axes.lines
    np.testing.assert_array_equal(perfect.get_xdata(), [1, 4, 64])
    np.testing.assert_allclose(perfect.get_ydata(), [4.0, 1.0, 0.0625])
    frame = axes.get_window_extent()
    assert all(text.get_window_extent().x1 <= frame.x1 for text in axes.texts)
