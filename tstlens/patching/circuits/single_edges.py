"""Every edge by itself, exactly: what the output does when one receiver hears one sender's clean
contribution.

For each sender the streams that later receivers would read are built once; each receiver answers
for all senders in one batch; and the answer is one more world that runs on through the rest of the
model. The runs of :mod:`tstlens.patching.circuits.edge_sets` are the oracle of this file's tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from tstlens.model import HookedTST
from tstlens.patching.circuits.edge_sets import embed_with_channels
from tstlens.patching.circuits.graph import PARTS, ComponentGraph
from tstlens.patching.circuits.streams import (
    Recorded,
    attention_input,
    carried,
    heads_z,
    leaving,
    run_mlp,
    walk,
    written,
)
from tstlens.patching.sweep import rows_that_fit

Answer = tuple[Tensor, Tensor, Tensor]  # senders [world], receivers [world], outputs


def run_single_edges(
    model: HookedTST,
    graph: ComponentGraph,
    here: Recorded,
    there: Recorded,
    wanted: Bool[Tensor, "sender receiver"],
    memory_mb: float = 256.0,
) -> Iterator[Answer]:
    """Outputs with one edge at a time replaced.

    Args:
        model: the model.
        graph: its components.
        here: the run that the edges are replaced in.
        there: where their contributions come from.
        wanted: True at the edges to run.
        memory_mb: worlds run in chunks whose activations stay near this many MiB.

    Yields:
        Places of sender and receiver, [world] each, and outputs [world, pair, ...].
    """
    runner = _Runner(model, graph, here, there, wanted, memory_mb)
    if graph.n_channels:
        yield from runner.channels()
    embedding = graph.sender_at("pos")
    whole = there.pre[0] - here.pre[0]
    yield from runner.walk_from(embedding, whole[None], by_pos=bool(graph.n_pos))
    for layer in range(graph.n_layers):
        block: Any = model.blocks[layer]
        heads = written(block, there.z[layer] - here.z[layer]).movedim(2, 0)
        yield from runner.walk_from(graph.sender_at("head", layer), heads)
        mlp = there.mlp_out[layer] - here.mlp_out[layer]
        yield from runner.walk_from(graph.sender_at("mlp", layer), mlp[None])


class _Runner:
    """The worlds of one block of pairs."""

    def __init__(
        self,
        model: HookedTST,
        graph: ComponentGraph,
        here: Recorded,
        there: Recorded,
        wanted: Tensor,
        memory_mb: float,
    ) -> None:
        self.model, self.graph, self.here, self.there = model, graph, here, there
        self.wanted = wanted & graph.allowed
        n_rows, n_pos, _ = here.pre[0].shape
        self.at_once = max(1, rows_that_fit(model, n_pos, memory_mb) // n_rows)

    def walk_from(self, senders: slice, changes: Tensor, by_pos: bool = False) -> Iterator[Answer]:
        """Edges from senders that write at the same place; ``changes`` [sender, row, pos, d]."""
        if not self.wanted[senders].any():
            return
        node = self.graph.senders[senders.start]
        for kind, layer, stream in walk(self.model, self.here, node, changes):
            if by_pos:
                stream = self._one_position_each(kind, layer, stream[0])
            if kind == "head":
                for part in PARTS:
                    yield from self._heads(senders, layer, part, stream)
            elif kind == "mlp":
                yield from self._mlp(senders, layer, stream)
            else:
                yield from self._output(senders, stream)

    def _one_position_each(self, kind: str, layer: int, changed: Tensor) -> Tensor:
        """[pos (sender), row, pos, d_model]: norms work on each position by itself."""
        same = self.here.mid[layer] if kind == "mlp" else self.here.pre[layer]
        chosen = torch.eye(self.graph.n_pos, dtype=torch.bool, device=changed.device)
        return torch.where(chosen[:, None, :, None], changed, same)

    def _heads(self, senders: slice, layer: int, part: str, stream: Tensor) -> Iterator[Answer]:
        ports = self.graph.receiver_at("head", layer, part)
        pairs = self.wanted[senders, ports].nonzero()  # [world, (sender, head)]
        if not len(pairs):
            return
        block: Any = self.model.blocks[layer]
        here = attention_input(block, self.here.pre[layer])
        asked = pairs[:, 0].unique()
        for some in asked.split(self.at_once):
            changed = attention_input(block, stream[some]).flatten(0, 1)
            same = here.repeat(len(some), 1, 1)
            inputs = [changed if part == which else same for which in PARTS]
            z = heads_z(self.model, layer, inputs, self.here.states(len(some)))
            change = z.unflatten(0, (len(some), -1)) - self.here.z[layer]
            place = torch.full((stream.shape[0],), -1)
            place[some] = torch.arange(len(some))
            worlds = pairs[place[pairs[:, 0]] >= 0]
            for chunk in worlds.split(self.at_once):
                sender, head = chunk.unbind(1)
                of_head = torch.einsum(
                    "wnph,whd->wnpd",
                    change[place[sender], :, :, head],
                    block.attn.W_O[head],
                )
                attn_out = (self.here.attn_out[layer] + of_head).flatten(0, 1)
                resid_pre = self.here.pre[layer].repeat(len(chunk), 1, 1)
                left = block.add_attention(resid_pre, attn_out)
                output = self._go_on(left, layer + 1, len(chunk))
                yield sender + senders.start, head + ports.start, output

    def _mlp(self, senders: slice, layer: int, stream: Tensor) -> Iterator[Answer]:
        port = self.graph.receiver_at("mlp", layer).start
        block: Any = self.model.blocks[layer]
        past = carried(block, self.here.mid[layer])
        for some in self.wanted[senders, port].nonzero()[:, 0].split(self.at_once):
            mlp_out = run_mlp(block, stream[some])
            left = leaving(block, past + mlp_out).flatten(0, 1)
            output = self._go_on(left, layer + 1, len(some))
            yield some + senders.start, torch.full_like(some, port), output

    def _output(self, senders: slice, stream: Tensor) -> Iterator[Answer]:
        port = len(self.graph.receivers) - 1
        for some in self.wanted[senders, port].nonzero()[:, 0].split(self.at_once):
            output = self._go_on(stream[some].flatten(0, 1), self.graph.n_layers, len(some))
            yield some + senders.start, torch.full_like(some, port), output

    def channels(self) -> Iterator[Answer]:
        """Edges from a channel to the embedding at a position: the embedding is what changes."""
        each = torch.eye(self.graph.n_channels, dtype=torch.bool, device=self.here.series.device)
        changed = embed_with_channels(self.model, self.here, self.there, each)
        same = self.here.pre[0]
        worlds = self.wanted[self.graph.sender_at("channel"), self.graph.receiver_at("pos")]
        for chunk in worlds.nonzero().split(self.at_once):
            channel, pos = chunk.unbind(1)
            where = torch.ones(len(chunk), 1, same.shape[1], 1, dtype=torch.bool)
            if self.graph.n_pos:
                where = torch.nn.functional.one_hot(pos, self.graph.n_pos).bool()[:, None, :, None]
            stream = torch.where(where.to(same.device), changed[channel], same)
            yield channel, pos, self._go_on(stream.flatten(0, 1), 0, len(chunk))

    def _go_on(self, residual: Tensor, layer: int, n_worlds: int) -> Tensor:
        output = self.model(residual, start_at_layer=layer, state=self.here.states(n_worlds))
        return output.unflatten(0, (n_worlds, len(self.here.series)))
