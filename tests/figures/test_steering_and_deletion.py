"""Figures of steering, attribution and deletion show the numbers of their results."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tstlens.errors import ArgumentError
from tstlens.probing import DeletionInsertion, Direction, DoseResponse, InputAttribution

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_a_dose_response_draws_the_mean_and_every_random_direction():
    values, random = np.random.rand(6, 3), np.random.rand(4, 6, 3)
    ends = np.zeros(3)
    result = DoseResponse(
        (0.0, 1.0, 2.0), values, random, ends, ends, ends, ends,
        "blocks.1.hook_resid_post", "mean", "one difference", "probability", "probability",
    )  # fmt: skip
    traces = result.figure().data
    np.testing.assert_allclose(traces[-1].y, values.mean(0))
    for number in range(4):
        np.testing.assert_allclose(traces[number].y, random[number].mean(0))


def test_an_attribution_draws_a_strip_per_channel_and_leaves_padding_empty():
    values = torch.randn(2, 3, 2)
    values[1, :, 1] = torch.nan
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1, 4:] = False
    series = torch.randn(2, 3, 8)
    result = InputAttribution(
        values, "patch", ((0, 4), (4, 8)), series, torch.zeros(2, 3, 8), "zero",
        torch.ones(2), torch.zeros(2), torch.tensor([0, 1]), "occlusion", "logit", "logit", mask,
    )  # fmt: skip
    figure = result.figure(index=1)
    strips = [trace for trace in figure.data if trace.type == "heatmap"]
    assert len(strips) == 3
    for channel, strip in enumerate(strips):
        np.testing.assert_allclose(strip.z[0][:4], float(values[1, channel, 0]), rtol=1e-6)
        assert np.isnan(np.array(strip.z[0][4:], dtype=float)).all()
    limit = figure.layout.coloraxis.cmax
    assert limit == pytest.approx(float(values[1].abs().nan_to_num().max()))
    with pytest.raises(ArgumentError, match="a series in 0..1, got 2"):
        result.figure(index=2)
    with pytest.raises(ArgumentError, match="channels in 0..2"):
        result.figure(channels=[3])


def test_deletion_and_direction_draw_their_means_and_largest_entries():
    curves, random = np.random.rand(6, 3), np.random.rand(2, 6, 3)
    result = DeletionInsertion(
        (0.0, 0.5, 1.0), curves, 1 - curves, random, 1 - random,
        "probability", "probability", "occlusion", "zero", "patch",
    )  # fmt: skip
    named = [trace for trace in result.figure().data if trace.name == "occlusion"]
    np.testing.assert_allclose(named[0].y, curves.mean(0))
    np.testing.assert_allclose(named[1].y, 1 - curves.mean(0))
    way = Direction("hook_embed", torch.tensor([1.0, -3.0, 2.0]), "mean", "one difference")
    np.testing.assert_allclose(way.figure(most=2).data[0].y, [-3, 2])
