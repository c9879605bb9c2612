"""Intervals, p-values and rankings against simulated truth, closed forms and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from tstlens.stats import (
    adjusted,
    bootstrap_t,
    by_cluster,
    flip_p_values,
    limits_of,
    mean_interval,
    no_interval,
    percentile_interval,
    rank_correlation,
    sign_agreement,
    strongest_share,
    top_overlap,
)
from tstlens.truth.questions import TAILS, drawn

MEANS = dict.fromkeys(TAILS, 1.0) | {"lognormal": np.exp(0.5)}


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("share", [0.05, 0.1, 0.25, 1.0])
def test_intervals_of_sparse_effects_cover_at_least_as_often_as_plain_t(tail, share):
    generator = np.random.default_rng([TAILS.index(tail), int(100 * share)])
    truth = share * MEANS[tail]
    for n in (5, 12, 24):
        values = drawn(tail, share, (n, 500), generator)
        low, high = mean_interval(values, n_boot=500, seed=generator)
        half = scipy.stats.t.ppf(0.975, n - 1) * scipy.stats.sem(values, axis=0)
        their_low, their_high = values.mean(0) - half, values.mean(0) + half
        given = np.isfinite(low)
        assert np.array_equal(given, values.any(0))
        covered = (low <= truth + 1e-9) & (truth - 1e-9 <= high)
        theirs = (their_low <= truth + 1e-9) & (truth - 1e-9 <= their_high)
        assert (covered >= theirs)[given].all()
        assert covered[given].mean() >= (0.87 if share == 1 or share * n >= 2.5 else 0.84)
        if tail == "normal" and share == 1:
            assert covered.mean() <= 0.985
        # Not by being of any width: an end is at most three half widths of t away.
        mean = values.mean(0)
        ratio = (high - low)[given] / np.maximum((their_high - their_low)[given], 1e-12)
        assert (ratio <= 3 + 1e-6).all()
        assert ((low <= mean) & (mean <= high))[given].all()


def test_near_constant_effects_do_not_drive_an_end_to_any_distance():
    effects = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.002, 0.241])[:, None]
    low, high = mean_interval(effects)
    assert -0.25 < low[0] < effects.mean() < high[0] < 0.3
    assert bootstrap_t(effects, np.ones(8), 0.95, 2000, np.random.default_rng(0))[1][0] > 5
    for tiny in (1e-12, 1e-7, 1e-3):  # however near to 0 the others are
        near = effects + tiny * np.random.default_rng(1).normal(size=(8, 1))
        assert mean_interval(near)[1][0] < 0.3


def test_a_resample_without_spread_is_infinite_by_the_sign_of_its_numerator():
    # One of 12: a third of the resamples are all 0, so their mean is below by any number of errors.
    effects = np.zeros((12, 1))
    effects[0] = 1.0
    low, high = bootstrap_t(effects, np.ones(12), 0.95, 2000, np.random.default_rng(0))
    assert high[0] == np.inf and np.isfinite(low[0])
    low, high = mean_interval(effects)
    error = effects.std(ddof=1) / 12**0.5
    half = scipy.stats.t.ppf(0.975, 11) * error
    assert high[0] == pytest.approx(effects.mean() + 3 * half)
    assert low[0] == pytest.approx(effects.mean() - half)


def test_effects_that_are_all_0_have_no_interval_and_equal_ones_have_that_number():
    values = np.zeros((12, 3))
    values[:, 1] = -0.5
    values[:, 2] = 1e-300
    low, high = mean_interval(values)
    assert np.isnan(low[0]) and np.isnan(high[0])
    assert (low[1], high[1], low[2], high[2]) == (-0.5, -0.5, 1e-300, 1e-300)
    assert no_interval(12) == "too few non-zero pairs for an interval"
    assert np.isnan(mean_interval(np.ones((4, 1)))[0][0])
    assert no_interval(4) == "too few pairs for an interval"


@pytest.mark.parametrize("scale", [1e-150, 1e-8, 1.0, 1e150])
def test_intervals_scale_with_the_effects(scale):
    values = drawn("lognormal", 0.6, (10, 6), np.random.default_rng(3))
    ends, scaled = mean_interval(values), mean_interval(values * scale)
    for one, other in zip(ends, scaled, strict=True):
        np.testing.assert_allclose(one * scale, other, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_at_one_site_changes_no_other_site(bad):
    values = np.random.default_rng(4).normal(0.4, 1, (14, 5))
    broken = values.copy()
    broken[3, 2] = bad
    rest = [0, 1, 3, 4]

    def statistics(x):
        p = flip_p_values(x, 2000, np.random.default_rng(0))
        return [*mean_interval(x, seed=1), p]

    for whole, found in zip(statistics(values), statistics(broken), strict=True):
        assert np.isnan(found[2]) and np.isfinite(whole).all()
        np.testing.assert_allclose(found[rest], whole[rest], rtol=1e-9)
    p = statistics(broken)[2]
    np.testing.assert_allclose(adjusted(p)[rest], adjusted(p[rest]))
    assert np.isnan(adjusted(p)[2])
    assert strongest_share(broken, 200, 0)[2] == 0


def test_ends_stay_within_what_the_metric_can_be():
    generator = np.random.default_rng(5)
    values = np.clip(generator.beta(8, 0.3, (6, 200)), 0, 1)
    low, high = mean_interval(values, limits=(0.0, 1.0))
    free = mean_interval(values)[1]
    assert (free > 1).any() and (high <= 1).all() and (low >= 0).all()
    np.testing.assert_array_equal(high, np.minimum(free, 1))
    assert limits_of("nats", np.array([-0.2, 0.0])) == (-np.inf, 0.0)
    assert limits_of("nats", np.array([-0.2, 0.4])) == (-np.inf, np.inf)  # not what it says
    assert limits_of("value", np.array([0.3])) == (-np.inf, np.inf)


def test_a_ratio_of_sums_is_covered_with_the_clusters_that_both_share():
    generator, covered = np.random.default_rng(6), []
    for _ in range(300):
        gap = generator.gamma(2, 1, 16)
        effect = 0.3 * gap[:, None] + 0.4 * generator.normal(size=(16, 1))
        low, high = mean_interval(effect, gap, n_boot=300, seed=generator)
        covered.append(low[0] <= 0.3 <= high[0])
    assert 0.91 <= np.mean(covered) <= 0.99
    exact = mean_interval(0.25 * gap[:, None], gap)
    assert (exact[0][0], exact[1][0]) == pytest.approx((0.25, 0.25))


def test_rows_of_a_cluster_count_as_one():
    values = np.random.default_rng(7).normal(size=(9, 4))
    names = np.repeat(list("abcdefghi"), 3)
    sums, counts = by_cluster(np.repeat(values, 3, 0), list(names))
    for one, many in zip(mean_interval(values), mean_interval(sums, counts), strict=True):
        np.testing.assert_allclose(one, many)


def test_percentiles_are_scipys_and_narrower_than_our_rule():
    values = np.random.default_rng(8).normal(size=(12, 1))
    theirs = scipy.stats.bootstrap(
        (values[:, 0],), np.mean, n_resamples=20000, method="percentile", random_state=1
    ).confidence_interval
    low, high = percentile_interval(values, n_boot=20000)
    assert (low[0], high[0]) == pytest.approx((theirs.low, theirs.high), abs=0.03)
    wide = mean_interval(values)
    assert wide[0] < low and high < wide[1]


def test_the_top_of_all_sites_is_no_overlap():
    up, down = np.arange(1.0, 6.0), np.arange(5.0, 0.0, -1)
    assert [top_overlap(up, down, k) for k in (2, 3, 4)] == pytest.approx([0, 1 / 3, 3 / 4])
    assert np.isnan(top_overlap(up, down, 5)) and np.isnan(top_overlap(up, down, 50))
    assert rank_correlation(up, down) == pytest.approx(-1)


def test_agreement_of_maps_is_scipys_over_the_sites_that_are_known():
    generator = np.random.default_rng(9)
    first = generator.normal(size=30).round(1)  # with ties
    second = first + generator.normal(size=30)
    gone = np.r_[first, np.nan, 3.0], np.r_[second, 8.0, np.inf]
    assert rank_correlation(*gone) == pytest.approx(scipy.stats.spearmanr(first, second)[0])
    assert np.isnan(rank_correlation(first, np.ones(30)))
    assert sign_agreement(np.array([1.0, -1, 1e-9, 2]), np.array([1.0, 1, -1, 2])) == 2 / 3
