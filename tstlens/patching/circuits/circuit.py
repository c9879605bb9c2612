"""A circuit: the edges of a model that are said to do a task, with what each is worth.

A circuit is a claim. :meth:`Circuit.faithfulness` asks whether its edges alone do what the model
does, :meth:`Circuit.completeness` whether it also breaks as the model breaks, and
:meth:`Circuit.minimality` whether each part is needed. The scores that edges were chosen by are
effects of edges one at a time (or estimates of them); what the edges do together is measured.

Circuits on disk: JSON to read back, GraphML for other programs; whole files or none.

A circuit as a networkx graph and as pandas frames.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tstlens import storage
from tstlens.arguments import checked
from tstlens.data import Pairs
from tstlens.effects import strongest
from tstlens.errors import ArgumentError, CorruptFileError, SeriesShapeError
from tstlens.metrics import Better, Metric
from tstlens.model import HookedTST
from tstlens.patching.circuits.edges import EdgeEffects, edge_attribution
from tstlens.patching.circuits.graph import ComponentGraph, Edge, Node
from tstlens.patching.circuits.judging import (
    Completeness,
    Faithfulness,
    Minimality,
    Together,
    completeness,
    faithfulness,
    minimality,
    patch_together,
)
from tstlens.patching.metrics import log_prob, metric_named
from tstlens.results import Result

if TYPE_CHECKING:
    import networkx as nx
    import pandas as pd


FORMAT = "tstlens-circuit"
FORMAT_VERSION = 1


def read_json(path: Path) -> dict[str, Any]:
    """The fields of a circuit; see :meth:`Circuit.from_json`."""
    record = storage.read_json(
        path,
        "a circuit that Circuit.to_json wrote",
        "write the circuit again",
        format=FORMAT,
        version=FORMAT_VERSION,
    )
    with storage.reading(path, "does not hold a whole circuit", "write the circuit again"):
        _check_scores(record)
        components = ComponentGraph(**record["components"])
        kept = torch.zeros(len(components.edges), dtype=torch.bool)
        kept[components.edge_numbers([entry["edge"] for entry in record["edges"]])] = True
        cells = record["time_cells"]
        fields = {
            "components": components,
            "scores": torch.tensor(record["scores"], dtype=torch.float64),
            "kept": kept,
            "metric": str(record["metric"]),
            "unit": str(record["unit"]),
            "better": record.get("better"),  # circuits of before had none
            "output": str(record["output"]),
            "time_cells": None if cells is None else tuple((int(a), int(b)) for a, b in cells),
            "made": dict(record["made"]),
        }
    if fields["scores"].shape != kept.shape:
        raise CorruptFileError(
            f"{path} holds {len(fields['scores'])} scores, its graph has {len(kept)} edges"
        )
    return fields


def _check_scores(record: dict[str, Any]) -> None:
    """Compare sizes with the scores that are there, before the graph of edges is built."""
    n_scores, components = len(record["scores"]), record["components"]
    for name, value in components.items():
        if type(value) is int and abs(value) > max(n_scores, 1):
            raise ValueError(f"{n_scores} scores, its graph has {name}={value:,}")


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


@dataclass(frozen=True, eq=False, repr=False)
class Circuit(Result):
    """Chosen edges of a model's component graph, with a signed weight on every edge.

    Plain data: it does not hold the model. Make one with :meth:`from_edge_attribution` or
    :meth:`from_effects`.

    Args:
        components: the whole graph that the edges were chosen from.
        scores: [edge], mean effect of each edge of the whole graph (in the metric's unit);
            positive where the clean contribution raises the metric.
        kept: [edge], True for the edges of the circuit.
        metric: name of the metric that the scores are changes of.
        unit: its unit.
        output: what the output is called: the target class.
        time_cells: first and one-past-last sample of every position, or None.
        made: how: model, method, pairs, what the edges were chosen by.

    Example:
        >>> import torch
        >>> from tstlens.data import Pairs
        >>> from tstlens.model import HookedTST, HookedTSTConfig, HeadConfig, PerStepConfig
        >>> model = HookedTST(HookedTSTConfig(
        ...     n_layers=2, d_model=16, n_heads=2, d_mlp=32, n_channels=3, n_time=20,
        ...     embed=PerStepConfig(), head=HeadConfig("mean", n_classes=5)))
        >>> with torch.no_grad():
        ...     for weight in model.parameters():
        ...         _ = weight.copy_(torch.randn_like(weight) / 4)
        >>> pairs = Pairs(*torch.randn(2, 6, 3, 20), torch.zeros(6, dtype=torch.long))
        >>> circuit = Circuit.from_edge_attribution(model, pairs, budget=0.05, progress=False)
        >>> circuit
        Circuit(17 of 331 edges, 5.1 %, log-probability of the target class)
    """

    components: ComponentGraph
    scores: Float[Tensor, " edge"]
    kept: Bool[Tensor, " edge"]
    metric: str
    unit: str
    output: str = "output"
    time_cells: tuple[tuple[int, int], ...] | None = None
    made: dict[str, Any] = field(default_factory=dict)
    better: Better | None = None

    def __post_init__(self) -> None:
        n_edges = len(self.components.edges)
        for name in ("scores", "kept"):
            shape = tuple(getattr(self, name).shape)
            if shape != (n_edges,):
                raise SeriesShapeError(
                    f"expected {name} for every edge of the graph [{n_edges}], got {list(shape)}"
                )
        if not bool(self.scores.isfinite().all()):
            raise ArgumentError("expected finite scores, got NaN or infinity")

    @classmethod
    @checked
    def from_edge_attribution(
        cls,
        model: HookedTST,
        pairs: Pairs,
        *,
        metric: Metric | None = None,
        budget: float | None = None,
        threshold: float | None = None,
        top_k: int | None = None,
        steps: int = 5,
        along: Literal["inputs", "edges"] = "inputs",
        positions: bool = True,
        channels: bool = False,
        progress: bool = True,
    ) -> Circuit:
        """The edges with the largest estimated effect, averaged over the pairs.

        Args:
            model: the model.
            pairs: clean and corrupted series.
            metric: what is followed; the log-probability of ``pairs.target`` where None.
            budget: share of all edges that are kept, 0.05 where nothing else is said.
            threshold: keep edges whose mean effect is at least this large in size, instead.
            top_k: keep this many edges, instead.
            steps: of integrated gradients; 0 for plain gradients.
            along: see :func:`edge_attribution`.
            positions: the embedding at every position is a node of its own.
            channels: the input's channels are nodes too.
            progress: show a progress bar.

        Returns:
            The circuit.

        Raises:
            ArgumentError: two of budget, threshold and top_k, or one that is not possible; masks
                of a pair that differ.
        """
        metric = log_prob(pairs.target) if metric is None else metric
        effects = edge_attribution(
            model,
            pairs.clean,
            pairs.corrupted,
            metric,
            steps,
            along=along,
            positions=positions,
            channels=channels,
            clean_mask=pairs.clean_mask,
            corrupted_mask=pairs.corrupted_mask,
            progress=progress,
        )
        return cls.from_effects(
            effects,
            budget=budget,
            threshold=threshold,
            top_k=top_k,
            output=output_name(model, pairs),
        )

    @classmethod
    @checked
    def from_effects(
        cls,
        effects: EdgeEffects,
        *,
        budget: float | None = None,
        threshold: float | None = None,
        top_k: int | None = None,
        edges: Sequence[str | Edge] | None = None,
        output: str = "output",
    ) -> Circuit:
        """A circuit from effects of edges, exact or estimated.

        Args:
            effects: what :func:`edge_sweep` or :func:`edge_attribution` returned.
            budget: share of all edges that are kept, the largest in size; 0.05 where nothing else
                is said.
            threshold: keep edges whose mean effect is at least this large in size.
            top_k: keep this many edges.
            edges: keep exactly these.
            output: what the output is called.

        Raises:
            ArgumentError: two ways of choosing at once, or one that is not possible.
            UnknownSiteError: an edge that the graph does not have.
        """
        graph = effects.graph
        numbers = graph.edge_numbers(effects.coords["edge"])
        effect = effects.effect()
        mean = effect.mean(0) if "pair" in effects.axes else effect
        scores = torch.zeros(len(graph.edges), dtype=torch.float64)
        scores[numbers] = mean.detach().double().cpu()
        circuit = cls(
            components=graph,
            scores=scores,
            kept=torch.zeros(len(graph.edges), dtype=torch.bool),
            metric=effects.metric,
            unit=effects.unit,
            better=effects.better,
            output=output,
            time_cells=effects.time_cells,
            made={key: value for key, value in effects.made.items() if key in ("model", "method")}
            | {"n_pairs": effects.n_pairs},
        )
        return circuit.choose(budget=budget, threshold=threshold, top_k=top_k, edges=edges)

    @checked
    def choose(
        self,
        *,
        budget: float | None = None,
        threshold: float | None = None,
        top_k: int | None = None,
        edges: Sequence[str | Edge] | None = None,
    ) -> Circuit:
        """The same scores with another choice of edges; see :meth:`from_effects`."""
        given = {"budget": budget, "threshold": threshold, "top_k": top_k, "edges": edges}
        asked = [name for name, value in given.items() if value is not None]
        if len(asked) > 1:
            raise ArgumentError(f"edges are chosen in one way, got {' and '.join(asked)}")
        kept = torch.zeros_like(self.kept)
        if edges is not None:
            kept[self.components.edge_numbers(edges)] = True
            return replace(self, kept=kept, made=self.made | {"chosen": "by name"})
        if threshold is not None:
            if not threshold > 0:
                raise ArgumentError(f"expected a threshold above 0, got {threshold}")
            kept = self.scores.abs() >= threshold
            chosen = f"effects of at least {threshold:g} {self.unit}"
            return replace(self, kept=kept, made=self.made | {"chosen": chosen})
        if top_k is None:
            budget = 0.05 if budget is None else budget
            if not 0 < budget <= 1:
                raise ArgumentError(f"expected a budget in (0, 1], a share of edges, got {budget}")
            top_k = max(1, round(budget * len(self.kept)))
            chosen = f"{100 * budget:g} % of edges"
        else:
            chosen = f"{top_k} strongest edges"
        if not 1 <= top_k <= len(self.kept):
            raise ArgumentError(f"expected top_k in 1..{len(self.kept)}, got {top_k}")
        kept[self.ranking()[:top_k]] = True
        return replace(self, kept=kept, made=self.made | {"chosen": chosen})

    @checked
    def ranking(self, absolute: bool = True) -> Tensor:
        """Numbers of all edges of the graph, strongest first (in size, or signed)."""
        key = self.scores.abs() if absolute else self.scores
        return key.argsort(descending=True, stable=True)

    def prune(self) -> Circuit:
        """Without edges that lead from nowhere or to nowhere; what the circuit does is the same.

        An edge counts if its sender hears of the input through the circuit, and its receiver is
        heard at the output.
        """
        graph, edges = self.components, self.edges
        heard: set[str] = {node.name for node in graph.senders[: self._n_sources]}
        for edge in edges:  # in the order of senders: whatever feeds a sender comes before it
            if edge.sender.name in heard:
                heard.add(edge.receiver.name)
        useful = {"output"}
        for edge in reversed(edges):
            if edge.receiver.name in useful:
                useful.add(edge.sender.name)
        live = [e for e in edges if e.sender.name in heard and e.receiver.name in useful]
        kept = torch.zeros_like(self.kept)
        if live:
            kept[graph.edge_numbers(live)] = True
        return replace(self, kept=kept)

    @property
    def _n_sources(self) -> int:
        return self.components.n_channels or self.components.n_inputs

    @property
    def edges(self) -> tuple[Edge, ...]:
        """The circuit's edges, by sender."""
        numbers = self.kept.nonzero()[:, 0].tolist()
        return tuple(self.components.edges[number] for number in numbers)

    @property
    def weights(self) -> Float[Tensor, " kept"]:
        """The score of each edge in ``edges``, in the metric's unit."""
        return self.scores[self.kept]

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The nodes that the circuit's edges touch, from the input to the output."""
        touched = {node for edge in self.edges for node in (edge.sender, edge.receiver)}
        return tuple(node for node in self.components.nodes if node in touched)

    @property
    def graph(self) -> nx.DiGraph:
        """The circuit as a networkx DiGraph.

        Nodes carry ``kind`` (``channel``, ``time``, ``embed``, ``head``, ``mlp``, ``class``),
        ``label`` and what applies of ``layer``, ``head``, ``pos``, ``channel``, ``start`` and
        ``stop`` (samples). A head can be read by queries, keys and values at once, and a DiGraph
        has one edge between two nodes: ``weight`` is the sum, and ``q``, ``k``, ``v`` hold the
        weight of each.
        """
        import networkx as nx

        graph = nx.DiGraph(metric=self.metric, unit=self.unit, output=self.output)
        for node in self.nodes:
            facts: dict[str, Any] = {"kind": kind_of(node), "label": label_of(self, node)}
            if node.layer is not None:
                facts["layer"] = node.layer
            if node.index is not None:
                facts[node.kind] = node.index
            if node.kind == "pos" and self.time_cells is not None:
                facts["start"], facts["stop"] = self.time_cells[node.index or 0]
            graph.add_node(node.name, **facts)
        for edge, weight in zip(self.edges, self.weights.tolist(), strict=True):
            ends = edge.sender.name, edge.receiver.name
            if not graph.has_edge(*ends):
                graph.add_edge(*ends, weight=0.0)
            graph.edges[ends]["weight"] += weight
            if edge.part is not None:
                graph.edges[ends][edge.part] = weight
        return graph

    def to_dataframe(self) -> pd.DataFrame:
        """One row per edge, the largest in size first: sender, receiver, part, weight and unit."""
        import pandas as pd

        rows = [
            {
                "sender": edge.sender.name,
                "receiver": edge.receiver.name,
                "part": edge.part or "",
                "sender_kind": kind_of(edge.sender),
                "receiver_kind": kind_of(edge.receiver),
                "weight": weight,
                "unit": self.unit,
            }
            for edge, weight in zip(self.edges, self.weights.tolist(), strict=True)
        ]
        columns = ["sender", "receiver", "part", "sender_kind", "receiver_kind", "weight", "unit"]
        frame = pd.DataFrame(rows, columns=columns)
        return strongest(frame, "weight")

    def edge_table(self) -> pd.DataFrame:
        """The same as :meth:`to_dataframe`."""
        return self.to_dataframe()

    def node_table(self) -> pd.DataFrame:
        """One row per node, from the input to the output: kind, edges in and out, their weights.

        ``weight`` columns are sums of weights, ``size`` columns sums of absolute ones.
        """
        import pandas as pd

        edges = list(zip(self.edges, self.weights.tolist(), strict=True))
        rows = []
        for node in self.nodes:
            into = [weight for edge, weight in edges if edge.receiver == node]
            out = [weight for edge, weight in edges if edge.sender == node]
            rows.append(
                {
                    "node": node.name,
                    "label": label_of(self, node),
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

    @checked
    def faithfulness(self, model: HookedTST, pairs: Pairs, **options: Any) -> Faithfulness:
        """How much of the model's behaviour the strongest edges keep; see :func:`faithfulness`."""
        return faithfulness(self, model, pairs, **options)

    @checked
    def completeness(self, model: HookedTST, pairs: Pairs, **options: Any) -> Completeness:
        """Whether circuit and model break alike; see :func:`completeness`."""
        return completeness(self, model, pairs, **options)

    @checked
    def minimality(self, model: HookedTST, pairs: Pairs, **options: Any) -> Minimality:
        """What the circuit loses without each of its parts; see :func:`minimality`."""
        return minimality(self, model, pairs, **options)

    @checked
    def patch_together(self, model: HookedTST, pairs: Pairs, **options: Any) -> Together:
        """The effect of patching the circuit's nodes, or edges, at once."""
        return patch_together(self, model, pairs, **options)

    @checked
    def metric_of(self, pairs: Pairs) -> Metric:
        """The metric that the circuit was made with, for these pairs.

        Raises:
            ArgumentError: it cannot be made from the pairs alone.
        """
        return metric_named(self.metric, pairs, "the circuit")

    @checked
    def to_json(self, path: str | Path) -> Path:
        """Write the circuit with the scores of all edges, whole or not at all.

        Raises:
            StorageError: the place cannot be written.
        """
        record = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "components": self.components.to_dict(),
            "metric": self.metric,
            "unit": self.unit,
            "better": self.better,
            "output": self.output,
            "time_cells": self.time_cells,
            "made": self.made,
            "edges": [
                {"edge": edge.name, "weight": weight}
                for edge, weight in zip(self.edges, self.weights.tolist(), strict=True)
            ],
            "scores": self.scores.tolist(),
        }
        text = storage.json_text(record, "a circuit's made=", indent=1, allow_nan=False)
        return storage.write_text(Path(path), text)

    @classmethod
    @checked
    def from_json(cls, path: str | Path) -> Circuit:
        """Read what :meth:`to_json` wrote.

        Raises:
            StorageError: there is no such file.
            CorruptFileError: it is truncated, or no circuit.
            ConfigVersionError: a newer tstlens wrote it.
        """
        return cls(**read_json(Path(path)))

    @checked
    def to_graphml(self, path: str | Path) -> Path:
        """Write :attr:`graph` as GraphML (Gephi, Cytoscape, yEd), whole or not at all.

        Raises:
            StorageError: the place cannot be written.
        """
        import networkx as nx

        buffer = BytesIO()
        nx.write_graphml_xml(self.graph, buffer)
        return storage.write_bytes(Path(path), buffer.getvalue())

    def __len__(self) -> int:
        return int(self.kept.sum())

    def __repr__(self) -> str:
        share = 100 * len(self) / max(1, len(self.kept))
        return f"Circuit({len(self)} of {len(self.kept)} edges, {share:.2g} %, {self.metric})"


def output_name(model: HookedTST, pairs: Pairs) -> str:
    """The target class by name where all pairs have the same, else "target class"."""
    if model.cfg.n_classes is None:
        return "forecast" if getattr(model.cfg.head, "horizon", None) else "output"
    targets = set(pairs.target.tolist())
    if len(targets) != 1:
        return "target class"
    (target,) = targets
    names: Iterable[str] = model.cfg.class_names or ()
    known = dict(enumerate(names))
    return f"class {known.get(target, target)}"
