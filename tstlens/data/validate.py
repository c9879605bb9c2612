"""The one check that every series passes before anything is computed from it.

Data sets, pairs and models all call `check_series`, so bad input is refused with the same words
wherever it enters. It costs one pass over the values and imports nothing but torch.

Rows picked by an int, a slice, or an array: the indexing that data sets and pairs share.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tstlens.arguments import shown
from tstlens.errors import ArgumentError, RowIndexError, SeriesShapeError, SeriesValueError


def check_series(
    series: Tensor,
    n_channels: int | None = None,
    n_time: int | None = None,
    mask: Tensor | None = None,
    finite: bool = True,
    missing: bool = False,
) -> None:
    """Refuse series that are not ``[batch, channel, time]``, floating point and finite.

    Padded samples (where ``mask`` is False) may hold anything finite; whatever they hold is read
    as zero (see `blanked`).

    Args:
        series: ``[batch, channel, time]``, floating point.
        n_channels: the channel count that is needed, or None for any.
        n_time: the number of samples that is needed, or None for any.
        mask: ``[batch, time]`` bool, True where a sample was observed; None where all were.
        finite: look for NaN and infinity; False saves the pass over the values.
        missing: NaN stands for a missing value and is let through; infinity is not.

    Raises:
        SeriesShapeError: wrong number of axes, channels or samples, or a mask that does not fit.
        SeriesValueError: integer or boolean values, NaN or infinity.

    Example:
        >>> import torch
        >>> check_series(torch.zeros(4, 12, 25), n_channels=12)
        >>> check_series(torch.zeros(4, 25, 12), n_channels=12, n_time=25)
        Traceback (most recent call last):
        ...
        tstlens.errors.SeriesShapeError: expected [batch, channel=12, time=25], got [4, 25, 12]; \
