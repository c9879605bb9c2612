"""Linear CKA against Gram matrices and closed forms; skipping against a model without layers."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from tests.probing.made import labelled, small
from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError, HookError, LabelError, SeriesShapeError
from tstlens.probing import activations, cka, similarity, skip_cost
from tstlens.probing.layer_similarity import Similarity


def vectors(n=40, width=6, seed=0):
    return np.random.default_rng(seed).normal(size=(n, width))


def by_gram(x, y, debiased):
    """The same from n x n Gram matrices: HSIC with centring, or Song et al.'s unbiased one."""
    n = len(x)
    k, l = x @ x.T, y @ y.T  # noqa: E741
    if not debiased:
        h = np.eye(n) - 1 / n

        def hsic(a, b):
            return np.trace(h @ a @ h @ b)
    else:
        k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))  # noqa: E741
        one = np.ones(n)

        def hsic(a, b):
            total = (one @ a @ one) * (one @ b @ one) / ((n - 1) * (n - 2))
            return np.trace(a @ b) + total - 2 / (n - 2) * (one @ a @ b @ one)

    return hsic(k, l) / np.sqrt(hsic(k, k) * hsic(l, l))


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize(("width_x", "width_y"), [(6, 6), (3, 50), (60, 50)])
def test_cka_is_hsic_of_gram_matrices(debiased, width_x, width_y):
    x, y = vectors(width=width_x) + 2, vectors(width=width_y, seed=1)
    y[:, :3] += x[:, :3]
    assert cka(x, y, debiased=debiased) == pytest.approx(by_gram(x, y, debiased), rel=1e-9)


@pytest.mark.parametrize("debiased", [False, True])
def test_cka_of_the_same_is_one_whatever_its_rotation_scale_and_place(debiased):
    x = vectors()
    turn, _ = np.linalg.qr(vectors(6, 6, seed=2))
    assert cka(x, x, debiased=debiased) == pytest.approx(1)
    assert cka(x, x @ turn, debiased=debiased) == pytest.approx(1)
    assert cka(x, -3.7 * x + 11, debiased=debiased) == pytest.approx(1)
    y = vectors(seed=3)
    before = cka(x, y, debiased=debiased)
    assert cka(2 * x @ turn, y, debiased=debiased) == pytest.approx(before)
    assert cka(y, x, debiased=debiased) == pytest.approx(before)


def test_another_linear_map_changes_cka():
    x = vectors()
    assert cka(x, x * np.array([10, 1, 1, 1, 1, 1])) < 0.7


def test_orthogonal_columns_have_none_and_a_half_shared_has_the_closed_form():
    x = np.linalg.qr(vectors(40, 8) - vectors(40, 8).mean(0))[0]
    assert cka(x[:, :4], x[:, 4:]) == pytest.approx(0, abs=1e-12)
    # Orthonormal columns, m of 4 shared: m / 4.
    assert cka(x[:, :4], x[:, 3:7]) == pytest.approx(1 / 4, abs=1e-12)


def test_noise_in_many_dimensions_fools_the_plain_estimate_only():
    pairs = [(vectors(30, 200, seed), vectors(30, 200, 100 + seed)) for seed in range(20)]
    plain = np.mean([cka(x, y) for x, y in pairs])
    debiased = [cka(x, y, debiased=True) for x, y in pairs]
    assert plain > 0.8
    assert abs(np.mean(debiased)) < 3 * np.std(debiased) / np.sqrt(20) + 1e-3


def test_cka_says_what_is_wrong():
    with pytest.raises(SeriesShapeError, match="the same rows, got"):
        cka(vectors(4), vectors(5))
    with pytest.raises(ArgumentError, match="at least 4 rows, got 3"):
        cka(vectors(3), vectors(3), debiased=True)
    assert np.isnan(cka(np.ones((9, 2)), vectors(9)))


def test_layers_are_compared_over_observed_positions():
    model, data = small(), labelled(20, padded=True)
    found = similarity(model, None, data, debiased=False)
    held = activations(model, data, "resid_post")
    x, y = (held[f"blocks.{layer}.hook_resid_post"].rows()[0] for layer in (0, 2))
    assert len(x) == int(data.mask.sum()) == found.n_rows
    assert found.values[0, 2] == pytest.approx(by_gram(x, y, False), rel=1e-5)
    np.testing.assert_allclose(found.values, found.values.T)
    np.testing.assert_allclose(np.diag(found.values), 1)
    assert found.null[0, 2] < 0.5 * found.values[0, 2]


