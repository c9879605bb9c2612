"""A circuit as a networkx graph and as pandas frames."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tstlens.patching.circuits.graph import Node

if TYPE_CHECKING:
    import networkx as nx
    import pandas as pd

    from tstlens.patching.circuits.circuit import Circuit

_KINDS = {"pos": "time", "output": "class"}  # what the graph calls them


def kind_of(node: Node) -> str:
    """``time`` for the embedding at a position, ``class`` for the output, else the node's kind."""
    return _KINDS.get(node.kind, node.kind)


def label_of(circuit: Circuit, node: Node) -> str:
    """A node in words: "sample 3", "samples 4–7", "channel 2", "L0H1", "MLP 0", a class' name."""
    if node.kind == "output":
        return circuit.output
    if node.kind == "mlp":
        return f"MLP {node.layer}"
    if node.kind == "channel":
        return f"channel {node.index}"
    if node.kind != "pos":
        return node.name
    if circuit.time_cells is None:
        return f"position {node.index}"
    start, stop = circuit.time_cells[node.index or 0]
    return f"sample {start}" if stop - start <= 1 else f"samples {start}–{stop - 1}"


def as_digraph(circuit: Circuit) -> nx.DiGraph:
    """The circuit as a networkx graph; see :attr:`Circuit.graph`."""
    import networkx as nx

    graph = nx.DiGraph(metric=circuit.metric, unit=circuit.unit, output=circuit.output)
    for node in circuit.nodes:
        facts: dict[str, Any] = {"kind": kind_of(node), "label": label_of(circuit, node)}
        if node.layer is not None:
            facts["layer"] = node.layer
        if node.index is not None:
            facts[node.kind] = node.index
        if node.kind == "pos" and circuit.time_cells is not None:
            facts["start"], facts["stop"] = circuit.time_cells[node.index or 0]
        graph.add_node(node.name, **facts)
    for edge, weight in zip(circuit.edges, circuit.weights.tolist(), strict=True):
        ends = edge.sender.name, edge.receiver.name
        if not graph.has_edge(*ends):
            graph.add_edge(*ends, weight=0.0)
        graph.edges[ends]["weight"] += weight
        if edge.part is not None:
            graph.edges[ends][edge.part] = weight
    return graph


def edge_table(circuit: Circuit) -> pd.DataFrame:
    """One row per edge, the largest in size first."""
    import pandas as pd

    rows = [
        {
            "sender": edge.sender.name,
            "receiver": edge.receiver.name,
            "part": edge.part or "",
            "sender_kind": kind_of(edge.sender),
            "receiver_kind": kind_of(edge.receiver),
            "weight": weight,
            "unit": circuit.unit,
        }
        for edge, weight in zip(circuit.edges, circuit.weights.tolist(), strict=True)
    ]
    columns = ["sender", "receiver", "part", "sender_kind", "receiver_kind", "weight", "unit"]
    frame = pd.DataFrame(rows, columns=columns)
    order = frame["weight"].abs().sort_values(ascending=False, kind="stable").index
    return frame.loc[order].reset_index(drop=True)


def node_table(circuit: Circuit) -> pd.DataFrame:
    """One row per node, from the input to the output; ``size`` columns add up absolute weights."""
    import pandas as pd

    edges = list(zip(circuit.edges, circuit.weights.tolist(), strict=True))
    rows = []
    for node in circuit.nodes:
        into = [weight for edge, weight in edges if edge.receiver == node]
        out = [weight for edge, weight in edges if edge.sender == node]
        rows.append(
            {
                "node": node.name,
                "label": label_of(circuit, node),
                "kind": kind_of(node),
                "layer": node.layer,
                "edges_in": len(into),
                "edges_out": len(out),
                "weight_in": sum(into),
                "weight_out": sum(out),
                "size_in": sum(map(abs, into)),
                "size_out": sum(map(abs, out)),
            }
        )
    columns = ["node", "label", "kind", "layer", "edges_in", "edges_out"]
    columns += ["weight_in", "weight_out", "size_in", "size_out"]
    return pd.DataFrame(rows, columns=columns).astype({"layer": "Int64"})
