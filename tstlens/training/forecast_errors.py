"""Errors of forecasts, beside forecasts that need no model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from tstlens.arguments import checked
from tstlens.data.forecasting import ForecastWindows
from tstlens.errors import ArgumentError, SeriesShapeError

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class ForecastErrors:
    """How far forecasts were from what came; steps without a recorded value are not counted.

    Args:
        rmse: root of the mean squared error, in the series' units.
        mae: mean absolute error, in the series' units.
        rmse_by_step: [horizon], the root mean squared error of each step.
        n: windows.
        n_values: recorded values that were compared.
        unit: of the series.
    """

    rmse: float
    mae: float
    rmse_by_step: tuple[float, ...]
    n: int
    n_values: int
    unit: str

    def to_dict(self) -> dict[str, Any]:
        """The errors as plain JSON values."""
        return {**vars(self), "rmse_by_step": list(self.rmse_by_step)}


@checked
def forecast_errors(
    forecast: Float[Tensor, "batch channel horizon"], windows: ForecastWindows
) -> ForecastErrors:
    """Compare forecasts with what came.

    Args:
        forecast: [batch, channel, horizon] in the series' units.
        windows: the windows they are for.

    Raises:
        SeriesShapeError: the forecast has another shape than the windows' future.
    """
    truth = windows.future
    if forecast.shape != truth.shape:
        raise SeriesShapeError(
            f"expected a forecast like the future {list(truth.shape)}, got {list(forecast.shape)}"
        )
    error = (forecast.double().cpu() - truth.double()).flatten(0, 1)  # [window * channel, horizon]
    counted = ~error.isnan()
    if not bool(counted.any()):
        raise ArgumentError("no step has both a forecast and a recorded value, so nothing to count")
    return ForecastErrors(
        rmse=float(error[counted].square().mean().sqrt()),
        mae=float(error[counted].abs().mean()),
        rmse_by_step=tuple(error.square().nanmean(0).sqrt().tolist()),
        n=len(windows),
        n_values=int(counted.sum()),
        unit=windows.unit,
    )


@checked
def naive_forecasts(windows: ForecastWindows) -> dict[str, Float[Tensor, "batch channel horizon"]]:
    """Forecasts that need no model: the last value, the last season, the last season plus growth.

    ``"seasonal naive"`` repeats the last season. ``"seasonal naive with drift"`` adds what the
    mean of the last season is above the mean of the one before, for every season ahead. NaN where
    the sample it repeats is missing.

    Args:
        windows: they need two seasons of samples.

    Raises:
        ArgumentError: fewer than two seasons.
    """
    seen, period = windows.series, windows.period
    if seen.shape[2] < 2 * period:
        raise ArgumentError(
            f"expected windows of two seasons, {2 * period} samples, got {seen.shape[2]}"
        )
    step = torch.arange(windows.future.shape[2])
    season = seen[..., -period:]
    repeated = season[..., step % period]
    growth = season.nanmean(-1, True) - seen[..., -2 * period : -period].nanmean(-1, True)
    place = torch.arange(seen.shape[2]).expand_as(seen)
    last = place.masked_fill(seen.isnan(), -1).amax(-1, keepdim=True)
    return {
        "last value": seen.gather(-1, last).expand_as(windows.future).clone(),
        "seasonal naive": repeated,
        "seasonal naive with drift": repeated + growth * (step // period + 1),
    }


@checked
def errors_table(measured: dict[str, ForecastErrors]) -> pd.DataFrame:
    """One row per forecast: RMSE and MAE in the series' units, and how much was counted."""
    import pandas as pd

    rows = [
        {"forecast": name, "rmse": found.rmse, "mae": found.mae, "n_values": found.n_values}
        for name, found in measured.items()
    ]
    return pd.DataFrame(rows).set_index("forecast")
