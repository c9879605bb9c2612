"""Windows of recorded series: no test value is ever a target in training."""

from __future__ import annotations

import sys

import pytest
import torch

import tstlens.data.forecasting as forecasting
from tstlens.data import load_forecasting, recorded_series
from tstlens.errors import ArgumentError, DownloadError, UnknownDatasetError

pytest.importorskip("statsmodels")


def recorded():
    from statsmodels.datasets import co2

    return co2.load_pandas().data["co2"]


@pytest.mark.parametrize("step", [1, 7])
def test_windows_are_cuts_of_the_series_at_their_dates(step):
    whole = recorded()
    windows = load_forecasting("co2", "test", n_time=60, horizon=20, step=step)
    assert windows.series.shape == (len(windows), 1, 60) and windows.unit == "ppm"
    for row in (0, len(windows) // 2, len(windows) - 1):
        at = whole.index.get_loc(windows.starts[row])
        seen, future = (torch.tensor(whole.iloc[a:b].to_numpy()).float()
                        for a, b in ((at - 60, at), (at, at + 20)))  # fmt: skip
        torch.testing.assert_close(windows.series[row, 0], seen, equal_nan=True)
        torch.testing.assert_close(windows.future[row, 0], future, equal_nan=True)


def test_no_test_value_is_a_target_in_training(monkeypatch):
    whole = recorded()
    numbered = whole.copy()
    numbered[:] = range(len(whole))
    monkeypatch.setitem(
        forecasting._KNOWN, "co2", forecasting._Recorded(lambda: numbered, 52, "ppm", "")
    )
    train = load_forecasting("co2", "train", n_time=104, horizon=52)
    test = load_forecasting("co2", "test", n_time=104, horizon=52)
    assert train.future.max() < test.future.min() == len(whole) - int(0.2 * len(whole))
    assert train.series.max() < test.future.min()
    assert test.future.max() == len(whole) - 1 and train.series.min() == 0
    assert ((test.series[:, 0, -1] + 1) == test.future[:, 0, 0]).all()


def test_missing_weeks_stay_missing():
    train = load_forecasting("co2", "train", n_time=104, horizon=52)
    assert train.series.isnan().any() and train.future.isnan().any()
    assert not (train.series.isnan().all(2).any() or train.future.isnan().all(2).any())


def test_what_is_refused(monkeypatch):
    with pytest.raises(UnknownDatasetError, match="did you mean 'co2'"):
        load_forecasting("co22")
    with pytest.raises(ArgumentError, match=r"n_time=208 and horizon=999 leave no window in the"):
        load_forecasting("co2", "test", horizon=999)
    with pytest.raises(ArgumentError, match="expected step as an integer of at least 1, got 0"):
        load_forecasting("co2", step=0)
    with pytest.raises(ArgumentError, match=r"expected split in \['train', 'test'\], got 'all'"):
        load_forecasting("co2", "all")
    monkeypatch.setitem(sys.modules, "statsmodels.datasets", None)
    with pytest.raises(DownloadError, match="ships with statsmodels, which is not installed: pip"):
        load_forecasting("co2")
    assert "Mauna Loa" in recorded_series()["co2"]
