"""What a metric says of itself, against the values that it gives."""

from __future__ import annotations

import functools
import math
import pickle

import pytest
import torch

from tstlens import patching
from tstlens.errors import ArgumentError
from tstlens.metrics import Metric, name_of

TARGET = torch.tensor([0, 3, 1])
TRUE = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(1))
LEVELS = (0.1, 0.5, 0.9)
MADE = {
    "prob": (patching.prob(TARGET), (3, 5)),
    "log_prob": (patching.log_prob(TARGET), (3, 5)),
    "logit": (patching.logit(TARGET), (3, 5)),
    "logit_diff": (patching.logit_diff(TARGET, TARGET.flip(0)), (3, 5)),
    "mse": (patching.mse(TRUE, horizon=slice(1, 3), channel=0), (3, 2, 4)),
    "quantile_loss": (patching.quantile_loss(TRUE, LEVELS, level=0.9), (3, 2, 4, 3)),
    "quantiles of a normal": (
        patching.quantile_loss(TRUE, LEVELS, distribution="normal"),
        (3, 2, 4, 2),
    ),
}


def spread_of(output):
    return output.flatten(1).std(1)


@pytest.mark.parametrize("name", MADE)
def test_a_metric_pickles_and_stays_what_it_was(name):
    metric, shape = MADE[name]
    output = torch.rand(7, *shape) + 0.1
    back = pickle.loads(pickle.dumps(metric))
    assert torch.equal(back(output), metric(output))
    assert torch.equal(back.of_pairs(slice(1, 3))(output[:, 1:3]), metric(output)[:, 1:3])
    said = ("name", "unit", "better", "range", "n_pairs")
    assert [getattr(back, part) for part in said] == [getattr(metric, part) for part in said]


@pytest.mark.parametrize("name", MADE)
def test_values_stay_within_the_range_and_come_near_its_ends(name):
    metric, shape = MADE[name]
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(2000, *shape, generator=generator) * 30
    output = output.abs() + 0.1 if name == "quantiles of a normal" else output
    values = metric(output)
    low, high = metric.range
    assert float(values.min()) >= low and float(values.max()) <= high
    # What is called finite is reached, what is called infinite is left far behind.
    if math.isfinite(high):
        assert float(values.max()) > high - 1e-3
    else:
        assert float(values.max()) > 20
    if low == -math.inf:
        assert float(values.min()) < -20


@pytest.mark.parametrize("name", ["prob", "log_prob", "logit", "logit_diff"])
def test_a_surer_model_scores_better_in_a_classifier_s_metrics(name):
    metric, _ = MADE[name]
    output = torch.randn(1, 3, 5)
    surer = output.clone()
    surer[0, torch.arange(3), TARGET] += 1
    changed = (TARGET.flip(0) != TARGET) | (name != "logit_diff")
    assert metric.better == "higher" and bool((metric(surer) > metric(output))[0, changed].all())


@pytest.mark.parametrize("name", ["mse", "quantile_loss"])
def test_a_better_forecast_scores_lower_in_an_error(name):
    metric, shape = MADE[name]
    off = torch.ones(1, *shape)
    at = TRUE[None] if len(shape) == 3 else TRUE[None, ..., None]
    assert metric.better == "lower" and bool((metric(at + off) > metric(at + 0.1 * off)).all())


def test_functions_are_called_by_a_name_that_can_be_shown():
    assert name_of(lambda out: out) == "metric"
    assert name_of(functools.partial(spread_of)) == "spread_of"
    assert name_of(torch.nn.Identity()) == "Identity"
    assert name_of(MADE["mse"][0]) == "mean squared error"
    own = Metric.of(spread_of, "spread", unit="units", better="lower", range=(0.0, math.inf))
    assert pickle.loads(pickle.dumps(own)) == own and own.n_pairs is None
    assert (own.name, own.unit, own.better) == ("spread", "units", "lower")


@pytest.mark.parametrize("better", ["up", 1, "Lower"])
def test_a_direction_that_is_none_is_said(better):
    # Where types are checked at run time, as in these tests, they stop it before the class does.
    metric = Metric.of(spread_of)
    object.__setattr__(metric, "better", better)
    with pytest.raises(ArgumentError, match="better: expected 'higher', 'lower' or None"):
        metric.__post_init__()
