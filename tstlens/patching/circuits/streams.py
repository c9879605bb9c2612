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

Runs in which any set of edges carries another run's activations, many sets at once.

Every receiver has its own copy of the residual stream, into which each sender's contribution goes
as the set says: the one of this run (whatever the sender writes by now), or the one recorded in
the other run. Sets are worlds along the batch axis. Cost and memory grow with the number of
receivers; for one edge at a time :mod:`tstlens.patching.circuits.edges` is much cheaper.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tstlens.arguments import check_finite
from tstlens.errors import ArgumentError, HookError, TstlensError
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


Share = Bool[Tensor, "world sender receiver"] | Float[Tensor, "world sender receiver"]

TOLERANCE = 1e-3  # of the output's scale; the rebuilt run differs by rounding only


def run_edge_sets(
    model: HookedTST,
    graph: ComponentGraph,
    here: Recorded,
    there: Recorded,
    masks: Share,
    memory_mb: float = 256.0,
) -> Iterator[Float[Tensor, "world pair *out"]]:
    """Outputs of runs whose masked edges carry the other run's contributions.

    Args:
        model: the model.
        graph: its components.
        here: the run that goes on as it is where no edge is replaced.
        there: where replaced edges take their contributions from.
        masks: True where an edge is replaced; numbers from 0 to 1 replace by that share.
        memory_mb: worlds run in chunks whose streams stay near this many MiB.

    Yields:
        Outputs [world, pair, ...] of the next worlds.
    """
    n_rows, n_pos, d_model = here.pre[0].shape
    per_world = 4 * n_rows * len(graph.receivers) * n_pos * d_model * 3
    at_once = max(1, int(memory_mb * 2**20 / per_world))
    for chunk in masks.split(at_once):
        yield _run(model, graph, here, there, chunk.to(here.pre[0].device))


def pairs_at_once(model: HookedTST, graph: ComponentGraph, n_pos: int, memory_mb: float) -> int:
    """Pairs whose streams for all receivers take about ``memory_mb`` MiB."""
    per_pair = 12 * model.cfg.rows_per_series * len(graph.receivers) * n_pos * model.cfg.d_model
    return max(1, int(memory_mb * 2**20 / per_pair))


@torch.no_grad()
def check_rebuilds(
    model: HookedTST, graph: ComponentGraph, here: Recorded, memory_mb: float = 256.0
) -> None:
    """Raise unless the model, rebuilt edge by edge with none replaced, gives its own output.

    Raises:
        TstlensError: the model does something between its components that the graph lacks.
    """
    check_finite(here.output.flatten(1).T, "the model", None)
    none = torch.zeros(1, len(graph.senders), len(graph.receivers), dtype=torch.bool)
    (rebuilt,) = run_edge_sets(model, graph, here, here, none, memory_mb)
    scale = max(1.0, float(here.output.abs().max()))
    off = float((rebuilt[0] - here.output).abs().max()) / scale
    if not off <= TOLERANCE:
        raise TstlensError(
            f"expected the model rebuilt from its components to give its own output, got a "
            f"difference of {off:.1e} of its scale: something in this model connects components "
            "in a way that the graph does not know; sweep its sites with patching.sweep instead"
        )


def _run(
    model: HookedTST, graph: ComponentGraph, here: Recorded, there: Recorded, masks: Tensor
) -> Tensor:
    n_worlds, n_rows, n_heads = len(masks), len(here.pre[0]), graph.n_heads
    weights = masks.to(here.pre[0].dtype)
    state = here.states(n_worlds)
    first = graph.receiver_at("pos").stop

    def going_to(sender: slice, left: int) -> Tensor:
        """[world, sender, receiver] of the receivers that are left."""
        return weights[:, sender, len(graph.receivers) - left :]

    embedded = embedding_of_sets(model, graph, here, there, masks)  # [world or 1, row, pos, d]
    left = len(graph.receivers) - first
    from_embedding = going_to(graph.sender_at("pos"), left).transpose(1, 2)  # [w, receiver, pos]
    change = (there.pre[0] - embedded)[:, :, None]  # [world, row, 1, pos, d_model]
    views = embedded[:, :, None] + from_embedding[:, None, :, :, None] * change
    for layer in range(graph.n_layers):
        block: Any = model.blocks[layer]
        inputs = attention_input(block, views[:, :, : 3 * n_heads])
        inputs = inputs.flatten(0, 1).transpose(1, 2)  # [world * row, pos, 3 * head, d_model]
        z = heads_z(model, layer, inputs.split(n_heads, 2), state)
        views = views[:, :, 3 * n_heads :]
        change = written(block, there.z[layer] - z.unflatten(0, (n_worlds, n_rows)))
        views = views + block.attn.write(z).unflatten(0, (n_worlds, n_rows))[:, :, None]
        views = views + torch.einsum(
            "whr,wnphd->wnrpd", going_to(graph.sender_at("head", layer), views.shape[2]), change
        )
        mlp_out = run_mlp(block, views[:, :, 0])
        views = carried(block, views[:, :, 1:])
        from_mlp = going_to(graph.sender_at("mlp", layer), views.shape[2])[:, 0]
        change = (there.mlp_out[layer] - mlp_out)[:, :, None]
        views = views + mlp_out[:, :, None] + from_mlp[:, None, :, None, None] * change
        views = leaving(block, views)
    output = model.unembed(views[:, :, 0].flatten(0, 1), state)
    return output.unflatten(0, (n_worlds, len(here.series)))


def embedding_of_sets(
    model: HookedTST, graph: ComponentGraph, here: Recorded, there: Recorded, masks: Tensor
) -> Tensor:
    """The embedding with some channels of the other run's series, [world or 1, row, pos, d_model].

    Which channels are replaced may differ from position to position; every pattern of channels
    that occurs is embedded once.
    """
    if not graph.n_channels:
        return here.pre[0][None]
    wanted = masks[:, graph.sender_at("channel"), graph.receiver_at("pos")]  # [w, channel, pos]
    patterns, which = wanted.transpose(1, 2).flatten(0, 1).unique(dim=0, return_inverse=True)
    streams = embed_with_channels(model, here, there, patterns)  # [pattern, row, pos, d_model]
    if not graph.n_pos:
        return streams[which]
    of_pos = streams.permute(0, 2, 1, 3)[
        which.view(len(masks), -1), torch.arange(graph.n_pos, device=which.device)
    ]  # [world, pos, row, d_model]
    return of_pos.transpose(1, 2)


def embed_with_channels(
    model: HookedTST, here: Recorded, there: Recorded, patterns: Tensor
) -> Tensor:
    """The embedding of series with the channels of each pattern replaced.

    Args:
        model: the model.
        here: the run whose series the others are taken from.
        there: the run whose channels replace them.
        patterns: bool [pattern, channel].

    Returns:
        [pattern, row, pos, d_model].
    """
    given = given_series(here, there)
    mixed = torch.where(patterns[:, None, :, None], given, here.series).flatten(0, 1)
    mask = here.mask
    if mask is not None:
        mask = mask.expand(len(patterns), *mask.shape).flatten(0, 1)
    return model.embed_series(mixed, mask)[0].unflatten(0, (len(patterns), -1))
