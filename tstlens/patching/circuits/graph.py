"""The graph of a model's components: who can write what whom reads.

Nodes that write (senders): input channels (when asked for), the embedding at each position (or as
a whole), every head, every MLP. Nodes that read (receivers): every head three times, through its
queries, keys and values; every MLP; the output, which is the final norm, the pooling and the
linear map; and, with channels, the embedding at each position. An edge runs from each sender to
each receiver that comes after it. Biases belong to no node: they are the same in every run.

Names: ``channel2``, ``pos3``, ``embed`` (where positions are not told apart), ``L0H1``, ``L0MLP``,
``output``; a head reads at ``L0H1.q``, ``L0H1.k`` and ``L0H1.v``. An edge is ``"L0H1->L1H0.k"``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tstlens.arguments import Count, checked
from tstlens.errors import ArgumentError, UnknownSiteError
from tstlens.model import HookedTST
from tstlens.patching.checks import require_two_writers

Kind = Literal["channel", "pos", "embed", "head", "mlp", "output"]
PARTS = ("q", "k", "v")


@dataclass(frozen=True)
class Node:
    """A component of the model.

    Args:
        kind: ``"channel"``, ``"pos"`` (the embedding at one position), ``"embed"`` (at all of
            them), ``"head"``, ``"mlp"`` or ``"output"``.
        layer: block of a head or MLP.
        index: number of the channel, position or head.
    """

    kind: Kind
    layer: int | None = None
    index: int | None = None

    @property
    def name(self) -> str:
        """``pos3``, ``L0H1``, ``L0MLP``, ``output`` …"""
        if self.kind == "head":
            return f"L{self.layer}H{self.index}"
        if self.kind == "mlp":
            return f"L{self.layer}MLP"
        return self.kind if self.index is None else f"{self.kind}{self.index}"

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Edge:
    """One way that a component's output is read by another one.

    Args:
        sender: the component that writes.
        receiver: the component that reads.
        part: ``"q"``, ``"k"`` or ``"v"`` where the receiver is a head, else None.
    """

    sender: Node
    receiver: Node
    part: str | None = None

    @property
    def reads_at(self) -> str:
        """The receiver with its part: ``L1H0.k``."""
        return self.receiver.name if self.part is None else f"{self.receiver.name}.{self.part}"

    @property
    def name(self) -> str:
        """``L0H1->L1H0.k``."""
        return f"{self.sender.name}->{self.reads_at}"

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class ComponentGraph:
    """All components of a model and all edges between them, as plain data.

    Args:
        n_layers: blocks.
        n_heads: heads of each block.
        n_pos: positions of the embedding as nodes of their own; 0 for one node ``embed``.
        n_channels: input channels as nodes; 0 for none.

    Example:
        >>> graph = ComponentGraph(n_layers=1, n_heads=2)
        >>> [edge.name for edge in graph.edges if edge.sender.kind == "head"]
        ['L0H0->L0MLP', 'L0H0->output', 'L0H1->L0MLP', 'L0H1->output']
    """

    n_layers: int
    n_heads: int
    n_pos: int = 0
    n_channels: int = 0

    @property
    def n_inputs(self) -> int:
        """Nodes of the embedding."""
        return self.n_pos or 1

    @cached_property
    def inputs(self) -> tuple[Node, ...]:
        """The embedding's nodes."""
        if not self.n_pos:
            return (Node("embed"),)
        return tuple(Node("pos", index=pos) for pos in range(self.n_pos))

    @cached_property
    def senders(self) -> tuple[Node, ...]:
        """What writes: channels, embedding, then heads and MLP layer by layer."""
        nodes = [Node("channel", index=channel) for channel in range(self.n_channels)]
        nodes += self.inputs
        for layer in range(self.n_layers):
            nodes += [Node("head", layer, head) for head in range(self.n_heads)]
            nodes.append(Node("mlp", layer))
        return tuple(nodes)

    @cached_property
    def receivers(self) -> tuple[tuple[Node, str | None], ...]:
        """What reads: (embedding, with channels), per layer heads by q, k, v and MLP, output."""
        ports: list[tuple[Node, str | None]] = []
        if self.n_channels:
            ports += [(node, None) for node in self.inputs]
        for layer in range(self.n_layers):
            for part in PARTS:
                ports += [(Node("head", layer, head), part) for head in range(self.n_heads)]
            ports.append((Node("mlp", layer), None))
        return (*ports, (Node("output"), None))

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        """Every node once, senders first and the output last."""
        return (*self.senders, Node("output"))

    @checked
    def sender_at(self, kind: Kind, layer: int = 0) -> slice:
        """Where in ``senders`` the nodes of a kind (and layer) are."""
        if kind == "channel":
            return slice(0, self.n_channels)
        start = self.n_channels
        if kind in ("pos", "embed"):
            return slice(start, start + self.n_inputs)
        start += self.n_inputs + layer * (self.n_heads + 1)
        if kind == "head":
            return slice(start, start + self.n_heads)
        return slice(start + self.n_heads, start + self.n_heads + 1)

    @checked
    def receiver_at(self, kind: Kind, layer: int = 0, part: str | None = None) -> slice:
        """Where in ``receivers`` the ports of a kind (and layer and part) are."""
        start = self.n_inputs if self.n_channels else 0
        if kind in ("pos", "embed"):
            return slice(0, start)
        start += layer * (3 * self.n_heads + 1)
        if kind == "output":
            return slice(len(self.receivers) - 1, len(self.receivers))
        if kind == "mlp":
            return slice(start + 3 * self.n_heads, start + 3 * self.n_heads + 1)
        first = start + PARTS.index(part or "q") * self.n_heads
        return slice(first, first + self.n_heads)

    @cached_property
    def allowed(self) -> Bool[Tensor, "sender receiver"]:
        """True where the receiver comes after the sender."""
        allowed = torch.zeros(len(self.senders), len(self.receivers), dtype=torch.bool)
        embedding = self.receiver_at("pos")
        allowed[self.sender_at("channel"), embedding] = True
        trunk = slice(embedding.stop, len(self.receivers))
        allowed[self.sender_at("pos"), trunk] = True
        for layer in range(self.n_layers):
            mlp = self.receiver_at("mlp", layer)
            allowed[self.sender_at("head", layer), mlp.start :] = True
            allowed[self.sender_at("mlp", layer), mlp.stop :] = True
        return allowed

    @cached_property
    def index(self) -> Int[Tensor, "edge 2"]:
        """Sender and receiver of every edge, as places in ``senders`` and ``receivers``."""
        return self.allowed.nonzero()

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """Every edge, by sender and then receiver."""
        return tuple(
            Edge(self.senders[sender], *self.receivers[receiver])
            for sender, receiver in self.index.tolist()
        )

    @cached_property
    def _by_name(self) -> dict[str, int]:
        return {edge.name: number for number, edge in enumerate(self.edges)}

    @checked
    def edge_numbers(self, edges: Iterable[str | Edge]) -> Int[Tensor, " edge"]:
        """Places of edges in ``edges``.

        Raises:
            UnknownSiteError: the graph has no such edge.
        """
        numbers = []
        for edge in edges:
            name = edge.name if isinstance(edge, Edge) else str(edge).replace(" ", "")
            if name not in self._by_name:
                raise UnknownSiteError(
                    name, self._by_name, "Edges go from what writes to what reads later"
                )
            numbers.append(self._by_name[name])
        return torch.tensor(numbers, dtype=torch.long)

    @checked
    def node(self, name: str | Node) -> Node:
        """The node of this name.

        Raises:
            UnknownSiteError: the graph has no such node.
        """
        known = {node.name: node for node in self.nodes}
        if str(name) not in known:
            advice = "Positions are nodes only with positions=True, channels with channels=True"
            raise UnknownSiteError(str(name), known, advice)
        return known[str(name)]

    @checked
    def ports(self, name: str) -> list[int]:
        """Places in ``receivers`` that a name means: ``L1H0.k`` one, ``L1H0.qk`` two, ``L1H0`` all.

        Raises:
            UnknownSiteError: nothing reads under this name.
        """
        node, _, parts = name.partition(".")
        found = [
            number
            for number, (receiver, part) in enumerate(self.receivers)
            if receiver.name == node and (not parts or (part is not None and part in parts))
        ]
        if not found or set(parts) - set(PARTS):
            known = dict.fromkeys(receiver.name for receiver, _ in self.receivers)
            raise UnknownSiteError(
                name, known, "A head's queries, keys and values are L0H1.q, L0H1.k, L0H1.v"
            )
        return found

    @checked
    def mask(self, numbers: Tensor) -> Bool[Tensor, "sender receiver"]:
        """Edges as a matrix, True where there is one of them."""
        mask = torch.zeros_like(self.allowed)
        chosen = self.index[numbers]
        mask[chosen[:, 0], chosen[:, 1]] = True
        return mask

    def to_dict(self) -> dict[str, Any]:
        """Sizes as JSON takes them."""
        return {
            "n_layers": self.n_layers,
            "n_heads": self.n_heads,
            "n_pos": self.n_pos,
            "n_channels": self.n_channels,
        }


