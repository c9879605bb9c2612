"""The recipe of the forecasting checkpoint that ships: a Hugging Face PatchTST on a real series.

``fit_forecast_recipe(FORECAST_RECIPES["co2"])`` makes the model again. The recipe was chosen by
its error on the last part of the training stretch (``held_out=0.2``); the test stretch took no
part in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tstlens.arguments import checked, needs_gradients
from tstlens.data.forecasting import ForecastWindows, load_forecasting
from tstlens.errors import ArgumentError
from tstlens.randomness import seeded
from tstlens.training.diverging import LastGood
from tstlens.training.forecast_errors import ForecastErrors, forecast_errors, naive_forecasts
from tstlens.training.recipes import one_thread


@dataclass(frozen=True)
class ForecastRecipe:
    """Everything that a trained forecaster depends on.

    Args:
        name: of the checkpoint.
        dataset: as ``tstlens.data.load_forecasting`` knows it.
        config: of the ``PatchTSTConfig``: its ``context_length`` and ``prediction_length`` are
            the windows' sizes.
        epochs: passes over the windows.
        batch_size: windows per step.
        lr: peak learning rate (one cycle).
        weight_decay: of AdamW.
        seed: of initialisation, order and dropout.
    """

    name: str
    dataset: str
    config: Mapping[str, Any]
    epochs: int
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.01
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain JSON values."""
        return asdict(replace(self, config=dict(self.config)))

    @checked
    def windows(self, split: Any, step: int = 1) -> ForecastWindows:
        """The windows of a split in the recipe's sizes."""
        sizes = self.config["context_length"], self.config["prediction_length"]
        return load_forecasting(self.dataset, split, *sizes, step)


@checked
@needs_gradients
@torch.enable_grad()
def fit_forecast_recipe(
    recipe: ForecastRecipe, held_out: float = 0.0, progress: bool = True
) -> tuple[nn.Module, dict[str, dict[str, ForecastErrors]]]:
    """Train a recipe's PatchTST from nothing and measure it.

    Runs on one thread of the CPU, so that the result does not depend on the number of cores.
    Missing targets take no part in the loss; missing samples are told to the model as missing.

    Args:
        recipe: what to train.
        held_out: fraction of the training windows, the last ones, that are measured instead of
            trained on, to choose a recipe by; their targets begin after the last trained one. The
            test stretch is then left alone.
        progress: show a progress bar.

    Returns:
        The source in eval mode, and its errors by split ("train", and "test" or "held out")
        beside those of the forecasts that need no model.

    Raises:
        ArgumentError: a fraction that leaves no window, or transformers is not installed.

    Example:
        >>> source, errors = fit_forecast_recipe(FORECAST_RECIPES["co2"])  # doctest: +SKIP
        >>> errors["test"]["model"].rmse < errors["test"]["seasonal naive"].rmse  # doctest: +SKIP
        True
    """
    try:
        from transformers import PatchTSTConfig, PatchTSTForPrediction
    except ImportError as error:
        raise ArgumentError(
            "the forecaster is a PatchTST of transformers: pip install transformers"
        ) from error
    train = recipe.windows("train")
    if held_out:
        train, measured = _cut(train, held_out)
        parts = {"train": train, "held out": measured}
    else:
        parts = {"train": train, "test": recipe.windows("test")}
    with one_thread(), seeded(recipe.seed):
        source: Any = PatchTSTForPrediction(PatchTSTConfig(**recipe.config))
        _fit(source, train, recipe, progress)
        errors = {split: _measure(source, windows) for split, windows in parts.items()}
    return source, errors


def _fit(source: Any, train: ForecastWindows, recipe: ForecastRecipe, progress: bool) -> None:
    n_steps = recipe.epochs * -(-len(train) // recipe.batch_size)
    optimizer = torch.optim.AdamW(
        source.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=recipe.lr, total_steps=n_steps + 1, cycle_momentum=False
    )
    good = LastGood(source, recipe.lr)
    source.train()
    with tqdm(total=n_steps, desc="training", unit="step", disable=not progress) as bar:
        for epoch in range(recipe.epochs):
            for index in torch.randperm(len(train)).split(recipe.batch_size):
                truth = train.future[index]
                recorded = ~truth.isnan()
                error = (forecast(source, train.series[index]) - truth)[recorded]
                loss = error.square().mean()
                good.check_loss(loss.item(), f"in epoch {epoch + 1}")
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(source.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                bar.update(1)
            good.keep(f"after epoch {epoch + 1}")
            bar.set_postfix(rmse=f"{loss.item() ** 0.5:.3f}", refresh=False)
    source.eval()


def forecast(source: Any, series: Tensor) -> Tensor:
    """A PatchTSTForPrediction's forecast [batch, channel, horizon] of series with gaps."""
    seen = ~series.isnan()
    out = source(
        past_values=series.masked_fill(~seen, 0.0).transpose(1, 2),
        past_observed_mask=seen.transpose(1, 2),
    )
    return out.prediction_outputs.transpose(1, 2)


@torch.no_grad()
def _measure(source: Any, windows: ForecastWindows) -> dict[str, ForecastErrors]:
    forecasts = {"model": forecast(source, windows.series), **naive_forecasts(windows)}
    return {name: forecast_errors(made, windows) for name, made in forecasts.items()}


def _cut(windows: ForecastWindows, fraction: float) -> tuple[ForecastWindows, ForecastWindows]:
    """The first windows, and the last ones whose targets begin after those of the first."""
    n = len(windows)
    first = int((1 - fraction) * n)
    trained = first - windows.future.shape[2] + 1
    if not 0 < trained < first < n:
        raise ArgumentError(
            f"held_out={fraction} leaves no window on one side of {n} windows of "
            f"{windows.future.shape[2]} targets"
        )
    return _part(windows, slice(0, trained)), _part(windows, slice(first, n))


def _part(windows: ForecastWindows, index: slice) -> ForecastWindows:
    return replace(
        windows,
        series=windows.series[index],
        future=windows.future[index],
        starts=windows.starts[index],
    )


FORECAST_RECIPES: dict[str, ForecastRecipe] = {
    "co2": ForecastRecipe(
        name="co2",
        dataset="co2",
        config={
            "num_input_channels": 1,
            "context_length": 208,
            "prediction_length": 52,
            "patch_length": 13,
            "patch_stride": 13,
            "d_model": 32,
            "num_attention_heads": 4,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "norm_type": "layernorm",
            "pooling_type": None,
            "attention_dropout": 0.1,
            "ff_dropout": 0.1,
            "head_dropout": 0.1,
        },
        epochs=20,
        lr=3e-3,
    )
}
