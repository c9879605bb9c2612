"""Arguments that many functions here take, checked in one way."""

from __future__ import annotations

import math
from collections.abc import Mapping
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
            raise ArgumentError(f"expected {name} as a positive number, got {value!r}")


def check_dictionary(dictionary: Any) -> None:
    """Raise :class:`ArgumentError` unless this encodes, decodes and has a decoder's weights."""
    if isinstance(dictionary, type) or not all(
        hasattr(dictionary, part) for part in ("W_dec", "encode", "decode")
    ):
        raise ArgumentError(
            f"expected an SAE, got {type(dictionary).__name__}; saes.load(name, hook) loads one, "
            "saes.train(model, data, hook) makes one"
        )


def check_data(data: Any) -> None:
    """Raise :class:`ArgumentError` unless these are TimeSeriesData with at least one series."""
    if not isinstance(data, TimeSeriesData):
        raise ArgumentError(
            f"expected TimeSeriesData, got {type(data).__name__}; TimeSeriesData(series, labels) "
            "makes them from tensors"
        )
    if not len(data):
        raise ArgumentError("data: expected at least one series, got none")


def drawn_by(state: Any, seed: int) -> int:
    """The batches that a stream's ``state_dict`` counts, which must be of this seed.

    Raises:
        ArgumentError: no such state, or of another seed.
    """
    if not isinstance(state, Mapping) or not {"seed", "batches_drawn"} <= set(state):
        raise ArgumentError(f"expected what a stream's state_dict() gave, got {state!r:.100}")
    if state["seed"] != seed:
        raise ArgumentError(f"expected the state of seed {seed}, got {state['seed']}")
    check_at_least(0, batches_drawn=state["batches_drawn"])
    return state["batches_drawn"]
