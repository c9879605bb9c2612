"""Predictors: what of the raw window of every position a unit may follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from tstlens.data import TimeSeriesData
from tstlens.data.window_properties import widened, window_properties, windows
from tstlens.errors import ArgumentError

Predictor = Callable[[np.ndarray, np.ndarray], np.ndarray]
Spans = Sequence[tuple[int, int]]


@dataclass(frozen=True, eq=False)
class Predictors:
    """Values of every predictor at every slot (position of every channel).

    Args:
        values: [series, slot, predictor].
        names: of the predictors.
    """

    values: Float[np.ndarray, "series slot predictor"]
    names: tuple[str, ...]


def predictors_of(
    data: TimeSeriesData,
    spans: Spans,
    per_channel: bool,
    own: Mapping[str, Predictor] | None,
    standard: bool,
) -> Predictors:
    """Level, slope, variance, frequency bands, channel and position of every window, and the
    user's own.

    Raises:
        ArgumentError: no predictor at all, a name used twice, or a function whose result is not
            one finite number per window.
    """
    parts: list[np.ndarray] = []
    names: list[str] = []
    if standard:
        values, found = window_properties(data, spans, per_channel=per_channel)
        parts.append(values)
        names += found
    for name, function in (own or {}).items():
        if name in names:
            raise ArgumentError(f"predictors: {name!r} is the name of a standard one; rename it")
        parts.append(_of_function(data, spans, per_channel, name, function)[:, :, None])
        names.append(name)
    if not parts:
        raise ArgumentError("expected predictors, got none; leave standard=True, or give some")
    return Predictors(np.concatenate(parts, 2), tuple(names))


def _of_function(
    data: TimeSeriesData, spans: Spans, per_channel: bool, name: str, function: Predictor
) -> Float[np.ndarray, "series slot"]:
    columns = []
    n_channels = data.n_channels if per_channel else 1
    shown = windows(data, widened(spans, data.n_time))
    for channel in range(n_channels):
        for window, seen in shown:
            given = window[:, channel : channel + 1] if per_channel else window
            value = np.asarray(function(given, seen > 0), dtype=np.float64)
            if value.shape != (len(data),):
                raise ArgumentError(
                    f"predictor {name!r}: expected one number per series [{len(data)}] from "
                    f"windows {list(given.shape)}, got {list(value.shape)}"
                )
            observed = seen.any(1)
            if not np.isfinite(value[observed]).all():
                raise ArgumentError(f"predictor {name!r} gave NaN or infinity for some windows")
            columns.append(np.where(observed, value, 0))
    return np.stack(columns, 1)
