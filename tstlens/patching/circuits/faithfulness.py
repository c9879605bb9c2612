"""Faithfulness: do a circuit's edges alone do what the model does?

Keep the clean run's contributions on the circuit's edges and let every other edge carry the
corrupted run's. Kept edges carry what their senders *now* write, so a kept edge whose sender hears
nothing clean tells nothing. With f(k) the share of the way from the corrupted to the clean run's
metric that the strongest k of all edges keep, CPR is the area under f (larger is better) and CMD
the area between f and 1 (smaller is better), over the share of edges from 0.1 to 100 %.

What can mislead: f can pass 1 (an edge left out worked against the task) or go below 0; and a
circuit found and judged on the same few pairs looks better than it is, so judge on others. Random
orders of edges are the yardstick.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from tstlens.arguments import Positive, Seed, checked
from tstlens.data import Pairs
from tstlens.errors import ArgumentError
from tstlens.metrics import Metric
from tstlens.model import HookedTST
from tstlens.patching.checks import check_pairs
from tstlens.patching.circuits.edges import recorded_pairs
from tstlens.patching.circuits.graph import ComponentGraph, component_graph
from tstlens.patching.circuits.streams import check_rebuilds, pairs_at_once, run_edge_sets
from tstlens.patching.metrics import as_metric, read_metric
from tstlens.results import Result

if TYPE_CHECKING:
    import pandas as pd

    from tstlens.patching.circuits.circuit import Circuit

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # MIB's
_SMALL = 1e-6  # a clean-corrupted gap below this cannot be divided by


@dataclass(frozen=True)
class Faithfulness(Result):
    """The metric that the strongest edges keep, for growing numbers of edges.

    Args:
        values: [pair, fraction], the metric with the strongest edges kept, all others corrupted.
        fractions: shares of all edges.
        n_edges: edges kept at each share.
        empty: [pair], the metric with no edge kept: the corrupted run's.
        full: [pair], the metric of the clean run.
        circuit: [pair], the metric with exactly the circuit's edges kept.
        n_circuit: edges of the circuit.
        random: [order, pair, fraction], the same as ``values`` with edges in random orders.
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
        return (
            torch.stack([self._share(values) for values in self.random])
            if len(self.random)
            else self.values.new_zeros(0, len(self.fractions))
        )

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

    def to_dataframe(self) -> pd.DataFrame:
        """One row per share of edges: edges, mean metric, f, and the mean f of random orders."""
        import pandas as pd

        frame = pd.DataFrame(
            {
                "fraction": self.fractions,
                "n_edges": self.n_edges,
                "value": self.values.mean(0).tolist(),
                "faithfulness": self.curve.tolist(),
            }
        )
        if len(self.random):
            frame["random"] = self.random_curves.mean(0).tolist()
        return frame

    def _share(self, values: Tensor) -> Tensor:
        gap = (self.full - self.empty).mean()
        if abs(float(gap)) < _SMALL:
            return torch.full_like(values[0], torch.nan)
        return (values - self.empty[:, None]).mean(0) / gap

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
    n_random: int = 0,
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
    if n_random < 0:
        raise ArgumentError(f"expected n_random of 0 or more, got {n_random}")
    n_all = len(circuit.kept)
    # As MIB's int(len(edges) * share): a share of less than one edge is the empty circuit.
    counts = [int(n_all * share + 1e-9) for share in fractions]
    generator = torch.Generator().manual_seed(seed)
    orders = [circuit.ranking(absolute)]
    orders += [torch.randperm(n_all, generator=generator) for _ in range(n_random)]
    sets = [circuit.kept, *(_first(order, count) for order in orders for count in counts)]
    values, empty, full = keep_edges(
        circuit, model, pairs, torch.stack(sets), metric, memory_mb, progress
    )
    by_order = values[:, 1:].unflatten(1, (len(orders), len(counts)))
    return Faithfulness(
        values=by_order[:, 0],
        fractions=fractions,
        n_edges=tuple(counts),
        empty=empty,
        full=full,
        circuit=values[:, 0],
        n_circuit=len(circuit),
        random=by_order[:, 1:].transpose(0, 1),
        metric=circuit.metric if metric is None else metric.name,
        unit=circuit.unit if metric is None else metric.unit,
        made={**circuit.made, "absolute": absolute, "seed": seed, "n_judged": len(pairs)},
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
    metric = as_metric(metric, len(pairs))
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
