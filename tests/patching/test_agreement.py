"""Agreement against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tstlens import patching
from tstlens.errors import ArgumentError


def result(effects, **changes):
    values = torch.tensor(effects)
    options = {
        "values": values,
        "axes": ("pair", "head"),
        "coords": {"pair": tuple(range(len(values))), "head": tuple(range(values.shape[1]))},
        "baseline": torch.zeros(len(values)),
        "clean": torch.ones(len(values)),
        "metric": "logit",
        "unit": "logit",
        "site": "z",
    }
    return patching.SweepResult(**options | changes)


def test_each_measure_is_what_it_says():
    exact = result([[4.0, 3.0, -2.0, 0.001], [1.0, 2.0, 3.0, 4.0]])
    guess = result([[3.0, -4.0, -2.0, -5.0], [2.0, 4.0, 6.0, 8.0]])
    both = patching.agreement(exact, guess, k=2)
    # Ranks 4 3 1 2 against 4 2 3 1: rho = 1 - 6 * (0 + 1 + 4 + 1) / (4 * 15)
    assert both.spearman == pytest.approx([1 - 36 / 60, 1.0])
    by_hand = np.corrcoef([4.0, 3.0, -2.0, 0.001], [3.0, -4.0, -2.0, -5.0])[0, 1]
    assert both.pearson == pytest.approx([by_hand, 1.0])
    assert both.top_k_overlap.tolist() == [0.5, 1.0]
    # 0.001 is less than 1 % of 4: it has no sign to speak of
    assert both.sign_agreement == pytest.approx([2 / 3, 1.0])


def test_effects_are_compared_not_values():
    exact = result([[1.0, 2.0, 3.0]])
    guess = result([[11.0, 12.0, 13.0]], baseline=torch.full((1,), 10.0))
    assert patching.agreement(exact, guess).pearson[0] == pytest.approx(1.0)
    assert patching.agreement(exact, guess).sign_agreement[0] == 1.0


def test_a_constant_map_has_no_correlation():
    both = patching.agreement(result([[1.0, 2.0, 3.0]]), result([[0.0, 0.0, 0.0]]))
    assert np.isnan(both.pearson[0]) and np.isnan(both.spearman[0])
    assert both.k == 3 and both.sign_agreement[0] == 0.0


def test_the_frame_has_a_row_per_pair_and_effects_a_row_per_site():
    both = patching.agreement(result([[1.0, 2.0], [3.0, 5.0]]), result([[2.0, 1.0], [3.0, 4.0]]))
    assert list(both.to_dataframe()["pair"]) == [0, 1]
    rows = both.effects()
    assert list(rows.columns) == ["pair", "head", "exact", "approximate"]
    assert rows.loc[3].tolist() == [1, 1, 5.0, 4.0]


def test_results_of_different_things_are_refused():
    one = result([[1.0, 2.0]])
    with pytest.raises(ArgumentError, match="expected two results over the same metric"):
        patching.agreement(one, result([[1.0, 2.0]], metric="probability"))
    with pytest.raises(ArgumentError, match="over the same coords"):
        patching.agreement(one, result([[1.0, 2.0, 3.0]]))
    with pytest.raises(ArgumentError, match="expected k as an integer of at least 1, got 0"):
        patching.agreement(one, one, k=0)
