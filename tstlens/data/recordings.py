"""Recorded series on a clock: out of frames, GluonTS, Hugging Face and darts, with regular times.

A :class:`Recording` is one series with the time of its every sample, one step apart. Nothing here
guesses: times that come twice, that are left out, or that lie beside the others' grid are named in
an error, and filled only where the caller says how.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tstlens.arguments import shown
from tstlens.data.frames import by_columns, parsed_times, refuse_missing
from tstlens.errors import ArgumentError, SeriesShapeError, SeriesValueError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Recording", "of_entries", "of_frame", "samples_per_season"]

Fill = Literal["error", "nan", "previous", "linear"]
Twice = Literal["error", "first", "last", "mean"]

_SHOWN = 3  # times that an error names
# Samples of the season that a step suggests, by pandas' name of the step.
_SEASONS = {"D": 7, "B": 5, "W": 52, "MS": 12, "ME": 12, "QS": 4, "QE": 4}


@dataclass(frozen=True, eq=False)
class Recording:
    """One recorded series.

    Args:
        name: of the series.
        times: when each sample was taken, one step apart: dates, or whole numbers.
        values: float [channel, time]; NaN where nothing was recorded.
        channels: a name for each channel.
    """

    name: str
    times: pd.Index
    values: np.ndarray
    channels: tuple[str, ...]

    @property
    def freq(self) -> str | None:
        """The step as pandas writes it; None where times are whole numbers."""
        return getattr(self.times, "freqstr", None)


def samples_per_season(freq: str | None) -> int:
    """Samples of the season that a step suggests: a day of hours, a week of days, a year of months.

    Args:
        freq: the step as pandas writes it; None (and years) give 1.

    Example:
        >>> samples_per_season("30min"), samples_per_season("W-SAT"), samples_per_season(None)
        (48, 52, 1)
    """
    import pandas as pd

    if freq is None:
        return 1
    offset = pd.tseries.frequencies.to_offset(freq)
    named = _SEASONS.get(offset.name.partition("-")[0])
    if named is not None:
        return max(1, named // offset.n) if named % offset.n == 0 else 1
    try:
        per_day = pd.Timedelta(days=1) / pd.Timedelta(offset)
    except ValueError:
        return 1
    return int(per_day) if per_day >= 2 and per_day == int(per_day) else 1


def of_frame(
    frame: pd.DataFrame,
    time: Any = None,
    series: Any = None,
    values: Any = None,
    freq: str | None = None,
    missing: Fill = "error",
    twice: Twice = "error",
) -> list[Recording]:
    """Every series of a frame with a row per time (and per series, where ``series`` is given).

    Args:
        frame: the frame.
        time: column, or level of the index, of the times; None for an index of dates.
        series: column, or level of the index, that tells series apart; None for one series.
        values: columns of the channels; None for all that are left.
        freq: the step, as pandas writes it; None to read it off the times.
        missing: what a time that is left out becomes: ``"error"``, ``"nan"``, or like missing
            values themselves the ``"previous"`` value or one on the ``"linear"`` way to the next.
        twice: which of several rows at one time counts.

    Raises:
        ArgumentError: columns that are not there, or times that are no times.
        SeriesShapeError: times that come twice, are left out, or lie beside the grid.
        SeriesValueError: values that are no numbers.
    """
    from pandas.api.types import is_numeric_dtype

    if not hasattr(frame, "columns"):
        raise ArgumentError(f"expected a pandas DataFrame, got {type(frame).__name__}")
    if not len(frame):
        raise ArgumentError("expected a frame with rows, got none")
    if time is None:
        parts = [frame.index.get_level_values(at) for at in range(frame.index.nlevels)]
        dated = [at for at, part in enumerate(parts) if _dated(part)]
        if len(dated) != 1:
            raise ArgumentError(
                "expected time= as the column of the times, or an index of dates; the frame has "
                f"columns {[str(name) for name in frame.columns[:20]]}"
            )
        names = list(frame.index.names)
        time = names[dated[0]] = "time" if names[dated[0]] is None else names[dated[0]]
        frame = frame.rename_axis(names)
    named = [column for column in (time, series) if column is not None]
    levels = [name for name in frame.index.names if name is not None and name in named]
    if frame.index.nlevels > 1 and len(levels) < frame.index.nlevels:
        others = [name for name in frame.index.names if name not in levels]
        raise ArgumentError(
            f"the frame's index has the level {others[0]!r} too: name the one that tells series "
            "apart as series=, and drop the rest with frame.reset_index(level, drop=True)"
        )
    frame, chosen = by_columns(frame, named, values)
    for column in chosen:
        if frame[column].dtype.kind == "c" or not is_numeric_dtype(frame[column]):
            raise SeriesValueError(
                f"expected numbers in column {column!r}, got {frame[column].dtype}; name the "
                "columns of values with values=[...]"
            )
    if not chosen:
        raise ArgumentError("expected a column of values, got none beside the times")
    where = f"column {time!r}"
    stamps = _stamps(frame[time], where)
    groups: Iterable[tuple[Any, Any]] = [("", frame)]
    if series is not None:
        refuse_missing(frame[series], f"column {series!r}")
        groups = frame.groupby(series, sort=False, observed=True)
    channels = tuple(map(str, chosen))
    found = []
    for identity, group in groups:
        table = group[chosen].astype("float64")
        table.index = stamps[group.index]
        of = f" of series {identity!r}" if series is not None else ""
        table = _filled(
            _regular(_once(table, twice, where + of), freq, missing, where + of), missing
        )
        found.append(Recording(str(identity), table.index, table.to_numpy().T, channels))
        freq = freq or found[0].freq  # one step for all of them
    return found


def of_entries(entries: Iterable[Any], freq: str | None = None) -> list[Recording]:
    """Series as GluonTS and the Hugging Face hub keep them: one mapping or darts series each.

    Args:
        entries: mappings with ``"target"`` ([time] or [channel, time]) and either ``"start"`` or
            a ``"timestamp"`` per sample, and ``"item_id"`` (or ``"id"``) where series have names;
            or objects with ``time_index``, ``values()`` and ``components``, as darts' are.
        freq: the step, as pandas writes it; None to read it off the entries.

    Raises:
        ArgumentError: an entry of another form, a step that cannot be known, or no entries.
    """
    import pandas as pd

    found: list[Recording] = []
    for number, entry in enumerate(entries):
        if hasattr(entry, "time_index"):
            frame = pd.DataFrame(np.asarray(entry.values()), index=entry.time_index)
            frame.columns = [str(name) for name in entry.components]
            own = of_frame(frame.rename_axis("time"), "time", freq=freq)[0]
            found.append(Recording(str(number), own.times, own.values, own.channels))
            continue
        if not hasattr(entry, "get") or entry.get("target") is None:
            raise ArgumentError(
                "expected entries with 'target' and 'start' (or 'timestamp'), as GluonTS has "
                f"them, or darts series, got {shown(entry)}"
            )
        target = np.atleast_2d(np.asarray(entry["target"], dtype=np.float64))
        if target.ndim != 2:
            raise SeriesShapeError(
                f"expected target [time] or [channel, time], got {list(target.shape)}"
            )
        name = str(entry.get("item_id", entry.get("id", number)))
        channels = tuple(str(channel) for channel in range(len(target)))
        if entry.get("timestamp") is not None:
            frame = pd.DataFrame(target.T, columns=list(channels))
            frame["time"] = pd.DatetimeIndex(entry["timestamp"])
            times = of_frame(frame, "time", freq=freq)[0].times
        else:
            start, step = entry.get("start"), freq
            if isinstance(start, pd.Period):
                step, start = freq or start.freqstr, start.to_timestamp()
            if start is None or step is None:
                raise ArgumentError(
                    f"expected 'start' in entry {name!r} and its step: give freq=, 'h' say"
                )
            times = pd.date_range(start, periods=target.shape[1], freq=step)
        found.append(Recording(name, times, target, channels))
    if not found:
        raise ArgumentError("expected at least one series, got none")
    return found


def _stamps(column: pd.Series, where: str) -> pd.Index:
    """Times as dates, or as whole numbers."""
    import pandas as pd

    refuse_missing(column, where)
    if isinstance(column.dtype, pd.PeriodDtype):
        return pd.DatetimeIndex(column.dt.to_timestamp())
    kind = getattr(column.dtype, "kind", "O")
    parsed: Any = column if kind in "iufM" else parsed_times(column.tolist())
    if parsed is not None and getattr(parsed.dtype, "kind", "O") == "M":
        return pd.DatetimeIndex(parsed)
    try:
        numbers = None if parsed is None else np.asarray(parsed, dtype=np.float64)
    except (TypeError, ValueError):
        numbers = None
    if numbers is None or not (numbers == np.round(numbers)).all():
        raise ArgumentError(
            f"expected dates or whole numbers in {where}, got "
            f"{', '.join(map(repr, dict.fromkeys(column.tolist()[:_SHOWN])))}; convert them "
            "first, with pd.to_datetime(..., format=...) say"
        )
    return pd.Index(numbers.astype(np.int64))


def _once(table: pd.DataFrame, twice: Twice, where: str) -> pd.DataFrame:
    """The rows in order of time, one for each."""
    table = table.sort_index(kind="stable")
    again = table.index.duplicated()
    if not again.any():
        return table
    if twice == "error":
        raise SeriesShapeError(
            f"expected one row per time, got several at {_some(table.index[again].unique())} in "
            f'{where}; give duplicates="first", "last" or "mean", or series= if these are several '
            "series (clocks that are put back do this too: dt.tz_localize(...) tells them apart)"
        )
    by_time = table.groupby(level=0)
    return {"first": by_time.first, "last": by_time.last, "mean": by_time.mean}[twice]()


def _regular(table: pd.DataFrame, freq: str | None, missing: Fill, where: str) -> pd.DataFrame:
    """The table on a grid of times one step apart."""
    import pandas as pd

    times = table.index
    grid = _grid(times, freq, where)
    beside = times.difference(grid)
    if len(beside):
        step = getattr(grid, "freqstr", None) or getattr(grid, "step", None)
        raise SeriesShapeError(
            f"expected times one step of {step} apart from {times[0]} on in {where}, got "
            f"{_some(beside)} beside that grid; give freq= if the step is another, or resample "
            "the frame first"
        )
    gaps = grid.difference(times)
    if len(gaps) and missing == "error":
        raise SeriesShapeError(
            f"expected a row for every time, got none at {_some(gaps)} in {where}; give "
            'missing="nan" to keep them as missing values, "previous" or "linear" to fill them'
        )
    return table.reindex(grid) if len(gaps) else table.set_axis(pd.Index(grid), axis=0)


def _grid(times: pd.Index, freq: str | None, where: str) -> pd.Index:
    import pandas as pd

    if not isinstance(times, pd.DatetimeIndex):
        if freq is not None:
            raise ArgumentError(f"freq={freq!r} is for dates, and {where} holds numbers")
        step = int(np.gcd.reduce(np.diff(times))) if len(times) > 1 else 1
        return pd.RangeIndex(int(times[0]), int(times[-1]) + step, step)
    step = freq or _step_of(times)
    if step is None:
        raise ArgumentError(f"the {len(times)} times in {where} do not tell their step; give freq=")
    try:
        grid = pd.date_range(times[0], times[-1], freq=step)
    except ValueError as error:
        raise ArgumentError(
            f"expected freq as pandas writes steps ('30min', 'h', 'D', 'MS'), got {freq!r}"
        ) from error
    # A grid may begin after the first time where a step has days of its own ("MS", "W-SAT").
    return grid


def _step_of(times: pd.DatetimeIndex) -> str | None:
    """The step that most of the times are apart; None where there are too few."""
    import pandas as pd

    if len(times) < 2:
        return None
    known = pd.infer_freq(times) if len(times) > 2 else None
    if known is not None:
        return known
    steps = pd.Series(times[1:] - times[:-1])
    common: Any = steps.mode()[0]
    if common >= pd.Timedelta(days=28):  # months: a stretch without a gap says of which kind
        for step in ("MS", "ME", "QS", "QE", "YS", "YE"):
            if not len(times.difference(pd.date_range(times[0], times[-1], freq=step))):
                return step
    return pd.tseries.frequencies.to_offset(common).freqstr


def _filled(table: pd.DataFrame, missing: Fill) -> pd.DataFrame:
    index = table.index
    if missing == "previous":
        table = table.ffill()
    elif missing == "linear":
        table = table.reset_index(drop=True).interpolate(limit_area="inside").set_axis(index)
    return table


def _dated(index: Any) -> bool:
    return str(index.dtype).startswith(("datetime64", "period"))


def _some(times: Any) -> str:
    """The first few times, and how many more there are."""
    said = ", ".join(str(time) for time in times[:_SHOWN])
    return said if len(times) <= _SHOWN else f"{said} and {len(times) - _SHOWN} more"
