"""``tstlens train``, ``convert``, ``families`` and ``checkpoints``."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

from tstlens.cli.apps import app
from tstlens.cli.options import Overwrite, Quiet, Resume, argument, option, settings_of
from tstlens.errors import ArgumentError, UnknownNameError
from tstlens.storage import check_folder


@app.command()
@settings_of("tstlens.training.loop.TrainConfig", "select")
def train(
    dataset: Annotated[
        str | None, argument("A data set, as aeon spells it: JapaneseVowels.")
    ] = None,
    out: Annotated[
        Path | None, option("Folder to save to; named after the recipe or the data by default.")
    ] = None,
    recipe: Annotated[str | None, option("Make a shipped checkpoint again, by its name.")] = None,
    layers: Annotated[int, option("Encoder layers.", min=1)] = 3,
    width: Annotated[int, option("d_model; a multiple of 4 and of heads.", min=8)] = 128,
    heads: Annotated[int, option("Attention heads.", min=1)] = 8,
    stride: Annotated[
        int | None, option("Samples per position; chosen by the length if not given.", min=1)
    ] = None,
    scaling: Annotated[str | None, option("per_channel or per_series; none by default.")] = None,
    unequal: Annotated[
        bool, option("Series as recorded, padded, with a mask.", "--unequal")
    ] = False,
    seed: Annotated[int, option("Of initialisation, split and shuffles.", min=0)] = 0,
    resume: Resume = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    **settings: Any,
) -> None:
    """Train a classifier on a data set, convert it, check parity, and save a checkpoint folder."""
    from tstlens.report import make_checkpoint
    from tstlens.training import (
        FORECAST_RECIPES,
        RECIPES,
        ConvTST,
        ConvTSTConfig,
        Recipe,
        fit_recipe,
    )
    from tstlens.training import train as fit

    command = shlex.join(["tstlens", *sys.argv[1:]])
    if (dataset is None) == (recipe is None):
        raise ArgumentError(
            "give either a data set (tstlens train GunPoint) or a recipe (tstlens train --recipe "
            f"gunpoint); recipes: {', '.join([*RECIPES, *FORECAST_RECIPES])}"
        )
    if recipe in FORECAST_RECIPES:
        return _train_forecaster(recipe, out or Path(recipe), overwrite, quiet)
    if recipe is not None:
        if recipe not in RECIPES:
            known = [*RECIPES, *FORECAST_RECIPES]
            raise UnknownNameError(recipe, known, "These are the recipes")
        chosen = RECIPES[recipe]
        folder = out or Path(recipe)
        _keep_existing(folder, overwrite)
        source, _, _ = fit_recipe(chosen, progress=not quiet, checkpoint=resume)
        saved = make_checkpoint(
            source,
            folder,
            data=chosen.dataset,
            recipe=chosen.to_dict(),
            seed=chosen.seed,
            command=f"tstlens train --recipe {recipe} --out {folder.as_posix()}",
            name=recipe,
            scaling=chosen.scaling,
        )
    else:
        from tstlens.data import load_dataset
        from tstlens.randomness import seeded

        data = load_dataset(str(dataset), split="train", equal_length=not unequal, scaling=scaling)
        _, n_channels, n_time = data.series.shape
        sizes = ConvTSTConfig(
            n_channels,
            n_time,
            data.n_classes,
            conv_channels=(width // 4, width // 2, width),
            strides=_exact_strides(stride) if stride else _strides(-(-n_time // 64)),
            n_heads=heads,
            d_mlp=2 * width,
            n_layers=layers,
        )
        folder = out or Path(data.name)
        _keep_existing(folder, overwrite)
        settings["select"] = "best_val" if settings["val_fraction"] > 0 else "last"
        chosen = Recipe(folder.resolve().name, data.name, sizes, settings, None, scaling, seed)
        with seeded(seed):
            source = ConvTST(sizes)
        fit(source, data, seed=seed, checkpoint=resume, progress=not quiet, **settings)
        saved = make_checkpoint(
            source,
            folder,
            data=data.name,
            recipe=chosen.to_dict(),
            seed=seed,
            command=command,
            scaling=scaling,
            equal_length=not unequal,
        )
    for split, part in saved.info["accuracy"].items():
        print(f"{split:5}  {part['n_correct']} of {part['n']} right ({part['accuracy']:.2%})")
    print(f"parity  {saved.parity.max_rel:.1e} of the output's scale (float32)")
    print(f"saved  {folder}")


def _train_forecaster(name: str, folder: Path, overwrite: bool, quiet: bool) -> None:
    """Make a forecasting checkpoint again."""
    from tstlens.report import make_forecast_checkpoint
    from tstlens.training import FORECAST_RECIPES, fit_forecast_recipe

    _keep_existing(folder, overwrite)
    recipe = FORECAST_RECIPES[name]
    source, _ = fit_forecast_recipe(recipe, progress=not quiet)
    command = f"tstlens train --recipe {name} --out {folder.as_posix()}"
    saved = make_forecast_checkpoint(source, recipe, folder, command=command)
    unit = saved.info["forecast_data"]["unit"]
    for kind, found in saved.info["forecast_errors"]["test"].items():
        print(f"test  {kind:26}  RMSE {found['rmse']:.3f} {unit}, MAE {found['mae']:.3f} {unit}")
    print(f"parity  {saved.parity.max_rel:.1e} of the output's scale (float32)")
    print(f"saved  {folder}")


@app.command()
def convert(
    source: Annotated[
        str,
        argument("A folder or hub id with config.json, or a file of weights (then give --family)."),
    ],
    out: Annotated[Path, option("Folder to save to.")],
    family: Annotated[str | None, option("The source's family; see tstlens families.")] = None,
    hint: Annotated[
        list[str] | None,
        option(
            "What weights alone do not tell, name=value with a JSON value: n_heads=8; repeat for "
            "more."
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Convert a source model, check its outputs against the source's, and save it."""
    from tstlens.zoo.converting import convert as run

    _keep_existing(out, overwrite)
    model = run(Path(source) if Path(source).exists() else source, family, **_hints(hint or []))
    model.save_pretrained(out)
    print(f"parity  {model.parity}")
    print(f"saved  {out}")