series are channel-first, try series.transpose(1, 2)
    """
    if not isinstance(series, Tensor):
        raise SeriesValueError(
            f"expected a tensor [batch, channel, time], got {type(series).__name__}; "
            "try torch.as_tensor(series) or TimeSeriesData.from_numpy(series)"
        )
    _check_shape(tuple(series.shape), n_channels, n_time)
    if not series.is_floating_point():
        advice = (
            "take a real representation first"
            if series.is_complex()
            else "call series.float() first"
        )
        raise SeriesValueError(f"expected floating point series, got {series.dtype}; {advice}")
    if mask is not None:
        _check_mask(series, mask)
    if finite and missing:
        if bool(series.isinf().any()):
            known = torch.where(series.isnan(), 0.0, series)
            raise SeriesValueError(_describe_first_bad_value(known, mask))
    elif finite and not bool(torch.isfinite(series).all()):
        raise SeriesValueError(_describe_first_bad_value(series, mask))


def blanked(series: Tensor, mask: Tensor | None) -> Tensor:
    """The series with zeros where the mask says padding: what stood there is read by nothing.

    Args:
        series: ``[batch, channel, time]``.
        mask: ``[batch, time]`` bool, True where a sample was observed; None where all were.
    """
    if mask is None:
        return series
    return series.masked_fill(~mask.to(series.device)[:, None], 0.0)


def usable_device(device: str | int | torch.device) -> torch.device:
    """The device of this name, which this machine has to have.

    Raises:
        ArgumentError: torch knows no such device, or this machine lacks it.
    """
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        here = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise ArgumentError(
            f"expected device as one that this machine has ({', '.join(here)}), got {device!r}"
        ) from error
    return found


def check_dtype_name(name: object) -> None:
    """Raise :class:`ArgumentError` unless this is the name of a floating point dtype."""
    found = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ArgumentError(
            f"expected dtype as the name of a floating point dtype, 'float32' say, got {name!r}"
        )


def _check_shape(shape: tuple[int, ...], n_channels: int | None, n_time: int | None) -> None:
    channel = "channel" if n_channels is None else f"channel={n_channels}"
    time = "time" if n_time is None else f"time={n_time}"
    expected = f"expected [batch, {channel}, {time}], got {list(shape)}"
    if len(shape) != 3:
        raise SeriesShapeError(f"{expected}; {_axis_advice(shape, n_channels)}")
    if shape[1] == 0 or shape[2] == 0:
        raise SeriesShapeError(f"{expected}; a series needs at least one channel and one sample")
    wrong_channels = n_channels is not None and shape[1] != n_channels
    wrong_time = n_time is not None and shape[2] != n_time
    if not (wrong_channels or wrong_time):
        return
    swapped_channels = n_channels is None or shape[2] == n_channels
    swapped_time = n_time is None or shape[1] == n_time
    if swapped_channels and swapped_time:
        advice = "series are channel-first, try series.transpose(1, 2)"
    elif wrong_channels:
        advice = f"the series have {shape[1]} channels where {n_channels} are needed"
    else:
        advice = f"the series have {shape[2]} samples where {n_time} are needed"
    raise SeriesShapeError(f"{expected}; {advice}")


def _axis_advice(shape: tuple[int, ...], n_channels: int | None) -> str:
    if len(shape) == 1:
        return "for one series of one channel, try series[None, None]"
    if len(shape) == 2:
        if n_channels is not None and n_channels != 1:
            return "for one series, add the batch axis: series[None]"
        return (
            "for series of one channel, add the channel axis: series[:, None]; "
            "for one series, add the batch axis: series[None]"
        )
    return "series have three axes"


def _check_mask(series: Tensor, mask: Tensor) -> None:
    expected = f"[batch={series.shape[0]}, time={series.shape[2]}]"
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise SeriesShapeError(
            f"expected a bool mask {expected}, got {got}; "
            "True marks observed samples, try mask.bool()"
        )
    if mask.shape != (series.shape[0], series.shape[2]):
        raise SeriesShapeError(f"expected a mask {expected}, got {list(mask.shape)}")
    empty = ~mask.any(dim=1)
    if bool(empty.any()):
        row = int(empty.nonzero()[0, 0])
        raise SeriesShapeError(
            f"expected at least one observed sample per series, got none in row {row} of the "
            "mask; True marks observed samples, False marks padding"
        )


def _describe_first_bad_value(series: Tensor, mask: Tensor | None) -> str:
    bad = ~torch.isfinite(series)
    count = int(bad.sum())
    row, channel, time = (int(i) for i in bad.nonzero()[0])
    value = float(series[row, channel, time])
    name = "NaN" if value != value else ("infinity" if value > 0 else "-infinity")
    others = f" and in {count - 1} more places" if count > 1 else ""
    padded = mask is not None and not bool(mask[row, time])
    if padded:
        advice = "padding must be finite too, try zeros"
    elif value != value:
        advice = "fill or drop missing values"
    else:
        advice = "look for a division by zero, or numbers that float32 cannot hold"
    return (
        f"expected finite series, got {name} at [{row}, {channel}, {time}]{others} "
        f"([batch, channel, time]); {advice}"
    )


def row_indices(index: Any, n: int) -> Tensor:
    """The int64 row numbers that an index picks out of n rows; an int picks one row.

    Args:
        index: an int, a slice, or a list, tuple, array or tensor of ints or booleans.
        n: how many rows there are.

    Raises:
        RowIndexError: outside the rows, or not an index.

    Example:
        >>> row_indices(-1, 4), row_indices([True, False, True], 3)
        (tensor([3]), tensor([0, 2]))
    """
    try:
        if isinstance(index, slice):
            return torch.tensor(range(n)[index], dtype=torch.int64)
        rows = np.asarray(index.cpu() if isinstance(index, Tensor) else index)
        kinds = {type(entry) for entry in index} if isinstance(index, list | tuple) else set()
    except (TypeError, ValueError, RuntimeError, OverflowError, MemoryError) as error:
        raise _refusal(index) from error
    mixed = bool(kinds & {bool, np.bool_}) and rows.dtype.kind != "b"  # numpy makes True a 1
    if rows.size == 0 and rows.ndim == 1 and rows.dtype.kind != "b":
        return torch.zeros(0, dtype=torch.int64)
    if rows.ndim > 1 or rows.dtype.kind not in "biu" or mixed or np.ma.isMaskedArray(index):
        raise _refusal(index)
    if rows.dtype.kind == "b":
        if rows.shape != (n,):
            raise RowIndexError(f"expected a bool index of length {n}, got {list(rows.shape)}")
        return torch.from_numpy(rows.nonzero()[0])
    if bool(((rows < -n) | (rows >= n)).any()):
        raise RowIndexError(f"expected indices within {n} rows, got {shown(index)}")
    rows = torch.from_numpy(np.atleast_1d(rows).astype(np.int64))
    return torch.where(rows < 0, rows + n, rows)


def _refusal(index: Any) -> RowIndexError:
    return RowIndexError(
        "expected an int, a slice, or a list of indices or booleans, got "
        f"{shown(index)}; an index picks rows only, for channels and samples use .series"
    )
