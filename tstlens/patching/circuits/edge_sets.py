"""Runs in which any set of edges carries another run's activations, many sets at once.

Every receiver has its own copy of the residual stream, into which each sender's contribution goes
as the set says: the one of this run (whatever the sender writes by now), or the one recorded in
the other run. Sets are worlds along the batch axis. Cost and memory grow with the number of
receivers; for one edge at a time :mod:`tstlens.patching.circuits.single_edges` is much cheaper.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tstlens.errors import TstlensError
from tstlens.model import HookedTST
from tstlens.patching.circuits.graph import ComponentGraph
from tstlens.patching.circuits.streams import (
    Recorded,
    attention_input,
    carried,
    given_series,
    heads_z,
    leaving,
    run_mlp,
    written,
)

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
