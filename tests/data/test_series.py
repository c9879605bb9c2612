from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError, LabelError, SeriesShapeError, SeriesValueError


def toy(n=5):
    series = torch.arange(n * 6.0).reshape(n, 2, 3)
    return TimeSeriesData(series, torch.arange(n) % 2, ("no", "yes"), name="toy", split="train")


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 3))
def test_padding_and_unpadding_gives_the_arrays_back(lengths, n_channels):
    generator = np.random.default_rng(0)
    arrays = [generator.normal(size=(n_channels, n)).astype("float32") for n in lengths]
    data = TimeSeriesData.from_arrays(arrays)
    assert data.lengths.tolist() == lengths
    assert (data.mask is None) == (len(set(lengths)) == 1)
    for array, back in zip(arrays, data.unpadded(), strict=True):
        np.testing.assert_array_equal(array, back.numpy())
    if data.mask is not None:
        assert not data.series.masked_select(~data.mask[:, None]).any()


def test_slices_carry_labels_mask_and_names_along():
    data = TimeSeriesData.from_arrays(
        [np.ones((1, n)) * n for n in (1, 2, 3, 3)], ["b", "a", "b", "a"], name="toy"
    )
    part = data[torch.tensor([2, 0])]
    assert part.series[:, 0, 0].tolist() == [3.0, 1.0]
    assert part.labels.tolist() == [1, 1]
    assert part.mask.tolist() == [[True] * 3, [True, False, False]]
    assert (part.name, part.class_names, len(part)) == ("toy", ("a", "b"), 2)
    assert data[2:].mask is None
    assert data[-1].labels.tolist() == [0]
    assert len(data[data.labels == 1]) == 2
    assert len(data[[]]) == 0
    assert [one.series[0, 0, 0].item() for one in data] == [1.0, 2.0, 3.0, 3.0]


def test_from_numpy_numbers_raw_labels_and_keeps_values():
    array = np.random.default_rng(0).normal(size=(3, 2, 4))
    data = TimeSeriesData.from_numpy(array, labels=np.array(["10", "9", "10"]))
    assert data.series.dtype == torch.float32
    np.testing.assert_allclose(data.series.numpy(), array, rtol=1e-6)
    assert data.labels.tolist() == [1, 0, 1]
    assert data.class_names == ("9", "10")
    univariate = TimeSeriesData.from_numpy(array[:, 0, ::-1])
    assert univariate.series.shape == (3, 1, 4)
    assert univariate.labels is None and univariate.n_classes == 0


def test_the_data_do_not_share_memory_with_the_array_they_came_from():
    array = np.zeros((1, 1, 3), dtype="float32")
    data = TimeSeriesData.from_numpy(array)
    array[:] = 1
    assert not data.series.any()


def test_a_wide_frame_is_one_row_per_series():
    frame = pd.DataFrame({"t0": [1.0, 4.0], "y": ["b", "a"], "t1": [2.0, 5.0]}, index=[7, 3])
    data = TimeSeriesData.from_pandas(frame, label="y")
    assert data.series.tolist() == [[[1.0, 2.0]], [[4.0, 5.0]]]
    assert data.labels.tolist() == [1, 0]


def test_a_wide_frame_with_two_column_levels_has_channels():
    columns = pd.MultiIndex.from_tuples([("x", 0), ("y", 0), ("x", 1), ("y", 1)])
    frame = pd.DataFrame([[1.0, 3.0, 2.0, 4.0]], columns=columns)
    assert TimeSeriesData.from_pandas(frame).series.tolist() == [[[1.0, 2.0], [3.0, 4.0]]]
    with pytest.raises(SeriesShapeError, match=r"equal length, got \{'x': 2, 'y': 1\} samples"):
        TimeSeriesData.from_pandas(frame[[("x", 0), ("x", 1), ("y", 0)]])


LONG = pd.DataFrame(
    {
        "id": ["p", "p", "q", "p", "q"],
        "t": [2, 0, 1, 1, 0],
        "x": [3.0, 1.0, 5.0, 2.0, 4.0],
        "y": [30.0, 10.0, 50.0, 20.0, 40.0],
        "who": ["u", "u", "v", "u", "v"],
    }
)


def test_a_long_frame_gives_the_same_with_one_column_per_channel_or_one_row_per_value():
    wide = TimeSeriesData.from_pandas(LONG, series="id", time="t", label="who")
    molten = LONG.melt(["id", "t", "who"], ["x", "y"], var_name="c").sample(frac=1, random_state=0)
    molten = molten.sort_values("id")
    tall = TimeSeriesData.from_pandas(molten, series="id", time="t", channel="c", label="who")
    for data in (wide, tall):
        assert [one.tolist() for one in data.unpadded()] == [
            [[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]],
            [[4.0, 5.0], [40.0, 50.0]],
        ]
        assert data.labels.tolist() == [0, 1]


