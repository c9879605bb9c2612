"""Arguments that many functions here take, checked in one way."""

from __future__ import annotations

from typing import Any

from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError
from tstlens.run import NO_SERIES


def check_dictionary(dictionary: Any) -> None:
    """Raise :class:`ArgumentError` unless this encodes, decodes and has a decoder's weights."""
    if isinstance(dictionary, type) or not all(
        hasattr(dictionary, part) for part in ("W_dec", "encode", "decode")
    ):
        raise ArgumentError(
            f"expected an SAE, got {type(dictionary).__name__}; saes.load(name, hook) loads one, "
            "saes.train(model, data, hook) makes one"
        )


def check_data(data: TimeSeriesData) -> None:
    """Raise :class:`ArgumentError` unless there is at least one series."""
    if not len(data):
        raise ArgumentError(NO_SERIES)
