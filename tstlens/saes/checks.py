"""Arguments that many functions here take, checked in one way."""

from __future__ import annotations

import math
from typing import Any

import torch

from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError


def check_at_least(least: int, **values: Any) -> None:
    """Raise :class:`ArgumentError` unless every value is a whole number of at least this."""
    for name, value in values.items():
        whole = hasattr(value, "__index__") and not isinstance(value, bool | torch.Tensor)
        if not whole or value < least:
            raise ArgumentError(f"expected {name} as an integer of at least {least}, got {value!r}")


def check_positive(**values: Any) -> None:
    """Raise :class:`ArgumentError` unless every value is a finite number above 0."""
    for name, value in values.items():
        number = hasattr(value, "__float__") and not isinstance(value, str)
        if not number or not 0 < float(value) < math.inf:
            raise ArgumentError(f"{name} must be a positive number, got {value!r}")


def check_data(data: Any) -> None:
    """Raise :class:`ArgumentError` unless these are TimeSeriesData with at least one series."""
    if not isinstance(data, TimeSeriesData):
        raise ArgumentError(
            f"expected TimeSeriesData, got {type(data).__name__}; TimeSeriesData(series, labels) "
            "makes them from tensors"
        )
    if not len(data):
        raise ArgumentError("data: expected at least one series, got none")
