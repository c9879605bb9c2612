"""Metrics against closed forms."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import mean_pinball_loss

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


def test_quantile_loss_is_the_pinball_loss_of_sklearn() -> None:
    truth, forecast = torch.randn(4, 2, 6), torch.randn(3, 4, 2, 6, 2)  # three worlds
    levels = (0.1, 0.8)
    values = patching.quantile_loss(truth, levels, horizon=slice(1, 4), channel=1)(forecast)
    assert values.shape == (3, 4)
    for world in range(3):
        for pair in range(4):
            y = truth[pair, 1, 1:4].numpy()
            losses = [
                mean_pinball_loss(y, forecast[world, pair, 1, 1:4, i].numpy(), alpha=level)
                for i, level in enumerate(levels)
            ]
            assert float(values[world, pair]) == pytest.approx(sum(losses) / 2, rel=1e-5)
            one = patching.quantile_loss(truth, levels, slice(1, 4), 1, level=0.8)(forecast)
            assert float(one[world, pair]) == pytest.approx(losses[1], rel=1e-5)


def test_quantile_loss_at_the_median_is_half_the_absolute_error() -> None:
    truth, forecast = torch.randn(4, 2, 6), torch.randn(4, 2, 6)
    values = patching.quantile_loss(truth, (0.5,))(forecast[..., None])
    torch.testing.assert_close(values, (truth - forecast).abs().mean((1, 2)) / 2)


@pytest.mark.parametrize("kind", ["normal", "student_t"])
def test_quantile_loss_takes_a_distributions_parameters(kind) -> None:
    truth = torch.randn(4, 2, 6)
    df, loc, scale = 2 + 8 * torch.rand(4, 2, 6), torch.randn(4, 2, 6), 0.1 + torch.rand(4, 2, 6)
    levels = (0.05, 0.5, 0.9)
    made = stats.norm(loc, scale) if kind == "normal" else stats.t(df, loc, scale)
    quantiles = torch.as_tensor(np.stack([made.ppf(level) for level in levels], -1)).float()
    parameters = torch.stack([loc, scale] if kind == "normal" else [df, loc, scale], -1)
    found = patching.quantile_loss(truth, levels, distribution=kind)(parameters)
    torch.testing.assert_close(found, patching.quantile_loss(truth, levels)(quantiles))


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
    with pytest.raises(ArgumentError, match=r"horizon within 0..4, got slice\(9, 12, None\)"):
        patching.mse(torch.zeros(1, 1, 4), horizon=slice(9, 12))
    with pytest.raises(
        SeriesShapeError, match=r"quantiles \[pair, channel, horizon, 2\] = .*1, 4, 2"
    ):
        patching.quantile_loss(torch.zeros(1, 1, 4), (0.1, 0.9))(torch.zeros(1, 1, 4))
    with pytest.raises(ArgumentError, match="levels must lie between 0 and 1"):
        patching.quantile_loss(torch.zeros(1, 1, 4), (0.1, 1.0))
    with pytest.raises(ArgumentError, match=r"level must be one of \(0.1,\), got 0.5"):
        patching.quantile_loss(torch.zeros(1, 1, 4), (0.1,), level=0.5)
    with pytest.raises(ArgumentError, match="normal or student_t distribution, got 'negative_bin"):
        patching.quantile_loss(torch.zeros(1, 1, 4), (0.1,), distribution="negative_binomial")
    with pytest.raises(SeriesShapeError, match=r"expected forecasts \[pair, channel, horizon\] = "):
        patching.mse(torch.zeros(1, 1, 4))(torch.zeros(1, 1, 3))


LABELS, REFERENCE = torch.tensor([0, 2]), torch.randn(2, 3, 4)
MADE = {
    "prob": (patching.prob(LABELS), (5, 2, 3)),
    "log_prob": (patching.log_prob(LABELS), (5, 2, 3)),
    "logit": (patching.logit(LABELS), (5, 2, 3)),
    "logit_diff": (patching.logit_diff(LABELS, LABELS - LABELS + 1), (5, 2, 3)),
    "mse": (patching.mse(REFERENCE, horizon=slice(1, 3), channel=-1), (5, 2, 3, 4)),
    "quantile_loss": (
        patching.quantile_loss(REFERENCE, (0.1, 0.9), horizon=2, level=0.9),
        (5, 2, 3, 4, 2),
    ),
    "quantile_loss of a distribution": (
        patching.quantile_loss(REFERENCE, (0.1, 0.9), distribution="normal"),
        (5, 2, 3, 4, 2),
    ),
}


@pytest.mark.parametrize("name", list(MADE))
def test_a_metric_survives_a_round_trip(name):
    metric, shape = MADE[name]
    output = torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 0.1
    for twin in (pickle.loads(pickle.dumps(metric)), copy.deepcopy(metric)):
        assert torch.equal(twin(output), metric(output))
        some, of_some = twin.of_pairs(slice(1, 2)), metric.of_pairs(slice(1, 2))
        assert torch.equal(some(output[:, 1:]), of_some(output[:, 1:]))
        assert (twin.name, twin.unit, twin.n_pairs) == (metric.name, metric.unit, 2)
