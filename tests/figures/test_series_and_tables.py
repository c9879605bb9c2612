"""Series with shaded positions, pairs, the confusion matrix, the ranking."""

from __future__ import annotations

import doctest
import importlib

import numpy as np
import pytest
import torch

from tstlens import figures
from tstlens.data import Pairs
from tstlens.errors import ArgumentError, SeriesShapeError
from tstlens.training import Evaluation


def lines_of(figure):
    return [trace for trace in figure.data if trace.type == "scatter"]


def shading_of(figure):
    return [trace for trace in figure.data if trace.type == "heatmap"]


def test_every_channel_is_a_line_through_its_samples():
    series = torch.randn(4, 30)
    lines = lines_of(figures.series(series))
    np.testing.assert_allclose([line.y for line in lines], series.numpy(), rtol=1e-6)
    assert len({line.line.color for line in lines}) == 4


def test_many_channels_become_small_multiples():
    figure = figures.series(torch.randn(15, 30))
    assert len({line.yaxis for line in lines_of(figure)}) == 15
    assert len({line.yaxis for line in lines_of(figures.series(torch.randn(12, 30)))}) == 1


def test_shading_puts_every_effect_on_the_samples_of_its_position():
    effect = torch.tensor([1.0, -2.0, 0.5])
    figure = figures.series(
        torch.randn(2, 10), effect=effect, time_cells=((0, 4), (4, 8), (8, 10)), effect_label="nats"
    )
    (shading,) = shading_of(figure)
    np.testing.assert_array_equal(shading.z[0], [1, 1, 1, 1, -2, -2, -2, -2, 0.5, 0.5])
    axis = figure.layout.coloraxis
    assert (axis.cmin, axis.cmax) == (-2, 2)
    assert "samples 4–7" in shading.hovertext[0][5] and "−2" in shading.hovertext[0][5]


def test_padding_is_not_drawn():
    mask = torch.arange(10) < 6
    (line,) = lines_of(figures.series(torch.ones(1, 10), mask=mask))
    assert np.isnan(line.y[6:]).all() and np.isfinite(line.y[:6]).all()


def test_highlighted_channels_are_coloured_and_named_and_the_rest_is_grey():
    lines = lines_of(figures.series(torch.randn(6, 10), highlight=[1, 4]))
    grey = [line.line.color == figures.style.FAINT for line in lines]
    assert grey == [True, False, True, True, False, True]
    named = [line.name for line in lines if line.showlegend]
    assert named == ["other channels", "channel 1", "channel 4"]


def test_effects_that_do_not_fit_are_refused():
    with pytest.raises(SeriesShapeError, match="3 effects and no time_cells"):
        figures.series(torch.randn(1, 10), effect=torch.zeros(3))
    with pytest.raises(ArgumentError, match="expected 2 channel names, got 1"):
        figures.series(torch.randn(2, 10), channel_names=["x"])


@pytest.fixture
def pairs():
    index = torch.arange(6)
    return Pairs(
        torch.randn(6, 2, 20),
        torch.randn(6, 2, 20),
        torch.tensor([0, 1, 0, 1, 0, 1]),
        clean_index=index + 10,
        corrupted_index=index + 20,
        predicted=torch.tensor([1, 0, 1, 0, 1, 0]),
    )


def test_a_pair_shows_both_series_with_that_pairs_effects(sweep, pairs):
    result = sweep(pos=20, n_time=20)
    figure = figures.pair(pairs, 3, result, class_names=("rest", "walk"))
    both = torch.cat([pairs.clean[3], pairs.corrupted[3]]).numpy()
    np.testing.assert_allclose([line.y for line in lines_of(figure)], both, rtol=1e-6)
    for shading in shading_of(figure):
        np.testing.assert_allclose(shading.z[0], result.effect()[3].numpy(), rtol=1e-6)
    notes = [note.text for note in figure.layout.annotations]
    assert notes[0] == "clean: series 13, class walk"
    assert notes[1] == "corrupted: series 23, seen as rest"
    assert any("change of log-probability (nats)" in note for note in notes)


def test_a_pair_refuses_sweeps_with_other_axes_or_of_other_pairs(sweep, pairs):
    with pytest.raises(
        ArgumentError, match=r"axes \('pair', 'pos'\), got \('pair', 'layer', 'pos'\)"
    ):
        figures.pair(pairs, 0, sweep(layer=2, pos=20))
    with pytest.raises(ArgumentError, match="of 4 pairs"):
        figures.pair(pairs, 0, sweep(n_pairs=4, pos=20))
    with pytest.raises(ArgumentError, match=r"expected a pair in 0\.\.5"):
        figures.pair(pairs, 6)


def evaluated(names=("a class with quite a long name", "b", "c")) -> Evaluation:
    counts = torch.tensor([[8, 2, 0], [0, 5, 0], [1, 0, 4]])
    labels = torch.arange(3).repeat_interleave(counts.sum(1))
    predictions = torch.cat([torch.arange(3).repeat_interleave(row) for row in counts])
    return Evaluation(
        accuracy=0.85,
        n_correct=17,
        n=20,
        cross_entropy=0.4,
        confusion=counts,
        predictions=predictions,
        probabilities=torch.full((20, 3), 1 / 3),
        labels=labels,
        class_names=names,
    )


def test_the_confusion_matrix_prints_every_count_once():
    figure = figures.confusion(evaluated())
    right, wrong = (trace.text for trace in figure.data)
    assert [right[i][i] for i in range(3)] == ["8", "5", "4"]
    assert wrong[0][1] == "2" and wrong[2][0] == "1"
    assert sum(bool(cell) for text in (right, wrong) for row in text for cell in row) == 5
    np.testing.assert_allclose(np.diag(figure.data[0].z), [0.8, 1.0, 0.8])
    assert all(len(label) <= 14 for label in figure.layout.xaxis.ticktext)
    assert "a class with quite a long name" in figure.data[1].hovertext[0][1]


def test_the_ranking_is_ordered_by_size_with_the_sweeps_means(sweep):
    result = sweep(n_pairs=8, layer=3, head=4)
    figure = figures.ranking(result, n=5)
    mean = result.effect().double().mean(0).flatten().numpy()
    order = np.argsort(-np.abs(mean))[:5]
    np.testing.assert_allclose(figure.data[-1].x, mean[order], rtol=1e-6)
    assert list(figure.layout.yaxis.ticktext) == [f"L{at // 4}H{at % 4}" for at in order]
    assert "nats" in figure.layout.xaxis.title.text
    assert len(figure.data[0].x) == 8 * 5


@pytest.mark.parametrize(
    "name",
    ["drawing", "lines", "statistics", "sweeps", "words"],
)
def test_the_examples_in_the_documentation_run(name):
    module = importlib.import_module(f"tstlens.figures.{name}")
    outcome = doctest.testmod(module)
    assert outcome.attempted > 0 and outcome.failed == 0
