"""From a trained source model to a checkpoint folder: convert, measure, describe, save.

The card says what a checkpoint was made from, how, and how good it is; its words are in
``card.md.j2``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tstlens.arguments import Seed, checked
from tstlens.data import ForecastWindows, Scaling, load_described
from tstlens.model import HookedTST
from tstlens.model.saving import save_with
from tstlens.report.wording import template
from tstlens.storage import check_folder, plain, quoted
from tstlens.training import (
    ForecastErrors,
    ForecastRecipe,
    evaluate,
    forecast_errors,
    naive_forecasts,
)
from tstlens.zoo.converting import convert


@checked
def model_card(model: HookedTST) -> str:
    """A checkpoint's README in Markdown, from the model's ``cfg``, ``info`` and ``parity``.

    Args:
        model: a converted model; what its ``info`` does not hold is left out.

    Returns:
        Markdown.
    """
    return _card(model)


def _card(model: HookedTST) -> str:
    """The text is ``card.md.j2``; names from a checkpoint are no markup, whatever they hold."""
    data = model.info.get("data", {})
    scaling = data.get("scaling")
    values = (
        f"scaled {plain(scaling['kind'])}" if scaling else "as they are in the archive, unscaled"
    )
    return template("card.md.j2").render(
        model=model,
        usage=_usage(model),
        n_parameters=sum(tensor.numel() for tensor in model.parameters()),
        recipe=json.dumps(model.info.get("recipe"), indent=2),
        scaling=values.replace("_", " "),
    )


def _usage(model: HookedTST) -> str:
    data, future = model.info.get("data", {}), model.info.get("forecast_data")
    name = quoted(model.cfg.model_name)
    lines = ["import tstlens", "", f"model = tstlens.HookedTST.from_pretrained({name})"]
    if future:
        name = quoted(future["name"])
        sizes = f"n_time={future['n_time']}, horizon={future['horizon']}"
        lines.append(f'windows = tstlens.data.load_forecasting({name}, "test", {sizes})')
        lines.append("forecast, cache = model.run_with_cache(windows.series)")
    elif data.get("name"):
        extra = "" if data.get("equal_length", True) else ", equal_length=False"
        lines.append(f'data = tstlens.load_dataset({quoted(data["name"])}, split="test"{extra})')
        if data.get("scaling"):
            lines.append(
                'data = tstlens.data.Scaling.from_dict(model.info["data"]["scaling"]).apply(data)'
            )
        lines.append("logits, cache = model.run_with_cache(data.series)")
    return "\n".join(lines)


@checked
def make_checkpoint(
    source: nn.Module,
    out: str | Path,
    *,
    data: str,
    recipe: dict[str, Any],
    seed: Seed,
    command: str,
    name: str | None = None,
    scaling: str | None = None,
    equal_length: bool = True,
) -> HookedTST:
    """Convert a trained classifier, check parity, measure it and save it with a card.

    What is measured is the converted model, on both splits. An existing folder is replaced as a
    whole once all of this has succeeded.

    Args:
        source: a trained classifier of a family that :func:`tstlens.convert` recognises.
        out: the folder; made if missing.
        data: name of the data set, as :func:`tstlens.load_dataset` knows it.
        recipe: how the source was trained, plain JSON values.
        seed: of the training.
        command: the command that repeats it, for the card.
        name: of the checkpoint; the folder's name where None.
        scaling: of the series: None, "per_channel" or "per_series".
        equal_length: as for :func:`tstlens.load_dataset`.

    Returns:
        The converted model, with ``info`` and ``parity`` as saved.

    Raises:
        ConversionError: the source cannot be converted, or parity fails.
        StorageError: the folder cannot be written.

    Example:
        >>> from tstlens.training import RECIPES, fit_recipe
        >>> recipe = RECIPES["gunpoint"]
        >>> source, _, _ = fit_recipe(recipe)  # doctest: +SKIP
        >>> model = make_checkpoint(source, "gunpoint", data="GunPoint", recipe=recipe.to_dict(),
        ...     seed=0, command="tstlens train --recipe gunpoint")  # doctest: +SKIP
    """
    out = Path(out)
    check_folder(out, "the model")
    described: dict[str, Any] = {"name": data, "equal_length": equal_length, "scaling": None}
    train = load_described(described, "train")
    if scaling is not None:
        described["scaling"] = Scaling.fit(train, scaling).to_dict()
        train = load_described(described, "train")
    test = load_described(described, "test")
    model = convert(source, class_names=train.class_names)
    model.cfg.model_name = name or out.resolve().name
    accuracy = {}
    for part in (train, test):
        measured = evaluate(model, part)
        accuracy[part.split] = {
            "accuracy": measured.accuracy,
            "n_correct": measured.n_correct,
            "n": measured.n,
            "cross_entropy": measured.cross_entropy,
        }
    model.info |= {
        "data": described,
        "recipe": recipe,
        "seed": seed,
        "accuracy": accuracy,
        "command": command,
    }
    save_with(model, out, {"README.md": model_card(model)})
    return model


@checked
@torch.no_grad()
def make_forecast_checkpoint(
    source: nn.Module, recipe: ForecastRecipe, out: str | Path, *, command: str
) -> HookedTST:
    """Convert a trained forecaster, check parity, measure it and save it with a card.

    What is measured is the converted model, on both splits, beside forecasts that need no model.
    An existing folder is replaced as a whole once all of this has succeeded.

    Args:
        source: the trained forecaster, of a family that :func:`tstlens.convert` recognises.
        recipe: how it was trained; its windows are what it is measured on.
        out: the folder; made if missing.
        command: the command that repeats it, for the card.

    Returns:
        The converted model, with ``info`` and ``parity`` as saved.

    Raises:
        ConversionError: the source cannot be converted, or parity fails.
        StorageError: the folder cannot be written.

    Example:
        >>> from tstlens.training import FORECAST_RECIPES, fit_forecast_recipe
        >>> recipe = FORECAST_RECIPES["co2"]
        >>> source, _ = fit_forecast_recipe(recipe)  # doctest: +SKIP
        >>> model = make_forecast_checkpoint(source, recipe, "co2",
        ...     command="tstlens train --recipe co2")  # doctest: +SKIP
    """
    out = Path(out)
    check_folder(out, "the model")
    model = convert(source)
    model.cfg.model_name = recipe.name
    test = recipe.windows("test")
    errors = {
        split: {name: found.to_dict() for name, found in _measure(model, windows).items()}
        for split, windows in (("train", recipe.windows("train")), ("test", test))
    }
    model.info |= {
        "forecast_data": {
            "name": recipe.dataset,
            "n_time": test.series.shape[2],
            "horizon": test.future.shape[2],
            "unit": test.unit,
            "first_test_target": test.starts[0],
        },
        "recipe": recipe.to_dict(),
        "seed": recipe.seed,
        "forecast_errors": errors,
        "command": command,
    }
    save_with(model, out, {"README.md": forecast_card(model)})
    return model


def _measure(model: HookedTST, windows: ForecastWindows) -> dict[str, ForecastErrors]:
    series = windows.series.to(model.cfg.device, model.cfg.dtype)
    made = {"model": model(series), **naive_forecasts(windows)}
    return {name: forecast_errors(forecast, windows) for name, forecast in made.items()}


@checked
def forecast_card(model: HookedTST) -> str:
    """A forecasting checkpoint's README in Markdown, from ``cfg``, ``info`` and ``parity``.

    Args:
        model: a model that :func:`make_forecast_checkpoint` made.

    Returns:
        Markdown.
    """
    return _card(model)
