"""Units against predictors: planted relations are found, and nothing is found in noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr

from tests.probing.made import labelled, small
from tests.probing.test_clusters import Dictionary
from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError
from tstlens.probing import activations, units
from tstlens.probing.unit_association import confirmed_pairs, distinct

LIMITS = (0.05, 0.0)
HALVES = np.arange(30), np.arange(30, 60)


def walks(n_series, n_slots, width, seed):
    """Values that are alike along each series, as activations are."""
    steps = np.random.default_rng(seed).normal(size=(n_series, n_slots, width))
    return steps.cumsum(1)


def test_nothing_is_confirmed_in_noise_however_alike_positions_are():
    weight = np.ones((60, 12))
    found_anything, confirmed = 0, 0
    for seed in range(60):
        values, predictors = walks(60, 12, 5, seed), walks(60, 12, 6, 1000 + seed)
        _, q, _, pairs = confirmed_pairs(values, predictors, weight, HALVES, LIMITS)
        found_anything += bool((q <= 0.05).any())
        confirmed += int(pairs.sum())
    # All are null, so the rate of runs with any finding is the false discovery rate: 5 %.
    assert found_anything / 60 <= 0.15
    assert confirmed <= 2


def test_false_discoveries_stay_rare_beside_true_ones():
    weight = np.ones((60, 12))
    shares, power = [], []
    for seed in range(25):
        values, predictors = walks(60, 12, 20, seed), walks(60, 12, 10, 1000 + seed)
        true = np.zeros((20, 10), dtype=bool)
        for unit in range(8):
            values[:, :, unit] += 1.5 * predictors[:, :, unit]
            true[unit, unit] = True
        *_, pairs = confirmed_pairs(values, predictors, weight, HALVES, LIMITS)
        shares.append((pairs & ~true).sum() / max(pairs.sum(), 1))
        power.append(pairs[true].mean())
    assert np.mean(shares) <= 0.05 and np.mean(power) > 0.9


def test_a_naive_test_over_positions_would_find_something_everywhere():
    """Why series are the unit: with positions as the unit half of all noise is significant."""
    values, predictors = walks(60, 12, 5, 0), walks(60, 12, 6, 1)
    naive = [
        pearsonr(values[:, :, i].ravel(), predictors[:, :, j].ravel())[1]
        for i in range(5)
        for j in range(6)
    ]
    assert np.mean(np.array(naive) < 0.05) > 0.3


def test_correlations_are_pearsons_over_observed_positions():
    data = labelled(24, seed=3, padded=True)
    model = small()
    hook = "blocks.0.hook_mlp_out"
    found = units(model, data, hook, seeds=(5,), progress=False)
    order = np.random.default_rng(5).permutation(24)
    half = np.sort(order[:12])
    values = activations(model, data, hook)[hook].values[:, 0]
    position = np.broadcast_to(np.linspace(0, 1, 10), (24, 10))
    seen = data.mask.numpy()
    at = found.predictors.index("position")
    for unit in (0, 7):
        x, y = values[half][seen[half]][:, unit], position[half][seen[half]]
        assert found.kinds["neurons"].r[0, unit, at] == pytest.approx(pearsonr(x, y)[0], abs=1e-6)


def test_units_that_copy_a_channel_follow_its_level():
    """The embedding is made to hand on channel 1 in unit 2, and nothing in unit 3."""
    model = small(positions="none")
    with torch.no_grad():
        for parameter in model.embed.parameters():
            if parameter.ndim == 1:
                parameter.zero_()
    generator = torch.Generator().manual_seed(0)
    series = torch.randn(80, 3, 10, generator=generator).cumsum(2)
    data = TimeSeriesData(series)

    def write(stream, hook):
        stream = stream.clone()
        given = series[held["at"]]
        stream[:, :, 2] = given[:, 1]
        stream[:, :, 3] = 0.5
        return stream

    held = {}
    lookup = {row.sum().item(): index for index, row in enumerate(series)}

    def see(given, hook):
        held["at"] = [lookup[row.sum().item()] for row in given]

    model.add_hook("hook_series", see)
    model.add_hook("blocks.0.hook_resid_pre", write)
    found = units(model, data, "blocks.0.hook_resid_pre", least_r=0.3, seeds=(0, 1), progress=False)
    neurons = found.kinds["neurons"]
    best = np.abs(np.nan_to_num(neurons.r_heldout[:, 2])).argmax(1)
    assert [found.predictors[index] for index in best] == ["level, channel 1"] * 2
    assert not neurons.alive[:, 3].any() and not neurons.confirmed[:, 3].any()
    assert found.of(2).iloc[0]["predictor"] == "level, channel 1"


def test_a_users_own_predictor_is_used_and_sees_no_padding():
    data = labelled(24, padded=True)
    model = small()
    seen_shapes = []

    def spread(windows, observed):
        seen_shapes.append((windows.shape[:2], observed.dtype))
        return np.where(observed[:, None], windows, 0).std((1, 2))

    found = units(model, data, "embed", predictors={"spread": spread}, standard=False,
                  seeds=(0,), progress=False)  # fmt: skip
    assert found.predictors == ("spread",)
    assert set(seen_shapes) == {((24, 3), np.dtype(bool))}
    with pytest.raises(ArgumentError, match=r"'bad': expected one number per series \[24\]"):
        units(model, data, "embed", predictors={"bad": lambda w, s: w}, progress=False)
    with pytest.raises(ArgumentError, match="'position' is the name of a standard one"):
        units(model, data, "embed", predictors={"position": spread}, progress=False)


def test_near_copies_count_once():
    confirmed = np.array([[True, True, True], [True, False, True], [False, False, False]])
    r = np.array([[0.9, 0.8, 0.3], [0.2, 0.0, 0.5], [0, 0, 0]])
    alike = np.array([[1, 0.95, 0.1], [0.95, 1, 0.2], [0.1, 0.2, 1]])
    assert distinct(confirmed, r, alike, 0.7).tolist() == [2, 2, 0]
    assert distinct(confirmed, r, alike, 0.99).tolist() == [3, 2, 0]


def test_latents_stand_beside_neurons_with_the_gain():
    model, data = small(), labelled(60, seed=4)
    hook = "blocks.0.hook_resid_pre"
    found = units(model, data, sae={"one": Dictionary(hook=hook)}, seeds=(0, 1, 2), progress=False)
    assert found.hook == hook and list(found.kinds) == ["neurons", "one"]
    assert found.kinds["one"].r.shape[:2] == (3, 16)
    summary = found.summary()
    assert summary.loc["neurons", "gain"] == pytest.approx(1)
    parts = []
    for seed in range(3):
        per = []
        for kind in ("neurons", "one"):
            one = found.kinds[kind]
            counts = one.distinct[seed][(one.confirmed[seed].any(1))]
            per.append(counts.mean())
        parts.append(per[0] / per[1])
    assert summary.loc["one", "gain"] == pytest.approx(np.mean(parts))
    frame = found.to_dataframe()
    assert len(frame) == sum(int(one.confirmed.sum()) for one in found.kinds.values())
    assert (frame["q"] <= 0.05).all() and (frame["r"] * frame["r_heldout"] > 0).all()


def test_channels_of_their_own_have_their_own_windows():
    found = units(small(per_channel=True), labelled(30), "embed", seeds=(0,), progress=False)
    assert {"level", "channel 0", "channel 2", "position"} <= set(found.predictors)


def test_the_same_seed_gives_the_same_numbers():
    options = {"seeds": (3,), "progress": False}
    one, two = (units(small(), labelled(30), "embed", **options) for _ in range(2))
    np.testing.assert_array_equal(one.kinds["neurons"].q, two.kinds["neurons"].q)
    np.testing.assert_array_equal(
        one.kinds["neurons"].by_position, two.kinds["neurons"].by_position
    )


def test_what_is_wrong_is_said():
    model, data = small(), labelled(30)
    with pytest.raises(ArgumentError, match="give hook=, sae=, or both"):
        units(model, data)
    with pytest.raises(ArgumentError, match="at least 8 series to split, got 5"):
        units(model, data[:5], "embed")
    with pytest.raises(ArgumentError, match="no known place in time; give spans="):
        units(model, data, "pooled", progress=False)
    with pytest.raises(ArgumentError, match="expected one or more different seeds"):
        units(model, data, "embed", seeds=(1, 1))


def test_figures():
    found = units(small(), labelled(60), "blocks.0.hook_resid_pre", seeds=(0, 1), progress=False)
    bars = found.figure().data[0]
    assert sum(bars.y) == pytest.approx(1)
    map_ = found.figure(kind="map").data[0]
    r, kept = found.kinds["neurons"].r_heldout.mean(0), found.kinds["neurons"].confirmed.mean(0)
    assert np.abs(map_.z).max() == pytest.approx(np.abs(np.where(kept > 0.5, r, 0)).max())
