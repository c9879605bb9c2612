"""What receivers read, rebuilt from what senders wrote: the ground that edges stand on.

A receiver's input is the residual stream, and the residual stream is built from what the senders
before it wrote. An edge replaces one sender's contribution in **one receiver's** input. That input
is rebuilt with the model's own steps: in a pre-norm model the contributions are added up and the
receiver's norm (``ln1``, ``ln2``, ``ln_final``) reads the sum; in a post-norm model every sublayer
adds its contribution and normalises, so the receiver's input is built again sublayer by sublayer
from the place where the sender writes: ``x <- norm(x + contribution)``. All other components'
contributions are held fixed. The norms are not: their means and scales are recomputed, for this
receiver only. Nothing is linearised, so replacing every edge gives exactly the other run.

What follows: on either kind of model effects of edges need not add up, since norms see the whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tstlens.errors import ArgumentError, HookError
from tstlens.model import HookedTST, TrunkState
from tstlens.model.norms import listened_to
from tstlens.patching.circuits.graph import ComponentGraph, Node


@dataclass(frozen=True)
class Recorded:
    """What every component wrote in one run.

    Args:
        series: [pair, channel, time].
        mask: [pair, time] or None.
        state: what crosses the trunk.
        pre: what enters each layer and what leaves the last, [row, pos, d_model] each.
        mid: the stream after attention, before any norm of it.
        post: the stream after the MLP, before any norm of it.
        z: heads' outputs, [row, pos, head, d_head].
        attn_out: [row, pos, d_model].
        mlp_out: [row, pos, d_model].
        output: [pair, ...].
    """

    series: Tensor
    mask: Tensor | None
    state: TrunkState
    pre: tuple[Tensor, ...]
    mid: tuple[Tensor, ...]
    post: tuple[Tensor, ...]
    z: tuple[Tensor, ...]
    attn_out: tuple[Tensor, ...]
    mlp_out: tuple[Tensor, ...]
    output: Tensor

    def states(self, n_worlds: int) -> TrunkState:
        """The state of ``n_worlds`` copies of all rows, world by world."""
        rows = torch.arange(len(self.series), device=self.series.device)
        return self.state.rows(rows.repeat(n_worlds))


@torch.no_grad()
def record_components(model: HookedTST, series: Tensor, mask: Tensor | None) -> Recorded:
    """Run the model once and keep what every component wrote.

    Raises:
        HookError: somebody's hooks are on the model.
    """
    if any(listened_to(point) for point in model.hook_points()):
        raise HookError(
            "edges are defined on the model without hooks, and there are some on it; "
            "model.reset_hooks() removes them"
        )
    kept: dict[str, Tensor] = {}

    def keep(activation: Tensor, hook: Any) -> None:
        kept[hook.name] = activation

    leaves = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "attn.hook_z")
    leaves += ("hook_attn_out", "hook_mlp_out")
    layers = range(model.cfg.n_layers)
    hooks = [(f"blocks.{layer}.{leaf}", keep) for layer in layers for leaf in leaves]
    residual, state = model.embed_series(series, mask)
    with model.hooks(fwd_hooks=hooks):
        final = model(residual, start_at_layer=0, stop_at_layer=len(layers), state=state)
    output = model.unembed(final, state)
    pre, mid, post, z, attn_out, mlp_out = (
        tuple(kept[f"blocks.{layer}.{leaf}"] for layer in layers) for leaf in leaves
    )
    return Recorded(series, mask, state, (*pre, final), mid, post, z, attn_out, mlp_out, output)


def given_series(here: Recorded, there: Recorded) -> Tensor:
    """The other run's series, where both observed it; this run's elsewhere."""
    seen = ~(here.series.isnan() | there.series.isnan())
    for mask in (here.mask, there.mask):
        seen = seen if mask is None else seen & mask[:, None]
    return torch.where(seen, there.series, here.series)


def check_same_positions(here: Recorded, there: Recorded) -> None:
    """Raise unless both runs observe the same positions.

    Raises:
        ArgumentError: the padding differs, so that no set of edges turns one run into the other.
    """
    one, other = here.state.pos_mask, there.state.pos_mask
    if one is None and other is None:
        return
    if one is None or other is None or not torch.equal(one, other):
        raise ArgumentError(
            "edges need pairs whose two series are observed at the same samples, and the masks "
            "differ: attention would see other positions whatever is patched; choose pairs of "
            "equal length, or sweep sites with patching.sweep"
        )


def attention_input(block: Any, stream: Tensor) -> Tensor:
    """What q, k and v are projected from, given the stream [..., pos, d_model] before the block."""
    return block.ln1(stream) if block.cfg.norm_position == "pre" else stream


def run_mlp(block: Any, mid: Tensor) -> Tensor:
    """What the MLP writes, given the stream [..., pos, d_model] after attention (before a norm)."""
    rows = mid.reshape(-1, *mid.shape[-2:])
    return block.mlp(block.read_mid(rows)[1]).view(mid.shape)


def carried(block: Any, mid: Tensor) -> Tensor:
    """What the stream carries past the MLP."""
    if block.cfg.norm_position == "pre":
        return mid
    return block.read_mid(mid.reshape(-1, *mid.shape[-2:]))[0].view(mid.shape)


def leaving(block: Any, post: Tensor) -> Tensor:
    """What leaves the block, given the stream after the MLP."""
    return block.leave(post.reshape(-1, *post.shape[-2:])).view(post.shape)


def heads_z(model: HookedTST, layer: int, inputs: Sequence[Tensor], state: TrunkState) -> Tensor:
    """Outputs z of a layer's heads for given inputs of q, k and v, [row, pos, head, d_head]."""
    block: Any = model.blocks[layer]
    kept: list[Tensor] = []

    def keep(activation: Tensor, hook: Any) -> None:
        del hook
        kept.append(activation)

    with model.hooks(fwd_hooks=[(f"blocks.{layer}.attn.hook_z", keep)]):
        block.attn(*inputs, state)
    return kept[0]


