"""Matching dictionaries, and the Features result that gathers everything."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from tests.saes import hand_made as made
from tstlens import saes
from tstlens.errors import ArgumentError
from tstlens.saes.reading import activity_of
from tstlens.saes.reading.matching import correlation

HOOK = "blocks.0.hook_mlp_out"


def shuffled(dictionary, seed=0):
    order = torch.randperm(len(dictionary.W_dec), generator=torch.Generator().manual_seed(seed))
    hook = dictionary.cfg.metadata.hook_name
    return order, made.Dictionary(
        dictionary.W_enc.detach()[:, order], dictionary.W_dec.detach()[order], hook, 0.3
    )


@pytest.mark.parametrize("by", ["decoder", "activations"])
def test_a_shuffled_copy_is_matched_latent_by_latent(by):
    model, data = made.per_step(n_layers=2), made.labelled(padded=True)
    first = made.random_dictionary(8, 12, HOOK)
    order, second = shuffled(first)
    found = saes.compare(first, second, model=model, data=data, by=by)
    active = activity_of(model, first, data).density > 0
    kept = range(12) if by == "decoder" else np.flatnonzero(active)
    assert sorted(found.latent_a) == sorted(kept)
    for a, b in zip(found.latent_a, found.latent_b, strict=True):
        assert int(order[b]) == a
    np.testing.assert_allclose(found.similarity, 1, atol=1e-5)
    assert found.chance.mean() < 0.75


def test_the_matching_is_scipys_over_cosines_of_directions():
    first = made.random_dictionary(8, 10, HOOK, seed=1)
    second = made.random_dictionary(8, 14, HOOK, seed=2)
    a, b = (one.W_dec.detach().double().numpy() for one in (first, second))
    a, b = (one / np.linalg.norm(one, axis=1, keepdims=True) for one in (a, b))
    rows, columns = linear_sum_assignment(-(a @ b.T))
    found = saes.compare(first, second)
    pairs = dict(zip(found.latent_a.tolist(), found.latent_b.tolist(), strict=True))
    assert pairs == dict(zip(rows.tolist(), columns.tolist(), strict=True))
    assert found.similarity.sum() == pytest.approx((a @ b.T)[rows, columns].sum())
    np.testing.assert_allclose(found.best_a, (a @ b.T).max(1), atol=1e-6)


def test_activations_correlate_as_numpy_says_over_observed_positions():
    model, data = made.per_step(n_layers=2), made.labelled(padded=True)
    first = activity_of(model, made.random_dictionary(8, 5, HOOK), data)
    second = activity_of(model, made.random_dictionary(8, 7, "blocks.1.hook_mlp_out"), data)
    found = correlation(first, second)
    for a in range(5):
        for b in range(7):
            x, y = first.of(a).ravel()[first.observed], second.of(b).ravel()[second.observed]
            expected = np.corrcoef(x, y)[0, 1] if x.std() and y.std() else 0
            assert found[a, b] == pytest.approx(expected, abs=1e-6)


def test_comparing_what_cannot_be_compared_says_what_to_do(no_shape_checks):
    model, data = made.per_step(), made.labelled()
    first = made.random_dictionary(8, 4, HOOK)
    with pytest.raises(ArgumentError, match="one width, got 8 and 16; compare dictionaries of"):
        saes.compare(first, made.random_dictionary(16, 4, HOOK))
    with pytest.raises(ArgumentError, match="needs model= and data="):
        saes.compare(first, first, by="activations")
    with pytest.raises(ArgumentError, match="by='decoder' or 'activations', got 'x'"):
        saes.compare(first, first, by="x")
    one = saes.features(model, first, data, effect_series=0, progress=False)
    other = saes.features(model, first, data[:10], effect_series=0, progress=False)
    with pytest.raises(ArgumentError, match="the same positions of the same series"):
        saes.compare(one, other)


@pytest.fixture(scope="module")
def planted():
    """Latent 0 follows channel 0, which is high in class 1; latent 1 follows channel 1."""
    model = made.read_channels(made.per_step())
    data = made.labelled(n=60, n_time=12)
    data.series[data.labels == 1, 0] += 2
    dictionary = made.axis_dictionary(model, n_latents=4)  # latents 2 and 3 read nothing
    return saes.features(model, dictionary, data, n_permutations=200, progress=False), data


def test_the_table_says_what_was_planted(planted):
    features, data = planted
    table = features.table()
    assert list(table.index) == [0, 1, 2, 3]
    assert table.loc[0, "class"] == "class 1" and table.loc[0, "auc"] > 0.95
    assert table.loc[0, "q_class"] < 0.01 < 0.1 < table.loc[1, "q_class"]
    assert table.loc[0, "property"] == "level, channel 0" and bool(table.loc[0, "confirmed"])
    assert table.loc[1, "property"].endswith("channel 1")
    over = data.series[:, 0] > 0.5
    assert table.loc[0, "density"] == pytest.approx(float(over.float().mean()))
    assert table.loc[0, "max"] == pytest.approx(float(data.series[:, 0].max()) - 0.5, rel=1e-5)
    assert table.loc[0, "mean"] == pytest.approx(
        float(data.series[:, 0][over].mean()) - 0.5, rel=1e-5
    )
    assert table.loc[0, "series"] == int(over.any(1).sum())
    assert table.loc[2, "density"] == 0 and table.loc[2].isna()["class"]
    assert list(features.monosemanticity.index) == ["trained", "random dictionary", "neurons"]


def test_nearest_latents_are_those_of_the_smallest_angle():
    model, data = made.per_step(), made.labelled()
    dictionary = made.random_dictionary(8, 30, HOOK)
    features = saes.features(model, dictionary, data, effect_series=0, progress=False)
    unit = torch.nn.functional.normalize(dictionary.W_dec.detach(), dim=1)
    cosine = (unit @ unit.T).fill_diagonal_(-2)
    frame = features.neighbours(7, n=3)
    assert frame["latent"].tolist() == cosine[7].topk(3).indices.tolist()
    np.testing.assert_allclose(frame["cosine"], cosine[7].topk(3).values, atol=1e-5)
    who, value = features.nearest(chunk=7)
    assert who.tolist() == cosine.argmax(1).tolist()
    np.testing.assert_allclose(value, cosine.amax(1), atol=1e-5)


def test_features_do_without_labels_and_effects(no_shape_checks):
    model, data = made.per_step(), made.labelled(padded=True)
    plain = type(data)(data.series, mask=data.mask)
    dictionary = made.random_dictionary(8, 6, HOOK)
    features = saes.features(model, dictionary, plain, effect_series=0, progress=False)
    assert features.classes is None and features.effects is None
    assert "auc" not in features.table() and "effect" not in features.table()
    assert features.top_windows(0, 2)[0].label is None
    with pytest.raises(ArgumentError, match="n of at least 1, got 0"):
        features.top_windows(0, 0)
    with pytest.raises(ArgumentError, match=r"a latent in 0..5, got 6"):
        features.figure(6)


def test_figures_show_windows_doses_and_matches(planted):
    features, _ = planted
    windows = features.top_windows(0, n=2)
    figure = features.figure(0, n=2)
    assert len(figure.data) == 2 * (2 + 1)  # two channels and the bars of each window
    np.testing.assert_allclose(figure.data[0].y, windows[0].values[0])
    np.testing.assert_allclose(figure.data[2].y, windows[0].over_time)
    assert len(features.figure().data[0].x) == 2  # the active ones
    match = saes.compare(features, features, by="decoder")
    np.testing.assert_allclose(match.figure().data[0].y, match.similarity)
    with pytest.raises(ArgumentError, match="latent 2 is never active"):
        features.figure(2)
