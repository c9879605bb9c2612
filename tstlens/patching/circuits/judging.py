"""Judging a circuit: do its edges alone do what the model does, and are all of them needed?

Keep the clean run's contributions on the circuit's edges and let every other edge carry the
corrupted run's. Kept edges carry what their senders *now* write, so a kept edge whose sender hears
nothing clean tells nothing. With f(k) the share of the way from the corrupted to the clean run's
metric that the strongest k of all edges keep, CPR is the area under f (larger is better) and CMD
the area between f and 1 (smaller is better), over the share of edges from 0.1 to 100 %.

What can mislead: f can pass 1 (an edge left out worked against the task) or go below 0; and a
circuit found and judged on the same few pairs looks better than it is, so judge on others. Random
orders of edges are the yardstick.

Completeness asks whether circuit and model break alike, minimality what the circuit loses without
each part, and ``patch_together`` what all its parts do at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from tstlens.arguments import Amount, Count, Positive, Seed, checked
from tstlens.data import Pairs
from tstlens.effects import Labelled
from tstlens.errors import ArgumentError
from tstlens.metrics import Metric
from tstlens.model import HookedTST
from tstlens.patching.checks import check_pairs
from tstlens.patching.circuits.edges import recorded_pairs
from tstlens.patching.circuits.graph import ComponentGraph, component_graph
from tstlens.patching.circuits.streams import check_rebuilds, pairs_at_once, run_edge_sets
from tstlens.patching.metrics import as_metric, read_metric
from tstlens.patching.patch import patch
from tstlens.patching.sites import Site

if TYPE_CHECKING:
    import pandas as pd

    from tstlens.patching.circuits.circuit import Circuit

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # MIB's
_SMALL = 1e-6  # a clean-corrupted gap below this cannot be divided by


class _OfGap(Labelled):
    """What judgements share: ``empty`` and ``full``, the metric of corrupted and clean run."""

    empty: Float[Tensor, " pair"]
    full: Float[Tensor, " pair"]

    @property
    def gap(self) -> float:
        """Mean metric of the clean run minus that of the corrupted run."""
        return float((self.full - self.empty).mean())


@dataclass(frozen=True, eq=False, repr=False)
class Faithfulness(_OfGap):
    """The metric that the strongest edges keep, for growing numbers of edges.

    Args:
        values: [pair, fraction], the metric with the strongest edges kept, all others corrupted.
        fractions: shares of all edges.
        n_edges: edges kept at each share.
        circuit: [pair], the metric with exactly the circuit's edges kept.
        n_circuit: edges of the circuit.
        random: [order, pair, fraction], the same as ``values`` with edges in random orders.
        empty: [pair], the metric of the corrupted run, with no edge kept.
        full: [pair], the metric of the clean run.
        metric: name of the metric.
        unit: its unit.
        made: how.
    """

    values: Float[Tensor, "pair fraction"]
    fractions: tuple[float, ...]
    n_edges: tuple[int, ...]
    empty: Float[Tensor, " pair"]
    full: Float[Tensor, " pair"]
    circuit: Float[Tensor, " pair"]
    n_circuit: int
    random: Float[Tensor, "order pair fraction"]
    metric: str
    unit: str
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def curve(self) -> Float[Tensor, " fraction"]:
        """f(k): mean gain over the empty circuit, divided by the mean gap; NaN without a gap."""
        return self._share(self.values)

    @property
    def of_circuit(self) -> float:
        """f of exactly the circuit's edges."""
        return float(self._share(self.circuit[:, None])[0])

    @property
    def cpr(self) -> float:
        """Area under f over the share of edges; about 1 where the first edges do it all."""
        return _area(self.fractions, self.curve)

    @property
    def cmd(self) -> float:
        """Area between f and 1 over the share of edges; 0 is best."""
        return _area(self.fractions, (1 - self.curve).abs())

    @property
    def random_curves(self) -> Float[Tensor, "order fraction"]:
        """f of each random order."""
        curves = [self._share(values) for values in self.random]
        return torch.stack(curves) if curves else self.values.new_zeros(0, len(self.fractions))

    @property
    def random_cpr(self) -> float:
        """Mean CPR of the random orders; NaN where there are none."""
        areas = [_area(self.fractions, curve) for curve in self.random_curves]
        return sum(areas) / len(areas) if areas else float("nan")

    @property
    def random_cmd(self) -> float:
        """Mean CMD of the random orders; NaN where there are none."""
        areas = [_area(self.fractions, (1 - curve).abs()) for curve in self.random_curves]
        return sum(areas) / len(areas) if areas else float("nan")

    def entries(self) -> dict[str, Any]:
        """Shares of edges."""
        return {"fraction": self.fractions}

    def columns(self) -> dict[str, Any]:
        """Edges, mean metric, f, and the mean f of random orders."""
        columns = {
            "n_edges": self.n_edges,
            "value": self.values.mean(0),
            "faithfulness": self.curve,
        }
        return columns | ({"random": self.random_curves.mean(0)} if len(self.random) else {})

    def _share(self, values: Tensor) -> Tensor:
        if abs(self.gap) < _SMALL:
            return torch.full_like(values[0], torch.nan)
        return (values - self.empty[:, None]).mean(0) / self.gap

    def __repr__(self) -> str:
        text = f"Faithfulness(CPR {self.cpr:.3f}, CMD {self.cmd:.3f}"
        if len(self.random):
            text += f"; random edges {self.random_cpr:.3f}, {self.random_cmd:.3f}"
        return f"{text}; circuit of {self.n_circuit} edges {self.of_circuit:.3f})"


