"""From a trained forecaster to a checkpoint folder: convert, measure, describe, save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tstlens.arguments import checked
from tstlens.conversion import convert
from tstlens.data import ForecastWindows
from tstlens.model import HookedTST
from tstlens.model.saving import save_with
from tstlens.report.card import how_made, sizes_table
from tstlens.storage import check_folder, fenced, plain, quoted
from tstlens.training import ForecastErrors, ForecastRecipe, forecast_errors, naive_forecasts


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
