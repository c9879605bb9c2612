"""Intervals over pairs: against a loop of one's own, and against coverage that is known."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy.stats import t

from tstlens import figures
from tstlens.errors import ArgumentError
from tstlens.patching import over_pairs


def by_hand(effect: np.ndarray, clusters: list[int], n: int, rng) -> tuple[np.ndarray, np.ndarray]:
    """Bootstrap-t in a loop: draw whole clusters, studentise, and turn the quantiles round."""
    groups = [effect[np.array(clusters) == one] for one in sorted(set(clusters))]

    def studentise(drawn: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        n_rows = sum(map(len, drawn))
        mean = sum(group.sum(0) for group in drawn) / n_rows
        square = sum((group.sum(0) - len(group) * mean) ** 2 for group in drawn)
        return mean, np.sqrt(square * len(drawn) / (len(drawn) - 1)) / n_rows

    mean, error = studentise(groups)
    ts = []
    while len(ts) < n:
        drawn = rng.integers(len(groups), size=len(groups))
        if len(set(drawn)) > 1:
            of_draw, error_of_draw = studentise([groups[one] for one in drawn])
            ts.append((of_draw - mean) / error_of_draw)
    high, low = np.quantile(ts, [0.025, 0.975], axis=0)
    plain = t.ppf(0.975, len(groups) - 1)  # no end is nearer than that of the t interval
    return mean - np.maximum(low, plain) * error, mean - np.minimum(high, -plain) * error


@pytest.mark.parametrize("clusters", [list(range(12)), [0, 0, 0, 1, 1, 2, 3, 4, 5, 5, 6, 7]])
def test_the_interval_is_that_of_a_loop_over_whole_clusters(sweep, clusters):
    result = sweep(n_pairs=12, layer=3)
    interval = over_pairs(result, clusters=clusters, n_resamples=4000)
    low, high = by_hand(result.effect().double().numpy(), clusters, 4000, np.random.default_rng(5))
    np.testing.assert_allclose(interval.low, low, atol=0.1)
    np.testing.assert_allclose(interval.high, high, atol=0.1)


def test_copies_of_a_pair_do_not_narrow_the_interval_of_their_cluster(sweep):
    result = sweep(n_pairs=8, layer=2)
    doubled = dataclasses.replace(
        result,
        values=result.values.repeat_interleave(3, 0),
        baseline=result.baseline.repeat_interleave(3),
        clean=result.clean.repeat_interleave(3),
        coords={**result.coords, "pair": tuple(range(24))},
        n_pairs=24,
    )
    clusters = [pair // 3 for pair in range(24)]
    once, thrice = over_pairs(result), over_pairs(doubled, clusters=clusters)
    np.testing.assert_allclose(thrice.low, once.low, atol=1e-6)
    np.testing.assert_allclose(thrice.high, once.high, atol=1e-6)
    assert (thrice.n_pairs, thrice.n_clusters) == (24, 8)
    naive = over_pairs(doubled)
    assert (naive.high - naive.low < 0.8 * (once.high - once.low)).all()


def test_the_same_seed_gives_the_same_interval(sweep):
    result = sweep(layer=3, head=2)
    np.testing.assert_array_equal(over_pairs(result).low, over_pairs(result).low)
    assert (over_pairs(result, seed=1).low != over_pairs(result).low).any()


def test_few_series_have_a_mean_but_no_interval(sweep):
    interval = over_pairs(sweep(n_pairs=4, layer=2))
    assert np.isfinite(interval.mean).all()
    assert np.isnan(interval.low).all() and np.isnan(interval.strongest).all()


def test_a_site_that_always_wins_is_always_the_strongest(sweep):
    result = sweep(layer=3)
    result.values[:, 1] += 50
    np.testing.assert_array_equal(over_pairs(result).strongest, [0, 1, 0])


def test_the_normalized_interval_resamples_the_gap_too(sweep):
    result = sweep(n_pairs=10, layer=1)
    result.values[:, 0] = result.baseline + 0.25 * (result.clean - result.baseline)
    interval = over_pairs(result, "normalized")
    np.testing.assert_allclose([interval.low[0], interval.high[0]], 0.25, atol=1e-6)


def test_95_percent_intervals_cover_a_known_mean_about_that_often(sweep):
    generator = torch.Generator().manual_seed(3)
    covered = 0
    result = sweep(n_pairs=25, layer=40)
    for _ in range(10):
        values = 0.7 + torch.randn(25, 40, generator=generator) + result.baseline[:, None]
        interval = over_pairs(dataclasses.replace(result, values=values), n_resamples=500)
        covered += int(((interval.low <= 0.7) & (interval.high >= 0.7)).sum())
    assert 0.89 <= covered / 400 <= 0.98


def test_what_cannot_be_resampled_is_refused(sweep):
    with pytest.raises(ArgumentError, match="averaged over"):
        over_pairs(sweep(layer=2).mean("pair"))
    with pytest.raises(ArgumentError, match=r"one cluster per pair \[6\], got 2"):
        over_pairs(sweep(layer=2), clusters=[0, 1])


def sparse(sweep, n=8):
    """Two of 8 pairs with an effect, as log-probabilities: 0.24 nats and next to nothing."""
    result = sweep(n_pairs=n, layer=2)
    effect = torch.zeros(n, 2)
    effect[:2, 0] = torch.tensor([0.241, 0.002])
    baseline = torch.linspace(-1.0, -0.3, n)
    return dataclasses.replace(
        result,
        values=baseline[:, None] + effect,
        baseline=baseline,
        clean=torch.zeros(n),
        metric="log-probability of the target class",
        unit="nats",
    )


def test_two_pairs_of_eight_do_not_make_an_end_of_many_nats(sweep):
    result = sparse(sweep)
    interval = over_pairs(result)
    assert 0.03 < interval.high[0] < 0.3 and interval.low[0] < 0
    assert np.isnan(interval.low[1])  # no pair has an effect there
    value, share = over_pairs(result, "value"), over_pairs(result, "normalized")
    assert (value.high <= 0).all() and (share.high[0] <= 1) and np.isfinite(share.low[0])


def test_axes_are_scaled_by_what_was_measured_and_missing_intervals_are_explained(sweep):
    wide = figures.maps.ends_of_axis(np.array([0.1, -0.2]), np.array([-9.0]), np.array([0.2]))
    assert wide[0] == pytest.approx(-0.5, abs=0.05) and wide[1] == pytest.approx(0.2, abs=0.05)
    result = sparse(sweep)
    for figure in (figures.ranking(result), figures.draw(result)):
        axis = figure.layout.xaxis if figure.data[-1].error_x.array is not None else None
        low, high = (axis or figure.layout.yaxis).range
        assert -0.3 < low < 0 < 0.241 < high < 0.5
        assert "too few non-zero pairs for an interval" in figure.to_json()
