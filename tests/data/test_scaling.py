from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tstlens.data import Scaling, TimeSeriesData
from tstlens.errors import ArgumentError, SeriesShapeError

ARRAYS = [
    np.random.default_rng(n).normal([[3.0], [-50.0]], [[0.1], [20.0]], (2, n)) for n in (4, 9)
]


def test_per_channel_statistics_are_those_of_all_observed_samples():
    scaling = Scaling.fit(TimeSeriesData.from_arrays(ARRAYS))
    together = np.concatenate(ARRAYS, axis=1)
    np.testing.assert_allclose(scaling.mean, together.mean(axis=1), rtol=1e-6)
    np.testing.assert_allclose(scaling.std, together.std(axis=1), rtol=1e-5)


def test_per_channel_scaling_is_undone_by_its_inverse():
    data = TimeSeriesData.from_arrays(ARRAYS)
    scaling = Scaling.fit(data)
    scaled = scaling.apply(data)
    assert scaled.scaling == scaling
    assert not scaled.series[0, :, 4:].any()
    back = scaling.inverse(scaled.series, data.mask)
    torch.testing.assert_close(back, data.series, rtol=1e-5, atol=1e-4)


def test_per_series_scaling_standardises_each_channel_of_each_series_without_its_padding():
    data = TimeSeriesData.from_arrays(ARRAYS)
    scaled = Scaling("per_series").apply(data)
    for array, row in zip(ARRAYS, scaled.unpadded(), strict=True):
        expected = (array - array.mean(1, keepdims=True)) / array.std(1, keepdims=True)
        np.testing.assert_allclose(row.numpy(), expected, atol=2e-5)
    assert not scaled.series[0, :, 4:].any()


def test_a_constant_channel_is_only_centred():
    series = torch.full((2, 1, 7), 0.1)
    assert not Scaling("per_series")(series).any()
    scaling = Scaling.fit(TimeSeriesData(series))
    assert scaling.std == (1.0,)
    assert scaling(series).abs().max() < 1e-7


def test_a_scaling_survives_json():
    scaling = Scaling.fit(TimeSeriesData.from_arrays(ARRAYS))
    for each in (scaling, Scaling("per_series")):
        assert Scaling.from_dict(json.loads(json.dumps(each.to_dict()))) == each
    with pytest.raises(ArgumentError, match=r"expected keys kind, mean and std, got \['kind'\]"):
        Scaling.from_dict({"kind": "per_series"})


def test_what_cannot_be_scaled_is_refused():
    data = TimeSeriesData.from_arrays(ARRAYS)
    scaling = Scaling.fit(data)
    with pytest.raises(ArgumentError, match=r"the data are scaled already \(per_channel\)"):
        scaling.apply(scaling.apply(data))
    with pytest.raises(SeriesShapeError, match=r"expected \[batch, channel=2, time\]"):
        scaling(torch.zeros(1, 3, 4))
    with pytest.raises(ArgumentError, match="expected scaling in .*, got 'minmax'"):
        Scaling("minmax")
    with pytest.raises(ArgumentError, match=r"try Scaling.fit\(train\)"):
        Scaling("per_channel")
    with pytest.raises(ArgumentError, match="positive, finite std"):
        Scaling("per_channel", (0.0,), (0.0,))
    with pytest.raises(ArgumentError, match="cannot be inverted"):
        Scaling("per_series").inverse(data.series)