def _area(fractions: Sequence[float], heights: Tensor) -> float:
    """Trapezoids between neighbouring shares, as MIB adds them up."""
    x = torch.tensor(fractions, dtype=heights.dtype)
    return float(((x[1:] - x[:-1]) * (heights[1:].cpu() + heights[:-1].cpu()) / 2).sum())


@checked
def faithfulness(
    circuit: Circuit,
    model: HookedTST,
    pairs: Pairs,
    *,
    metric: Metric | None = None,
    fractions: Sequence[float] = FRACTIONS,
    absolute: bool = True,
    n_random: Amount = 0,
    seed: Seed = 0,
    memory_mb: Positive = 256.0,
    progress: bool = True,
) -> Faithfulness:
    """How much of the model's behaviour the circuit's scores' strongest edges keep.

    Args:
        circuit: scores of all edges; its own choice of edges is measured beside the curve.
        model: the model.
        pairs: clean and corrupted series, better not those that the scores came from.
        metric: what is followed, for these pairs; the circuit's own where None.
        fractions: shares of all edges, growing.
        absolute: rank edges by the size of their scores (for CMD); False ranks by the signed score
            (for CPR).
        n_random: random orders of edges to compare with.
        seed: of the random orders.
        memory_mb: worlds run in chunks whose streams stay near this many MiB.
        progress: show a progress bar.

    Returns:
        The curve with CPR and CMD.

    Raises:
        ArgumentError: fractions that do not grow within (0, 1], another model, or pairs of
            different padding.

    Source: MIB, Mueller et al. 2025 (arXiv 2504.13151); there too edges outside the circuit carry
    the counterfactual's activations.

    Example:
        >>> FRACTIONS[:3]
        (0.001, 0.002, 0.005)
    """
    fractions = tuple(float(share) for share in fractions)
    if not fractions or list(fractions) != sorted(set(fractions)):
        raise ArgumentError(f"expected fractions that grow, got {fractions}")
    if not 0 < fractions[0] <= fractions[-1] <= 1:
        raise ArgumentError(f"expected fractions in (0, 1], shares of edges, got {fractions}")
    n_all = len(circuit.kept)
    # As MIB's int(len(edges) * share): a share of less than one edge is the empty circuit.
    counts = [int(n_all * share + 1e-9) for share in fractions]
    generator = torch.Generator().manual_seed(seed)
    orders = [circuit.ranking(absolute)]
    orders += [torch.randperm(n_all, generator=generator) for _ in range(n_random)]
    sets = [circuit.kept, *(_first(order, count) for order in orders for count in counts)]
    made = {"absolute": absolute, "seed": seed, "n_judged": len(pairs)}
    how = (metric, memory_mb, progress)
    values, judged = _judged(circuit, model, pairs, torch.stack(sets), *how, **made)
    by_order = values[:, 1:].unflatten(1, (len(orders), len(counts)))
    return Faithfulness(
        values=by_order[:, 0],
        fractions=fractions,
        n_edges=tuple(counts),
        circuit=values[:, 0],
        n_circuit=len(circuit),
        random=by_order[:, 1:].transpose(0, 1),
        **judged,
    )


def _first(order: Tensor, count: int) -> Tensor:
    kept = torch.zeros(len(order), dtype=torch.bool)
    kept[order[:count]] = True
    return kept


