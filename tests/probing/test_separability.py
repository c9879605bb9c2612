"""The layer x position map finds what was planted, where it was planted, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from tstlens import HookedTST, probing
from tstlens.errors import ArgumentError
from tstlens.model import HeadConfig, HookedTSTConfig, PerStepConfig
from tstlens.probing.separability_map import _aucs, _folds


def model() -> HookedTST:
    return HookedTST(
        HookedTSTConfig(
            n_layers=2,
            d_model=8,
            n_heads=2,
            d_mlp=8,
            n_channels=2,
            n_time=6,
            embed=PerStepConfig(),
            head=HeadConfig("mean", n_classes=3),
        )
    )


def sets(n: int = 25) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 2, 6, generator=generator), torch.randn(n, 2, 6, generator=generator)


def test_a_difference_at_one_sample_is_found_there_and_only_there():
    a, b = sets()
    b[:, 0, 3] += 5.0
    found = probing.separability(model(), a, b, "embed", n_permutations=50, progress=False)
    assert found.auc[0, 3] > 0.99 and found.p[0, 3] == pytest.approx(1 / 51)
    others = np.delete(found.p[0], 3)
    assert (others > 0.05).all() and np.delete(found.auc[0], 3).max() < 0.8
    assert found.hooks == ("hook_embed",) and found.time_cells[3] == (3, 4)


def test_a_pooled_vector_is_one_position_and_heads_stand_side_by_side():
    a, b = sets()
    b[:, 0] += 2.0
    pooled = probing.separability(model(), a, b, "pooled", n_permutations=20, progress=False)
    assert pooled.auc.shape == (1, 1) and pooled.auc[0, 0] > 0.95 and pooled.time_cells is None
    heads = probing.separability(model(), a, b, "z", n_permutations=2, progress=False)
    assert heads.auc.shape == (2, 6) and heads.auc.min() > 0.8
    with pytest.raises(ArgumentError, match="the same positions"):
        probing.separability(model(), a, b, ["pooled", "embed"], progress=False)


def test_sets_of_one_kind_sit_at_chance():
    a, b = sets(40)
    found = probing.separability(model(), a, b, "resid_post", n_permutations=50, progress=False)
    assert abs(found.auc.mean() - 0.5) < 0.1 and abs(found.null.mean() - 0.5) < 0.02
    assert found.p.min() > 0.05


def test_the_auc_is_scikit_learns_and_the_normal_a_ridge_fit():
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from tstlens.probing.separability_map import RIDGES

    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(40, 5)), np.repeat([0, 1], 20)
    x[y == 1, 0] += 1
    fold = _folds(y, 4, seed=0)
    scores = []
    for number in range(4):
        fit = fold != number
        ridge = make_pipeline(StandardScaler(), RidgeCV(alphas=RIDGES)).fit(
            x[fit], 2.0 * y[fit] - 1
        )
        scores.append(roc_auc_score(y[~fit], ridge.predict(x[~fit])))
    assert _aucs(x, y[None], fold)[0] == pytest.approx(np.mean(scores))


def test_positions_that_too_few_series_observed_are_nan():
    a, b = sets()
    mask = torch.ones(25, 6, dtype=torch.bool)
    mask[2:, 5] = False
    found = probing.separability(
        model(), a, b, "embed", b_mask=mask, n_permutations=5, progress=False
    )
    assert np.isnan(found.auc[0, 5]) and np.isfinite(found.auc[0, :5]).all()
    assert np.isnan(found.p[0, 5]) and found.n_series[0].tolist() == [50] * 5 + [27]
    assert len(found.to_dataframe()) == 6


def test_the_seed_repeats_and_too_many_folds_are_refused():
    a, b = sets()
    one, two = (
        probing.separability(model(), a, b, "embed", n_permutations=3, seed=5, progress=False)
        for _ in range(2)
    )
    np.testing.assert_array_equal(one.null, two.null)
    with pytest.raises(ArgumentError, match="between 2 and the 3 series"):
        probing.separability(model(), a, b[:3], "embed", progress=False)
