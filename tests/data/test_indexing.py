from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tstlens.data.indexing import row_indices

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


@pytest.mark.parametrize("index", [5, -6, [0, 5], [0.5], [[1]], [True], "a"])
def test_what_is_outside_or_no_index_is_an_index_error(index):
    with pytest.raises((IndexError, TypeError)):
        row_indices(index, 5)
