"""Part (b) of the suite: which component? Circuit methods against circuits that are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tstlens.data import Pairs
from tstlens.data.planted import Score
from tstlens.model.planted import ComponentTask, component_task
from tstlens.patching import attribution, logit_diff, sweep
from tstlens.patching.circuits import (
    Circuit,
    ComponentGraph,
    component_graph,
    edge_attribution,
    edge_sweep,
)
from tstlens.patching.metrics import Metric
from tstlens.randomness import seeded

FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # of the edges, for the faithfulness curve


@dataclass(frozen=True, eq=False)
class Asked:
    """What methods are asked about.

    Args:
        task: model, graph and series.
        graph: all nodes and edges.
        pairs: that methods see.
        judged: others, that circuits are judged on.
        seed: of everything random.
    """

    task: ComponentTask
    graph: ComponentGraph
    pairs: Pairs
    judged: Pairs
    seed: int

    @property
    def runs(self) -> tuple[Tensor, Tensor]:
        """Clean and corrupted series."""
        return self.pairs.clean, self.pairs.corrupted

    @property
    def true_edges(self) -> Tensor:
        """bool [edge], with all parts where the planted graph does not tell them apart."""
        return torch.tensor([self.name_of(edge) in self.task.graph.edges for edge in self._names])

    @property
    def true_nodes(self) -> Tensor:
        """bool [sender]."""
        return torch.tensor([node.name in self.task.graph.nodes for node in self.graph.senders])

    @property
    def _names(self) -> tuple[str, ...]:
        return tuple(edge.name for edge in self.graph.edges)

    def name_of(self, edge: str) -> str:
        """An edge as the planted graph names it: ``pos1->L0H0.v``, or without its part."""
        return edge if self.task.graph.parts else edge.partition(".")[0]

    def collapsed(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Sizes of the edges that the planted graph tells apart, and which one each edge is."""
        names = [self.name_of(edge) for edge in self._names]
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
        group = torch.tensor([numbers[name] for name in names])
        sizes = torch.zeros(len(numbers), dtype=scores.dtype)
        return sizes.scatter_reduce(0, group, scores.abs(), "amax"), group


def metric_of(pairs: Pairs) -> Metric:
    """Logit of the clean series' class minus that of the corrupted one's."""
    other = pairs.target if pairs.predicted is None else pairs.predicted
    return logit_diff(pairs.target, other)


def asked(task: ComponentTask, n_pairs: int, seed: int) -> Asked:
    """Pairs to find circuits on, and others to judge them on."""
    pairs, judged = (task.pairs(n_pairs, seed=first + seed) for first in (1000, 2000))
    graph = component_graph(task.model, pairs.clean.shape[2])
    return Asked(task, graph, pairs, judged, seed)


def edge_scores(what: Asked) -> dict[str, tuple[str, Tensor, Tensor]]:
    """Method -> kind of row, scores of edges [edge] and of nodes [sender]."""
    model, metric = what.task.model, metric_of(what.pairs)
    generator = torch.Generator().manual_seed(what.seed + 29)
    found: dict[str, tuple[str, Tensor, Tensor]] = {}

    def by_edge(method: str, effects: Tensor, kind: str = "method") -> None:
        found[method] = (kind, effects, _outgoing(what.graph, effects))

    def by_node(method: str, nodes: Tensor, kind: str = "method") -> None:
        found[method] = (kind, _weaker_end(what.graph, nodes), nodes)

    runs = (model, *what.runs)
    exact = edge_sweep(*runs, metric, progress=False)
    by_edge("edge patching, exact", exact.effect().mean(0))
    for steps, method in ((0, "edge attribution (EAP)"), (5, "edge attribution (EAP-IG)")):
        estimate = edge_attribution(*runs, metric, steps, progress=False)
        by_edge(method, estimate.effect().mean(0))
    for find, method in ((sweep, "node patching, exact"), (attribution, "node attribution")):
        effects = [
            find(*runs, site, axes, metric, progress=False).effect().mean(0)
            for site, axes in (("embed", ("pos",)), ("z", ("layer", "head")))
        ]
        mlps = find(*runs, "mlp_out", ("layer",), metric, progress=False).effect().mean(0)
        layers = torch.cat([effects[1], mlps[:, None]], 1)  # heads, then the MLP, layer by layer
        by_node(method, torch.cat([effects[0], layers.flatten()]))
    by_node("size of the change", _changes(what), "trivial")
    by_edge("random", torch.randn(len(what.graph.edges), generator=generator), "random")
    by_edge("the graph itself", what.true_edges.float(), "answer")
    return found


