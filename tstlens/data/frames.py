"""Series out of pandas frames, wide or long.

Only reads the frame: pandas itself is never imported here, so it costs nothing to have this
module loaded. `TimeSeriesData.from_pandas` documents the layouts.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

from tstlens.errors import ArgumentError, LabelError, SeriesShapeError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["series_of_frame"]


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

    Args:
        frame: wide (one row per series) or long (``series`` tells series apart).
        label: column of the label.
        series: long: column of the series' identity.
        time: long: column to sort by.
        channel: long: column of the channel's name.
        value: long: column or columns of the values.

    Raises:
        ArgumentError: a missing column, or arguments that do not go together.
        LabelError: a series with two labels.
        SeriesShapeError: two values for one place, or channels of unequal length.
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
    labels = None
    if label is not None:
        _require(frame, label)
        column = frame[label]
        labels = (column.iloc[:, 0] if column.ndim == 2 else column).tolist()
        frame = frame.drop(columns=label)
    if frame.columns.nlevels == 1:
        return [row[None] for row in frame.to_numpy()], labels
    channels = list(dict.fromkeys(frame.columns.get_level_values(0)))
    columns = {name: [c for c in frame.columns if c[0] == name] for name in channels}
    lengths = {str(name): len(found) for name, found in columns.items()}
    if len(set(lengths.values())) > 1:
        raise SeriesShapeError(f"expected channels of equal length, got {lengths} samples")
    flat = frame[[column for name in channels for column in columns[name]]].to_numpy()
    return list(flat.reshape(len(frame), len(channels), -1)), labels


def _long(
    frame: pd.DataFrame, label: Any, series: Any, time: Any, channel: Any, value: Any
) -> tuple[list[Any], list[Any] | None]:
    named = [column for column in (label, series, time, channel) if column is not None]
    for column in named:
        _require(frame, column)
    if value is None:
        values = [column for column in frame.columns if column not in named]
    else:
        values = list(value) if isinstance(value, list | tuple) else [value]
    for column in values:
        _require(frame, column)
    if not values or (channel is not None and len(values) != 1):
        need = "one value column beside channel=" if channel is not None else "a value column"
        raise ArgumentError(f"expected {need}, got {values}; name it with value=")
    groups = frame.groupby(series, sort=False)
    arrays, labels = [], []
    channels = None if channel is None else sorted(frame[channel].unique().tolist())
    for identity, group in groups:
        if time is not None:
            group = group.sort_values(time, kind="stable")
            place = [time] if channel is None else [channel, time]
            if group.duplicated(place).any():
                raise SeriesShapeError(f"expected one row per {place} in series {identity!r}")
        arrays.append(
            group[values].to_numpy().T
            if channels is None
            else _stack_channels(group, channels, channel, time, values[0], identity)
        )
        if label is not None:
            distinct = group[label].unique().tolist()
            if len(distinct) != 1:
                raise LabelError(f"expected one label for series {identity!r}, got {distinct}")
            labels.append(distinct[0])
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
    flat = group.assign(_order=group[channel].map({name: i for i, name in enumerate(channels)}))
    flat = flat.sort_values("_order", kind="stable")
    return flat[value].to_numpy().reshape(len(channels), -1)


def _require(frame: pd.DataFrame, column: Any) -> None:
    if not isinstance(column, Hashable) or column not in frame.columns:
        raise ArgumentError(f"expected a column {column!r}, got columns {list(frame.columns)[:20]}")
