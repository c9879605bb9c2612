"""Which latents go with a class or a property of the window, against scikit-learn and scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse import csc_matrix
from scipy.stats import linregress, pearsonr
from sklearn.metrics import roc_auc_score

from tests.saes import hand_made as made
from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError, LabelError
from tstlens.saes.reading import Activity, class_association, property_association
from tstlens.saes.reading.result import correlations, window_properties


def sparse_activity(n_series=60, n_pos=10, n_latents=8, seed=0, share=0.3):
    rng = np.random.default_rng(seed)
    dense = rng.exponential(size=(n_series * n_pos, n_latents))
    dense = np.round(dense, 1) * (rng.random(dense.shape) < share)  # rounded: with ties
    observed = np.ones(len(dense), dtype=bool)
    return Activity(csc_matrix(dense), observed, n_series, 1, n_pos), dense


def test_auc_is_scikit_learns_for_every_latent_and_class_with_ties():
    activity, dense = sparse_activity()
    labels = np.random.default_rng(1).integers(0, 4, 60)
    found = class_association(activity, labels, 5, n_permutations=100)
    scores = dense.reshape(60, 10, 8).max(1)
    for latent in range(8):
        for label in range(4):
            expected = roc_auc_score(labels == label, scores[:, latent])
            assert found.auc[latent, label] == pytest.approx(expected, abs=1e-6)
    assert np.isnan(found.auc[:, 4]).all()  # a class without series


def test_a_planted_class_latent_stands_out_and_silent_ones_are_chance():
    labels = np.repeat(np.arange(3), 20)
    _, dense = sparse_activity(n_latents=40)
    grid = dense.reshape(60, 10, 40)
    grid[labels == 1, :, 0] += 50
    activity = Activity(csc_matrix(dense), np.ones(600, dtype=bool), 60, 1, 10)
    found = class_association(activity, labels, 3, n_permutations=400)
    assert (found.best[0], found.best_auc()[0]) == (1, 1.0)
    assert found.p[0] == pytest.approx(1 / 401) and found.q[0] < 0.15
    assert (found.q[1:] > 0.05).all()
    assert found.p[1:].mean() == pytest.approx(0.5, abs=0.15)
    assert 0.05 < found.chance[1:].mean() < 0.2
    np.testing.assert_allclose(found.active_share[0, 1], 1.0)


def test_p_values_are_uniform_where_there_is_nothing():
    activity, _ = sparse_activity(n_latents=300, seed=3)
    labels = np.random.default_rng(4).permutation(np.repeat(np.arange(4), 15))
    p = class_association(activity, labels, 4, n_permutations=200).p
    rate = (p <= 0.05).mean()
    assert 0.015 < rate < 0.09, rate


def test_dead_latents_have_no_q_and_do_not_count_as_tests():
    activity, dense = sparse_activity()
    dense[:, 3] = 0
    dead = Activity(csc_matrix(dense), activity.observed, 60, 1, 10)
    found = class_association(dead, np.arange(60) % 2, 2, n_permutations=100)
    assert np.isnan(found.q[3]) and np.isfinite(found.q[[0, 1, 2, 4]]).all()


def test_window_properties_are_those_of_numpy_and_scipy():
    data = made.labelled(n=3, n_channels=2, n_time=16)
    activity, _ = sparse_activity(n_series=3, n_pos=2, n_latents=2)
    found = window_properties(data, activity, ((0, 8), (8, 16)))
    names = {name: index for index, name in enumerate(found.names)}
    values = data.series.double().numpy()
    for pos in range(2):
        for channel in range(2):
            window = values[1, channel, 8 * pos : 8 * pos + 8]
            own = {
                "level": window.mean(),
                "slope": linregress(np.arange(8), window).slope,
                "variance": window.var(),
            }
            for kind, expected in own.items():
                at = names[f"{kind}, channel {channel}"]
                assert found.values[1, pos, at] == pytest.approx(expected)
            bands = [
                names[f"{b} frequencies, channel {channel}"] for b in ("low", "middle", "high")
            ]
            assert found.values[1, pos, bands].sum() == pytest.approx(window.var())
        level = names["level, mean of channels"]
        assert found.values[1, pos, level] == pytest.approx(
            values[1, :, 8 * pos : 8 * pos + 8].mean()
        )
    np.testing.assert_allclose(found.values[:, :, names["position"]], [[0, 1]] * 3)


@pytest.mark.parametrize(("cycles", "band"), [(2, "low"), (4, "middle"), (7, "high")])
def test_a_sine_has_its_variance_in_its_band(cycles, band):
    wave = torch.sin(2 * torch.pi * cycles * torch.arange(16) / 16)
    data = TimeSeriesData(wave.expand(1, 1, 16).clone())
    activity, _ = sparse_activity(n_series=1, n_pos=1, n_latents=1)
    found = window_properties(data, activity, ((0, 16),))
    values = dict(zip(found.names, found.values[0, 0], strict=True))
    assert values[f"{band} frequencies"] == pytest.approx(values["variance"])
    assert values["variance"] == pytest.approx(0.5)


def test_padded_samples_take_no_part_in_properties():
    data = made.labelled(n=8, padded=True)
    activity, _ = sparse_activity(n_series=8, n_pos=1, n_latents=1)
    found = window_properties(data, activity, ((0, 16),))
    names = {name: index for index, name in enumerate(found.names)}
    for index, row in enumerate(data.unpadded()):
        one = row[0].double().numpy()
        got = found.values[index, 0]
        assert got[names["level, channel 0"]] == pytest.approx(one.mean())
        assert got[names["variance, channel 0"]] == pytest.approx(one.var())
        slope = linregress(np.arange(len(one)), one).slope
        assert got[names["slope, channel 0"]] == pytest.approx(slope)


def test_narrow_spans_are_widened_and_stay_within_the_series():
    from tstlens.data.window_properties import widened

    assert widened(((0, 1), (9, 10), (19, 20)), 20) == ((0, 5), (6, 14), (16, 20))
    assert widened(((2, 14),), 20) == ((2, 14),)


def test_r_is_scipys_over_observed_positions():
    data = made.labelled(n=20, n_time=16, padded=True)
    rng = np.random.default_rng(0)
    observed = data.mask.numpy().ravel()
    dense = rng.exponential(size=(320, 3)) * (rng.random((320, 3)) < 0.4) * observed[:, None]
    activity = Activity(csc_matrix(dense), observed, 20, 1, 16)
    spans = tuple((t, t + 1) for t in range(16))
    properties = window_properties(data, activity, spans)
    chosen = np.array([0, 3, 4, 7, 11, 12, 19])
    r, _ = correlations(activity, properties, chosen)
    weight = data.mask.numpy()[chosen].ravel()
    for latent in range(3):
        x = dense.reshape(20, 16, 3)[chosen].reshape(-1, 3)[weight, latent]
        for index in range(len(properties.names)):
            y = properties.values[chosen].reshape(len(weight), -1)[weight, index]
            assert r[latent, index] == pytest.approx(pearsonr(x, y).statistic, abs=1e-9)


def test_p_takes_series_as_the_unit_where_positions_repeat_each_other():
    """Latent and level both constant within a series: 600 positions, but 30 independent series."""
    rng = np.random.default_rng(0)
    clustered, naive = [], []
    for _ in range(60):
        latent = np.repeat(rng.exponential(size=(30, 10)), 20, axis=0)
        level = rng.standard_normal(30)
        data = TimeSeriesData(torch.tensor(level).float()[:, None, None].repeat(1, 1, 20))
        activity = Activity(csc_matrix(latent), np.ones(600, dtype=bool), 30, 1, 20)
        properties = window_properties(data, activity, tuple((t, t + 1) for t in range(20)))
        _, p = correlations(activity, properties, np.arange(30))
        clustered.append(p[:, 0])
        naive.append([pearsonr(latent[:, one], np.repeat(level, 20)).pvalue for one in range(10)])
    rate, naive_rate = (np.array(clustered) <= 0.05).mean(), (np.array(naive) <= 0.05).mean()
    assert rate < 0.08, rate
    assert naive_rate > 0.5, naive_rate


def test_a_latent_that_follows_a_channel_is_found_and_confirmed_and_noise_is_not():
    rng = np.random.default_rng(2)
    series = torch.tensor(rng.standard_normal((160, 2, 24)).cumsum(2) * 0.3).float()
    data = TimeSeriesData(series)
    spans = tuple((max(t - 4, 0), min(t + 5, 24)) for t in range(24))
    noise = rng.exponential(size=(160 * 24, 50)) * (rng.random((160 * 24, 50)) < 0.2)
    plain = Activity(csc_matrix(noise), np.ones(160 * 24, dtype=bool), 160, 1, 24)
    properties = window_properties(data, plain, spans)
    level = properties.values[:, :, properties.names.index("level, channel 1")].ravel()
    noise[:, 7] = np.maximum(level - 0.3, 0)
    activity = Activity(csc_matrix(noise), np.ones(160 * 24, dtype=bool), 160, 1, 24)
    found = property_association(activity, properties, seed=0)
    assert found.names[found.best[7]] == "level, channel 1"
    assert found.confirmed[7] and found.of_best("r_heldout")[7] > 0.7
    others = np.delete(found.confirmed, 7)
    assert others.mean() <= 0.05
    assert len(found.heldout) == 80


def test_errors_of_associations(no_shape_checks):
    activity, _ = sparse_activity()
    with pytest.raises(LabelError, match="expected 60 labels, got 3"):
        class_association(activity, np.zeros(3, dtype=int), 2)
    with pytest.raises(ArgumentError, match="n_permutations of at least 100, got 10"):
        class_association(activity, np.zeros(60, dtype=int), 2, n_permutations=10)
    few, _ = sparse_activity(n_series=3)
    data = made.labelled(n=3, n_time=10)
    with pytest.raises(ArgumentError, match="at least 4 series to split in two halves, got 3"):
        property_association(
            few, window_properties(data, few, tuple((t, t + 1) for t in range(10)))
        )
