"""Recorded series cut into windows: what a forecaster sees, and what came next.

The stretch that a window's *targets* lie in decides its split, so no value that a model is tested
on was ever a target in training; what it sees before them may reach back into the training
stretch, as it would in use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from tstlens.arguments import Count, checked
from tstlens.errors import ArgumentError, DownloadError, UnknownDatasetError

if TYPE_CHECKING:
    import pandas as pd

TEST_FRACTION = 0.2  # of the recorded samples, at the end


@dataclass(frozen=True)
class ForecastWindows:
    """Windows of one recorded series, in the order of time.

    Args:
        name: of the recorded series.
        split: "train" or "test".
        series: float [batch, channel, time], what a forecaster sees; NaN where nothing was
            recorded.
        future: float [batch, channel, horizon], what came next; NaN where nothing was recorded.
        starts: date of the first step to forecast, one per window.
        period: samples of one season.
        unit: of the values.
    """

    name: str
    split: str
    series: Float[Tensor, "batch channel time"]
    future: Float[Tensor, "batch channel horizon"]
    starts: tuple[str, ...]
    period: int
    unit: str

    def __len__(self) -> int:
        return len(self.series)

    def __repr__(self) -> str:
        _, channel, time = self.series.shape
        return (
            f"ForecastWindows({self.name!r}, {self.split!r}, n={len(self)}, channel={channel}, "
            f"time={time}, horizon={self.future.shape[2]}, first {self.starts[0]}, "
            f"last {self.starts[-1]})"
        )


@dataclass(frozen=True)
class _Recorded:
    """Where a recorded series comes from."""

    read: Callable[[], pd.Series]
    period: int
    unit: str
    summary: str


def _co2() -> pd.Series:
    try:
        from statsmodels.datasets import co2
    except ImportError as error:
        raise DownloadError(
            "the series 'co2' ships with statsmodels, which is not installed: "
            "pip install statsmodels"
        ) from error
    table: Any = co2.load_pandas().data
    return table["co2"]


_KNOWN = {
    "co2": _Recorded(
        _co2,
        52,
        "ppm",
        "weekly carbon dioxide at Mauna Loa, March 1958 to December 2001, 59 of 2284 weeks "
        "missing (Keeling and Whorf 2004, public domain; in statsmodels)",
    )
}


def recorded_series() -> dict[str, str]:
    """Names of the recorded series that :func:`load_forecasting` knows, and what they are."""
    return {name: known.summary for name, known in _KNOWN.items()}


@checked
def load_forecasting(
    name: str,
    split: str = "test",
    n_time: Count = 208,
    horizon: Count = 52,
    step: Count = 1,
) -> ForecastWindows:
    """Windows of a recorded series that ships with a dependency.

    The last fifth of the samples are the test stretch. Windows overlap where ``step`` is shorter
    than they are, so their errors are not independent. A window without a recorded target, or
    without a recorded sample to see, is left out.

    Args:
        name: a recorded series; see :func:`recorded_series`.
        split: "train", or "test" for the last fifth.
        n_time: samples that a forecaster sees.
        horizon: samples to forecast.
        step: samples between the starts of two windows.

    Raises:
        UnknownDatasetError: no recorded series of this name.
        ArgumentError: sizes that leave no window, or another split.
        DownloadError: the package that the series ships with is not installed.

    Example:
        >>> load_forecasting("co2", "test", n_time=208, horizon=52)
        ForecastWindows('co2', 'test', n=405, channel=1, time=208, horizon=52, first 1993-04-10, \
last 2001-01-06)
    """
    if name not in _KNOWN:
        raise UnknownDatasetError(name, _KNOWN, "These are recorded series, to forecast")
    if split not in ("train", "test"):
        raise ArgumentError(f"expected split in ['train', 'test'], got {split!r}")
    known = _KNOWN[name]
    recorded = known.read()
    values = torch.tensor(recorded.to_numpy(), dtype=torch.float32)
    boundary = len(values) - int(TEST_FRACTION * len(values))
    first, last = (n_time, boundary) if split == "train" else (max(boundary, n_time), len(values))
    if last - horizon < first:
        stretch = boundary if split == "train" else len(values) - boundary
        raise ArgumentError(
            f"n_time={n_time} and horizon={horizon} leave no window in the {stretch} samples of "
            f"the {split} stretch of {name!r}"
        )
    targets = torch.arange(first, last - horizon + 1, step)  # of each window's first target
    seen = values[targets[:, None] - n_time + torch.arange(n_time)]
    future = values[targets[:, None] + torch.arange(horizon)]
    kept = ~(seen.isnan().all(1) | future.isnan().all(1))
    dates = [str(date)[:10] for date in recorded.index]
    return ForecastWindows(
        name=name,
        split=split,
        series=seen[kept][:, None],
        future=future[kept][:, None],
        starts=tuple(dates[target] for target in targets[kept].tolist()),
        period=known.period,
        unit=known.unit,
    )
