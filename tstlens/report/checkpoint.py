"""From a trained source model to a checkpoint folder: convert, measure, describe, save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from tstlens.arguments import checked
from tstlens.conversion import convert
from tstlens.data import Scaling, load_described
from tstlens.model import HookedTST
from tstlens.model.saving import save_with
from tstlens.report.card import model_card
from tstlens.storage import check_folder
from tstlens.training import evaluate


@checked
def make_checkpoint(
    source: nn.Module,
    out: str | Path,
    *,
    data: str,
    recipe: dict[str, Any],
    seed: int,
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