def test_a_model_is_like_itself_and_unlike_another_seed():
    model, data = small(positions="none"), labelled(60)
    same = similarity(model, copy.deepcopy(model), data, rows="series")
    other = similarity(model, small(positions="none", seed=7), data, rows="series")
    np.testing.assert_allclose(np.diag(same.values), 1)
    assert (other.values < 1 - 1e-3).all() and same.names == ("small", "small")


def test_models_of_other_positions_can_be_compared_by_series_only():
    model, per_channel, data = small(), small(per_channel=True), labelled(30)
    with pytest.raises(ArgumentError, match="compare rows='series'"):
        similarity(model, per_channel, data)
    assert similarity(model, per_channel, data, rows="series").values.shape == (3, 3)


def blocks_of(values, threshold):
    hooks = tuple(f"blocks.{layer}.hook_resid_post" for layer in range(len(values)))
    matrix = np.array(values, dtype=float)
    found = Similarity(matrix, matrix, matrix, hooks, hooks, ("a", "a"), True, "series", 9)
    return found.blocks(threshold)


def test_blocks_are_runs_in_which_every_pair_is_alike():
    values = np.eye(5)
    values[0, 1] = values[1, 0] = 0.99
    values[2:, 2:] = 0.97
    assert blocks_of(values, 0.95) == ((0, 1), (2, 4))
    assert blocks_of(values, 0.98) == ((0, 1),)
    values[2, 4] = values[4, 2] = 0.5
    assert blocks_of(values, 0.95) == ((0, 1), (2, 3))
    assert blocks_of(np.eye(3), 0.95) == ()


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_skipping_layers_is_the_model_without_them(norm_position):
    model = small(norm_position=norm_position)
    data = labelled(30, n_classes=4, padded=True)
    found = skip_cost(model, data, progress=False)
    for first in range(3):
        for last in range(first, 3):
            without = copy.deepcopy(model)
            kept = [block for at, block in enumerate(model.blocks) if not first <= at <= last]
            without.blocks = torch.nn.ModuleList(copy.deepcopy(kept))
            without.cfg.n_layers = len(kept)
            without.setup()
            with torch.no_grad():
                output = without(data.series, mask=data.mask)
            expected = output.double().log_softmax(1).gather(1, data.labels[:, None]).mean()
            assert found.value[first, last] == pytest.approx(float(expected), rel=1e-5)
            right = (output.argmax(1) == data.labels).double().mean()
            assert found.accuracy[first, last] == pytest.approx(float(right))
    assert np.isnan(found.value[2, 0]) and len(found.to_dataframe()) == 6
    assert not model.hook_dict["blocks.0.hook_resid_pre"].fwd_hooks


def test_a_layer_that_writes_nothing_costs_nothing():
    model, data = small(), labelled(30, n_classes=4)
    with torch.no_grad():
        for parameter in (model.blocks[1].attn.W_O, model.blocks[1].mlp.W_out):
            parameter.zero_()
        model.blocks[1].attn.b_O.zero_()
        model.blocks[1].mlp.b_out.zero_()
    assert similarity(model, None, data).blocks(0.9999) == ((0, 1),)
    found = skip_cost(model, data, progress=False)
    assert found.change[1, 1] == pytest.approx(0, abs=1e-12) and found.changed[1, 1] == 0
    assert abs(found.change[0, 0]) > 1e-4 and abs(found.change[2, 2]) > 1e-4


def test_skipping_needs_something_to_measure():
    data = labelled(8)
    with pytest.raises(LabelError, match="expected a classifier and labelled series, or metric="):
        skip_cost(small(), TimeSeriesData(data.series), progress=False)
    own = skip_cost(
        small(), TimeSeriesData(data.series), metric=lambda out: out[:, 0], progress=False
    )
    assert np.isfinite(own.value[0, 0]) and np.isnan(own.accuracy[0, 0])


def test_figures():
    model, data = small(), labelled(20, n_classes=4)
    found = similarity(model, None, data)
    np.testing.assert_allclose(found.figure().data[0].z, found.values)
    cost = skip_cost(model, data, progress=False)
    np.testing.assert_allclose(cost.figure().data[0].z, cost.change)
    assert len(found.to_dataframe()) == 9
    with pytest.raises(HookError, match="has no feature axis"):
        similarity(model, None, data, "pattern")
