"""Trainable source models, one training loop, evaluation, and the shipped recipes."""

from __future__ import annotations

from tstlens.training.augment import Augment
from tstlens.training.conv_tst import ConvTST, ConvTSTConfig
from tstlens.training.evaluation import Evaluation, evaluate
from tstlens.training.forecast_errors import (
    ForecastErrors,
    errors_table,
    forecast_errors,
    naive_forecasts,
)
from tstlens.training.forecast_recipes import (
    FORECAST_RECIPES,
    ForecastRecipe,
    fit_forecast_recipe,
)
from tstlens.training.loop import TrainingResult, train
from tstlens.training.planted import (
    PLANTED_RECIPES,
    NextPatchHead,
    NextPatchScore,
    PlantedRecipe,
    fit_next_patch,
    fit_planted,
    score_next_patch,
)
from tstlens.training.recipes import RECIPES, Recipe, cross_validate, fit_recipe
from tstlens.training.split import stratified_folds, stratified_split

__all__ = [
    "FORECAST_RECIPES",
    "PLANTED_RECIPES",
    "RECIPES",
    "Augment",
    "ConvTST",
    "ConvTSTConfig",
    "Evaluation",
    "ForecastErrors",
    "ForecastRecipe",
    "NextPatchHead",
    "NextPatchScore",
    "PlantedRecipe",
    "Recipe",
    "TrainingResult",
    "cross_validate",
    "errors_table",
    "evaluate",
    "fit_forecast_recipe",
    "fit_next_patch",
    "fit_planted",
    "fit_recipe",
    "forecast_errors",
    "naive_forecasts",
    "score_next_patch",
    "stratified_folds",
    "stratified_split",
    "train",
]