def test_a_long_frame_without_time_keeps_the_order_of_rows():
    data = TimeSeriesData.from_pandas(LONG, series="id", value="x")
    assert [one.tolist() for one in data.unpadded()] == [[[3.0, 1.0, 2.0]], [[5.0, 4.0]]]


def test_frames_that_do_not_make_series_are_refused():
    with pytest.raises(ArgumentError, match="expected a column 'z', got columns"):
        TimeSeriesData.from_pandas(LONG, series="z")
    with pytest.raises(ArgumentError, match="time='t' belongs to a long frame: also give series="):
        TimeSeriesData.from_pandas(LONG, time="t")
    with pytest.raises(LabelError, match=r"one label for series 'p', got \[30.0, 10.0, 20.0\]"):
        TimeSeriesData.from_pandas(LONG, series="id", label="y", value="x")
    twice = pd.concat([LONG, LONG.iloc[:1]])
    with pytest.raises(SeriesShapeError, match=r"one row per \['t'\] in series 'p'"):
        TimeSeriesData.from_pandas(twice, series="id", time="t", value="x")
    molten = LONG.melt(["id", "t"], ["x", "y"]).iloc[1:]
    with pytest.raises(SeriesShapeError, match=r"in series 'p', got \{'x': 2, 'y': 3\} samples"):
        TimeSeriesData.from_pandas(molten, series="id", time="t", channel="variable")
    with pytest.raises(ArgumentError, match="one value column beside channel="):
        TimeSeriesData.from_pandas(LONG, series="id", channel="who")


@pytest.mark.usefixtures("no_shape_checks")
def test_bad_values_are_refused_with_their_place():
    array = np.zeros((2, 1, 3))
    array[1, 0, 2] = np.nan
    with pytest.raises(SeriesValueError, match=r"got NaN at \[1, 0, 2\]"):
        TimeSeriesData.from_numpy(array)
    with pytest.raises(SeriesValueError, match=r"got infinity at \[0, 0, 0\]"):
        TimeSeriesData.from_numpy(np.full((1, 1, 2), 1e300))
    with pytest.raises(SeriesValueError, match=r"got int64; call .float\(\) on a tensor"):
        TimeSeriesData.from_numpy(np.zeros((2, 1, 3), dtype="int64"))
    with pytest.raises(SeriesValueError, match=r"got torch.int64; call series.float\(\) first"):
        TimeSeriesData(torch.zeros(2, 1, 3, dtype=torch.int64))


def test_channels_last_is_caught_where_it_shows():
    with pytest.raises(SeriesShapeError, match=r"channel-first, try series.transpose\(1, 2\)"):
        TimeSeriesData.from_numpy(np.zeros((4, 25, 12)), n_channels=12)
    with pytest.raises(SeriesShapeError, match=r"for series 1; series are channel-first, try"):
        TimeSeriesData.from_arrays([np.zeros((9, 2)), np.zeros((7, 2))])
    with pytest.raises(SeriesShapeError, match=r"expected \[channel=2, time\] as in series 0"):
        TimeSeriesData.from_arrays([np.zeros((2, 9)), np.zeros((3, 8))])


def test_arrays_longer_than_asked_for_are_not_cut():
    data = TimeSeriesData.from_arrays([np.ones(3), np.ones(4)], n_time=6)
    assert data.series.shape == (2, 1, 6) and data.lengths.tolist() == [3, 4]
    with pytest.raises(SeriesShapeError, match="at most n_time=3 samples, got 4 for series 1"):
        TimeSeriesData.from_arrays([np.ones(3), np.ones(4)], n_time=3)
    with pytest.raises(SeriesShapeError, match="at least one series, got an empty list"):
        TimeSeriesData.from_arrays([])


@pytest.mark.usefixtures("no_shape_checks")
def test_labels_must_fit_series_and_classes():
    series = torch.zeros(3, 1, 4)
    with pytest.raises(LabelError) as caught:
        TimeSeriesData(series, torch.tensor([0, 2, 1]), ("a", "b"))
    assert str(caught.value) == "expected labels in 0..1 (2 classes), got 2 for series 1"
    with pytest.raises(SeriesShapeError, match=r"one label per series, \[n=3\], got \[2\]"):
        TimeSeriesData.from_numpy(series.numpy(), labels=["a", "b"])
    assert TimeSeriesData(series, torch.tensor([0, 2, 1])).class_names == ("0", "1", "2")


def test_moving_and_printing_keep_everything():
    data = toy()
    assert repr(data) == "TimeSeriesData('toy', 'train', n=5, channel=2, time=3, classes=2)"
    moved = data.to("cpu")
    assert moved.labels.equal(data.labels) and moved.series.equal(data.series)
    assert moved.class_names == data.class_names
    with pytest.raises(AttributeError):
        data.name = "other"