@checked
def component_graph(
    model: HookedTST,
    n_time: Count | None = None,
    *,
    positions: bool = True,
    channels: bool = False,
) -> ComponentGraph:
    """The graph of a model's components.

    Args:
        model: the model.
        n_time: samples of a series, where the model takes several lengths.
        positions: the embedding at every position is a node of its own.
        channels: the input's channels are nodes too, which send to the embedding at each position.

    Returns:
        Nodes and edges.

    Raises:
        ArgumentError: the number of positions or channels is not known.

    Example:
        >>> from tstlens.model import HookedTST, HookedTSTConfig, HeadConfig, PerStepConfig
        >>> model = HookedTST(HookedTSTConfig(
        ...     n_layers=2, d_model=16, n_heads=4, d_mlp=32, n_channels=3, n_time=20,
        ...     embed=PerStepConfig(), head=HeadConfig("mean", n_classes=5)))
        >>> len(component_graph(model, positions=False).edges)
        110
    """
    require_two_writers(model, "a graph of components")
    cfg = model.cfg
    n_pos = 0
    if positions:
        n_time = n_time or cfg.n_time
        n_pos = (model.n_pos(n_time) if n_time else None) or 0
        if not n_pos:
            raise ArgumentError(
                "the number of positions is not known: give n_time=, or positions=False (a front "
                "end of your own has none that can be told)"
            )
    if channels and not cfg.n_channels:
        raise ArgumentError("channels=True needs a model whose n_channels is known")
    return ComponentGraph(cfg.n_layers, cfg.n_heads, n_pos, (cfg.n_channels or 0) * channels)