@torch.no_grad()
def keep_edges(
    circuit: Circuit,
    model: HookedTST,
    pairs: Pairs,
    sets: Tensor,
    metric: Metric | None,
    memory_mb: float = 256.0,
    progress: bool = True,
    onto: str = "clean",
) -> tuple[Tensor, Tensor, Tensor]:
    """The metric of runs in which only these edges are clean.

    Args:
        circuit: says which graph the sets are of.
        model: the model.
        pairs: clean and corrupted series.
        sets: bool [set, edge], True at the edges that stay clean.
        metric: for these pairs; the circuit's own where None.
        memory_mb: worlds run in chunks whose streams stay near this many MiB.
        progress: show a progress bar.
        onto: ``"clean"``: kept edges carry what their senders now write, the others the corrupted
            run's contributions. ``"corrupted"``: kept edges carry the clean run's contributions,
            the others what their senders now write.

    Returns:
        Values [pair, set], and those of the corrupted and of the clean run, [pair].
    """
    check_pairs(model, pairs.clean, pairs.corrupted, pairs.clean_mask, pairs.corrupted_mask)
    metric = circuit.metric_of(pairs) if metric is None else metric
    metric = as_metric(metric, len(pairs), model)
    graph = circuit.components
    check_graph(model, graph, pairs.clean.shape[2])
    masks = torch.stack([graph.mask(kept.nonzero()[:, 0]) for kept in sets])
    if onto == "clean":
        masks = ~masks & graph.allowed
    most = min(128, pairs_at_once(model, graph, graph.n_inputs, memory_mb))
    values, empty, full = [], [], []
    runs = (pairs.clean, pairs.corrupted, pairs.clean_mask, pairs.corrupted_mask)
    with tqdm(total=len(sets) * len(pairs), unit="run", disable=not progress) as bar:
        bar.set_description("keeping edges")
        for rows, clean, corrupted in recorded_pairs(model, *runs, metric, most):
            here, there = (clean, corrupted) if onto == "clean" else (corrupted, clean)
            if not values:
                check_rebuilds(model, graph, here, memory_mb)
            of_rows, pieces = metric.of_pairs(rows), []
            for output in run_edge_sets(model, graph, here, there, masks, memory_mb):
                pieces.append(read_metric(of_rows, output))
                bar.update(pieces[-1].numel())
            values.append(torch.cat(pieces).T)
            empty.append(read_metric(of_rows, corrupted.output[None])[0])
            full.append(read_metric(of_rows, clean.output[None])[0])
    return torch.cat(values), torch.cat(empty), torch.cat(full)


def _judged(
    circuit: Circuit,
    model: HookedTST,
    pairs: Pairs,
    sets: Tensor,
    metric: Metric | None,
    memory_mb: float,
    progress: bool,
    **made: Any,
) -> tuple[Tensor, dict[str, Any]]:
    """Values [pair, set] of :func:`keep_edges`, and the fields that all judgements share."""
    values, *ends = keep_edges(circuit, model, pairs, sets, metric, memory_mb, progress)
    judged = dict(zip(("empty", "full"), ends, strict=True)) | _named(circuit, metric)
    return values, {**judged, "made": {**circuit.made, **made}}


def check_graph(model: HookedTST, graph: ComponentGraph, n_time: int) -> None:
    """Raise unless the graph is this model's.

    Raises:
        ArgumentError: layers, heads, positions or channels differ.
    """
    own = component_graph(
        model, n_time, positions=bool(graph.n_pos), channels=bool(graph.n_channels)
    )
    if own != graph:
        raise ArgumentError(
            f"the circuit is of another model: it has {graph.to_dict()}, this model and series "
            f"have {own.to_dict()}"
        )


@dataclass(frozen=True, eq=False, repr=False)
class Completeness(_OfGap):
    """The metric of circuit and model with the same random nodes taken out of both.

    Args:
        removed: the nodes taken out, for each sample.
        circuit: [pair, sample], the metric of the circuit without them.
        model: [pair, sample], the metric of the whole model without them.
        empty: [pair], the metric of the corrupted run, with no edge kept.
        full: [pair], the metric of the clean run.
        metric: name of the metric.
        unit: its unit.
        made: how.
    """

    removed: tuple[tuple[str, ...], ...]
    circuit: Float[Tensor, "pair sample"]
    model: Float[Tensor, "pair sample"]
    empty: Float[Tensor, " pair"]
    full: Float[Tensor, " pair"]
    metric: str
    unit: str
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def incompleteness(self) -> Float[Tensor, " sample"]:
        """|circuit - model| of the mean metrics, as a share of the clean-corrupted gap."""
        return (self.circuit - self.model).mean(0).abs() / abs(self.gap)

    def entries(self) -> dict[str, Any]:
        """Samples, by the nodes that were removed."""
        return {"removed": [", ".join(names) for names in self.removed]}

    def columns(self) -> dict[str, Any]:
        """How many were removed, the two metrics, and the incompleteness."""
        return {
            "n_removed": [len(names) for names in self.removed],
            "circuit": self.circuit.mean(0),
            "model": self.model.mean(0),
            "incompleteness": self.incompleteness,
        }


