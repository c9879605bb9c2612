"""Hostile values in every place: what comes back is a result or an error of ours, and soon.

``TSTLENS_FUZZ_SECONDS=3600`` draws at random for that long; without it, the same few draws are
made every time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.faults.test_hostile import within
from tests.test_arguments import _public_functions
from tstlens.data import Pairs, TimeSeriesData
from tstlens.errors import TstlensError

pytestmark = pytest.mark.usefixtures("no_shape_checks")

SECONDS = float(os.environ.get("TSTLENS_FUZZ_SECONDS", "0"))


def _deep(levels: int) -> list[Any]:
    nested: list[Any] = []
    for _ in range(levels):
        nested = [nested]
    return nested


def _endless() -> Iterator[int]:
    return iter([0, -1, 10**30])


class _Odd:
    """Says that it is an array, a sequence and a number, and is none of them."""

    dtype, shape, ndim = "no dtype", "no shape", 0

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def __len__(self) -> int:
        return 2**31


# Made anew for each call, as iterators are used up.
HOSTILE: dict[str, Any] = {
    "none": lambda: None,
    "2**31": lambda: 2**31,
    "10**400": lambda: 10**400,
    "-1": lambda: -1,
    "1e30": lambda: 1e30,
    "nan": lambda: float("nan"),
    "infinity": lambda: float("-inf"),
    "complex": lambda: 1 + 2j,
    "true": lambda: True,
    "empty text": lambda: "",
    "half a pair": lambda: "\ud800",
    "nul": lambda: "a\0b",
    "long text": lambda: "x" * 100_000,
    "bytes": lambda: b"\xff\x00",
    "list": list,
    "deep list": lambda: _deep(900),
    "deeper list": lambda: _deep(50_000),
    "mixed list": lambda: [1, "a", None, torch.zeros(1)],
    "iterator": _endless,
    "generator": lambda: (n for n in (1, 2)),
    "set": lambda: {1, 2},
    "dict": lambda: {"a": {"b": None}},
    "range": lambda: range(2**62),
    "slice": lambda: slice(None, None, -1),
    "ellipsis": lambda: ...,
    "class": lambda: int,
    "function": lambda: len,
    "odd": _Odd,
    "sparse": lambda: torch.zeros(3, 3).to_sparse(),
    "sparse number": lambda: torch.tensor(1).to_sparse(),
    "meta": lambda: torch.zeros(3, device="meta"),
    "meta number": lambda: torch.zeros((), device="meta"),
    "bfloat16": lambda: torch.ones(2, 3, 4, dtype=torch.bfloat16),
    "complex tensor": lambda: torch.zeros(2, dtype=torch.complex64),
    "mask": lambda: torch.tensor([True, False]),
    "empty tensor": lambda: torch.zeros(0),
    "nan number": lambda: torch.tensor(float("nan")),
    "quantized": lambda: torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    "objects": lambda: np.array([None, "a"], dtype=object),
    "structured": lambda: np.zeros(2, dtype=[("a", "i4")]),
    "time": lambda: np.datetime64("NaT"),
    "frame": lambda: pd.DataFrame({"a": [None]}),
    "missing": lambda: pd.NA,
    "categories": lambda: pd.Series(["a", None], dtype="category"),
}
CHECKED = {
    called: function
    for called, function in _public_functions().items()
    if hasattr(function, "taken")
}
DATA = TimeSeriesData(torch.arange(24.0).reshape(4, 2, 3), torch.tensor([0, 1, 0, 1]))
PAIRS = Pairs(DATA.series[:2], DATA.series[2:], torch.tensor([0, 1]))


def survives(call: Any) -> None:
    """A result, or an error of ours, within five seconds."""
    with within(5):
        try:
            call()
        except TstlensError as error:
            assert len(str(error)) < 5_000  # readable: no value is quoted at length


@pytest.mark.parametrize("value", HOSTILE)
def test_every_argument_is_taken_or_refused_in_words(value):
    for function in CHECKED.values():
        for name in function.__annotations__:
            survives(lambda f=function, n=name: f.taken(n, HOSTILE[value]()))


@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize("rows", [DATA, PAIRS], ids=["data", "pairs"])
def test_rows_are_found_or_refused_in_words(rows, value):
    survives(lambda: rows[HOSTILE[value]()])
    survives(lambda: rows[HOSTILE[value](), 0])


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.complex_numbers(),
    st.text(max_size=8),
    st.binary(max_size=8),
    st.sampled_from(sorted(HOSTILE)).map(lambda name: HOSTILE[name]()),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.tuples(inner, inner),
        st.dictionaries(st.text(max_size=4), inner, max_size=3),
        st.builds(slice, inner, inner, inner),
    ),
    max_leaves=6,
)


def test_drawn_values_are_taken_or_refused_in_words():
    until = time.monotonic() + SECONDS
    names = [(called, name) for called in CHECKED for name in CHECKED[called].__annotations__]

    @settings(
        max_examples=10_000 if SECONDS else 300,
        derandomize=not SECONDS,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(names), VALUES)
    def draw(place, value):
        called, name = place
        survives(lambda: CHECKED[called].taken(name, value))
        survives(lambda: DATA[value])

    draw()
    while time.monotonic() < until:
        draw()
