"""Forecasts beside what came: one window of a recorded series."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go
from torch import Tensor

from tstlens.arguments import checked
from tstlens.data import ForecastWindows
from tstlens.errors import ArgumentError, SeriesShapeError
from tstlens.figures import style


@checked
def forecast(
    windows: ForecastWindows,
    index: int,
    forecasts: Mapping[str, Tensor],
    *,
    channel: int = 0,
    seen: int | None = None,
    title: str | None = None,
) -> go.Figure:
    """What a forecaster saw, what it said, and what came.

    One window is an anecdote: errors over all of them are in
    :func:`tstlens.training.forecast_errors`.

    Args:
        windows: the windows.
        index: which of them.
        forecasts: what to draw by name, each [batch, channel, horizon] for all windows.
        channel: of the series.
        seen: samples before the first step that are drawn; all where None.
        title: above the figure.

    Returns:
        A plotly figure.

    Raises:
        ArgumentError: no such window or channel.
        SeriesShapeError: a forecast that is not one of all these windows.

    Example:
        >>> from tstlens.data import load_forecasting
        >>> from tstlens.training import naive_forecasts
        >>> windows = load_forecasting("co2")
        >>> figure = forecast(windows, 0, naive_forecasts(windows), seen=104)
    """
    if not -len(windows) <= index < len(windows):
        raise ArgumentError(f"expected a window in 0..{len(windows) - 1}, got {index}")
    if not 0 <= channel < windows.series.shape[1]:
        n_channels = windows.series.shape[1]
        raise ArgumentError(f"expected a channel in 0..{n_channels - 1}, got {channel}")
    before = windows.series[index, channel].numpy()
    if seen is not None:
        before = before[-max(1, seen) :]
    after = windows.future[index, channel].numpy()
    step = np.arange(1, len(after) + 1)
    figure = go.Figure()
    lines = [
        ("seen", np.arange(1 - len(before), 1), before, {"color": style.MUTED, "width": 1.2}),
        ("came", step, after, {"color": style.INK, "width": 2.2}),
    ]
    for number, (name, made) in enumerate(forecasts.items()):
        if made.shape != windows.future.shape:
            raise SeriesShapeError(
                f"expected forecast {name!r} of all windows {list(windows.future.shape)}, got "
                f"{list(made.shape)}"
            )
        line = {"color": style.LINES[number % len(style.LINES)], "width": 1.8, "dash": "dot"}
        if number == 0:
            line["dash"] = "solid"
        lines.append((name, step, made[index, channel].detach().cpu().numpy(), line))
    for name, x, y, line in lines:
        hover = f"{name}<br>step %{{x}}<br>%{{y:.2f}} {windows.unit}<extra></extra>"
        figure.add_trace(
            go.Scatter(x=x, y=y, name=name, mode="lines", line=line, hovertemplate=hover)
        )
    figure.add_vline(x=0.5, line={"color": style.FAINT, "width": 1})
    figure.update_xaxes(title_text="steps from the last one seen", showgrid=False, zeroline=False)
    figure.update_yaxes(title_text=windows.unit)
    heading = title or f"{windows.name}, forecast from {windows.starts[index]}"
    return style.finish(figure, heading, plot_height=260, above=26, left=58)