def _outgoing(graph: ComponentGraph, effects: Tensor) -> Tensor:
    """A node counts as much as its strongest edge out."""
    sizes = torch.zeros(len(graph.senders), dtype=effects.dtype)
    return sizes.scatter_reduce(0, graph.index[:, 0], effects.abs(), "amax")


def _weaker_end(graph: ComponentGraph, nodes: Tensor) -> Tensor:
    """Node methods have no edges: an edge counts as much as the weaker of its two nodes."""
    places = {node.name: number for number, node in enumerate(graph.senders)}
    sizes = nodes.abs()
    return torch.stack(
        [
            sizes[sender]
            if graph.receivers[receiver][0].kind == "output"
            else torch.minimum(sizes[sender], sizes[places[graph.receivers[receiver][0].name]])
            for sender, receiver in graph.index.tolist()
        ]
    )


@torch.no_grad()
def _changes(what: Asked) -> Tensor:
    """How much each node's output differs between the two series: no effect on anything asked."""
    model: Any = what.task.model
    layers = range(model.cfg.n_layers)
    names = ["hook_embed", *(f"blocks.{layer}.attn.hook_z" for layer in layers)]
    names += [f"blocks.{layer}.hook_mlp_out" for layer in layers]
    clean, corrupted = (model.run_with_cache(run, names_filter=names)[1] for run in what.runs)
    sizes = [(clean["hook_embed"] - corrupted["hook_embed"]).norm(dim=-1).mean(0)]
    for layer in layers:
        z = f"blocks.{layer}.attn.hook_z"
        written = torch.einsum(
            "nphd,hdm->nphm", clean[z] - corrupted[z], model.blocks[layer].attn.W_O
        )
        sizes.append(written.norm(dim=(1, 3)).mean(0))
        mlp = f"blocks.{layer}.hook_mlp_out"
        sizes.append((clean[mlp] - corrupted[mlp]).norm(dim=(1, 2)).mean(0)[None])
    return torch.cat(sizes)


@seeded(0)
def score_edges(what: Asked, edges: Tensor, nodes: Tensor) -> dict[str, float]:
    """AUROC of edges and nodes, and how faithful the edges are on pairs they were not found on.

    ``"faithfulness"`` keeps as many edges as the planted graph has; 1 is what the whole model
    does, and less than 1 is also what the planted graph itself gets where others do a little.
    ``"CMD"`` is the area between the curve of growing circuits and 1: smaller is better.
    """
    from sklearn.metrics import roc_auc_score

    sizes, group = what.collapsed(edges)
    truth, _ = what.collapsed(what.true_edges.float())
    n_true = int(truth.sum())
    strongest = torch.argsort(sizes, descending=True, stable=True)[:n_true]
    kept = torch.isin(group, strongest)
    metric = metric_of(what.judged)
    circuit = Circuit(what.graph, edges.double(), kept, metric.name, metric.unit)
    faithful = circuit.faithfulness(
        what.task.model, what.judged, metric=metric, fractions=FRACTIONS, progress=False
    )
    return {
        "edge AUROC": float(roc_auc_score(truth.numpy(), sizes.numpy())),
        "node AUROC": float(roc_auc_score(what.true_nodes.numpy(), nodes.abs().numpy())),
        "faithfulness": faithful.of_circuit,
        "CMD": faithful.cmd,
    }


def component_scores(
    names: Sequence[str], seeds: Sequence[int], *, n_pairs: int = 48, progress: bool = True
) -> tuple[list[Score], dict[str, float]]:
    """AUROC and faithfulness of every method, and how well each graph holds.

    A task whose graph does not hold under interchange interventions in 99 % of the held-out pairs
    is not scored on; the share is in the checks all the same.

    Args:
        names: of :func:`tstlens.model.planted.component_names`.
        seeds: of models and pairs.
        n_pairs: that methods see, and as many that circuits are judged on.
        progress: show a bar.

    Returns:
        Scores, and "interchange, task, seed" -> the lowest accuracy over interventions.
    """
    scores, checks = [], {}
    todo = [(name, seed) for name in names for seed in seeds]
    for name, seed in tqdm(todo, desc="component", disable=not progress):
        task = component_task(name, seed, progress=False)
        verified = task.verify(seed=seed)
        checks[f"interchange, {name}, seed {seed}"] = verified.worst
        if not verified.holds:
            continue
        what = asked(task, n_pairs, seed)
        for method, (kind, edges, nodes) in edge_scores(what).items():
            scores += [
                Score(name, method, measure, seed, value, kind)
                for measure, value in score_edges(what, edges, nodes).items()
            ]
    return scores, checks