@dataclass(frozen=True, eq=False, repr=False)
class Minimality(_OfGap):
    """What the circuit loses when one of its parts is taken out.

    Args:
        parts: names of the edges or nodes.
        values: [pair, part], the metric of the circuit without the part.
        circuit: [pair], the metric of the whole circuit.
        empty: [pair], the metric of the corrupted run, with no edge kept.
        full: [pair], the metric of the clean run.
        metric: name of the metric.
        unit: its unit.
        made: how.
    """

    parts: tuple[str, ...]
    values: Float[Tensor, "pair part"]
    circuit: Float[Tensor, " pair"]
    empty: Float[Tensor, " pair"]
    full: Float[Tensor, " pair"]
    metric: str
    unit: str
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def loss(self) -> Float[Tensor, " part"]:
        """Mean metric of the circuit minus that without the part, as a share of the gap."""
        return (self.circuit[:, None] - self.values).mean(0) / self.gap

    def entries(self) -> dict[str, Any]:
        """The parts."""
        return {"part": self.parts}

    def columns(self) -> dict[str, Any]:
        """The mean metric without each part, and what is lost."""
        return {"value": self.values.mean(0), "loss": self.loss}

    def to_dataframe(self) -> pd.DataFrame:
        """One row per part, the most needed first."""
        frame = super().to_dataframe().sort_values("loss", ascending=False, kind="stable")
        return frame.reset_index(drop=True)


@dataclass(frozen=True, eq=False, repr=False)
class Together(Labelled):
    """The metric with all of a circuit's parts patched from the clean into the corrupted run.

    Args:
        nodes: [pair], with the outputs of all its nodes patched: whoever reads them.
        edges: [pair], with its edges patched: only the circuit's readers read them.
        one_by_one: sum of the scores of its edges, what one might have expected.
        baseline: [pair], the corrupted run's metric.
        clean: [pair], the clean run's metric.
        metric: name of the metric.
        unit: its unit.
        made: how.
    """

    nodes: Float[Tensor, " pair"]
    edges: Float[Tensor, " pair"]
    one_by_one: float
    baseline: Float[Tensor, " pair"]
    clean: Float[Tensor, " pair"]
    metric: str
    unit: str
    made: dict[str, Any] = field(default_factory=dict)

    def entries(self) -> dict[str, Any]:
        """The runs: corrupted, edges together, nodes together, clean."""
        return {"run": ("corrupted", "edges together", "nodes together", "clean")}

    def columns(self) -> dict[str, Any]:
        """The mean metric, its change, and the change as a share of the gap."""
        runs = torch.stack([self.baseline, self.edges, self.nodes, self.clean]).mean(1)
        effect = runs - runs[0]
        gap = effect[-1] if effect[-1] else torch.nan
        return {"value": runs, "effect": effect, "normalized": effect / gap}


@checked
def completeness(
    circuit: Circuit,
    model: HookedTST,
    pairs: Pairs,
    *,
    metric: Metric | None = None,
    n_samples: Count = 20,
    seed: Seed = 0,
    memory_mb: Positive = 256.0,
    progress: bool = True,
) -> Completeness:
    """Do circuit and model break alike when parts of the circuit are taken out of both?

    Random sets of the circuit's nodes (each node with probability one half) are taken out: all
    edges from them carry the corrupted run's contributions. A circuit that misses backup parts is
    faithful, but breaks where the model does not.

    Args:
        circuit: the circuit.
        model: the model.
        pairs: clean and corrupted series.
        metric: for these pairs; the circuit's own where None.
        n_samples: sets of nodes.
        seed: of the sets.
        memory_mb: worlds run in chunks whose streams stay near this many MiB.
        progress: show a progress bar.

    Raises:
        ArgumentError: no samples, no edges, or another model.

    Source: Wang et al. 2022 (arXiv 2211.00593), section 4, with edges in place of nodes.
    """
    _check_not_empty(circuit)
    names = [node.name for node in circuit.nodes if node.kind != "output"]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(n_samples, len(names), generator=generator) < 0.5
    removed = tuple(
        tuple(name for name, out in zip(names, row, strict=True) if out) for row in drawn.tolist()
    )
    senders = [edge.sender.name for edge in circuit.components.edges]
    stays = torch.stack(
        [torch.tensor([name not in set(out) for name in senders]) for out in removed]
    )
    sets = torch.cat([circuit.kept & stays, stays])
    how = (metric, memory_mb, progress)
    values, judged = _judged(circuit, model, pairs, sets, *how, seed=seed)
    return Completeness(removed, values[:, :n_samples], values[:, n_samples:], **judged)


