"""The table of methods against answers, and the features that dictionaries are to find."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap

from tstlens.errors import ArgumentError, UnknownNameError
from tstlens.truth.features import planted_features
from tstlens.truth.scores import Score, TruthTable, interval


@pytest.fixture
def table():
    values = {("a", 0): 0.5, ("a", 1): 0.7, ("b", 0): 0.9, ("b", 1): 0.9}
    scores = [Score(task, "found", "AUPRC", seed, v) for (task, seed), v in values.items()]
    scores += [Score(task, "chance", "AUPRC", seed, 0.1, "random") for task, seed in values]
    scores += [Score("a", "found", "other", 0, 0.25)]
    return TruthTable("where", tuple(scores))


def test_a_seed_counts_with_its_mean_over_tasks(table):
    assert table.values("found", "AUPRC").tolist() == pytest.approx([0.7, 0.8])
    assert table.values("found", "AUPRC", "a").tolist() == [0.5, 0.7]
    row = table.summary().query("method == 'found' and measure == 'AUPRC'").iloc[0]
    assert row["mean"] == pytest.approx(0.75)
    assert (row["low"], row["high"]) == pytest.approx((0.7, 0.8))  # of two seeds: the two


def test_markdown_has_a_row_per_method_with_controls_last(table):
    lines = table.to_markdown().splitlines()
    assert lines[0] == "| method | AUPRC | other |"
    assert lines[2] == "| found | 0.75 [0.70, 0.80] | 0.25 |"
    assert lines[3] == "| *chance* (random) | 0.10 [0.10, 0.10] | – |"
    assert "| found | 0.60" in table.to_markdown("a")


def test_the_interval_is_scipys_percentile_bootstrap():
    values = np.random.default_rng(1).normal(size=12)
    theirs = bootstrap(
        (values,), np.mean, n_resamples=20000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert interval(values) == pytest.approx((theirs.low, theirs.high), abs=0.03)
    assert np.isnan(interval([1.0])).all()


def test_a_table_refuses_rows_it_does_not_know(table):
    with pytest.raises(ArgumentError, match="expected at least one score"):
        TruthTable("where", ())
    with pytest.raises(UnknownNameError, match="'guess'; known: method, trivial"):
        TruthTable("where", (Score("a", "m", "x", 0, 1.0, "guess"),))
    with pytest.raises(UnknownNameError, match="this names a row of the table"):
        table.kind_of("lost")


def test_activations_are_sums_of_their_features():
    drawn = planted_features(3000, n_features=12, width=6, active=2.0, noise=0.0, seed=3)
    torch.testing.assert_close(drawn.activations, drawn.truth @ drawn.directions)
    assert drawn.directions.norm(dim=1).tolist() == pytest.approx([1] * 12, abs=1e-5)
    active = (drawn.truth > 0).float()
    assert active.sum(1).mean().item() == pytest.approx(2.0, abs=0.1)
    share = active.mean(0)
    assert share[0] / share[-1] == pytest.approx(4, rel=0.3)


def test_splits_share_directions_and_no_rows():
    one, other = (planted_features(50, seed=1, split=split) for split in (0, 1))
    torch.testing.assert_close(one.directions, other.directions, rtol=0, atol=0)
    assert not torch.equal(one.truth, other.truth)
    again = planted_features(50, seed=1)
    torch.testing.assert_close(one.activations, again.activations, rtol=0, atol=0)
    with pytest.raises(ArgumentError, match=r"active in 0\.\.4"):
        planted_features(5, n_features=8, active=5.0)
