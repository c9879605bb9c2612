"""Statistics on simulated effects whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.patching.conftest import CONFIGS, randomised
from tstlens import patching
from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError, LabelError
from tstlens.stats import bootstrap_t, flip_p_values


def result(effects, axes=("head",), **changes):
    values = torch.as_tensor(np.asarray(effects), dtype=torch.float64)
    coords = {"pair": tuple(range(len(values)))}
    coords |= {a: tuple(range(n)) for a, n in zip(axes, values.shape[1:], strict=True)}
    options = {
        "values": values,
        "axes": ("pair", *axes),
        "coords": coords,
        "baseline": torch.zeros(len(values), dtype=torch.float64),
        "clean": torch.ones(len(values), dtype=torch.float64),
        "metric": "logit",
        "unit": "logit",
        "site": "z",
        "n_pairs": len(values),
    }
    return patching.SweepResult(**options | changes)


def simulated(generator, n_clusters, n_sites, mean=0.0, skewed=False):
    """Pairs in clusters of one to three that share most of their noise."""
    sizes = generator.integers(1, 4, n_clusters)
    noise = generator.exponential(size=(n_clusters, n_sites)) - 1
    shared = noise if skewed else generator.normal(size=(n_clusters, n_sites))
    cluster = np.repeat(np.arange(n_clusters), sizes)
    own = 0.5 * generator.normal(size=(len(cluster), n_sites))
    return mean + shared[cluster] + own, cluster


@pytest.mark.parametrize(
    ("n_clusters", "skewed", "least"), [(9, False, 0.92), (20, False, 0.93), (20, True, 0.91)]
)
def test_intervals_cover_the_truth_as_often_as_they_say(n_clusters, skewed, least):
    generator = np.random.default_rng(1)
    covered = []
    for seed in range(25):
        effects, cluster = simulated(generator, n_clusters, 80, mean=0.7, skewed=skewed)
        found = patching.summary(
            result(effects), None, 500, cluster=cluster, n_flips=100, seed=seed
        )
        covered.append((found.low[0] <= 0.7) & (found.high[0] >= 0.7))
    assert least < np.mean(covered) < 0.975


def test_ignoring_clusters_would_cover_too_rarely():
    generator = np.random.default_rng(2)
    rates = {"clustered": [], "pairs": []}
    for _ in range(15):
        effects, cluster = simulated(generator, 12, 80)
        for name, groups in (("clustered", cluster), ("pairs", None)):
            found = patching.summary(result(effects), None, 300, cluster=groups, n_flips=100)
            rates[name].append((found.low[0] <= 0) & (found.high[0] >= 0))
    assert np.mean(rates["clustered"]) > np.mean(rates["pairs"]) + 0.08


def test_p_values_are_uniform_where_nothing_happens():
    generator = np.random.default_rng(3)
    p = []
    for _ in range(20):
        effects, cluster = simulated(generator, 14, 100)
        p.append(patching.summary(result(effects), None, 100, cluster=cluster).p[0])
    p = np.concatenate(p)
    for level in (0.01, 0.05, 0.2, 0.5):
        assert abs((p <= level).mean() - level) < 0.25 * level + 0.005


def test_the_false_discovery_rate_is_held():
    generator = np.random.default_rng(4)
    shares, power = [], []
    for _ in range(30):
        effects, cluster = simulated(generator, 20, 100)
        effects[:, :20] += 1.2  # sites 0 to 19 do something
        q = patching.summary(result(effects), None, 100, cluster=cluster).q[0]
        found = q <= 0.1
        shares.append(found[20:].sum() / max(1, found.sum()))
        power.append(found[:20].mean())
    assert 0.04 < np.mean(shares) < 0.11  # 0.1 times the share of true nulls, 0.8
    assert np.mean(power) > 0.8


def test_flips_of_few_clusters_are_exact():
    from scipy.stats import permutation_test

    sums = np.random.default_rng(5).normal(0.4, 1, (8, 3))
    mine = flip_p_values(sums, 10000, np.random.default_rng(0))
    for site in range(3):
        exact = permutation_test(
            (sums[:, site],), np.mean, permutation_type="samples", n_resamples=np.inf
        )
        assert mine[site] == pytest.approx(exact.pvalue)
    assert flip_p_values(np.zeros((8, 1)), 10000, np.random.default_rng(0)) == 1.0
    random = flip_p_values(sums, 255, np.random.default_rng(0))
    assert np.abs(random - mine).max() < 0.1 and random.min() >= 1 / 256


def test_the_interval_is_the_bootstrap_t_written_out():
    generator = np.random.default_rng(6)
    sums, counts = generator.normal(1, 1, (7, 2)), np.ones(7)
    low, high = bootstrap_t(sums, counts, 0.9, 4000, np.random.default_rng(0))
    mean, error = sums.mean(0), sums.std(0, ddof=1) / 7**0.5
    ts = []
    for _ in range(4000):
        some = sums[generator.integers(0, 7, 7)]
        spread = some.std(0, ddof=1) / 7**0.5
        if (spread > 0).all():
            ts.append((some.mean(0) - mean) / spread)
    first, last = np.quantile(ts, [0.05, 0.95], axis=0)
    assert np.allclose(low, mean - last * error, rtol=0.08, atol=0.05)
    assert np.allclose(high, mean - first * error, rtol=0.08, atol=0.05)


def test_a_class_is_summarised_by_its_own_pairs():
    effects = np.arange(24.0).reshape(12, 2)
    by = torch.tensor([3] * 8 + [1] * 4)
    found = patching.summary(result(effects), by)
    assert found.coords["class"] == (1, 3) and found.n_pairs == (4, 8)
    assert found.effect.tolist() == [effects[8:].mean(0).tolist(), effects[:8].mean(0).tolist()]
    assert np.isnan(found.low[0]).all()  # four series are too few for an interval
    assert found.p[0, 0] == pytest.approx(2 / 16) and np.isfinite(found.low[1]).all()
    frame = found.to_dataframe()
    assert list(frame["n_pairs"]) == [4, 4, 8, 8]
    assert set(found.discoveries(0.05)["class"]) == {3}


def test_q_values_are_benjamini_and_hochberg_s():
    generator = np.random.default_rng(7)
    found = patching.summary(result(generator.normal(0.3, 1, (15, 6, 2)), ("layer", "head")))
    p = np.sort(found.p.ravel())
    raw = p * p.size / np.arange(1, p.size + 1)
    expected = np.minimum.accumulate(raw[::-1])[::-1]
    assert np.allclose(np.sort(found.q.ravel()), np.minimum(expected, 1))


def test_the_same_seed_gives_the_same_table():
    effects = np.random.default_rng(8).normal(size=(30, 4))
    one, two, other = (patching.summary(result(effects), seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(one.low, two.low) and np.array_equal(one.p, two.p)
    assert not np.array_equal(one.low, other.low)


def test_halves_agree_on_a_planted_ranking_and_not_on_noise():
    generator = np.random.default_rng(9)
    planted = patching.split_half(result(generator.normal(size=(40, 10)) + np.arange(10.0)), k=3)
    noise = patching.split_half(result(generator.normal(size=(40, 10))), k=3)
    assert planted.spearman.mean() > 0.95 and planted.top_k_overlap.mean() > 0.9
    assert abs(noise.spearman.mean()) < 0.45
    r = planted.spearman.mean()
    assert planted.reliability == pytest.approx(2 * r / (1 + r))


def test_pairs_of_one_series_are_never_split():
    shared = np.repeat(np.random.default_rng(10).normal(size=(6, 8)), 5, axis=0)
    cluster = np.repeat(np.arange(6), 5)
    split = patching.split_half(result(shared))
    kept = patching.split_half(result(shared), cluster=cluster)
    assert kept.n_clusters == 6 and kept.spearman.mean() < split.spearman.mean() - 0.3


def test_alike_series_are_of_one_class_and_next_to_each_other():
    model = randomised(CONFIGS["pre-norm per step, max"])
    series = torch.randn(40, 4, 10)
    labels = model(series).argmax(1)
    labels[:5] = (labels[:5] + 1) % 5  # wrong ones take no part
    data = TimeSeriesData(series, labels, class_names=tuple("abcde"))
    pairs = patching.alike_pairs(model, data, n=12)
    assert not set(pairs.corrupted_index.tolist() + pairs.clean_index.tolist()) & set(range(5))
    assert torch.equal(labels[pairs.clean_index], labels[pairs.corrupted_index])
    log_probs = model(series).detach().double().log_softmax(1)
    for clean, corrupted in zip(pairs.clean_index, pairs.corrupted_index, strict=True):
        distance = (log_probs - log_probs[corrupted]).norm(dim=1)
        rest = [
            float(distance[i])
            for i in range(5, 40)
            if labels[i] == labels[corrupted] and i != corrupted
        ]
        assert float(distance[clean]) == pytest.approx(min(rest))


def test_a_null_map_is_small_beside_a_real_one():
    model = randomised(CONFIGS["pre-norm per step, max"])
    series = torch.randn(60, 4, 10)
    series[1::2] = series[::2] + 0.01 * torch.randn(30, 4, 10)  # twins
    data = TimeSeriesData(series, model(series).argmax(1), class_names=tuple("abcde"))
    alike = patching.alike_pairs(model, data, n=20)
    null = patching.null_map(model, alike, "z", ("layer", "head"), patching.logit, progress=False)
    assert null.made["method"] == "null"
    real = patching.sweep(
        model,
        series[:20],
        series[40:],
        "z",
        ("layer", "head"),
        patching.logit(torch.zeros(20, dtype=torch.long)),
        progress=False,
    )
    assert null.effect().abs().median() < 0.1 * real.effect().abs().median()
    found = patching.summary(real, null=null)
    assert found.beyond_null.shape == (1, 2, 3) and found.beyond_null.mean() > 0.8
    assert "beyond_null" in found.to_dataframe()


def test_what_cannot_be_summarised_is_said():
    one = result(np.random.default_rng(0).normal(size=(10, 3)))
    with pytest.raises(ArgumentError, match="averaged over before"):
        patching.summary(one.mean("pair"))
    with pytest.raises(ArgumentError, match=r"one entry of by per pair \[10\], got 3"):
        patching.summary(one, torch.zeros(3, dtype=torch.long))
    with pytest.raises(ArgumentError, match="expected level as a number between 0 and 1"):
        patching.summary(one, level=95.0)
    with pytest.raises(
        ArgumentError, match="expected n_boot as an integer of at least 100, got 10"
    ):
        patching.summary(one, n_boot=10)
    with pytest.raises(ArgumentError, match="a null map over the same sites"):
        patching.summary(one, null=result(np.zeros((4, 2))))
    with pytest.raises(ArgumentError, match="at least 4 independent series and 3 sites"):
        patching.split_half(one, cluster=[0, 1, 2] * 3 + [0])
    with pytest.raises(LabelError, match="got data without labels"):
        model = randomised(CONFIGS["pre-norm per step, max"])
        patching.alike_pairs(model, TimeSeriesData(torch.randn(3, 4, 10)))


def test_nan_at_one_site_is_never_significant_and_changes_no_other_site():
    effects = np.random.default_rng(11).normal(0.5, 1, (12, 6))
    broken = effects.copy()
    broken[4, 2] = np.nan
    whole, found = (patching.summary(result(x), seed=3) for x in (effects, broken))
    rest = [0, 1, 3, 4, 5]
    for name in ("effect", "low", "high", "p", "q"):
        assert np.isnan(getattr(found, name)[0, 2]), name
    for name in ("effect", "low", "high", "p"):
        np.testing.assert_allclose(
            getattr(found, name)[0, rest], getattr(whole, name)[0, rest], rtol=1e-9, err_msg=name
        )
    alone = patching.summary(result(effects[:, rest]), seed=3)
    np.testing.assert_array_equal(found.q[0, rest], alone.q[0])  # q over the sites that have a p
    assert 2 not in set(found.discoveries(0.999)["head"])


def test_halves_are_ranked_by_the_sites_that_are_known():
    effects = np.random.default_rng(12).normal(size=(20, 6)) + np.arange(6.0)
    broken = np.column_stack([effects, np.full(20, np.nan)])
    one, two = (patching.split_half(result(x), k=3) for x in (effects, broken))
    np.testing.assert_array_equal(one.spearman, two.spearman)
    np.testing.assert_array_equal(one.top_k_overlap, two.top_k_overlap)
    with pytest.raises(ArgumentError, match="3 sites of finite effects to rank, got 20 and 0"):
        patching.split_half(result(np.full((20, 6), np.nan)))


@pytest.mark.parametrize("k", [4, 5, 50])
def test_the_top_of_all_sites_agrees_with_nothing(k):
    up = np.arange(1.0, 5.0) + np.zeros((8, 1))
    assert np.isnan(patching.split_half(result(up), k).top_k_overlap).all()
    both = patching.agreement(result(up), result(up[:, ::-1].copy()), k)
    assert np.isnan(both.top_k_overlap).all() and both.spearman == pytest.approx(-1)
    assert "top_k_overlap nan" in repr(both)


@pytest.mark.parametrize("metric", [patching.log_prob, patching.prob, patching.logit])
def test_logits_that_are_nan_are_refused_with_the_series_named(metric):
    model = randomised(CONFIGS["pre-norm per step, max"])
    series = torch.randn(131, 4, 10)  # more pairs than are held at once
    series[130] = 3e38
    target = torch.zeros(131, dtype=torch.long)
    with torch.no_grad():
        assert not model(series)[130].isfinite().all()  # finite input
    with pytest.raises(ArgumentError, match="to give finite values, got .* for series 130; "):
        patching.sweep(
            model, series.flip(1), series, "z", ("layer",), metric(target), progress=False
        )


@pytest.mark.parametrize(
    ("unit", "metric", "values"),
    [
        ("nats", "log-probability of the target class", -1.0),
        ("probability", "probability of the target class", 1.0),
    ],
)
def test_no_end_passes_what_the_metric_can_be(unit, metric, values):
    generator = np.random.default_rng(13)
    baseline = values * generator.beta(2, 1, 10)
    patched = values * generator.beta(0.3, 3, (10, 40))
    if unit == "probability":
        patched = 1 - patched
    found = patching.summary(
        result(
            patched,
            baseline=torch.from_numpy(baseline),
            unit=unit,
            metric=metric,
        )
    )
    most = (0.0 if unit == "nats" else 1.0) - baseline.mean()
    assert (found.high <= most + 1e-12).all() and (found.high == most).any()
    free = patching.summary(result(patched, baseline=torch.from_numpy(baseline)))
    assert (free.high > most).any()
