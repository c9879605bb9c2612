"""Series out of pandas frames, wide, nested or long.

`TimeSeriesData.from_pandas` documents the layouts. Nothing here guesses an order: times are
compared as what they are, and times that cannot be, or that skip a step, are refused.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from datetime import date
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np

from tstlens.data.labels import NUMBER
from tstlens.errors import ArgumentError, LabelError, SeriesShapeError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["by_columns", "parsed_times", "refuse_missing", "require_column", "series_of_frame"]

_JITTER = 0.25  # share of a step by which a clock may be off before a sample counts as missing
_DATES = ("datetime64", "period", "timedelta64")
_ISO = re.compile(r"[0-9]{4}-[0-9]{2}(-[0-9]{2}([T ][0-9:.,]+ *(Z|[+-][0-9:]{2,6})?)?)?")
_DIGITS = re.compile(r"([0-9]+)")


def series_of_frame(
    frame: pd.DataFrame,
    *,
    label: Any = None,
    series: Any = None,
    time: Any = None,
    channel: Any = None,
    value: Any = None,
) -> tuple[list[Any], list[Any] | None]:
    """The ``[channel, time_i]`` arrays of a frame and its raw labels (None without ``label``).

    Arguments and errors are those of `TimeSeriesData.from_pandas`; beside a column, ``series``,
    ``time`` and ``channel`` may name a level of the index. A series of two labels is a LabelError.
    """
    if not hasattr(frame, "columns"):
        raise ArgumentError(
            f"expected a pandas DataFrame, got {type(frame).__name__}; for arrays use "
            "TimeSeriesData.from_numpy or from_arrays"
        )
    if series is None:
        for key, given in {"time": time, "channel": channel, "value": value}.items():
            if given is not None:
                raise ArgumentError(
                    f"{key}={given!r} belongs to a long frame: also give series=, the column "
                    "that tells series apart"
                )
        return _wide(frame, label)
    return _long(frame, label, series, time, channel, value)


def _wide(frame: pd.DataFrame, label: Any) -> tuple[list[Any], list[Any] | None]:
    if frame.index.nlevels > 1 or _holds_dates(frame.index):
        kind = f"{frame.index.nlevels} levels" if frame.index.nlevels > 1 else "dates"
        raise ArgumentError(
            f"expected one row per series, got an index of {kind}, {list(frame.index.names)}: of a "
            "long frame give series= and time=, columns or levels of the index by name "
            '(frame.rename_axis(["series", "time"]) names them); if each row is a series, '
            "frame.reset_index(drop=True)"
        )
    labels, whole = None, list(frame.columns)
    if label is not None:
        require_column(frame, label)
        column = frame[label]
        labels = (column.iloc[:, 0] if column.ndim == 2 else column).tolist()
        frame = frame.drop(columns=label)
    if frame.columns.nlevels == 1:
        if any(map(_is_series, frame.to_numpy(dtype=object)[:1].flat)):
            cells = frame.to_numpy(dtype=object).tolist()
            return [_nested(row, list(frame.columns), at) for at, row in enumerate(cells)], labels
        _check_columns(list(frame.columns), whole)
        return [row[None] for row in _values(frame)], labels
    channels = list(dict.fromkeys(frame.columns.get_level_values(0)))
    columns = {name: [c for c in frame.columns if c[0] == name] for name in channels}
    lengths = {str(name): len(found) for name, found in columns.items()}
    if len(set(lengths.values())) > 1:
        raise SeriesShapeError(f"expected channels of equal length, got {lengths} samples")
    for name, found in columns.items():
        times = [column[1:] for column in found]
        if times != [column[1:] for column in columns[channels[0]]]:
            raise SeriesShapeError(
                f"expected the same times in every channel, got others in {name!r} than in "
                f"{channels[0]!r}"
            )
        _check_columns([time[0] for time in times])
    flat = _values(frame[[column for name in channels for column in columns[name]]])
    return list(flat.reshape(len(frame), len(channels), -1)), labels


def _nested(cells: list[Any], columns: list[Any], row: int) -> np.ndarray:
    """The ``[channel, time]`` array of a row whose cells are series themselves, as in sktime."""
    if not all(map(_is_series, cells)) or len({len(cell) for cell in cells}) > 1:
        sizes = [len(cell) if _is_series(cell) else "no series" for cell in cells]
        raise SeriesShapeError(
            f"expected a series of the same length in every cell of row {row}, got "
            f"{dict(zip(map(str, columns), sizes, strict=True))}"
        )
    indices = [cell.index for cell in cells if hasattr(cell, "to_frame")]
    for index in indices:
        if not index.equals(indices[0]):
            raise SeriesShapeError(f"expected the same times in every cell of row {row}")
    if indices:
        clocks = _clocks(indices[0].to_series(), f"the index of the cells of row {row}")
        if any(later <= earlier for earlier, later in zip(clocks[0], clocks[0][1:], strict=False)):
            raise SeriesShapeError(f"expected increasing times in the cells of row {row}")
        _check_steps(clocks, [(row, np.arange(len(indices[0])))], "the index of its cells")
    return np.stack([np.asarray(cell) for cell in cells])


def _long(
    frame: pd.DataFrame, label: Any, series: Any, time: Any, channel: Any, value: Any
) -> tuple[list[Any], list[Any] | None]:
    if time is None and frame.index.nlevels == 1 and _holds_dates(frame.index):
        time = "time" if frame.index.name is None else frame.index.name
        frame = frame.rename_axis(time)
    named = [column for column in (label, series, time, channel) if column is not None]
    frame, values = by_columns(frame, named, value)
    if not values or (channel is not None and len(values) != 1):
        need = "one value column beside channel=" if channel is not None else "a value column"
        raise ArgumentError(f"expected {need}, got {values}; name it with value=")
    for column in (series, channel):
        if column is not None:
            refuse_missing(frame[column], f"column {column!r}")
    clocks = [] if time is None else _clocks(frame[time], f"column {time!r}")
    if time is not None:
        frame[time] = clocks[0]
    channels = None if channel is None else _in_order(frame[channel].unique().tolist())
    arrays, labels, rows = [], [], []
    for identity, group in frame.groupby(series, sort=False, observed=True):
        if time is not None:
            group = group.sort_values(time, kind="stable")
            place = [time] if channel is None else [channel, time]
            if group.duplicated(place).any():
                raise SeriesShapeError(f"expected one row per {place} in series {identity!r}")
            rows.append((identity, group.drop_duplicates(time).index.to_numpy()))
        arrays.append(
            _values(group[values]).T
            if channels is None
            else _stack_channels(group, channels, channel, time, values[0], identity)
        )
        if label is not None:
            distinct = group[label].unique().tolist()
            if len(distinct) != 1:
                raise LabelError(f"expected one label for series {identity!r}, got {distinct}")
            labels.append(distinct[0])
    if rows:
        _check_steps(clocks, rows, f"column {time!r}")
    return arrays, (None if label is None else labels)


def _stack_channels(
    group: pd.DataFrame, channels: list[Any], channel: Any, time: Any, value: Any, identity: Any
) -> Any:
    rows = [group[group[channel] == name] for name in channels]
    lengths = {str(name): len(row) for name, row in zip(channels, rows, strict=True)}
    if len(set(lengths.values())) > 1:
        raise SeriesShapeError(
            f"expected channels of equal length in series {identity!r}, got {lengths} samples"
        )
    if time is not None:
        times = [row[time].tolist() for row in rows]
        for name, stamps in zip(channels, times, strict=True):
            if stamps != times[0]:
                raise SeriesShapeError(
                    f"expected the same times in every channel of series {identity!r}, "
                    f"got others in channel {name!r} than in {channels[0]!r}"
                )
    return np.stack([_values(row[[value]])[:, 0] for row in rows])


def by_columns(
    frame: pd.DataFrame, named: Sequence[Any], values: Any
) -> tuple[pd.DataFrame, list[Any]]:
    """A frame whose named levels of the index are columns too, and its columns of values.

    Args:
        frame: the frame.
        named: columns, or levels of the index, that are no values.
        values: column or columns of values; None for all that are left.

    Raises:
        ArgumentError: a column that is not there, or a level that is a column as well.
    """
    levels = [name for name in frame.index.names if name is not None and name in named]
    for level in levels:
        if level in frame.columns:
            raise ArgumentError(f"{level!r} is a column and a level of the index; rename one")
    frame = frame.reset_index(levels) if levels else frame
    frame = frame.reset_index(drop=True)
    if values is None:
        chosen = [column for column in frame.columns if column not in named]
    else:
        chosen = list(values) if isinstance(values, list | tuple) else [values]
    for column in [*named, *chosen]:
        require_column(frame, column)
    return frame, chosen


def _clocks(times: pd.Series, where: str) -> list[np.ndarray]:
    """Times as numbers that sort as they do: the instants, then days and months of a calendar.

    Raises:
        ArgumentError: times that are missing, of several kinds, or that no one order is known of.
    """
    import pandas as pd

    refuse_missing(times, where)
    kind = getattr(times.dtype, "kind", "O")
    if isinstance(times.dtype, pd.CategoricalDtype) or kind not in "iufMm":
        if isinstance(times.dtype, pd.PeriodDtype):
            return [times.astype("int64").to_numpy()]
        given = times.tolist()
        parsed = parsed_times(given)
        if parsed is None:
            raise ArgumentError(
                f"expected times in {where} as numbers or dates of one kind, got "
                f"{', '.join(map(repr, dict.fromkeys(given[:3])))}; convert them first, with "
                "pd.to_datetime(..., format=...) say, or leave time= out to keep the rows' order"
            )
        if isinstance(parsed, np.ndarray):
            return [parsed]
        times = parsed
    elif kind in "iuf":
        numbers = times.to_numpy()
        if kind == "f" and not np.isfinite(numbers).all():
            raise ArgumentError(f"expected finite times in {where}, got infinity")
        return [numbers]
    instants = times.astype("int64").to_numpy()
    if kind == "m":
        return [instants]
    # A day of local time may have 23 hours and a month 28 days without a sample missing.
    wall = times.dt.tz_localize(None)
    if (wall - wall.dt.normalize()).nunique() > 1:
        return [instants]
    found = [instants, wall.dt.normalize().astype("datetime64[s]").astype("int64").to_numpy()]
    if wall.dt.day.nunique() == 1 or wall.dt.is_month_end.all():
        found.append((wall.dt.year * 12 + wall.dt.month).to_numpy())
    return found


def parsed_times(times: list[Any]) -> Any:
    """Times as written: numbers as an array, dates as a pandas series; None for what is neither."""
    import pandas as pd

    if all(isinstance(time, str) for time in times):
        if all(map(NUMBER.fullmatch, times)):
            return np.array([Decimal(time) for time in times], dtype=object)
        forms = [_ISO.fullmatch(time) for time in times]
        zoned = {form is not None and form[3] is not None for form in forms}
        if not all(forms) or len(zoned) > 1:
            return None
        options: dict[str, Any] = {"format": "ISO8601", "utc": zoned == {True}}
    elif all(isinstance(time, int | float) and not isinstance(time, bool) for time in times):
        return np.array(times)
    elif all(isinstance(time, date) for time in times):
        options = {}
    else:
        return None
    try:
        dates = pd.Series(pd.to_datetime(times, **options))
    except (ValueError, TypeError, OverflowError):  # zones beside none, 30 February
        return None
    return dates if dates.dtype.kind == "M" else None


def _check_steps(clocks: list[np.ndarray], rows: list[tuple[Any, np.ndarray]], where: str) -> None:
    """Refuse times that skip one: what follows would be taken for earlier than it was.

    Args:
        clocks: [row] times as numbers, as alternatives.
        rows: of every series, its name and the numbers of its rows in order of time.
        where: the times are from.

    Raises:
        SeriesShapeError: on no clock are all steps of all series the same.
    """
    gap = None
    for clock in clocks:
        steps = [np.diff(clock[row]).astype(float) for _, row in rows]
        least = min((step.min() for step in steps if len(step)), default=0.0)
        uneven = [np.flatnonzero(np.abs(step - least) > _JITTER * least) for step in steps]
        if not any(map(len, uneven)):
            return
        if gap is None:
            series = next(index for index, found in enumerate(uneven) if len(found))
            gap = series, int(uneven[series][0])
    if gap is not None:
        raise SeriesShapeError(
            f"expected the same step between all times in {where}, got another after sample "
            f"{gap[1]} of series {rows[gap[0]][0]!r}: is one missing there? Fill it in, or sort "
            "the rows and leave time= out if the steps do not matter"
        )


def _check_columns(columns: list[Any], whole: Sequence[Any] = ()) -> None:
    """Refuse columns of samples whose names, read as times, are not in order or skip one.

    Args:
        columns: names of the samples, in order; names that are no times may have any order.
        whole: the same with the column of the label, which may be the one that is skipped.

    Raises:
        SeriesShapeError: in words.
    """
    import pandas as pd

    texts = [_DIGITS.split(name) for name in columns if isinstance(name, str)]
    counted = len(texts) == len(columns) and len({(len(t), *t[::2]) for t in texts}) == 1
    if counted and len(texts[0]) == 3:  # "t0", "t1", ... or downwards, "t-3", "t-2", ...
        places = [int(text[1]) for text in texts]
        places = places[::-1] if places[0] > places[-1] and texts[0][0] else places
        clock: Any = np.array(places, dtype=object)
    else:
        clock = parsed_times(columns) if columns else None
    if clock is None:
        return
    clocks = _clocks(clock, "the columns") if isinstance(clock, pd.Series) else [clock]
    if any(not later > earlier for earlier, later in zip(clocks[0], clocks[0][1:], strict=False)):
        raise SeriesShapeError(
            f"expected columns in order of time, got {', '.join(map(str, columns[:6]))}, ...; "
            "give them in their order, frame[[...]], or other names if they are no times"
        )
    try:
        _check_steps(clocks, [("of each row", np.arange(len(columns)))], "the columns")
    except SeriesShapeError:
        if len(whole) <= len(columns):
            raise
        _check_columns(list(whole))


def _in_order(names: list[Any]) -> list[Any]:
    """Channels by name: numbers by value, and the numbers inside of words too (dim_2, dim_10)."""
    if all(isinstance(name, str) for name in names):
        parts = {name: _DIGITS.split(name) for name in names}
        for split in parts.values():
            split[1::2] = map(int, split[1::2])  # type: ignore[assignment]
        return sorted(names, key=lambda name: (parts[name], name))
    try:
        if any(isinstance(name, str) for name in names):
            raise TypeError
        return sorted(names)
    except TypeError:
        shown = ", ".join(map(repr, names[:10]))
        raise ArgumentError(f"expected names of channels of one kind, got {shown}") from None


def _values(frame: Any) -> np.ndarray:
    array = frame.to_numpy()
    kinds = {getattr(dtype, "kind", "O") for dtype in frame.dtypes}
    if array.dtype == object and "f" in kinds and kinds <= set("fiu"):  # pandas' own, with NA
        return frame.to_numpy(dtype="float64", na_value=np.nan)
    return array


def _is_series(cell: Any) -> bool:
    return getattr(cell, "ndim", 0) == 1 or isinstance(cell, list | tuple)


def _holds_dates(index: Any) -> bool:
    return str(index.dtype).startswith(_DATES)


def refuse_missing(column: Any, where: str) -> None:
    """Raise :class:`ArgumentError` unless every row of the column has an entry."""
    missing = column.isna().to_numpy()
    if missing.any():
        raise ArgumentError(
            f"expected an entry in {where} for every row, got none in row {int(missing.argmax())} "
            f"({int(missing.sum())} in all); fill them, or drop those rows"
        )


def require_column(frame: pd.DataFrame, column: Any) -> None:
    """Raise :class:`ArgumentError` unless the frame has one column of this name."""
    if not isinstance(column, Hashable) or column not in frame.columns:
        raise ArgumentError(f"expected a column {column!r}, got columns {list(frame.columns)[:20]}")
    if frame.columns.nlevels == 1 and list(frame.columns).count(column) > 1:
        raise ArgumentError(f"expected one column {column!r}, got several of that name")
