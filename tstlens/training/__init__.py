"""Trainable source models, one training loop, evaluation, and the shipped recipes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tstlens.lazy import lazy

if TYPE_CHECKING:
    from tstlens.training.augment import Augment
    from tstlens.training.conv_tst import ConvTST, ConvTSTConfig
    from tstlens.training.evaluation import (
        Evaluation,
        ForecastErrors,
        errors_table,
        evaluate,
        forecast_errors,
        naive_forecasts,
    )
    from tstlens.training.loop import TrainConfig, TrainingResult, train
    from tstlens.training.recipes import (
        FORECAST_RECIPES,
        RECIPES,
        ForecastRecipe,
        Recipe,
        cross_validate,
        fit_forecast_recipe,
        fit_recipe,
    )
    from tstlens.training.split import stratified_folds, stratified_split

__all__ = [
    "Augment",
    "ConvTST",
    "ConvTSTConfig",
    "Evaluation",
    "FORECAST_RECIPES",
    "ForecastErrors",
    "ForecastRecipe",
    "RECIPES",
    "Recipe",
    "TrainConfig",
    "TrainingResult",
    "cross_validate",
    "errors_table",
    "evaluate",
    "fit_forecast_recipe",
    "fit_recipe",
    "forecast_errors",
    "naive_forecasts",
    "stratified_folds",
    "stratified_split",
    "train",
]

# Public elsewhere now; the old name works for one release.
_MOVED = {
    "NextPatchHead": "tstlens.truth",
    "NextPatchScore": "tstlens.truth",
    "PLANTED_RECIPES": "tstlens.truth",
    "PlantedRecipe": "tstlens.truth",
    "fit_next_patch": "tstlens.truth",
    "fit_planted": "tstlens.truth",
    "score_next_patch": "tstlens.truth",
}

if not TYPE_CHECKING:  # a type checker would take it to mean that every name exists
    __getattr__, __dir__ = lazy(__name__, _MOVED)
