"""Figures of training runs and fits hold their histories."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.conftest import NO_SAES
from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError
from tstlens.figures.histories import histories
from tstlens.training import ConvTST, train


@pytest.fixture(scope="module")
def data() -> TimeSeriesData:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(20) % 2
    series = torch.randn(20, 1, 12, generator=generator) + labels[:, None, None]
    return TimeSeriesData(series, labels)


def small() -> ConvTST:
    sizes = {"conv_channels": (4, 8), "kernel_sizes": (3, 3), "strides": (1, 1), "n_heads": 2}
    return ConvTST(n_channels=1, n_time=12, n_classes=2, d_mlp=8, n_layers=1, **sizes)


def test_a_training_shows_both_parts_and_the_chosen_epoch(data):
    found = train(small(), data, epochs=4, refit=True, progress=False)
    figure = found.figure()
    fit = found.to_dataframe().query("phase == 'fit'")
    columns = ["train_loss", "val_loss", "train_accuracy", "val_accuracy", "lr"]
    assert len(figure.data) == len(columns)
    for trace, column in zip(figure.data, columns, strict=True):
        np.testing.assert_allclose(np.asarray(trace.y, dtype=float), fit[column].astype(float))
        assert list(trace.x) == [1, 2, 3, 4]
    assert [trace.name for trace in figure.data if trace.showlegend is not False] == [
        "training",
        "validation",
    ]
    assert {shape.x0 for shape in figure.layout.shapes} == {found.best_epoch}
    again = found.figure(phase="refit")
    assert len(again.data[0].x) == found.best_epoch
    assert not again.layout.shapes
    with pytest.raises(ArgumentError, match="expected phase in"):
        found.figure(phase="test")


def test_without_validation_there_is_one_line_a_panel(data):
    found = train(small(), data, epochs=2, val_fraction=0.0, select="last", progress=False)
    assert len(found.figure().data) == 3


@pytest.mark.skipif(NO_SAES is not None, reason="codebooks need sae-lens")
def test_a_fit_of_codebooks_shows_error_codes_and_perplexity(data):
    from tests.saes.conftest import small as hooked
    from tstlens import codebooks

    wide = TimeSeriesData(data.series[..., :10].expand(-1, 3, -1).contiguous(), data.labels)
    found = codebooks.fit(
        hooked(), wide, ["blocks.0.hook_mlp_out"], n_codes=6, epochs=3, progress=False
    )
    drawn = [np.asarray(trace.y, dtype=float) for trace in found.figure().data]
    frame = found.to_dataframe()
    for column in ("reconstruction", "dead", "perplexity"):
        assert any(np.allclose(y, frame[column].astype(float)) for y in drawn), column


def test_an_empty_history_is_refused():
    with pytest.raises(ArgumentError, match="empty"):
        histories([], {"loss": {"loss": "loss"}}, "step", None)
