"""The model card of a checkpoint: what it was made from, how, and how good it is.

From a trained source model to a checkpoint folder: convert, measure, describe, save.

From a trained forecaster to a checkpoint folder: convert, measure, describe, save.
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
from tstlens.storage import check_folder, fenced, plain, quoted
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
    info, cfg = model.info, model.cfg
    name = cfg.model_name
    data = info.get("data", {})
    parts = [f"# {plain(name)}", _summary(model)]
    accuracy = info.get("accuracy", {})
    if accuracy:
        rows = [
            f"| {plain(split)} | {plain(part['n_correct'])} of {plain(part['n'])} "
            f"| {100 * part['accuracy']:.2f} % | {part['cross_entropy']:.3f} |"
            for split, part in accuracy.items()
        ]
        head = ["| split | right | accuracy | cross-entropy (nats) |", "|---|---|---|---|"]
        parts += ["## Accuracy", "\n".join([*head, *rows])]
        parts.append("Measured on the converted model. The test split took no part in training.")
    parts += ["## Use", _usage(name, data)]
    parts += ["## Model", sizes_table(model)]
    if model.parity is not None:
        parts.append(f"Parity with the model it was converted from: {plain(model.parity)}.")
    parts += how_made(model)
    parts += ["## Limits", _limits(data)]
    return "\n\n".join(parts) + "\n"


def sizes_table(model: HookedTST) -> str:
    """The model's sizes as a Markdown table."""
    cfg = model.cfg
    sizes = {
        "layers": cfg.n_layers,
        "d_model": cfg.d_model,
        "heads": f"{cfg.n_heads} of width {cfg.d_head}",
        "d_mlp": cfg.d_mlp,
        "channels × samples": f"{cfg.n_channels} × {cfg.n_time}",
        "positions": cfg.n_ctx,
        "norm": f"{cfg.norm_position}-norm, {cfg.normalization_type}",
        "activation": cfg.act_fn,
        "parameters": f"{sum(tensor.numel() for tensor in model.parameters()):,}",
    }
    rows = [f"| {key} | {plain(value)} |" for key, value in sizes.items()]
    return "\n".join(["| | |", "|---|---|", *rows])


def how_made(model: HookedTST) -> list[str]:
    """Command, seed and recipe, as far as the model's ``info`` holds them."""
    info, parts = model.info, []
    if "command" in info:
        order = ", ".join(map(plain, model.cfg.class_names or ()))
        parts += [
            "## How it was made",
            fenced(info["command"], "bash"),
            f"Seed {plain(info.get('seed'))}" + (f"; class order: {order}." if order else "."),
        ]
    if "recipe" in info:
        recipe = json.dumps(info["recipe"], indent=2)
        recipe = fenced(recipe, "json")
        parts.append(f"<details><summary>Recipe</summary>\n\n{recipe}\n\n</details>")
    return parts


def _summary(model: HookedTST) -> str:
    cfg = model.cfg
    data = model.info.get("data", {}).get("name", "series")
    return (
        f"A time-series transformer that classifies {plain(data)} into {cfg.n_classes} classes, "
        "with a hook point on every activation. It is small on purpose: a specimen for "
        "interpretability, not a record."
    )


def _usage(name: str, data: dict[str, Any]) -> str:
    lines = ["import tstlens", "", f"model = tstlens.HookedTST.from_pretrained({quoted(name)})"]
    if data.get("name"):
        extra = "" if data.get("equal_length", True) else ", equal_length=False"
        lines.append(f'data = tstlens.load_dataset({quoted(data["name"])}, split="test"{extra})')
        if data.get("scaling"):
            lines.append(
                'data = tstlens.data.Scaling.from_dict(model.info["data"]["scaling"]).apply(data)'
            )
        lines.append("logits, cache = model.run_with_cache(data.series)")
    return fenced("\n".join(lines), "python")


def _limits(data: dict[str, Any]) -> str:
    scaling = data.get("scaling")
    values = (
        "as they are in the archive, unscaled"
        if not scaling
        else f"scaled {plain(scaling['kind'])}"
    )
    return (
        f"Series must have the length and the channels of the data set, {values.replace('_', ' ')}."
        " One training seed: what is found inside need not hold for another. Probabilities are not "
        "calibrated."
    )


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
    data: dict[str, Any] = model.info["forecast_data"]
    unit = plain(data["unit"])
    rows = [
        f"| {plain(split)} | {plain(name)} | {found['rmse']:.3f} | {found['mae']:.3f} "
        f"| {plain(found['n'])} | {plain(found['n_values'])} |"
        for split, measured in model.info["forecast_errors"].items()
        for name, found in measured.items()
    ]
    head = [
        f"| split | forecast | RMSE ({unit}) | MAE ({unit}) | windows | values |",
        "|---|---|---|---|---|---|",
    ]
    by_step = model.info["forecast_errors"]["test"]
    chosen = sorted({0, data["horizon"] // 4, data["horizon"] // 2, data["horizon"] - 1})
    steps = [
        f"| {plain(name)} | "
        + " | ".join(f"{found['rmse_by_step'][at]:.3f}" for at in chosen)
        + " |"
        for name, found in by_step.items()
    ]
    step_head = [
        "| forecast | " + " | ".join(f"step {at + 1}" for at in chosen) + " |",
        "|---" * (len(chosen) + 1) + "|",
    ]
    sizes = f"n_time={data['n_time']}, horizon={data['horizon']}"
    usage = "\n".join(
        [
            "import tstlens",
            "",
            f"model = tstlens.HookedTST.from_pretrained({quoted(model.cfg.model_name)})",
            f'windows = tstlens.data.load_forecasting({quoted(data["name"])}, "test", {sizes})',
            "forecast, cache = model.run_with_cache(windows.series)",
        ]
    )
    parts = [
        f"# {plain(model.cfg.model_name)}",
        f"A PatchTST that forecasts the series {plain(data['name'])}, {data['horizon']} steps from "
        f"{data['n_time']}, with a hook point on every activation. It is small on purpose: a "
        "specimen for interpretability, not a record.",
        "## Errors",
        "\n".join([*head, *rows]),
        "Measured on the converted model. Test targets begin on "
        f"{plain(data['first_test_target'])}; no value from then on took part in training, or in "
        "choosing the recipe. Windows overlap, so their errors are not independent. Root mean "
        f"squared test error by step ahead ({unit}):",
        "\n".join([*step_head, *steps]),
        "## Use",
        fenced(usage, "python"),
        "The series ships with statsmodels (`pip install statsmodels`); NaN marks a missing "
        "sample, in the model's input too.",
        "## Model",
        sizes_table(model),
        f"Parity with the model it was converted from: {plain(model.parity)}.",
        *how_made(model),
        "## Limits",
        "Series must have the length and the channel of the data. The forecast is a mean without "
        "an interval. One training seed: what is found inside need not hold for another.",
    ]
    return "\n\n".join(parts) + "\n"
