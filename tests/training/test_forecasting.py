"""Errors of forecasts against closed forms, and a recipe that repeats."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from tstlens.data import ForecastWindows
from tstlens.errors import ArgumentError, SeriesShapeError
from tstlens.training import (
    FORECAST_RECIPES,
    errors_table,
    fit_forecast_recipe,
    forecast_errors,
    naive_forecasts,
)

NAN = float("nan")


def windows(series: torch.Tensor, future: torch.Tensor, period: int = 4) -> ForecastWindows:
    starts = ("2000-01-01",) * len(series)
    return ForecastWindows(
        series, future=future, starts=starts, period=period, unit="K", name="made", split="test"
    )


def test_errors_count_recorded_values_only():
    future = torch.tensor([[[1.0, 2.0, NAN]], [[5.0, 6.0, 7.0]]])
    forecast = torch.tensor([[[2.0, 2.0, 9.0]], [[5.0, 8.0, 4.0]]])
    found = forecast_errors(forecast, windows(torch.zeros(2, 1, 8), future))
    assert found.n == 2 and found.n_values == 5
    assert found.mae == pytest.approx((1 + 0 + 0 + 2 + 3) / 5)
    assert found.rmse == pytest.approx(((1 + 4 + 9) / 5) ** 0.5)
    assert found.rmse_by_step == pytest.approx((0.5**0.5, 2**0.5, 3.0))
    assert json.loads(json.dumps(found.to_dict()))["unit"] == "K"
    assert errors_table({"model": found}).loc["model", "n_values"] == 5
    with pytest.raises(SeriesShapeError, match=r"like the future \[2, 1, 3\], got \[2, 1, 2\]"):
        forecast_errors(forecast[..., :2], windows(torch.zeros(2, 1, 8), future))
    with pytest.raises(ArgumentError, match="no step has both"):
        forecast_errors(forecast, windows(torch.zeros(2, 1, 8), torch.full((2, 1, 3), NAN)))


def test_naive_forecasts_are_exact_on_what_they_assume():
    time = torch.arange(30.0)
    season = torch.tensor([3.0, -1.0, 0.0, 2.0])[torch.arange(30) % 4]
    for values, exact in ((season, "seasonal naive"), (season + 2 * time, "with drift")):
        cut = windows(values[None, None, :24], values[None, None, 24:])
        errors = {name: forecast_errors(f, cut).rmse for name, f in naive_forecasts(cut).items()}
        assert errors.pop(next(name for name in errors if name.endswith(exact))) < 1e-5
        assert errors["last value"] > 1
    gaps = season.clone()
    gaps[[20, 23]] = NAN
    cut = windows(gaps[None, None, :24], season[None, None, 24:])
    made = naive_forecasts(cut)
    assert torch.equal(made["last value"][0, 0], season[22].expand(6))
    assert forecast_errors(made["seasonal naive"], cut).n_values == 3  # steps 2, 3 and 6
    with pytest.raises(ArgumentError, match="two seasons, 8 samples, got 7"):
        naive_forecasts(windows(torch.zeros(1, 1, 7), torch.zeros(1, 1, 2)))


def short():
    pytest.importorskip("statsmodels")
    pytest.importorskip("transformers")
    recipe = FORECAST_RECIPES["co2"]
    small = {"d_model": 8, "ffn_dim": 8, "num_hidden_layers": 1}
    return dataclasses.replace(recipe, epochs=2, config={**recipe.config, **small})


def test_fitting_a_recipe_twice_gives_the_same_weights_whatever_came_before():
    first, errors = fit_forecast_recipe(short(), progress=False)
    torch.randn(5)
    second, again = fit_forecast_recipe(short(), progress=False)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert set(errors) == {"train", "test"} and not first.training
    assert errors["test"]["model"] == again["test"]["model"]


def test_held_out_windows_begin_after_the_last_trained_target(monkeypatch):
    import tstlens.training.recipes as recipes

    asked = []
    real = recipes.load_forecasting

    def spy(name, split, *sizes):
        asked.append(split)
        return real(name, split, *sizes)

    monkeypatch.setattr(recipes, "load_forecasting", spy)
    whole = short().windows("train")
    trained, measured = recipes._cut(whole, 0.2)
    at = {start: number for number, start in enumerate(whole.starts)}
    assert at[trained.starts[-1]] + whole.future.shape[2] <= at[measured.starts[0]]
    _, errors = fit_forecast_recipe(short(), held_out=0.2, progress=False)
    assert errors["held out"]["model"].n == len(measured)
    assert set(asked) == {"train"}  # the test stretch is not even read
    with pytest.raises(ArgumentError, match="held_out=0.99 leaves no window"):
        fit_forecast_recipe(short(), held_out=0.99, progress=False)
