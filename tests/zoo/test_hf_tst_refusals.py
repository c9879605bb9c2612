"""What a converted TimeSeriesTransformer does not take, and sources that are not converted."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import tstlens
from tests.zoo.sources.hf_tst import EVERYTHING, covariates, make, modeling, series, values
from tstlens.errors import (
    ArgumentError,
    SeriesShapeError,
    SeriesValueError,
    UnknownFamilyError,
    UnsupportedSourceError,
)
from tstlens.model import HookedTST


@pytest.fixture(scope="module")
def source() -> Any:
    return make(**EVERYTHING)


@pytest.fixture(scope="module")
def model(source) -> HookedTST:
    return tstlens.convert(source)


def test_missing_and_misshapen_covariates_are_told_by_name_and_shape(model):
    x, given = values(model), covariates(model)
    needed = (
        r"expected covariates past_time_features \[batch=3, time=14, feature=3\], "
        r"future_time_features \[batch=3, time=4, feature=3\], static_real_features \[batch=3, "
        r"feature=2\], static_categorical_features \[batch=3, feature=2\], got "
    )
    with pytest.raises(ArgumentError, match=needed + "none"):
        model(x)
    short = {**given, "future_time_features": given["future_time_features"][:, :2]}
    with pytest.raises(ArgumentError, match=needed + r"past.*future_time_features \[batch=3, tim"):
        model(x, covariates=short)
    with pytest.raises(ArgumentError, match=needed + r".*age \[3\]; their names and layouts"):
        model(x, covariates={**given, "age": torch.ones(3)})
    with pytest.raises(ArgumentError, match="beside the 2 channels that are forecast.*has 9"):
        model(series(model), covariates=given)
    with pytest.raises(ArgumentError, match="expected tensors in covariates, got 3 as age"):
        model(x, covariates={**given, "age": 3})
    codes = given["static_categorical_features"]
    for wrong, error, message in (
        (codes.float(), ArgumentError, "expected integers as static_cat"),
        (codes + 5, SeriesValueError, "category 0 within 0..2, got"),
    ):
        with pytest.raises(error, match=message):
            model(x, covariates={**given, "static_categorical_features": wrong})
    for wrong, message in (
        (given["static_real_features"].double(), "of torch.float32 like the series"),
        (given["static_real_features"] * torch.nan, "with NaN or infinity"),
    ):
        with pytest.raises(ArgumentError, match=message):
            model(x, covariates={**given, "static_real_features": wrong})
    residual, state = model.embed_series(x, covariates=given)
    with pytest.raises(ArgumentError, match="leave out mask= and covariates="):
        model(residual, start_at_layer=0, state=state, covariates=given)


def test_what_the_source_cannot_scale_or_does_not_know_is_refused(model):
    x = series(model)
    x[1, 0, 5:14] = torch.nan  # the whole context
    with pytest.raises(SeriesValueError, match="in the context of every channel.*series 1"):
        model(x)
    y = series(model)
    y[0, 4, 6] = torch.nan
    with pytest.raises(SeriesValueError, match="covariates without NaN"):
        model(y)
    for n_time in (14, 19):
        with pytest.raises(SeriesShapeError, match="expected 15 to 18 samples, got.*the 14 of the"):
            model(torch.randn(2, 9, n_time))
    with pytest.raises(SeriesShapeError, match="channel=9"):
        model(torch.randn(2, 5, 18))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"decoder_attention_heads": 4},
            "encoder_attention_heads=2 with decoder_attention_heads=4",
        ),
        ({"decoder_ffn_dim": 40}, "encoder_ffn_dim=24 with decoder_ffn_dim=40"),
        ({"decoder_layers": 0}, "decoder_layers=0 is not covered"),
        ({"lags_sequence": [0, 1]}, r"lags_sequence=\[0, 1\] is not covered"),
        ({"scaling_dim": 0}, "scaling_dim=0, keepdim=True is not covered"),
        ({"keepdim": False}, "keepdim=False is not covered"),
        ({"activation_function": "tanh"}, "activation_function: activation 'tanh' is not covered"),
    ],
)
def test_options_that_are_not_covered_are_named(options, message):
    with pytest.raises(UnsupportedSourceError, match=message):
        tstlens.convert(make(**options))


def test_near_misses_are_refused(source):
    class Mine(modeling.TimeSeriesTransformerForPrediction):
        pass

    with pytest.raises(UnknownFamilyError, match="Mine"):
        tstlens.convert(Mine(source.config))
    changed = copy.deepcopy(source)
    changed.model.encoder.layers[0].fc1 = torch.nn.Sequential(changed.model.encoder.layers[0].fc1)
    with pytest.raises(UnsupportedSourceError, match=r"expected Linear at 'model.encoder.layers.0"):
        tstlens.convert(changed)
    changed = copy.deepcopy(source)
    changed.model.forward = changed.model.forward
    with pytest.raises(UnsupportedSourceError, match="forward of 'model' was replaced"):
        tstlens.convert(changed)
