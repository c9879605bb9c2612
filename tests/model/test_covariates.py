"""Models whose front end takes no covariates say so; the others are tested with their family."""

from __future__ import annotations

import pytest
import torch

from tstlens.errors import ArgumentError, SeriesShapeError
from tstlens.model import HeadConfig, HookedTST, HookedTSTConfig, PerStepConfig
from tstlens.zoo.lagged_steps import LaggedStepsConfig, StepParametersConfig


def test_a_model_that_takes_none_refuses_them():
    cfg = HookedTSTConfig(
        n_layers=1,
        d_model=8,
        n_heads=2,
        d_mlp=12,
        n_channels=2,
        embed=PerStepConfig(),
        head=HeadConfig("mean", n_classes=2),
    )
    model, x = HookedTST(cfg), torch.randn(3, 2, 5)
    assert model.with_covariates(x) is x
    with pytest.raises(ArgumentError, match="takes no covariates, got time_features; leave"):
        model(x, covariates={"time_features": torch.randn(3, 5, 1)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lags": (0, 1)}, r"lags of 1 and more, got \(0, 1\)"),
        ({"lags": ()}, r"lags of 1 and more, got \(\)"),
        ({"context_length": 0}, "context_length must be a positive integer"),
        ({"categories": (3,)}, "one width per category, got 0 for 1"),
        ({"smallest_scale": 0.0}, "smallest_scale must be above 0"),
    ],
)
def test_impossible_front_ends_are_refused(change, message):
    options = {"context_length": 5, "prediction_length": 2, "lags": (1, 2), **change}
    with pytest.raises(ArgumentError, match=message):
        LaggedStepsConfig(**options)


def test_a_series_that_is_no_series_gets_the_usual_error():
    embed = LaggedStepsConfig(5, 2, (1, 2), n_time_features=1)
    cfg = HookedTSTConfig(
        n_layers=2,
        n_decoder_layers=1,
        d_model=8,
        n_heads=2,
        d_mlp=12,
        n_channels=embed.n_channels,
        norm_position="post",
        embed=embed,
        head=StepParametersConfig(2),
    )
    model = HookedTST(cfg)
    with pytest.raises(ArgumentError, match="takes out; pass|took out; pass"):
        model.unembed(torch.randn(2, 2, 8))
    assert model(torch.randn(3, 2, 9)).shape == (3, 1, 2, 3)
    with pytest.raises(SeriesShapeError, match=r"channel=2, time\], got \[3, 4, 9\]"):
        model(torch.randn(3, 4, 9))
