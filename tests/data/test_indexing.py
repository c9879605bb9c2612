from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tstlens.data import Pairs, TimeSeriesData
from tstlens.data.validate import row_indices
from tstlens.errors import ArgumentError, RowIndexError

bounds = st.none() | st.integers(-7, 7)


@given(st.integers(0, 6), bounds, bounds, st.sampled_from([None, 1, 2, -1, -3]))
def test_slices_pick_what_a_list_would_pick(n, start, stop, step):
    index = slice(start, stop, step)
    assert row_indices(index, n).tolist() == list(range(n))[index]


@given(st.lists(st.integers(-5, 4), max_size=6))
def test_lists_arrays_and_tensors_pick_what_numpy_picks(rows):
    expected = np.arange(5)[np.array(rows, dtype=int)].tolist()
    for index in (rows, np.array(rows, dtype=int), torch.tensor(rows, dtype=torch.int64)):
        assert row_indices(index, 5).tolist() == expected


def test_an_int_picks_one_row_and_booleans_the_true_ones():
    assert row_indices(-1, 5).tolist() == [4]
    assert row_indices(np.int64(2), 5).tolist() == [2]
    assert row_indices(np.array([True, False, True]), 3).tolist() == [0, 2]


NO_INDEX = [
    5, -6, [0, 5], [0.5], [[1]], [True], "a", b"a", None, ..., 1.0, np.float64(1), 1j, True,
    np.True_, {1}, {1: 2}, [None], ["a"], [[1], [2, 3]], [True, 1, 0, 1, 0], 2**70, [2**70],
    -(2**70), object(), (row for row in range(2)), slice(0, 4, 0), slice(0.5, None), slice("a"),
    np.zeros((2, 2), int), np.zeros(5), np.ma.array([0, 1], mask=[0, 1]), np.array([None]),
    torch.zeros(5), torch.zeros(2, 2), torch.tensor(True), torch.tensor([1j]), torch.zeros(5,
    device="meta"), torch.eye(3).to_sparse(), np.array(["2020"], dtype="datetime64[Y]"),
    pd.Series([1, None]), [np.True_, 0, 0, 0, 0], torch.ones(4, dtype=torch.bool), (0,
    slice(None)),
]  # fmt: skip


@pytest.mark.parametrize(
    "index", NO_INDEX, ids=lambda index: re.sub(" at 0x.*", "", repr(index))[:30]
)
def test_what_is_outside_or_no_index_is_an_index_error_of_ours(index):
    with pytest.raises(RowIndexError) as caught:
        row_indices(index, 5)
    assert isinstance(caught.value, IndexError) and isinstance(caught.value, ArgumentError)
    data = TimeSeriesData(torch.zeros(5, 1, 4))
    with pytest.raises(RowIndexError):
        data[index]
    with pytest.raises(RowIndexError):
        Pairs(data.series, data.series, torch.zeros(5, dtype=torch.int64))[index]


@pytest.mark.parametrize(
    "index",
    [
        (1, 3), range(1, 4), np.array([1, 3], dtype=np.uint8), torch.tensor(3), np.array(-1),
        torch.tensor([1, -2], dtype=torch.int16), np.array([1], dtype=np.uint64), pd.Series([1, 3]),
        pd.Series([True, False, True, False, True]), [np.int64(1), np.int32(2)], [], np.array([]),
        slice(np.int64(1), None, -1), slice(-99, 99), [False] * 5,
    ],
    ids=repr,
)  # fmt: skip
def test_every_other_kind_of_index_picks_what_numpy_picks(index):
    given = list(index) if isinstance(index, tuple | range) else index
    given = np.asarray(given, dtype=int) if np.size(given) == 0 else given
    expected = np.arange(5)[given if isinstance(given, slice) else np.asarray(given)]
    assert row_indices(index, 5).tolist() == np.atleast_1d(expected).tolist()
