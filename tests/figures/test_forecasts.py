"""The figure of a forecast holds the numbers of the window it is of."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tstlens import figures
from tstlens.data import ForecastWindows
from tstlens.errors import ArgumentError, SeriesShapeError


@pytest.fixture
def windows() -> ForecastWindows:
    starts = ("2000-01-01", "2000-01-08", "2000-01-15")
    return ForecastWindows(
        torch.randn(3, 2, 10),
        future=torch.randn(3, 2, 4),
        starts=starts,
        period=4,
        unit="K",
        name="made",
        split="test",
    )


def test_lines_are_the_windows_numbers_at_their_steps(windows):
    made = {"mine": torch.randn(3, 2, 4), "other": torch.randn(3, 2, 4)}
    figure = figures.forecast(windows, 1, made, channel=1, seen=6)
    lines = {line.name: (np.asarray(line.x), np.asarray(line.y)) for line in figure.data}
    assert list(lines) == ["seen", "came", "mine", "other"]
    np.testing.assert_array_equal(lines["seen"][0], np.arange(-5, 1))
    np.testing.assert_allclose(lines["seen"][1], windows.series[1, 1, -6:])
    for name, values in {"came": windows.future, **made}.items():
        np.testing.assert_array_equal(lines[name][0], [1, 2, 3, 4])
        np.testing.assert_allclose(lines[name][1], values[1, 1])
    assert "2000-01-08" in figure.layout.title.text and figure.layout.yaxis.title.text == "K"


def test_what_is_refused(windows):
    with pytest.raises(ArgumentError, match=r"a window in 0\.\.2, got 3"):
        figures.forecast(windows, 3, {})
    with pytest.raises(ArgumentError, match=r"a channel in 0\.\.1, got 2"):
        figures.forecast(windows, 0, {}, channel=2)
    with pytest.raises(SeriesShapeError, match=r"forecast 'short' of all windows \[3, 2, 4\], got"):
        figures.forecast(windows, 0, {"short": torch.zeros(3, 2, 3)})
