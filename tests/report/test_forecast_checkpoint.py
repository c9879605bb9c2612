"""The forecasting checkpoint that ships: what its card says is what is measured again."""

from __future__ import annotations

import pytest
import torch

import tstlens
from tstlens.report import forecast_card, make_forecast_checkpoint
from tstlens.training import (
    FORECAST_RECIPES,
    ForecastRecipe,
    forecast_errors,
    naive_forecasts,
)

pytest.importorskip("statsmodels")


@pytest.mark.parametrize("name", sorted(FORECAST_RECIPES))
def test_a_shipped_forecaster_beats_the_naive_forecasts_as_its_card_says(name, repository):
    model = tstlens.HookedTST.from_pretrained(name)
    windows = FORECAST_RECIPES[name].windows("test")
    measured = forecast_errors(model(windows.series).detach(), windows)
    recorded = model.info["forecast_errors"]["test"]
    assert measured.rmse == pytest.approx(recorded["model"]["rmse"], rel=1e-4)
    card = (repository / "checkpoints" / name / "README.md").read_text()
    assert f"| test | model | {measured.rmse:.3f} | {measured.mae:.3f} |" in card
    for other, forecast in naive_forecasts(windows).items():
        found = forecast_errors(forecast, windows)
        assert recorded[other]["rmse"] == pytest.approx(found.rmse, rel=1e-4)
        assert measured.rmse < found.rmse and measured.mae < found.mae
        assert f"| test | {other} | {found.rmse:.3f} | {found.mae:.3f} |" in card
    assert card == forecast_card(model)
    assert model.parity.max_rel <= 1e-5 and model.parity.max_rel_float64 <= 1e-10
    assert model.info["command"] == f"tstlens train --recipe {name} --out checkpoints/{name}"
    assert ForecastRecipe(**model.info["recipe"]) == FORECAST_RECIPES[name]


def test_a_checkpoint_is_made_of_a_live_forecaster(tmp_path):
    transformers = pytest.importorskip("transformers")
    recipe = FORECAST_RECIPES["co2"]
    torch.manual_seed(0)
    source = transformers.PatchTSTForPrediction(transformers.PatchTSTConfig(**recipe.config)).eval()
    made = make_forecast_checkpoint(source, recipe, tmp_path / "untrained", command="as made")
    loaded = tstlens.HookedTST.from_pretrained(tmp_path / "untrained")
    series = recipe.windows("test", step=50).series
    expected = source(series.transpose(1, 2)).prediction_outputs.transpose(1, 2)
    torch.testing.assert_close(loaded(series), expected, rtol=1e-5, atol=1e-3)
    untrained = made.info["forecast_errors"]["test"]
    assert untrained["model"]["rmse"] > untrained["seasonal naive"]["rmse"]
    card = (tmp_path / "untrained" / "README.md").read_text()
    assert "as made" in card and "seasonal naive with drift" in card