@checked
def minimality(
    circuit: Circuit,
    model: HookedTST,
    pairs: Pairs,
    *,
    of: Literal["edge", "node"] = "edge",
    metric: Metric | None = None,
    memory_mb: Positive = 256.0,
    progress: bool = True,
) -> Minimality:
    """What does the circuit lose without each of its parts?

    One part at a time carries the corrupted run's contributions. What can mislead: two parts that
    back each other up both look superfluous.

    Args:
        circuit: the circuit.
        model: the model.
        pairs: clean and corrupted series.
        of: take out one ``"edge"`` at a time, or one ``"node"`` with all edges from and to it.
        metric: for these pairs; the circuit's own where None.
        memory_mb: worlds run in chunks whose streams stay near this many MiB.
        progress: show a progress bar.

    Raises:
        ArgumentError: no edges, another ``of``, or another model.

    Source: Wang et al. 2022 (arXiv 2211.00593), section 4.
    """
    _check_not_empty(circuit)
    if of == "edge":
        parts = [edge.name for edge in circuit.edges]
        numbers = circuit.kept.nonzero()
        sets = circuit.kept.repeat(len(parts), 1).scatter(1, numbers, False)
    else:
        parts = [node.name for node in circuit.nodes if node.kind != "output"]
        sets = torch.stack([circuit.kept & ~_touching(circuit, [name]) for name in parts])
    sets = torch.cat([circuit.kept[None], sets])
    how = (metric, memory_mb, progress)
    values, judged = _judged(circuit, model, pairs, sets, *how, of=of)
    return Minimality(tuple(parts), values[:, 1:], values[:, 0], **judged)


@checked
def patch_together(
    circuit: Circuit,
    model: HookedTST,
    pairs: Pairs,
    *,
    metric: Metric | None = None,
    progress: bool = True,
) -> Together:
    """What do all parts of the circuit do together, patched into the corrupted run?

    Args:
        circuit: the circuit.
        model: the model.
        pairs: clean and corrupted series.
        metric: for these pairs; the circuit's own where None.
        progress: show a progress bar.

    Raises:
        ArgumentError: no edges, or another model.
    """
    _check_not_empty(circuit)
    measure = circuit.metric_of(pairs) if metric is None else metric
    values, baseline, clean = keep_edges(
        circuit, model, pairs, circuit.kept[None], metric, progress=progress, onto="corrupted"
    )
    output = patch(
        model,
        pairs.clean,
        pairs.corrupted,
        sites_of(circuit),
        clean_mask=pairs.clean_mask,
        corrupted_mask=pairs.corrupted_mask,
    )
    return Together(
        nodes=read_metric(measure, output[None])[0],
        edges=values[:, 0],
        one_by_one=float(circuit.weights.sum()),
        baseline=baseline,
        clean=clean,
        **_named(circuit, metric),
        made=dict(circuit.made),
    )


def sites_of(circuit: Circuit) -> list[Site]:
    """The patching sites of a circuit's nodes: embedding positions, heads at z, MLP outputs.

    Channels have no site of their own here; they act through the embedding.
    """
    sites: list[Site] = []
    positions = [node.index for node in circuit.nodes if node.kind == "pos"]
    if positions:
        sites.append(Site("embed", pos=[pos for pos in positions if pos is not None]))
    for node in circuit.nodes:
        if node.kind == "embed":
            sites.append(Site("embed"))
        elif node.kind == "head":
            sites.append(Site("z", layer=node.layer, head=node.index))
        elif node.kind == "mlp":
            sites.append(Site("mlp_out", layer=node.layer))
    return sites


def _touching(circuit: Circuit, names: Sequence[str]) -> Tensor:
    """bool [edge], True where an edge starts or ends at one of these nodes."""
    out = set(names)
    edges = circuit.components.edges
    return torch.tensor([e.sender.name in out or e.receiver.name in out for e in edges])


def _check_not_empty(circuit: Circuit) -> None:
    if not len(circuit):
        raise ArgumentError(
            "expected a circuit with edges, got one without; choose a larger budget"
        )


def _named(circuit: Circuit, metric: Metric | None) -> dict[str, Any]:
    if metric is None:
        return {"metric": circuit.metric, "unit": circuit.unit}
    return {"metric": metric.name, "unit": metric.unit}
