from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tstlens.data import (
    TimeSeriesData,
    corrupt_with_mean,
    corrupt_with_noise,
    corrupt_with_sample,
    corrupt_with_shift,
)
from tstlens.errors import ArgumentError, LabelError, SeriesShapeError

SERIES = torch.from_numpy(np.random.default_rng(0).normal(5.0, 2.0, (3, 2, 10))).float()
RAGGED = TimeSeriesData.from_arrays(
    [np.random.default_rng(n).normal(5.0, 2.0, (2, n)) for n in (4, 10)], ["x", "y"], name="ragged"
)


def outside(pairs, channel, time):
    chosen = torch.zeros(pairs.clean.shape, dtype=torch.bool)
    chosen[:, channel, time] = True
    return pairs.corrupted[~chosen].equal(pairs.clean[~chosen])


def test_a_mean_replaces_the_stretch_of_the_channel_and_nothing_else():
    pairs = corrupt_with_mean(SERIES, target=1, channel=1, time=slice(2, 6))
    expected = SERIES[:, 1, 2:6].numpy().mean(1, keepdims=True).repeat(4, 1)
    np.testing.assert_allclose(pairs.corrupted[:, 1, 2:6].numpy(), expected, rtol=1e-6)
    assert outside(pairs, 1, slice(2, 6)) and pairs.clean.equal(SERIES)
    assert pairs.target.tolist() == [1, 1, 1]
    assert pairs.made == {"how": "corrupt_with_mean", "channel": [1], "time": [2, 3, 4, 5]}


def test_noise_has_the_mean_and_spread_of_what_it_replaces():
    pairs = corrupt_with_noise(SERIES, target=0, channel=0, time=range(1, 9), seed=4)
    new, old = pairs.corrupted[:, 0, 1:9].numpy(), SERIES[:, 0, 1:9].numpy()
    np.testing.assert_allclose(new.mean(1), old.mean(1), rtol=1e-5)
    np.testing.assert_allclose(new.std(1), old.std(1), rtol=1e-5)
    assert outside(pairs, 0, slice(1, 9))
    assert (pairs.corrupted != pairs.clean).sum() == 3 * 8
    again = corrupt_with_noise(SERIES, target=0, channel=0, time=range(1, 9), seed=4)
    other = corrupt_with_noise(SERIES, target=0, channel=0, time=range(1, 9), seed=5)
    assert again.corrupted.equal(pairs.corrupted) and not other.corrupted.equal(pairs.corrupted)
    assert pairs.made["seed"] == 4


def test_another_sample_is_copied_in_place():
    donor = -SERIES[0]
    pairs = corrupt_with_sample(SERIES, donor, target=torch.tensor([0, 1, 2]), time=[0, -1])
    assert pairs.corrupted[:, :, [0, 9]].equal(donor[:, [0, 9]].expand(3, 2, 2))
    assert outside(pairs, slice(None), [0, 9])
    assert pairs.target.tolist() == [0, 1, 2]
    own = corrupt_with_sample(SERIES, -SERIES, target=0)
    assert own.corrupted.equal(-SERIES)


@given(st.integers(-25, 25))
def test_a_shift_is_circular_and_undone_by_its_opposite(samples):
    pairs = corrupt_with_shift(SERIES, samples, target=0, channel=1)
    np.testing.assert_array_equal(pairs.corrupted[:, 1], np.roll(SERIES[:, 1], samples, axis=1))
    assert outside(pairs, 1, slice(None))
    assert corrupt_with_shift(pairs.corrupted, -samples, 0, channel=1).corrupted.equal(SERIES)


def test_padding_stays_at_the_end_and_out_of_every_statistic():
    first = RAGGED.unpadded()[0]
    shifted = corrupt_with_shift(RAGGED, 1)
    np.testing.assert_array_equal(shifted.corrupted[0, :, :4], np.roll(first, 1, axis=1))
    mean = corrupt_with_mean(RAGGED)
    np.testing.assert_allclose(mean.corrupted[0, :, 0], first.mean(1), rtol=1e-6)
    noise = corrupt_with_noise(RAGGED)
    np.testing.assert_allclose(noise.corrupted[0, :, :4].mean(1), first.mean(1), rtol=1e-5)
    for pairs in (shifted, mean, noise):
        assert not pairs.corrupted[0, :, 4:].any()
        assert pairs.corrupted_mask.equal(RAGGED.mask) and pairs.clean_mask.equal(RAGGED.mask)


def test_a_data_set_brings_labels_rows_and_name():
    pairs = corrupt_with_shift(RAGGED, 2)
    assert pairs.target.tolist() == [0, 1]
    assert pairs.clean_index.tolist() == pairs.corrupted_index.tolist() == [0, 1]
    assert pairs.made["data"] == "ragged" and pairs.made["samples"] == 2
    assert json.loads(json.dumps(pairs.made)) == pairs.made


def test_one_series_needs_no_batch_axis():
    assert corrupt_with_mean(SERIES[0], target=2).clean.shape == (1, 2, 10)


def test_stretches_that_cannot_be_corrupted_are_refused():
    with pytest.raises(ArgumentError, match="at least 2 observed samples, got 1 in series 0"):
        corrupt_with_mean(SERIES, target=0, time=3)
    with pytest.raises(ArgumentError, match="got only padding in series 0"):
        corrupt_with_noise(RAGGED, time=slice(5, 9))
    with pytest.raises(ArgumentError, match=r"expected time within 0..9 and not empty, got 10"):
        corrupt_with_mean(SERIES, target=0, time=10)
    with pytest.raises(ArgumentError, match=r"expected channel within 0..1 and not empty"):
        corrupt_with_mean(SERIES, target=0, channel=[])


def test_donors_that_do_not_fit_are_refused():
    with pytest.raises(SeriesShapeError, match=r"donor \[2, 10\] or \[3, 2, 10\], got \[1, 2, 9\]"):
        corrupt_with_sample(SERIES, SERIES[0, :, :9], target=0)
    with pytest.raises(ArgumentError, match="got padding at sample 4 for series 0"):
        corrupt_with_sample(SERIES, RAGGED[0], target=0, time=slice(2, 6))


@pytest.mark.usefixtures("no_shape_checks")
def test_a_target_is_needed_where_there_are_no_labels():
    with pytest.raises(LabelError, match="expected target, the true class of the series"):
        corrupt_with_mean(SERIES)
    with pytest.raises(LabelError, match="expected target as class index, got torch.float32"):
        corrupt_with_mean(SERIES, target=torch.ones(3))
    with pytest.raises(SeriesShapeError, match=r"expected target as \[pair=3\], got \[2\]"):
        corrupt_with_mean(SERIES, target=torch.tensor([0, 1]))
