"""The engine of exact patching: every replacement is one more world along the batch axis.

The corrupted series runs once. A world that replaces something in block l starts there, from the
corrupted run's activations: before attention it starts at the block's residual stream; after
attention, where every position is computed by itself, it computes only the positions that change,
and goes on from block l + 1. Worlds run in chunks that fit in memory. The serial loop with
``run_with_hooks`` is the oracle of this file's tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tstlens.model import HookedTST, TrunkState
from tstlens.model.block import Block
from tstlens.model.norms import listened_to
from tstlens.patching.grids import Grid
from tstlens.patching.sites import Place

_BESIDE = {  # what a world that enters a block after attention needs beside the activation itself
    "attn.hook_z": "hook_resid_pre",
    "hook_attn_out": "hook_resid_pre",
    "hook_resid_mid": None,
    "mlp.hook_pre": "hook_resid_mid",
    "mlp.hook_post": "hook_resid_mid",
    "hook_mlp_out": "hook_resid_mid",
    "hook_resid_post": None,
    "hook_normalized_resid_post": None,
}

_SCORES = "attn.hook_attn_scores"
_OUTSIDE = ("hook_", "embed", "pos_embed", "head")


@dataclass(frozen=True)
class CorruptedRun:
    """What the corrupted run leaves for the worlds to start from.

    Args:
        series: the corrupted series [pair, channel, time].
        mask: its mask or None.
        state: what crosses the trunk.
        acts: activations by hook name.
        final: what leaves the last block, [row, pos, d_model].
        output: the model's output, [pair, ...].
        blocks: names of the model's layers in order.
        crossing: what leaves an encoder, [row, pos, d_model]; None in a model of one stack.
        decoder_state: the state inside the decoder.
        n_encoder_layers: the first decoder layer, where there is one.
    """

    series: Tensor
    mask: Tensor | None
    state: TrunkState
    acts: dict[str, Tensor]
    final: Tensor
    output: Tensor
    blocks: tuple[str, ...]
    crossing: Tensor | None = None
    decoder_state: TrunkState | None = None
    n_encoder_layers: int | None = None

    @property
    def n_pairs(self) -> int:
        """Series in this run."""
        return len(self.series)

    @property
    def n_pos(self) -> int:
        """Positions of the longest stream."""
        return max(len(x[0]) for x in (self.final, self.crossing) if x is not None)

    def state_entering(self, layer: int) -> TrunkState:
        """The state that belongs to the stream that enters a layer."""
        if self.decoder_state is not None and layer > (self.n_encoder_layers or 0):
            return self.decoder_state
        scores = None if not layer else self.acts.get(f"{self.blocks[layer - 1]}.{_SCORES}")
        return self.state if scores is None else replace(self.state, previous_scores=scores)

    def entering(self, layer: int) -> Tensor:
        """What ``start_at_layer`` takes to run from a layer on, [row, pos, d_model]."""
        if self.crossing is not None and layer == self.n_encoder_layers:
            return self.crossing
        return self.final if layer >= len(self.blocks) else self.stream_before(layer)

    def stream_before(self, layer: int) -> Tensor:
        """The residual stream as a block takes it, [row, pos, d_model]."""
        return self.acts[f"{self.blocks[layer]}.hook_resid_pre"]


def run_corrupted(
    model: HookedTST,
    series: Tensor,
    mask: Tensor | None,
    place: Place,
    layers: Sequence[int | None],
) -> CorruptedRun:
    """Run the corrupted series once and keep what worlds of these layers start from."""
    cfg, blocks = model.cfg, tuple(map(model.layer_name, range(model.cfg.n_layers)))
    names: set[str] = set()
    for layer in layers:
        if layer is None:
            names.add(place.hook_name(None))
            continue
        names |= {place.hook_name(layer), f"{blocks[layer]}.hook_resid_pre"}
        if cfg.residual_attention:
            names |= {f"{blocks[before]}.{_SCORES}" for before in (layer - 1, layer) if before >= 0}
        if layer + 1 < cfg.n_layers:
            names.add(f"{blocks[layer + 1]}.hook_resid_pre")
        beside = _BESIDE.get(place.kind)
        if beside is not None:
            names.add(f"{blocks[layer]}.{beside}")
    if cfg.n_decoder_layers:
        names.add("hook_encoded")
    within = {name for name in names if model.crosses(name) or not name.startswith(_OUTSIDE)}
    after = {name for name in names if name.startswith("head")}
    with model.hooks(fwd_hooks=_keepers(kept := {}, names - within - after)):
        residual, state = model.embed_series(series, mask)
    with model.hooks(fwd_hooks=_keepers(kept, within)):
        first = cfg.n_encoder_layers if cfg.n_decoder_layers else None
        crossing = None
        if first is not None:
            residual = model(residual, start_at_layer=0, stop_at_layer=first, state=state)
            crossing = residual
        final = model(residual, start_at_layer=first or 0, stop_at_layer=cfg.n_layers, state=state)
    inside = model.decoder_state(state, kept["hook_encoded"]) if first is not None else None
    with model.hooks(fwd_hooks=_keepers(kept, after)):
        output = model.unembed(final, inside or state)
    return CorruptedRun(series, mask, state, kept, final, output, blocks, crossing, inside, first)


def start_of(model: HookedTST, place: Place, layer: int | None) -> int | None:
    """The layer from which a run that replaces something at a place has to go on; None for all."""
    if layer is not None:
        return layer
    if place.template.startswith("head"):
        return model.cfg.n_layers
    return model.cfg.n_encoder_layers if place.crosses else None


def _keepers(kept: dict[str, Tensor], names: Iterable[str]) -> list[Any]:
    def keep(activation: Tensor, hook: Any) -> None:
        kept[hook.name] = activation

    return [(name, keep) for name in names]


def run_worlds(
    model: HookedTST,
    run: CorruptedRun,
    place: Place,
    layer: int | None,
    grid: Grid,
    source: Tensor,
    worlds_per_chunk: int,
) -> Iterator[Tensor]:
    """Outputs of a layer's worlds, chunk by chunk.

    Args:
        model: the model.
        run: the corrupted run.
        place: where things are replaced.
        layer: the layer, None for a place outside the trunk.
        grid: which entries each world replaces.
        source: what they are replaced by, [row, ...] or [one series' rows, ...].
        worlds_per_chunk: worlds that run at once.

    Yields:
        Outputs [world, pair, ...] of the next worlds.
    """
    kind = place.kind
    undisturbed = not any(listened_to(point) for point in model.hook_points())
    by_itself = not (model.cfg.gated_mlp and kind == "mlp.hook_pre")
    if layer is not None:
        by_itself = by_itself and model.layers[layer].second == "none"
    enters_late = layer is not None and kind in _BESIDE and undisturbed and by_itself
    first = start_of(model, place, layer)
    for start in range(0, grid.n_worlds, worlds_per_chunk):
        worlds = slice(start, min(start + worlds_per_chunk, grid.n_worlds))
        n_worlds = worlds.stop - worlds.start
        series_of_row = torch.arange(run.n_pairs, device=run.final.device).repeat(n_worlds)
        if enters_late and layer is not None:
            residual = _leave_block(model, run, place, layer, grid, source, worlds)
            state = run.state_entering(layer + 1).rows(series_of_row)
            output = model(residual, start_at_layer=layer + 1, state=state)
        else:
            state = None if first is None else run.state_entering(first).rows(series_of_row)
            output = _run_hooked(model, run, place, layer, grid, source, worlds, state)
        yield output.unflatten(0, (n_worlds, run.n_pairs))


def _run_hooked(
    model: HookedTST,
    run: CorruptedRun,
    place: Place,
    layer: int | None,
    grid: Grid,
    source: Tensor,
    worlds: slice,
    state: TrunkState | None,
) -> Tensor:
    """Worlds that start at the block's residual stream, at the series or at the head."""
    n_worlds = worlds.stop - worlds.start
    hooks = [_replacing(run, place, layer, grid.condition(worlds), source, n_worlds)]
    first = start_of(model, place, layer)
    return _run_from(model, run, first, n_worlds, state, hooks)


def run_replaced(
    model: HookedTST,
    run: CorruptedRun,
    place: Place,
    conditions: Mapping[int | None, Tensor],
    given: Mapping[str, Tensor],
    n_worlds: int,
) -> Tensor:
    """Outputs [world, pair, ...] of worlds that each replace something in several layers at once.

    Args:
        model: the model.
        run: the corrupted run.
        place: where things are replaced.
        conditions: by layer bool [world, 1 (pair), *axes], True where a world replaces.
        given: what they are replaced by, [row, ...] by hook name.
        n_worlds: how many there are.
    """
    hooks = [
        _replacing(run, place, layer, condition, given[place.hook_name(layer)], n_worlds)
        for layer, condition in conditions.items()
    ]
    layers = [layer for layer in conditions if layer is not None]
    first = start_of(model, place, min(layers, default=None))
    state = None
    if first is not None:
        rows = torch.arange(run.n_pairs, device=run.final.device).repeat(n_worlds)
        state = run.state_entering(first).rows(rows)
    output = _run_from(model, run, first, n_worlds, state, hooks)
    return output.unflatten(0, (n_worlds, run.n_pairs))


def _replacing(
    run: CorruptedRun,
    place: Place,
    layer: int | None,
    condition: Tensor,
    source: Tensor,
    n_worlds: int,
) -> tuple[str, Callable[[Tensor, Any], Tensor]]:
    """A hook that replaces, in rows of worlds, what the condition says."""
    by_series = place.by_series(source)

    def replace(activation: Tensor, hook: Any) -> Tensor:
        per_world = place.by_series(activation).unflatten(0, (n_worlds, run.n_pairs))
        return torch.where(condition, by_series, per_world).reshape(activation.shape)

    return place.hook_name(layer), replace


def _run_from(
    model: HookedTST,
    run: CorruptedRun,
    first: int | None,
    n_worlds: int,
    state: TrunkState | None,
    hooks: list[Any],
) -> Tensor:
    """Worlds of the corrupted run with hooks, from a layer on; None for the series."""
    if first is not None:
        residual = _repeat(run.entering(first), n_worlds)
        return model.run_with_hooks(residual, start_at_layer=first, state=state, fwd_hooks=hooks)
    mask = None if run.mask is None else _repeat(run.mask, n_worlds)
    return model.run_with_hooks(_repeat(run.series, n_worlds), mask=mask, fwd_hooks=hooks)


def _leave_block(
    model: HookedTST,
    run: CorruptedRun,
    place: Place,
    layer: int,
    grid: Grid,
    source: Tensor,
    worlds: slice,
) -> Tensor:
    """What leaves the block in worlds that replace something after its attention."""
    block: Any = model.layers[layer]
    prefix = f"{run.blocks[layer]}."
    beside_name = _BESIDE[place.kind]
    here = run.acts[place.hook_name(layer)]
    beside = None if beside_name is None else run.acts[prefix + beside_name]
    n_worlds, n_rows = worlds.stop - worlds.start, len(here)
    pos_axis = place.axes.index("pos")
    if grid.pos is None:
        condition, pos = grid.condition(worlds), None
    else:
        condition, pos = grid.condition(worlds, skip_pos=pos_axis), grid.pos[worlds]

    def in_worlds(activation: Tensor) -> Tensor:
        """[row, pos, ...] as [world, row, changed pos, ...]."""
        if pos is None:
            return activation.expand(n_worlds, *activation.shape)
        return activation[:, pos].transpose(0, 1).unsqueeze(2)

    def by_series(activation: Tensor) -> Tensor:
        if place.n_series_channels is None:
            return activation
        return activation.unflatten(1, (-1, place.n_series_channels))

    patched = torch.where(condition, by_series(in_worlds(source)), by_series(in_worlds(here)))
    patched = patched.reshape(n_worlds * n_rows, *patched.shape[pos_axis + 2 :])
    rows = None if beside is None else in_worlds(beside).reshape(len(patched), -1, beside.shape[-1])
    left = finish_block(block, place.kind, patched, rows)
    if pos is None:
        return left
    residual = run.entering(layer + 1).expand(n_worlds, -1, -1, -1).clone()
    index = torch.arange(n_worlds, device=pos.device)
    residual[index, :, pos] = left.view(n_worlds, n_rows, -1)
    return residual.flatten(0, 1)


def finish_block(block: Block, kind: str, patched: Tensor, beside: Tensor | None) -> Tensor:
    """What leaves a block, from an activation after its attention.

    Args:
        block: the block.
        kind: the activation's hook name without ``blocks.{l}.``.
        patched: the activation, [row, pos, ...].
        beside: the residual stream it is added to: ``resid_pre`` for z and attn_out, ``resid_mid``
            for the MLP's, None for the stream itself.
    """
    if kind == "hook_resid_mid":
        return block.add_mlp(patched)
    if kind == "hook_resid_post":
        return block.leave(patched)
    if beside is None:
        return patched
    if kind == "attn.hook_z":
        return block.add_attention(beside, block.write_attention(patched))
    if kind == "hook_attn_out":
        return block.add_attention(beside, patched)
    if kind == "mlp.hook_pre":
        patched = block.mlp.act(patched)
    if kind != "hook_mlp_out":
        patched = block.write_mlp(patched)
    return block.add_mlp_out(block.read_mid(beside)[0], patched)


def _repeat(x: Tensor, n_worlds: int) -> Tensor:
    return x.expand(n_worlds, *x.shape).flatten(0, 1)
