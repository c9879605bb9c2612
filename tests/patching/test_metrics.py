"""Metrics against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from tstlens import patching
from tstlens.errors import ArgumentError, LabelError, SeriesShapeError

OUTPUT = torch.tensor([[0.0, math.log(3.0)], [math.log(4.0), 0.0]])
TARGET = torch.tensor([1, 1])


def test_class_metrics_are_what_their_names_say() -> None:
    expected = torch.tensor([0.75, 0.2])
    torch.testing.assert_close(patching.prob(TARGET)(OUTPUT), expected)
    torch.testing.assert_close(patching.log_prob(TARGET)(OUTPUT), expected.log())
    torch.testing.assert_close(patching.logit(TARGET)(OUTPUT), OUTPUT[:, 1])
    torch.testing.assert_close(
        patching.logit_diff(TARGET, 1 - TARGET)(OUTPUT), OUTPUT[:, 1] - OUTPUT[:, 0]
    )


def test_worlds_come_before_pairs() -> None:
    worlds = torch.stack([OUTPUT, OUTPUT.flip(0)])
    values = patching.prob(TARGET)(worlds)
    torch.testing.assert_close(values, torch.tensor([[0.75, 0.2], [0.2, 0.75]]))


def test_mean_squared_error_counts_the_chosen_steps_and_channels() -> None:
    reference = torch.zeros(2, 3, 4)
    output = torch.arange(24.0).view(2, 3, 4)
    torch.testing.assert_close(patching.mse(reference)(output), output.pow(2).mean((1, 2)))
    torch.testing.assert_close(
        patching.mse(reference, horizon=slice(0, 2))(output), output[..., :2].pow(2).mean((1, 2))
    )
    torch.testing.assert_close(
        patching.mse(reference, horizon=-1, channel=1)(output), output[:, 1, 3].pow(2)
    )


@pytest.mark.usefixtures("no_shape_checks")
def test_what_metrics_refuse() -> None:
    with pytest.raises(LabelError, match=r"expected targets in 0\.\.1, got 2"):
        patching.prob(torch.tensor([0, 2]))(OUTPUT)
    with pytest.raises(LabelError, match="expected targets as integers"):
        patching.prob(torch.tensor([0.0, 1.0]))
    with pytest.raises(SeriesShapeError, match="logits of 3 series, one per target"):
        patching.prob(torch.tensor([0, 1, 0]))(OUTPUT)
    with pytest.raises(LabelError, match="as many other classes as targets"):
        patching.logit_diff(TARGET, torch.tensor([0]))
    with pytest.raises(ArgumentError, match=r"horizon=slice\(9, 12, None\) selects nothing"):
        patching.mse(torch.zeros(1, 1, 4), horizon=slice(9, 12))
    with pytest.raises(SeriesShapeError, match="expected forecasts like the reference"):
        patching.mse(torch.zeros(1, 1, 4))(torch.zeros(1, 1, 5))
