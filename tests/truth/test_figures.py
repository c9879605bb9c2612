"""Figures of planted tasks and their scores: what is drawn is what was measured."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tstlens.errors import ArgumentError
from tstlens.figures import draw
from tstlens.truth.figures import planted_series
from tstlens.truth.scores import score_features, score_states, score_where
from tstlens.truth.tasks import planted
from tstlens.truth.training import NextPatchScore

TASK = planted("seq-comb-multivariate", n_train=8)


def test_a_series_is_drawn_with_its_deciding_samples_on_top():
    figure = planted_series(TASK, 3)
    assert len(figure.data) == 8
    for channel in range(4):
        whole, decides = figure.data[2 * channel : 2 * channel + 2]
        np.testing.assert_array_equal(whole.y, TASK.series[3, channel].numpy())
        np.testing.assert_array_equal(~np.isnan(decides.y), TASK.mask[3, channel].numpy())
    assert TASK.class_names[int(TASK.labels[3])] in figure.layout.title.text
    with pytest.raises(ArgumentError, match=r"index: expected 0..7, got 8"):
        planted_series(TASK, 8)


def test_auprc_is_drawn_best_first_with_the_series_it_belongs_to():
    mask = TASK.mask.clone()
    mask[2] = False  # not scored
    result = score_where(mask + torch.randn(8, 4, 96), mask)
    random, found = result.figure().data
    assert list(found.y) == sorted(found.y, reverse=True) and len(found.y) == 7
    np.testing.assert_array_equal(result.auprc[np.array(found.customdata)], found.y)
    np.testing.assert_array_equal(result.random[np.array(found.customdata)], random.y)


def test_bars_of_codes_cover_all_positions():
    states = torch.randint(0, 5, (200,))
    result = score_states(torch.where(torch.rand(200) < 0.7, states, 6), states)
    (bars,) = result.figure().data
    assert sum(bars.width) == pytest.approx(100)
    np.testing.assert_allclose(np.array(bars.x)[1:], np.cumsum(bars.width)[:-1])
    assert np.dot(bars.y, bars.width) / 100 == pytest.approx(result.purity)


def test_bars_of_features_are_their_correlations():
    truth = torch.rand(50, 4)
    result = score_features(-truth[:, :2], truth, n_shuffles=2)
    (bars,) = draw(result).data
    np.testing.assert_allclose(sorted(bars.y), sorted(abs(result.correlation)))
    assert sum("no latent left" in text for text in bars.hovertext) == 2


def test_curves_of_a_forecaster_lie_between_its_bounds():
    best, alone = np.array([0.5, 0.9, 1.0]), np.array([0.5, 0.5, 0.5])
    result = NextPatchScore((best + alone) / 2, best, alone, 1 / 3, np.ones(3), 10)
    curves = {curve.name: np.array(curve.y) for curve in result.figure().data}
    np.testing.assert_array_equal(curves["model"], (best + alone) / 2)
    np.testing.assert_array_equal(curves["best possible"], best)
    assert result.figure(title=None).layout.title.text is None
