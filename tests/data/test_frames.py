"""Frames in every layout give the arrays that they were made from, or are refused."""

from __future__ import annotations

from datetime import datetime

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError, LabelError, SeriesShapeError, SeriesValueError

N, CHANNELS, TIME = 3, 12, 13
ARRAY = np.arange(N * CHANNELS * TIME, dtype="float32").reshape(N, CHANNELS, TIME)
LABELS = ["b", "a", "b"]
NAMES = [f"dim_{index}" for index in range(CHANNELS)]
CLOCKS = {
    "integers": list(range(TIME)),
    "every second": list(range(0, 2 * TIME, 2)),
    "floats": [0.1 * index for index in range(TIME)],
    "strings of integers": [str(index) for index in range(TIME)],
    "strings of decimals": [f"{9.5 + index}" for index in range(TIME)],
    "strings with a sign": [f"{index - 6}" for index in range(TIME)],
    "hours": list(pd.date_range("2020-01-31 20:00", periods=TIME, freq="h")),
    "days over summer time": list(pd.date_range("2020-03-25", periods=TIME, tz="Europe/Berlin")),
    "hours over winter time": list(
        pd.date_range("2020-10-24 22:00", periods=TIME, freq="h", tz="Europe/Berlin")
    ),
    "ends of months": list(pd.date_range("2020-01-31", periods=TIME, freq="ME")),
    "quarters": list(pd.date_range("2020-01-01", periods=TIME, freq="QS")),
    "periods": list(pd.period_range("2020-01", periods=TIME, freq="M")),
    "spans": list(pd.timedelta_range("0s", periods=TIME, freq="8s")),
    "days as text": [f"{day:%Y-%m-%d}" for day in pd.date_range("2020-02-25", periods=TIME)],
    "stamps as text": [
        f"{hour:%Y-%m-%dT%H:%M:%S}Z" for hour in pd.date_range("2020-02-28", periods=TIME, freq="h")
    ],
    "dates": [day.date() for day in pd.date_range("2020-02-25", periods=TIME)],
    "60 frames a second, in ms": list(
        pd.to_datetime([round(1000 * index / 60) for index in range(TIME)], unit="ms")
    ),
}


def tall(clock, names=NAMES):
    """One row per value: columns who, what, when, value, class."""
    rows = [
        (f"s{n}", names[c], clock[t], ARRAY[n, c, t], LABELS[n])
        for n in range(N)
        for c in range(CHANNELS)
        for t in range(TIME)
    ]
    return pd.DataFrame(rows, columns=["who", "what", "when", "value", "class"])


def broad(clock):
    """One row per series and time, a column per channel."""
    frame = tall(clock).pivot(index=["who", "when"], columns="what", values="value")
    return frame[NAMES].reset_index().assign(**{"class": lambda f: f["who"].map(CLASS)})


CLASS = {f"s{n}": LABELS[n] for n in range(N)}


def same(data, labels=True):
    """Series come in the order in which they appear, so sort them by their first sample."""
    order = data.series[:, 0, 0].argsort()
    np.testing.assert_array_equal(data.series[order].numpy(), ARRAY)
    if labels:
        assert [data.class_names[data.labels[row]] for row in order] == LABELS
    assert data.mask is None


@pytest.mark.parametrize("clock", CLOCKS.values(), ids=CLOCKS)
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_shuffled_rows_of_any_clock_give_the_array_back(clock, seed):
    frame = broad(clock).sample(frac=1, random_state=seed)
    how = {"series": "who", "time": "when", "label": "class"}
    same(TimeSeriesData.from_pandas(frame, **how))
    indexed = frame.set_index(["who", "when"])
    same(TimeSeriesData.from_pandas(indexed, **how))
    molten = tall(clock).sample(frac=1, random_state=seed)
    same(TimeSeriesData.from_pandas(molten, **how, channel="what", value="value"))


def test_an_index_of_dates_is_the_time():
    frame = broad(CLOCKS["hours"]).set_index("when").sample(frac=1, random_state=0)
    same(TimeSeriesData.from_pandas(frame, series="who", label="class"))
    unnamed = frame.rename_axis(None)
    same(TimeSeriesData.from_pandas(unnamed, series="who", label="class"))
    short = frame[frame.index != CLOCKS["hours"][5]]
    with pytest.raises(SeriesShapeError, match="same step"):
        TimeSeriesData.from_pandas(short, series="who", label="class")


