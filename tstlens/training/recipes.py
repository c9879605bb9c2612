"""The recipes of the checkpoints that ship with tstlens.

A recipe is everything that a checkpoint depends on: data set, scaling, sizes, training
arguments, seed. ``fit_recipe(RECIPES["gunpoint"])`` makes the model again. The recipes were
chosen by cross-validation on the training splits; the test splits took no part in it.

The recipe of the forecasting checkpoint that ships: a Hugging Face PatchTST on a real series.

``fit_forecast_recipe(FORECAST_RECIPES["co2"])`` makes the model again. The recipe was chosen by
its error on the last part of the training stretch (``held_out=0.2``); the test stretch took no
part in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tstlens.arguments import checked, needs_gradients
from tstlens.data import load_dataset
from tstlens.data.forecasting import ForecastWindows, load_forecasting
from tstlens.errors import ArgumentError
from tstlens.randomness import seeded
from tstlens.training.augment import Augment
from tstlens.training.conv_tst import ConvTST, ConvTSTConfig, refuse_unfit
from tstlens.training.evaluation import (
    Evaluation,
    ForecastErrors,
    evaluate,
    forecast_errors,
    labels_of,
    naive_forecasts,
)
from tstlens.training.loop import LastGood, TrainingResult, train
from tstlens.training.split import stratified_folds


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that a trained checkpoint depends on.

    Args:
        name: of the checkpoint.
        dataset: as ``tstlens.load_dataset`` knows it.
        config: the sizes of the ConvTST.
        training: arguments of ``train``, without seed, augment, checkpoint and progress.
        augment: variation of the training batches.
        scaling: of the series, as ``load_dataset`` knows it.
        seed: of the initialisation and the training.

    Example:
        >>> recipe = RECIPES["gunpoint"]
        >>> Recipe.from_dict(recipe.to_dict()) == recipe
        True
    """

    name: str
    dataset: str
    config: ConvTSTConfig
    training: Mapping[str, Any]
    augment: Augment | None = None
    scaling: str | None = None
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain JSON values."""
        augment = None if self.augment is None else dataclasses.asdict(self.augment)
        return {
            "name": self.name,
            "dataset": self.dataset,
            "scaling": self.scaling,
            "seed": self.seed,
            "config": self.config.to_dict(),
            "training": dict(self.training),
            "augment": augment,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """The inverse of ``to_dict``; raises UnknownNameError for a field that does not exist."""
        refuse_unfit(cls, values)
        values = dict(values)
        values["config"] = ConvTSTConfig.from_dict(values["config"])
        if values.get("augment") is not None:
            refuse_unfit(Augment, values["augment"])
            values["augment"] = Augment(**values["augment"])
        return cls(**values)


@checked
def fit_recipe(
    recipe: Recipe, progress: bool = True, checkpoint: str | Path | None = None
) -> tuple[ConvTST, TrainingResult, dict[str, Evaluation]]:
    """Train a recipe's model from nothing and evaluate it.

    Runs on one thread of the CPU, so that the order of floating-point sums, and with it the
    result, does not depend on the number of cores.

    Args:
        recipe: what to train.
        progress: whether to show a bar.
        checkpoint: a folder to keep progress in; a run found there is continued.

    Returns:
        The module in eval mode, how training went, and the evaluations of "train" and "test".

    Example:
        >>> model, result, evaluations = fit_recipe(RECIPES["gunpoint"])  # doctest: +SKIP
        >>> evaluations["test"].accuracy >= 0.95  # doctest: +SKIP
        True
    """
    data = load_dataset(recipe.dataset, split="train", scaling=recipe.scaling)
    with one_thread():
        model = _fresh(recipe)
        result = train(
            model,
            data,
            seed=recipe.seed,
            augment=recipe.augment,
            checkpoint=checkpoint,
            progress=progress,
            **recipe.training,
        )
        test = load_dataset(recipe.dataset, split="test", scaling=recipe.scaling)
        evaluations = {"train": evaluate(model, data), "test": evaluate(model, test)}
    return model, result, evaluations


@checked
def cross_validate(recipe: Recipe, n_folds: int = 5, progress: bool = False) -> list[Evaluation]:
    """Train a recipe on all but one fold of its *training* split and evaluate it on that fold.

    This is how the shipped recipes were chosen. The recipe's own choice of an epoch, if it
    makes one, happens inside the folds trained on.

    Args:
        recipe: what to train, ``n_folds`` times.
        n_folds: stratified folds, dealt with the recipe's seed.
        progress: whether to show bars.

    Returns:
        One Evaluation per fold, of series that its model has not seen.

    Example:
        >>> folds = cross_validate(RECIPES["gunpoint"], n_folds=5)  # doctest: +SKIP
        >>> sum(fold.n_correct for fold in folds)  # doctest: +SKIP
        49
    """
    data = load_dataset(recipe.dataset, split="train", scaling=recipe.scaling)
    evaluations = []
    with one_thread():
        for fold in stratified_folds(labels_of(data), n_folds, recipe.seed):
            inside = torch.ones(len(data), dtype=torch.bool)
            inside[fold] = False
            kept = inside.nonzero()[:, 0]
            model = _fresh(recipe)
            train(
                model,
                data[kept],
                seed=recipe.seed,
                augment=recipe.augment,
                progress=progress,
                **recipe.training,
            )
            evaluations.append(evaluate(model, data[fold]))
    return evaluations


def _fresh(recipe: Recipe) -> ConvTST:
    with seeded(recipe.seed):
        return ConvTST(recipe.config)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread of the CPU for a while: the order of sums does not depend on the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _small(n_channels: int, n_time: int, n_classes: int, **sizes: Any) -> ConvTSTConfig:
    """Two layers of width 64: enough for a few dozen series, at 24 to 38 positions."""
    widths = {"conv_channels": (16, 32, 64), "n_heads": 8, "d_mlp": 128, "n_layers": 2}
    return ConvTSTConfig(n_channels, n_time, n_classes, **{**widths, **sizes})


# No epoch is chosen here: cross-validation chose the arguments, and every series is trained on.
_TRAINING = {
    "epochs": 150,
    "batch_size": 16,
    "lr": 1e-3,
    "weight_decay": 0.05,
    "schedule": "onecycle",
    "label_smoothing": 0.1,
    "val_fraction": 0.0,
    "select": "last",
}

_SHIPPED = (
    Recipe(
        name="japanese-vowels",
        dataset="JapaneseVowels",
        config=ConvTSTConfig(n_channels=12, n_time=25, n_classes=9),
        training={**_TRAINING, "epochs": 60, "batch_size": 32},
        augment=Augment(jitter=0.2),
    ),
    Recipe(
        name="gunpoint",
        dataset="GunPoint",
        config=_small(1, 150, 2, kernel_sizes=(7, 5, 3), strides=(1, 2, 2)),
        training=_TRAINING,
        augment=Augment(jitter=0.05, scale=0.1, window=0.1, shift=0.05),
    ),
    Recipe(
        name="italy-power-demand",
        dataset="ItalyPowerDemand",
        config=_small(1, 24, 2),
        training=_TRAINING,
        augment=Augment(jitter=0.1, scale=0.1),
    ),
    Recipe(
        name="basic-motions",
        dataset="BasicMotions",
        config=_small(6, 100, 4, kernel_sizes=(7, 5, 3), strides=(1, 2, 2)),
        training=_TRAINING,
        augment=Augment(jitter=0.05, scale=0.1, window=0.1, shift=0.05),
    ),
    Recipe(
        name="arrow-head",
        dataset="ArrowHead",
        config=_small(1, 251, 3, kernel_sizes=(9, 5, 3), strides=(2, 2, 2), pooling="mean"),
        training=_TRAINING,
        augment=Augment(jitter=0.03, window=0.2),
    ),
)

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _SHIPPED}


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
    return windows[:trained], windows[first:]


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
