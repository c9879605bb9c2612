"""Windows cut from tables are what slicing the table by hand gives, with their times."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tstlens.data import ForecastWindows
from tstlens.data.recordings import samples_per_season
from tstlens.errors import ArgumentError, SeriesShapeError, SeriesValueError

FREQS = ["h", "30min", "D", "B", "W-SUN", "MS", "ME", "QS", "15s"]


def table(n: int = 60, freq: str = "h", start: str = "2023-10-20", tz: str | None = None) -> Any:
    times = pd.date_range(start, periods=n, freq=freq, tz=tz)
    return pd.DataFrame({"t": times, "x": np.arange(n) + 0.5, "y": np.arange(n) ** 2.0})


def by_hand(frame: Any, columns: list[str], n_time: int, horizon: int, stride: int) -> Any:
    values = torch.tensor(frame[columns].to_numpy().T)
    at = list(range(len(frame) - horizon, n_time - 1, -stride))[::-1]
    seen = torch.stack([values[:, a - n_time : a] for a in at]).float()
    return at, seen, torch.stack([values[:, a : a + horizon] for a in at]).float()


@pytest.mark.parametrize("freq", FREQS)
@pytest.mark.parametrize("tz", [None, "Europe/Berlin"])
@pytest.mark.parametrize("stride", [1, 7])
def test_windows_are_slices_of_the_table_at_their_times(freq, tz, stride):
    frame = table(freq=freq, tz=tz)
    windows = ForecastWindows.from_pandas(frame, 20, 6, time="t", stride=stride)
    at, seen, future = by_hand(frame, ["x", "y"], 20, 6, stride)
    assert torch.equal(windows.series, seen) and torch.equal(windows.future, future)
    assert windows.channel_names == ("x", "y")
    for row in (0, len(at) // 2, -1):
        times = windows.times(row)
        assert list(times) == list(frame.t[at[row] - 20 : at[row] + 6])
    assert list(windows[-1:].times()) == list(windows.times(-1))


@pytest.mark.parametrize("how", ["column", "index", "strings", "level", "periods", "shuffled"])
def test_a_table_may_tell_its_times_in_several_ways(how):
    frame = table()
    expected = ForecastWindows.from_pandas(frame, 20, 6, time="t", values=["x"])
    given, time = frame, "t"
    if how == "index":
        given, time = frame.set_index("t"), None
    elif how == "strings":
        given = frame.assign(t=frame.t.dt.strftime("%Y-%m-%dT%H:%M:%S"))
    elif how == "level":
        given = frame.assign(id="a").set_index(["id", "t"])
    elif how == "periods":
        given = frame.assign(t=frame.t.dt.to_period("h"))
    elif how == "shuffled":
        given = frame.sample(frac=1, random_state=1)
    series = "id" if how == "level" else None
    windows = ForecastWindows.from_pandas(given, 20, 6, time=time, series=series, values=["x"])
    assert torch.equal(windows.series, expected.series) and windows.starts == expected.starts


def test_several_series_are_cut_apart_and_keep_their_names():
    frame = pd.concat([table(30).assign(id="b"), table(41, start="2024-01-01").assign(id="a")])
    windows = ForecastWindows.from_pandas(frame, 20, 6, time="t", series="id", stride=2)
    assert windows.ids == ("b",) * 3 + ("a",) * 8
    alone = ForecastWindows.from_pandas(table(41, start="2024-01-01"), 20, 6, time="t", stride=2)
    assert torch.equal(windows[3:].series, alone.series) and windows[3:].starts == alone.starts
    assert windows[[0, 5]].ids == ("b", "a") and len(windows[1]) == 1


@pytest.mark.parametrize("freq", ["h", "D", "MS"])
@pytest.mark.parametrize("missing", ["nan", "previous", "linear"])
def test_times_that_are_left_out_are_named_or_filled(freq, missing):
    frame = table(freq=freq).drop([20, 21, 33])
    with pytest.raises(SeriesShapeError, match=str(table(freq=freq).t[20])[:10]):
        ForecastWindows.from_pandas(frame, 20, 6, time="t")
    windows = ForecastWindows.from_pandas(frame, 20, 6, time="t", missing=missing)
    whole = table(freq=freq)
    whole.loc[[20, 21, 33], ["x", "y"]] = np.nan
    if missing == "previous":
        whole = whole.ffill()
    elif missing == "linear":
        whole[["x", "y"]] = whole[["x", "y"]].interpolate()
    _, seen, future = by_hand(whole, ["x", "y"], 20, 6, 1)
    torch.testing.assert_close(windows.series, seen, equal_nan=True)
    torch.testing.assert_close(windows.future, future, equal_nan=True)


def test_values_that_pandas_itself_calls_missing_are_missing():
    frame = table().astype({"x": "Float64"})
    frame["n"] = pd.array([None, *range(59)], dtype="Int64")
    frame.loc[30, "x"] = pd.NA
    windows = ForecastWindows.from_pandas(frame, 20, 6, time="t", missing="previous", stride=34)
    assert windows.series[0, 2, 0].isnan() and windows.series[0, 2, 1] == 0
    kept = ForecastWindows.from_pandas(frame, 20, 6, time="t", stride=34)
    assert windows.channel_names == ("x", "y", "n") and kept.series[1, 0].isnan().sum() == 0
    assert not windows.series[1].isnan().any()


def test_times_that_come_twice_are_named_or_joined():
    frame = pd.concat([table(), table()[3:5].assign(x=-1.0)])
    with pytest.raises(SeriesShapeError, match=r"several at 2023-10-20 03:00:00, 2023-10-20 04"):
        ForecastWindows.from_pandas(frame, 20, 6, time="t")
    found = [
        float(ForecastWindows.from_pandas(frame, 20, 6, time="t", duplicates=kind).series[0, 0, 3])
        for kind in ("first", "last", "mean")
    ]
    assert found == [3.5, -1.0, 1.25]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda f: f.assign(t=f.t.dt.strftime("%d/%m/%Y")), ArgumentError, "pd.to_datetime"),
        (lambda f: f.assign(t=f.t.where(f.index != 4)), ArgumentError, "none in row 4"),
        (lambda f: f.assign(x="word"), SeriesValueError, "expected numbers in column 'x'"),
        (lambda f: f.assign(x=np.inf), SeriesValueError, "infinity"),
        (lambda f: f[["t"]], ArgumentError, "a column of values"),
        (lambda f: f.drop(columns="t"), ArgumentError, "a column 't'"),
        (lambda f: f[:25], ArgumentError, "leave no window in the 25 samples"),
        (lambda f: f[:0], ArgumentError, "with rows, got none"),
        (lambda f: f.assign(t=f.t + pd.to_timedelta(f.index % 2, unit="s")),
         SeriesShapeError, "beside that grid|row for every time"),
        (lambda f: f.set_index(["t", "y"]), ArgumentError, "the level 'y' too"),
        (lambda f: f.set_index("t", drop=False), ArgumentError, "'t' is a column and a level"),
        (lambda f: f.assign(x=f.x * 1j), SeriesValueError, "expected numbers in column 'x'"),
    ],
)  # fmt: skip
def test_what_cannot_be_cut_is_refused(change, error, words):
    with pytest.raises(error, match=words):
        ForecastWindows.from_pandas(change(table()), 20, 6, time="t")


def test_arrays_and_the_future_that_is_not_known_yet():
    values = np.arange(24.0).reshape(2, 1, 12)
    windows = ForecastWindows.from_numpy(values, 4, 3, stride=2, start=100, open_end=True)
    assert len(windows) == 2 * 4 and windows.ids[:4] == ("0",) * 4
    assert windows.future[3].isnan().all() and windows.series[3, 0].tolist() == [8, 9, 10, 11]
    assert windows.starts[3] == "112" and list(windows.times(3)) == list(range(108, 115))
    dated = ForecastWindows.from_numpy(values[0, 0], 4, 3, start="2024-01-01", freq="D")
    assert dated.starts[0] == "2024-01-05" and dated.period == 7
    with pytest.raises(ArgumentError, match="needs its step"):
        ForecastWindows.from_numpy(values, 4, 3, start="2024-01-01")


def test_gluonts_datasets_and_darts_forms_are_the_same_windows():
    frame = table(40, "D")
    expected = ForecastWindows.from_pandas(frame, 20, 6, time="t", values=["x"])
    entries = [
        {"start": frame.t[0], "target": frame.x.tolist()},
        {"start": pd.Period("2023-10-20", freq="D"), "target": frame.x.to_numpy()},
        {"timestamp": frame.t.tolist(), "target": frame.x.tolist()},
    ]
    for entry, freq in zip(entries, ["D", None, None], strict=True):
        found = ForecastWindows.from_gluonts([entry], 20, 6, freq=freq)
        assert torch.equal(found.series, expected.series) and found.starts == expected.starts
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(
        [{"id": "a", "timestamp": frame.t.tolist(), "target": frame.x.tolist()}] * 2
    )
    found = ForecastWindows.from_datasets(rows, 20, 6)
    assert torch.equal(found[: len(expected)].series, expected.series) and set(found.ids) == {"a"}

    class Darts:
        time_index = pd.DatetimeIndex(frame.t)
        components = pd.Index(["x"])

        def values(self) -> np.ndarray:
            return frame[["x"]].to_numpy()

    found = ForecastWindows.from_darts(Darts(), 20, 6)
    assert torch.equal(found.series, expected.series) and found.channel_names == ("x",)
    with pytest.raises(ArgumentError, match="give freq="):
        ForecastWindows.from_gluonts([{"start": "2024-01-01", "target": [1.0]}], 20, 6)
    with pytest.raises(ArgumentError, match="'target' and 'start'"):
        ForecastWindows.from_gluonts([3], 20, 6)


@pytest.mark.parametrize("shares", [{"test": 0.2}, {"validation": 0.2, "test": 0.2}])
def test_no_target_of_one_stretch_is_a_target_of_another(shares):
    windows = ForecastWindows.from_numpy(np.arange(300.0), 20, 6)
    parts = windows.split_in_time(**shares)
    targets = [set(part.future.flatten().tolist()) for part in parts]
    for before, after in pairwise(targets):
        assert max(before) < min(after)
    assert [part.split for part in parts] == (
        ["train", "test"] if len(parts) == 2 else ["train", "validation", "test"]
    )
    both = pd.concat([table(90).assign(id="a"), table(90, start="2023-10-20 00:15").assign(id="b")])
    apart = ForecastWindows.from_pandas(both, 20, 6, time="t", series="id").split_in_time(**shares)
    last = [max(part.times(row)[-1] for row in range(len(part))) for part in apart]
    first = [min(part.times(row)[20] for row in range(len(part))) for part in apart]
    assert all(set(part.ids) == {"a", "b"} for part in apart)
    assert all(end < begin for end, begin in zip(last[:-1], first[1:], strict=True))
    with pytest.raises(ArgumentError, match="leave no window"):
        windows[:20].split_in_time(test=0.01)


@pytest.mark.parametrize("freq", ["h", "D"])
def test_a_pair_is_the_window_and_the_one_before_or_its_means(freq):
    frame = table(24 * 20, freq)
    windows = ForecastWindows.from_pandas(frame, 24 * 8, 12, time="t", stride=3)
    by = "3D" if freq == "D" else "6h"
    clean, corrupted = windows.pair([-1, -2], back=by)
    steps = 3 if freq == "D" else 6
    assert torch.equal(corrupted.series[:, 0], clean.series[:, 0] - steps)
    assert windows.pair(-1, back=steps)[1].starts == windows.pair(-1, back=by)[1].starts
    with pytest.raises(ArgumentError, match="no window starts at"):
        windows.pair(-1, back=1)
    with pytest.raises(ArgumentError, match="one of back= and to="):
        windows.pair(-1)
    holed = windows.series.clone()
    holed[-1, 0, 5] = torch.nan
    windows = ForecastWindows(
        holed, future=windows.future, starts=windows.starts, freq=freq, period=24
    )
    for to in ["mean", "mean season", "mean week", *(["mean day"] if freq == "h" else [])]:
        clean, mean = windows.pair(-1, to=to)
        times = clean.times()[: clean.n_time]
        key = {
            "mean": np.zeros(clean.n_time),
            "mean season": np.arange(clean.n_time) % 24,
            "mean day": times.hour,
            "mean week": times.dayofweek * 24 + times.hour,
        }[to]
        values = pd.Series(clean.series[0, 0].numpy())
        expected = values.groupby(np.asarray(key)).transform("mean").where(values.notna())
        np.testing.assert_allclose(mean.series[0, 0], expected, rtol=1e-5)


def test_spans_are_the_days_of_the_calendar_and_of_the_clock_that_changes():
    frame = table(24 * 12, "h", "2023-10-25 07:00", tz="Europe/Berlin")
    window = ForecastWindows.from_pandas(frame, 24 * 9, 24, time="t", stride=24)[:1]
    spans = window.spans("1D")
    times = window.times()
    for name, (start, stop) in spans.items():
        days = {time.date() for time in times[start:stop]}
        assert len(days) == 1 and str(days.pop()) in name
    assert sorted(stop - start for start, stop in spans.values())[-1] == 25  # 29 October 2023
    assert [span for span in window.spans(50).values()][-1] == (24 * 9 - 50, 24 * 9)
    assert [stop for _, stop in window.spans("6h").values()][-1] == 24 * 9
    several = ForecastWindows.from_pandas(table(24 * 12), 48, 24, time="t", stride=24)
    assert list(several.spans("1D")) == ["-2", "-1"]
    with pytest.raises(ArgumentError, match="cuts window 1 .* at other samples"):
        ForecastWindows.from_pandas(table(24 * 12), 48, 24, time="t", stride=5).spans("1D")
    counted = ForecastWindows.from_numpy(np.arange(30.0), 10, 2)
    with pytest.raises(ArgumentError, match="these windows count samples"):
        counted.spans("1D")


def test_seasons_are_days_of_hours_weeks_of_days_and_years_of_months():
    found = {freq: samples_per_season(freq) for freq in [*FREQS, "2h", "7D", "YS", None]}
    assert found == {
        "h": 24, "30min": 48, "D": 7, "B": 5, "W-SUN": 52, "MS": 12, "ME": 12, "QS": 4,
        "15s": 5760, "2h": 12, "7D": 1, "YS": 1, None: 1,
    }  # fmt: skip
