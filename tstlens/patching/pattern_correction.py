"""AtP*'s correction: queries and keys are replaced exactly, and only the pattern is linearised."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tstlens.model import HookedTST
from tstlens.patching.grids import Grid
from tstlens.patching.sites import Place
from tstlens.patching.worlds import CorruptedRun


def pattern_place(place: Place) -> Place:
    """Where the pattern of a query or key site lies."""
    return replace(place, template=place.template.rsplit("hook_", 1)[0] + "hook_pattern")


def corrected(
    model: HookedTST,
    run: CorruptedRun,
    place: Place,
    layer: int,
    grid: Grid,
    source: Tensor,
    gradient: Tensor,
    memory_mb: float,
) -> Tensor:
    """Effects of replacing queries (or keys), [pair, world].

    Every world's pattern is computed with its queries (or keys) replaced; the effect is the
    gradient of the metric with respect to the pattern times the change of the pattern.

    Args:
        model: the model.
        run: the corrupted run, with the activation at the place.
        place: q or k.
        layer: its layer.
        grid: which entries each world replaces.
        source: what they are replaced by, [row, pos, head, d_head].
        gradient: of the metric with respect to the pattern, [row, head, query, key].
        memory_mb: worlds in chunks whose patterns stay near this many MiB.

    Source: Kramár et al. 2024 (arXiv 2403.00745), section 3.1.1.
    """
    here = run.acts[place.hook_name(layer)]
    others = _beside(model, run, place, layer)
    before = _pattern(model, run, layer, place, here[None], others)
    per_chunk = max(1, int(memory_mb * 2**20 / (16 * gradient.numel())))
    by_series, given = place.by_series(here), place.by_series(source)
    effects = []
    for start in range(0, grid.n_worlds, per_chunk):
        worlds = slice(start, min(start + per_chunk, grid.n_worlds))
        mixed = torch.where(grid.condition(worlds), given, by_series)
        mixed = mixed.reshape(-1, *here.shape)  # [world, row, pos, head, d_head]
        changed = _pattern(model, run, layer, place, mixed, others) - before
        of_row = (gradient * changed).flatten(2).sum(-1)  # [world, row]
        effects.append(of_row.unflatten(1, (run.n_pairs, -1)).sum(-1))
    return torch.cat(effects).T


def _beside(model: HookedTST, run: CorruptedRun, place: Place, layer: int) -> Tensor:
    """Keys of the corrupted run where the place is q, queries where it is k."""
    other = "hook_k" if place.kind == "attn.hook_q" else "hook_q"
    name = f"{run.blocks[layer]}.attn.{other}"
    with torch.no_grad():
        return model.run_with_cache(
            run.entering(layer),
            start_at_layer=layer,
            stop_at_layer=layer + 1,
            state=run.state_entering(layer),
            names_filter=[name],
            return_cache_object=False,
        )[1][name]


def _pattern(
    model: HookedTST, run: CorruptedRun, layer: int, place: Place, own: Tensor, others: Tensor
) -> Tensor:
    """Patterns [world, row, head, query, key] of queries or keys [world, row, pos, head, d_head].

    The model's own attention computes them, with whatever biases and masks it has.
    """
    n_worlds = len(own)
    flat, beside = own.flatten(0, 1), others.expand(n_worlds, *others.shape).flatten(0, 1)
    q, k = (flat, beside) if place.kind == "attn.hook_q" else (beside, flat)
    series_of_row = torch.arange(run.n_pairs, device=own.device).repeat(n_worlds)
    kept: list[Tensor] = []

    def keep(pattern: Tensor, hook: Any) -> None:
        del hook
        kept.append(pattern)

    block: Any = model.layers[layer]
    state = run.state_entering(layer)
    with torch.no_grad(), model.hooks(fwd_hooks=[(pattern_place(place).hook_name(layer), keep)]):
        block.attn.mix(q, k, torch.zeros_like(k), state.rows(series_of_row))
    return kept[0].unflatten(0, (n_worlds, -1))
