"""Interchange interventions: run some series with single components' outputs of other series.

A component is a head (its z at all positions), an MLP (what it writes), or the embedding at some
positions, which for front ends whose positions do not overlap is a piece of the series.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tstlens.model.hooked_tst import HookedTST
from tstlens.shapes import Series

Swaps = Mapping[str, Bool[Tensor, " series"]]  # L0H1, L1MLP -> where it is the source's


def component_nodes(model: HookedTST) -> list[str]:
    """Names of all heads and MLPs, layer by layer."""
    names = []
    for layer in range(model.cfg.n_layers):
        names += [f"L{layer}H{head}" for head in range(model.cfg.n_heads)]
        names.append(f"L{layer}MLP")
    return names


def splice_positions(
    model: HookedTST, base: Series, source: Series, swapped: Bool[Tensor, "series pos"]
) -> Series:
    """The series with the samples of some positions taken from other series."""
    n_time = base.shape[2]
    take = torch.zeros(len(base), n_time, dtype=torch.bool)
    for pos in range(swapped.shape[1]):
        take[:, model.time_cell(pos, n_time)] |= swapped[:, pos, None]
    return torch.where(take[:, None], source, base)


def interchange(
    model: HookedTST, base: Series, source: Series, swaps: Swaps
) -> Float[Tensor, "series class"]:
    """The model's output on ``base`` with some components' outputs those of ``source``.

    Args:
        model: pre-norm or post-norm.
        base: [series, channel, time].
        source: [series, channel, time], row by row the other series.
        swaps: head or MLP -> bool [series]; components that are not named stay the base's own,
            computed from what now reaches them.
    """
    names = [_hook(node) for node in swaps]
    kept: dict[str, Tensor] = {}

    def keep(activation: Tensor, hook: Any) -> None:
        kept[hook.name] = activation

    with model.hooks(fwd_hooks=[(name, keep) for name in dict.fromkeys(names)]):
        model(source)

    def replace(activation: Tensor, hook: Any) -> Tensor:
        layer = hook.name.split(".")[1]
        if hook.name.endswith("hook_mlp_out"):
            take = swaps[f"L{layer}MLP"][:, None, None]
        else:
            heads = [
                swaps.get(f"L{layer}H{head}", torch.zeros(len(base), dtype=torch.bool))
                for head in range(model.cfg.n_heads)
            ]
            take = torch.stack(heads, 1)[:, None, :, None]
        return torch.where(take.to(activation.device), kept[hook.name], activation)

    with model.hooks(fwd_hooks=[(name, replace) for name in dict.fromkeys(names)]):
        return model(base)


def _hook(node: str) -> str:
    layer, _, head = node.removeprefix("L").partition("H")
    if head:
        return f"blocks.{layer}.attn.hook_z"
    return f"blocks.{layer.removesuffix('MLP')}.hook_mlp_out"
