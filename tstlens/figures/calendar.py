"""Days and hours as a calendar: what each of them does to a forecast."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from tstlens.arguments import Positive, checked
from tstlens.errors import ArgumentError
from tstlens.figures.maps import Panel, Ticks, heat_maps
from tstlens.figures.sweeps import rounded, scale_of, shown
from tstlens.figures.words import number, suffix
from tstlens.patching import SweepResult

_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")


@checked
def calendar(
    result: SweepResult, *, title: str | None = "", limits: Positive | None = None
) -> go.Figure:
    """The effect of every day as weeks by weekdays, or of every hour as days by times of day.

    For a sweep of one window along ``"slice"`` (or ``"time"``): each entry stands at the time that
    it begins at; entries of a whole day or more make a row of a week, shorter ones of a day. Blue
    is better, by the metric's own direction (more, where it has none).

    Args:
        result: with dates: of windows, one pair.
        title: above the figure; "" for one made from the result, None for none.
        limits: the end of the zero-centred scale.

    Raises:
        ArgumentError: a result without dates, of several pairs, or along other axes.

    Example:
        >>> from tstlens import HookedTST, figures, patching
        >>> from tstlens.data import ForecastWindows, load_forecasting
        >>> windows = load_forecasting("co2")
        >>> result = patching.window_sweep(HookedTST.from_pretrained("co2"),
        ...     *windows.pair(-1, back=52), patching.forecast("mean"), unit=4, progress=False)
        >>> figure = figures.calendar(result)
    """
    import pandas as pd

    axes = [axis for axis in result.axes if axis != "pair"]
    if result.times is None or axes not in (["slice"], ["time"]) or result.n_pairs != 1:
        raise ArgumentError(
            "a calendar is of one window with dates, swept along ('slice',) or ('time',): "
            "patching.window_sweep(model, *windows.pair(-1, ...), metric, unit='1D'); got "
            f"{result!r}" + ("" if result.times else " without dates")
        )
    single = result.mean("pair") if "pair" in result.axes else result
    values, grey = shown(single, "effect"), rounded(single)
    stamps = pd.DatetimeIndex(pd.to_datetime(list(result.times), utc=False, format="ISO8601"))
    if axes == ["slice"]:
        spans = result.made["spans"]
        starts = stamps[[start for start, _ in spans.values()]]
        names = list(spans)
    else:
        starts = stamps[list(result.coords["time"])]
        names = [str(start) for start in starts]
    # The first unit may be cut short, and a day of local time may have 23 hours.
    step = (starts[1:] - starts[:-1]).max() if len(starts) > 1 else pd.Timedelta(days=1)
    if step >= pd.Timedelta(hours=23):
        monday = starts.normalize() - pd.to_timedelta(starts.dayofweek, unit="D")
        rows, columns = monday.strftime("%Y-%m-%d"), starts.dayofweek
        across: tuple[str, ...] = tuple(_DAYS)
        wide, down = "weekday", "week of"
    else:
        rows = starts.strftime("%a %Y-%m-%d")
        across = tuple(dict.fromkeys(sorted(starts.strftime("%H:%M"))))
        columns = [across.index(time) for time in starts.strftime("%H:%M")]
        wide, down = "time of day", ""
    order = list(dict.fromkeys(rows))
    grid = np.full((len(order), len(across)), np.nan)
    said = np.full(grid.shape, "", dtype=object)
    faint = np.zeros(grid.shape, dtype=bool)
    unit = suffix(result.unit)
    for entry, (row, column) in enumerate(zip(rows, columns, strict=True)):
        at = order.index(row), int(column)
        if not np.isnan(grid[at]):
            raise ArgumentError(
                f"{names[entry]} falls where another entry is; a calendar shows units of a day, or "
                "parts of a day"
            )
        grid[at], faint[at] = values[entry], grey[entry]
        said[at] = f"<b>{names[entry]}</b><br>{number(values[entry], signed=True)}{unit}"
    scale = scale_of(single, values, "effect", limits, grey)
    heading = f"{result.metric}, by {'day' if wide == 'weekday' else 'hour'}"
    return heat_maps(
        [Panel("", grid, said, faint)],
        Ticks(down, tuple(order)),
        Ticks(wide, across),
        scale,
        title=heading[:1].upper() + heading[1:] if title == "" else title,
        subtitle=f"{result.source} in place of the other series, one at a time"
        if title == ""
        else "",
    )