def test_nested_and_wide_frames_give_the_array_back():
    cells = [[pd.Series(ARRAY[n, c]) for c in range(CHANNELS)] for n in range(N)]
    same(TimeSeriesData.from_pandas(pd.DataFrame(cells, columns=NAMES)), labels=False)
    nested = pd.DataFrame(cells, columns=NAMES).assign(y=LABELS)
    same(TimeSeriesData.from_pandas(nested, label="y"))
    columns = pd.MultiIndex.from_product([NAMES, range(TIME)])
    wide = pd.DataFrame(ARRAY.reshape(N, -1), columns=columns)
    same(TimeSeriesData.from_pandas(wide), labels=False)
    one = pd.DataFrame(ARRAY[:, 0], columns=[f"t{index}" for index in range(TIME)])
    assert TimeSeriesData.from_pandas(one).series[:, 0].tolist() == ARRAY[:, 0].tolist()
    categorical = broad(CLOCKS["integers"]).astype({"who": "category", "class": "category"})
    categorical = categorical[categorical["who"] != "s1"]
    data = TimeSeriesData.from_pandas(categorical, series="who", time="when", label="class")
    assert len(data) == 2 and data.class_names == ("b",)


WHEN = {"series": "who", "time": "when", "label": "class"}


@pytest.mark.parametrize("clock", CLOCKS.values(), ids=CLOCKS)
def test_a_time_that_is_left_out_or_comes_twice_is_refused(clock):
    frame = broad(clock)
    for missing in (1, TIME // 2):
        gap = frame[frame["when"] != clock[missing]]
        with pytest.raises(SeriesShapeError, match="same step between all times"):
            TimeSeriesData.from_pandas(gap, **WHEN)
        hole = frame.drop(frame.index[missing])
        with pytest.raises(SeriesShapeError, match="same step between all times"):
            TimeSeriesData.from_pandas(hole, **WHEN)
    twice = pd.concat([frame, frame.iloc[[4]]])
    with pytest.raises(SeriesShapeError, match="one row per"):
        TimeSeriesData.from_pandas(twice, **WHEN)


@pytest.mark.parametrize(
    "clock",
    [
        ["first", *map(str, range(1, TIME))],
        [f"{index + 1}/2/2020" for index in range(TIME)],
        [f"{index}:30" for index in range(TIME)],
        [*range(TIME - 1), "12"],
        [*range(TIME - 1), None],
        [*map(str, range(TIME - 1)), None],
        [*map(float, range(TIME - 1)), float("inf")],
        [*pd.date_range("2020-01-01", periods=TIME - 1), pd.NaT],
        ["2020-01-01", *[f"2020-01-{day:02}T00:00Z" for day in range(2, TIME + 1)]],
        [f"2020-02-{day + 20}" for day in range(TIME)],  # to the 32nd of February
        [datetime(2020, 1, 1), *pd.date_range("2020-01-02", periods=TIME - 1, tz="UTC")],
        [True, *[False] * (TIME - 1)],
        [complex(index) for index in range(TIME)],
    ],
    ids=lambda clock: str(clock[-1]),
)
def test_times_without_one_order_are_refused(clock):
    frame = broad(CLOCKS["integers"])
    frame["when"] = pd.Series([*clock] * N)
    with pytest.raises(ArgumentError, match="times in column 'when'|an entry in column 'when'"):
        TimeSeriesData.from_pandas(frame, **WHEN)


@pytest.mark.parametrize("column", ["who", "what"])
def test_rows_without_a_series_or_channel_are_refused(column):
    frame = tall(CLOCKS["integers"]).astype({column: object})
    frame.loc[7, column] = None
    with pytest.raises(ArgumentError, match=f"an entry in column '{column}' for every row.*row 7"):
        TimeSeriesData.from_pandas(frame, **WHEN, channel="what", value="value")
    frame.loc[7, column] = 3  # beside names that are strings
    if column == "what":
        with pytest.raises(ArgumentError, match="channels of one kind"):
            TimeSeriesData.from_pandas(frame, **WHEN, channel="what", value="value")


def test_frames_whose_rows_are_no_series_are_refused():
    frame = broad(CLOCKS["integers"]).drop(columns="class").set_index(["who", "when"])
    for names in (["who", "when"], [None, None]):
        with pytest.raises(ArgumentError, match="expected one row per series, got an index of 2"):
            TimeSeriesData.from_pandas(frame.rename_axis(names))
    with pytest.raises(ArgumentError, match="got an index of dates"):
        TimeSeriesData.from_pandas(pd.DataFrame(ARRAY[0].T, index=CLOCKS["hours"]))
    double = pd.DataFrame(np.ones((2, 3)), columns=["y", "y", "x"])
    with pytest.raises(ArgumentError, match="one column 'y', got several"):
        TimeSeriesData.from_pandas(double, label="y")


@pytest.mark.parametrize(
    "columns",
    [
        sorted(map(str, range(TIME))),
        sorted(f"t{index}" for index in range(TIME)),
        [*range(TIME - 1), TIME],
        [*range(1, TIME), 0],
        [*CLOCKS["hours"][1:], CLOCKS["hours"][0]],
    ],
    ids=str,
)
def test_columns_that_are_not_in_order_of_time_are_refused(columns):
    with pytest.raises(SeriesShapeError, match="columns in order of time|same step"):
        TimeSeriesData.from_pandas(pd.DataFrame(ARRAY[:, 0], columns=columns))
    levels = pd.MultiIndex.from_tuples([(c, t) for c in "xy" for t in columns])
    with pytest.raises(SeriesShapeError, match="columns in order of time|same step"):
        TimeSeriesData.from_pandas(pd.DataFrame(ARRAY[:, :2].reshape(N, -1), columns=levels))


@pytest.mark.parametrize("columns", [[f"t-{9 - i}" for i in range(4)], ["d", "b", "a", "c"]])
def test_other_columns_keep_their_order(columns):
    data = TimeSeriesData.from_pandas(pd.DataFrame(ARRAY[:, 0, :4], columns=columns))
    assert data.series[:, 0].tolist() == ARRAY[:, 0, :4].tolist()
    numbered = pd.DataFrame(ARRAY[:, 0, :4])
    numbered[1] = LABELS  # the label's own column leaves no gap
    data = TimeSeriesData.from_pandas(numbered, label=1)
    assert data.series[:, 0].tolist() == ARRAY[:, 0][:, [0, 2, 3]].tolist()


def test_nested_cells_that_do_not_fit_are_refused():
    cells = [[pd.Series([1.0, 2.0]), pd.Series([3.0, 4.0])]]
    for change, words in (
        (pd.Series([3.0]), "same length in every cell of row 0"),
        (5.0, "same length in every cell of row 0"),
        (pd.Series([3.0, 4.0], index=[1, 2]), "same times in every cell"),
    ):
        frame = pd.DataFrame({"x": [cells[0][0]], "y": [change]})
        with pytest.raises(SeriesShapeError, match=words):
            TimeSeriesData.from_pandas(frame)
    for index in ([1, 0, 2], [0, 1, 3]):
        frame = pd.DataFrame({"x": [pd.Series([1.0, 2.0, 3.0], index=index)]})
        with pytest.raises(SeriesShapeError, match="increasing times|same step"):
            TimeSeriesData.from_pandas(frame)


def test_missing_values_and_labels_are_named():
    frame = pd.DataFrame({"x": pd.array([1.0, None], dtype="Float64"), "y": [1.0, 2.0]})
    with pytest.raises(SeriesValueError, match=r"got NaN at \[1, 0, 0\]"):
        TimeSeriesData.from_pandas(frame)
    for missing in (None, float("nan"), pd.NA, pd.NaT):
        frame = pd.DataFrame({"x": [1.0, 2.0], "y": pd.Series(["a", missing], dtype=object)})
        with pytest.raises(LabelError, match="a label for every series, got .* for series 1"):
            TimeSeriesData.from_pandas(frame, label="y")


@pytest.mark.parametrize("ndim", [2, 3])
@given(st.lists(st.booleans(), min_size=5, max_size=5).filter(any))
def test_samples_under_a_mask_are_not_read(ndim, seen):
    values = np.random.default_rng(0).normal(size=(2, 3, 5)[3 - ndim :]).astype("float32")
    hidden = np.broadcast_to(~np.array(seen), values.shape)
    found = [
        TimeSeriesData.from_numpy(np.ma.array(np.where(hidden, fill, values), mask=hidden))
        for fill in (-999.0, np.nan)
    ]
    listed = [np.ma.array(row, mask=~np.array(seen) | np.zeros(row.shape, bool)) for row in values]
    found.append(TimeSeriesData.from_arrays(listed))
    found.append(TimeSeriesData.from_numpy(listed))
    for data in found:
        kept = values if ndim == 3 else values[:, None]
        np.testing.assert_array_equal(data.series.numpy(), kept * np.array(seen))
        assert (data.mask is None and all(seen)) or data.mask.tolist() == [seen] * len(values)
    given_mask = np.ones((len(values), 5), dtype=bool)
    again = TimeSeriesData.from_numpy(np.ma.array(values, mask=hidden), mask=given_mask)
    assert again.lengths.tolist() == found[0].lengths.tolist()


def test_a_mask_that_differs_between_channels_is_refused():
    array = np.ma.array(np.ones((2, 2, 3)), mask=False)
    array[1, 0, 2] = np.ma.masked
    with pytest.raises(SeriesValueError, match="masked in all channels or in none"):
        TimeSeriesData.from_numpy(array)
    with pytest.raises(SeriesValueError, match="masked in all channels or in none for series 1"):
        TimeSeriesData.from_arrays(list(array))
