"""Forecasts beside what came: one window of a recorded series, with lines or as a fan.

One window is an anecdote: errors over all of them are in :func:`tstlens.training.evaluation`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go
from torch import Tensor

from tstlens.arguments import Count, checked
from tstlens.data import ForecastWindows
from tstlens.errors import ArgumentError, SeriesShapeError
from tstlens.figures import marks, style
from tstlens.figures.drawing import draw
from tstlens.model import Forecast


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

    Over dates where the windows have a step, else over steps.

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
    view = _View(windows, index, channel, seen)
    for number, (name, made) in enumerate(forecasts.items()):
        if made.shape != windows.future.shape:
            raise SeriesShapeError(
                f"expected forecast {name!r} of all windows {list(windows.future.shape)}, got "
                f"{list(made.shape)}"
            )
        values = made[view.row, channel].detach().cpu().numpy()
        view.line(name, values, style.LINES[number % len(style.LINES)], "dot" if number else None)
    return view.finished(title)


@draw.register
@checked
def draw_forecast(
    result: Forecast,
    *,
    window: int = -1,
    channel: int = 0,
    seen: Count | None = None,
    beside: Forecast | Mapping[str, Forecast] | None = None,
    title: str | None = "",
) -> go.Figure:
    """The fan of one window: its median, the bands between its quantiles, what was seen and came.

    Args:
        window: which; the last by default.
        channel: of the series.
        seen: samples before the first step that are drawn; twice the horizon where None.
        beside: other forecasts of the same windows, under an intervention say, by name: their
            medians are drawn, each with its widest band.

    Raises:
        ArgumentError: no such window or channel.
        SeriesShapeError: a forecast beside it of other windows or steps.

    Example:
        >>> from tstlens import HookedTST
        >>> from tstlens.data import load_forecasting
        >>> model = HookedTST.from_pretrained("co2")
        >>> figure = model.forecast(load_forecasting("co2")).figure(window=0)
    """
    view = _View(result.windows, window, channel, 2 * result.horizon if seen is None else seen)
    view.fan("forecast", result, style.LINES[0], whole=True)
    others = {"other forecast": beside} if isinstance(beside, Forecast) else dict(beside or {})
    for number, (name, other) in enumerate(others.items(), 1):
        if other.values.shape[:3] != result.values.shape[:3]:
            raise SeriesShapeError(
                f"expected forecast {name!r} [window, channel, step] = "
                f"{list(result.values.shape[:3])}, got {list(other.values.shape[:3])}"
            )
        view.fan(name, other, style.LINES[number % len(style.LINES)], whole=False)
    return view.finished(title if title is None else title or None)


class _View:
    """One window as it is drawn: its axis of time, and what was seen and came."""

    def __init__(self, windows: ForecastWindows, window: int, channel: int, seen: int | None):
        self.windows = windows
        self.row = marks.row_of(window, len(windows), "a window")
        if not 0 <= channel < windows.n_channels:
            raise ArgumentError(f"expected a channel in 0..{windows.n_channels - 1}, got {channel}")
        self.channel = channel
        n_seen = windows.n_time if seen is None else min(windows.n_time, max(1, seen))
        before = windows.series[self.row, channel, -n_seen:].cpu().numpy()
        after = windows.future[self.row, channel].cpu().numpy()
        self.dated = windows.freq is not None
        if self.dated:
            times = windows.times(self.row)
            past, self.x = times[windows.n_time - n_seen : windows.n_time], times[windows.n_time :]
        else:
            past, self.x = np.arange(1 - n_seen, 1), np.arange(1, len(after) + 1)
        self.edge = past[-1] + (self.x[0] - past[-1]) / 2 if len(self.x) else past[-1]
        self.figure = go.Figure()
        self._add("seen", past, before, {"color": style.MUTED, "width": 1.2})
        if not np.isnan(after).all():
            self._add("came", self.x, after, {"color": style.INK, "width": 2.2})

    def _add(self, name: str, x: Any, y: Any, line: dict[str, Any], **more: Any) -> None:
        unit = f" {self.windows.unit}" if self.windows.unit else ""
        at = "%{x|%a %Y-%m-%d %H:%M}" if self.dated else "step %{x}"
        hover = f"{name}<br>{at}<br>%{{y:.4g}}{unit}<extra></extra>"
        self.figure.add_scatter(
            x=x, y=y, name=name, mode="lines", line=line, hovertemplate=hover, **more
        )

    def line(self, name: str, values: np.ndarray, color: str, dash: str | None = None) -> None:
        """A forecast as a line."""
        self._add(name, self.x, values, {"color": color, "width": 1.8, "dash": dash or "solid"})

    def fan(self, name: str, found: Forecast, color: str, whole: bool) -> None:
        """A forecast's bands, all of them or the widest, and its median over them."""
        levels, quantiles = found.levels, found.values[self.row, self.channel].numpy()
        n_bands = len(levels) // 2
        shown = range(n_bands) if whole else range(min(1, n_bands))
        for band in shown:
            low, high = quantiles[:, band], quantiles[:, -1 - band]
            opacity = 0.12 if whole else 0.10
            marks.band(self.figure, self.x, low, high, _faint(color, opacity), legendgroup=name)
        middle = found.median if 0.5 in levels else found.mean
        self.line(name, middle[self.row, self.channel].numpy(), color, None if whole else "dash")
        self.figure.data[-1].legendgroup = name

    def finished(self, title: str | None) -> go.Figure:
        """The figure with its axes and title."""
        windows, figure = self.windows, self.figure
        figure.add_vline(x=self.edge, line={"color": style.FAINT, "width": 1})
        axis = None if self.dated else "steps from the last one seen"
        figure.update_xaxes(title_text=axis, showgrid=False, zeroline=False)
        names = windows.channel_names
        named = [names[self.channel]] if names and len(names) > 1 else []
        figure.update_yaxes(title_text=" · ".join([*named, *([windows.unit] * bool(windows.unit))]))
        of = [part for part in (windows.name, windows.ids[self.row] if windows.ids else "") if part]
        heading = (
            title or f"{', '.join(of)}{', ' * bool(of)}forecast from {windows.starts[self.row]}"
        )
        return style.finish(figure, heading, plot_height=260, above=26, left=58)


def _faint(color: str, opacity: float) -> str:
    red, green, blue = (int(color[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"
