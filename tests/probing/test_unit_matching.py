"""Neurons of two models matched: planted permutations, and scipy on numpy's correlations."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from tests.probing.made import labelled, small
from tstlens.errors import ArgumentError, SeriesShapeError
from tstlens.model import LinearPatchesConfig
from tstlens.probing import activations, match_units

POST = "blocks.1.mlp.hook_post"


def permuted(model, order):
    """The same model with the neurons of layer 1 in another order."""
    other = copy.deepcopy(model)
    mlp = other.blocks[1].mlp
    with torch.no_grad():
        mlp.W_in.copy_(mlp.W_in[:, order])
        mlp.b_in.copy_(mlp.b_in[order])
        mlp.W_out.copy_(mlp.W_out[order])
    return other


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("rows", ["positions", "series"])
def test_neurons_in_another_order_are_found_again(padded, rows):
    model, data = small(), labelled(30, padded=padded)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    other = permuted(model, order)
    torch.testing.assert_close(
        model(data.series, mask=data.mask), other(data.series, mask=data.mask)
    )
    found = match_units(model, other, data, POST, rows=rows)
    assert found.correlation.min() > 1 - 1e-5 and len(found.correlation) == 12
    assert (order.numpy()[found.unit_b] == found.unit_a).all()
    assert found.chance.mean() < 0.8


def test_the_pairs_are_scipys_on_numpys_correlations():
    a, b, data = small(), small(d_mlp=9), labelled(30, padded=True)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in b.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        b.blocks[1].mlp.b_in[2] = -1e3  # a neuron that never fires has no partner
    found = match_units(a, b, data, POST)
    left, right = (activations(one, data, POST)[POST] for one in (a, b))
    x, y = left.values[left.observed], right.values[right.observed]
    assert found.n_rows == len(x) == int(data.mask.sum())
    kept = [n for n in range(9) if n != 2]
    table = np.corrcoef(x.T, y[:, kept].T)[:12, 12:]
    rows, columns = linear_sum_assignment(table, maximize=True)
    expected = {(r, kept[c]) for r, c in zip(rows, columns, strict=True)}
    assert set(zip(found.unit_a.tolist(), found.unit_b.tolist(), strict=True)) == expected
    np.testing.assert_allclose(np.sort(found.correlation), np.sort(table[rows, columns]), atol=1e-5)
    np.testing.assert_allclose(found.best_a, table.max(1), atol=1e-5)
    assert (np.diff(found.correlation) <= 0).all() and (np.diff(found.chance) <= 0).all()
    assert list(found.to_dataframe()) == ["unit_a", "unit_b", "correlation", "chance"]


def test_models_that_cut_series_differently_are_compared_by_series():
    a, b, data = small(), small(embed=LinearPatchesConfig(2, 2)), labelled(20)
    with pytest.raises(SeriesShapeError, match="rows='series'"):
        match_units(a, b, data, POST)
    found = match_units(a, b, data, POST, rows="series", pool="max")
    pooled = [activations(one, data, POST)[POST].pooled("max")[:, 0] for one in (a, b)]
    first = found.unit_a[0], found.unit_b[0]
    expected = np.corrcoef(pooled[0][:, first[0]], pooled[1][:, first[1]])[0, 1]
    assert found.correlation[0] == pytest.approx(expected, abs=1e-5)


def test_what_cannot_be_matched_is_refused_in_words():
    model = small()
    with pytest.raises(ArgumentError, match="expected one hook point"):
        match_units(model, model, labelled(6), "mlp_out")
    with pytest.raises(ArgumentError, match="at least two series"):
        match_units(model, model, labelled(6)[:1], POST)
    dead = copy.deepcopy(model)
    with torch.no_grad():
        dead.blocks[1].mlp.b_in.fill_(-1e4)
    with pytest.raises(ArgumentError, match="got none in one model"):
        match_units(model, dead, labelled(6), POST)


def test_the_figure_shows_pairs_and_control():
    found = match_units(small(), small(), labelled(20), POST)
    pairs, control = found.figure().data
    np.testing.assert_allclose(pairs.y, found.correlation)
    np.testing.assert_allclose(control.y, found.chance)
    assert pairs.text[0] == f"{found.unit_a[0]} and {found.unit_b[0]}"