@app.command()
def families() -> None:
    """List the source families that can be converted."""
    from tstlens.family_index import FAMILIES

    for name, entry in sorted(FAMILIES.items()):
        print(f"{name:18} {entry.summary}")


@app.command()
def checkpoints() -> None:
    """List the checkpoints that ship, with their data, accuracy and size."""
    from tstlens.model.folders import describe_checkpoint, find_checkpoint, list_checkpoints

    rows: list[tuple[str, ...]] = [("name", "data", "train", "test", "layers", "heads", "size")]
    for name in list_checkpoints():
        record = describe_checkpoint(name)
        info, cfg = record.get("info", {}), record["config"]
        size = sum(part.stat().st_size for part in find_checkpoint(name).iterdir())
        rows.append(
            (
                name,
                str((info.get("data") or info.get("forecast_data") or {}).get("name", "?")),
                *(_measured(info, split) for split in ("train", "test")),
                str(cfg["n_layers"]),
                str(cfg["n_heads"]),
                f"{size / 1e6:.1f} MB",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )


def _hints(given: list[str]) -> dict[str, Any]:
    """``name=value`` as a dictionary; a value that is no JSON is taken as text."""
    hints: dict[str, Any] = {}
    for entry in given:
        name, equals, value = entry.partition("=")
        if not equals:
            raise ArgumentError(f"--hint takes name=value, got {entry!r}")
        try:
            hints[name] = json.loads(value)
        except ValueError:
            hints[name] = value
    return hints


def _measured(info: dict[str, Any], split: str) -> str:
    """A classifier's accuracy, a forecaster's error."""
    part = info.get("accuracy", {}).get(split)
    if part:
        return f"{part['accuracy']:.2%}"
    errors = info.get("forecast_errors", {}).get(split)
    return f"RMSE {errors['model']['rmse']:.2f}" if errors else "?"


def _keep_existing(folder: Path, overwrite: bool) -> None:
    """Refuse to train over a model that is there already, or for a place that cannot be written."""
    check_folder(folder, "the model")
    if not overwrite and (folder / "config.json").exists():
        raise ArgumentError(
            f"{folder} holds a model already; give another --out, or --overwrite to replace it"
        )


def _exact_strides(samples: int) -> tuple[int, int, int]:
    """Strides of the three stages whose product is exactly this many samples per position."""
    strides = _strides(samples)
    if strides[0] * strides[1] * strides[2] != samples:
        raise ArgumentError(
            f"--stride must be 1, 2, 4, 8, 16, 32 or 64 samples per position, got {samples}"
        )
    return strides


def _strides(samples: int) -> tuple[int, int, int]:
    """Strides of the three stages whose product is about this many samples per position."""
    strides = [1, 1, 1]
    for stage in (2, 1, 0, 2, 1, 0):
        if strides[0] * strides[1] * strides[2] < samples:
            strides[stage] *= 2
    return strides[0], strides[1], strides[2]
