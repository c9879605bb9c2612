"""The model card of a checkpoint: what it was made from, how, and how good it is."""

from __future__ import annotations

import json
from typing import Any

from tstlens.arguments import checked
from tstlens.model import HookedTST
from tstlens.storage import fenced, plain, quoted


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