def written(block: Any, z: Tensor) -> Tensor:
    """What each head adds to the stream, [..., pos, head, d_model]."""
    return torch.einsum("...hd,hdm->...hm", z, block.attn.W_O)


def contribution_change(
    model: HookedTST, graph: ComponentGraph, node: Node, here: Recorded, there: Recorded
) -> Tensor:
    """There minus here of what a node writes, [row, pos, d_model]."""
    if node.kind in ("pos", "embed"):
        change = there.pre[0] - here.pre[0]
        if node.kind == "embed":
            return change
        return change * one_position(change, node.index or 0)
    layer = node.layer or 0
    if node.kind == "mlp":
        return there.mlp_out[layer] - here.mlp_out[layer]
    head, block = node.index, model.blocks[layer]
    return written(block, there.z[layer] - here.z[layer])[:, :, head]


def one_position(like: Tensor, pos: int) -> Tensor:
    """[pos, 1], 1 at one position."""
    chosen = torch.zeros(like.shape[-2], 1, dtype=like.dtype, device=like.device)
    chosen[pos] = 1
    return chosen


def walk(
    model: HookedTST, here: Recorded, node: Node, change: Tensor
) -> Iterator[tuple[str, int, Tensor]]:
    """What later receivers would read if a node wrote ``change`` more, all others held fixed.

    Args:
        model: the model.
        here: the run that the other components stay at.
        node: the sender.
        change: [*world, row, pos, d_model], added to what the sender writes.

    Yields:
        Kind of receiver (``"head"``, ``"mlp"``, ``"output"``), its layer, and the stream
        [*world, row, pos, d_model]: before ``ln1`` of a pre-norm block; before any norm after
        attention; what leaves the last block.
    """
    first = node.layer or 0
    place = node.kind if node.kind in ("head", "mlp") else "pre"
    stream = change
    for layer in range(first, model.cfg.n_layers):
        block: Any = model.blocks[layer]
        if place == "pre":
            stream = here.pre[layer] + change if layer == first else stream
            yield "head", layer, stream
            stream = stream + here.attn_out[layer]
        elif place == "head":
            stream = here.mid[layer] + change
        if place != "mlp":
            yield "mlp", layer, stream
            stream = carried(block, stream) + here.mlp_out[layer]
        else:
            stream = here.post[layer] + change
        stream = leaving(block, stream)
        place = "pre"
    yield "output", model.cfg.n_layers, stream
