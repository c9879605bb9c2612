"""Exact edge patching: what does one component's output do through one reader of it?

Run the corrupted series, but let one receiver read one sender's clean contribution; everything
after the receiver is computed anew. Where node patching says that a component matters, edges say
for whom. What an edge is on pre-norm and post-norm models, and what is held fixed, is told in
:mod:`tstlens.patching.circuits.streams`.

What can mislead: as for sweeps (:func:`tstlens.patching.sweep`), and more so: an edge into one of
many readers that do the same looks weak, and edges that only work together (a head's key and
value, say) look weak one by one. Effects of edges do not add up to the effect of the node.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tstlens.arguments import checked
from tstlens.errors import ArgumentError
from tstlens.metrics import Metric
from tstlens.model import HookedTST
from tstlens.patching.checks import check_pairs
from tstlens.patching.circuits.edge_sets import check_rebuilds
from tstlens.patching.circuits.graph import ComponentGraph, Edge, component_graph
from tstlens.patching.circuits.single_edges import run_single_edges
from tstlens.patching.circuits.streams import (
    Recorded,
    check_same_positions,
    record_components,
)
from tstlens.patching.measuring import (
    MeasureOutput,
    as_metric,
    described,
    joined,
    read_metric,
    read_runs,
)
from tstlens.patching.result import SweepResult
from tstlens.patching.sweep import time_cells
from tstlens.shapes import PairMask, PairSeries


@dataclass(frozen=True, repr=False)
class EdgeEffects(SweepResult):
    """The metric with each edge patched (or its estimate), [pair, edge].

    A :class:`SweepResult` whose one axis beside the pairs is ``"edge"``, with entries like
    ``"L0H1->L1H0.k"``; ``made["graph"]`` holds the sizes of the graph.
    """

    @cached_property
    def graph(self) -> ComponentGraph:
        """The graph that the edges belong to."""
        return ComponentGraph(**self.made["graph"])

    @property
    def edges(self) -> tuple[Edge, ...]:
        """The edges, in the order of the values."""
        numbers = self.graph.edge_numbers(self.coords["edge"])
        return tuple(self.graph.edges[number] for number in numbers.tolist())


@checked
@torch.no_grad()
def edge_sweep(
    model: HookedTST,
    clean: PairSeries,
    corrupted: PairSeries,
    metric: MeasureOutput,
    *,
    edges: Sequence[str | Edge] | None = None,
    positions: bool = True,
    channels: bool = False,
    clean_mask: PairMask | None = None,
    corrupted_mask: PairMask | None = None,
    memory_mb: float = 256.0,
    progress: bool = True,
) -> EdgeEffects:
    """Patch one edge at a time from the clean into the corrupted run, exactly.

    Args:
        model: the model, pre-norm or post-norm.
        clean: series [pair, channel, time].
        corrupted: series of the same shape.
        metric: :func:`~tstlens.patching.log_prob` and its like, or any function from outputs
            [pair, ...] to [pair].
        edges: names like ``"L0H1->L1H0.k"``; None for all.
        positions: the embedding at every position is a node of its own.
        channels: the input's channels are nodes too.
        clean_mask: bool [pair, time] of the clean series.
        corrupted_mask: bool [pair, time] of the corrupted series.
        memory_mb: worlds run in chunks whose activations stay near this many MiB.
        progress: show a progress bar.

    Returns:
        Values [pair, edge] in the metric's unit.

    Raises:
        UnknownSiteError: an edge that the model does not have.
        SeriesShapeError: clean and corrupted differ in shape, or do not fit the model.
        ArgumentError: the two series of a pair have different padding.
        HookError: somebody's hooks are on the model.

    Source: Conmy et al. 2023 (arXiv 2304.14997), Goldowsky-Dill et al. 2023 (arXiv 2304.05969).

    Example:
        >>> import torch
        >>> from tstlens import patching
        >>> from tstlens.model import HookedTST, HookedTSTConfig, HeadConfig, PerStepConfig
        >>> model = HookedTST(HookedTSTConfig(
        ...     n_layers=2, d_model=16, n_heads=2, d_mlp=32, n_channels=3, n_time=20,
        ...     embed=PerStepConfig(), head=HeadConfig("mean", n_classes=5)))
        >>> a, b = torch.randn(2, 6, 3, 20)
        >>> effects = edge_sweep(model, a, b, patching.logit(torch.zeros(6, dtype=torch.long)),
        ...                      edges=["L0H1->L1H0.k", "L0MLP->output"], progress=False)
        >>> effects.effect().shape
        torch.Size([6, 2])
    """
    clean, corrupted = check_pairs(model, clean, corrupted, clean_mask, corrupted_mask)
    metric = as_metric(metric, len(clean))
    graph = component_graph(model, clean.shape[2], positions=positions, channels=channels)
    if edges is not None and not len(edges):
        raise ArgumentError("expected at least one edge to patch, got none; leave out for all")
    numbers = torch.arange(len(graph.edges)) if edges is None else graph.edge_numbers(edges)
    wanted = graph.mask(numbers)
    values, runs = [], []
    with tqdm(total=len(numbers) * len(clean), unit="run", disable=not progress) as bar:
        bar.set_description("patching edges")
        for rows, there, here in recorded_pairs(
            model, clean, corrupted, clean_mask, corrupted_mask, metric
        ):
            if not values:
                check_rebuilds(model, graph, here, memory_mb)
            of_rows = metric.of_pairs(rows)
            table = torch.zeros(len(graph.senders), len(graph.receivers), len(here.series))
            table = table.to(here.output)
            for senders, receivers, output in run_single_edges(
                model, graph, here, there, wanted, memory_mb
            ):
                table[senders, receivers] = read_metric(of_rows, output).to(table)
                bar.update(output.shape[0] * output.shape[1])
            chosen = graph.index[numbers]
            values.append(table[chosen[:, 0], chosen[:, 1]].T)
            runs.append(read_runs(of_rows, here.output, there.output))
    names = tuple(graph.edges[number].name for number in numbers.tolist())
    found, both = torch.cat(values), joined(runs)
    return as_effects(model, graph, metric, clean, found, both, {"method": "exact"}, names)


def as_effects(
    model: HookedTST,
    graph: ComponentGraph,
    metric: Metric,
    clean: Tensor,
    values: Tensor,
    runs: dict[str, Tensor],
    made: dict[str, Any],
    names: tuple[str, ...] | None = None,
    effects: Tensor | None = None,
) -> EdgeEffects:
    """Values [pair, edge], and what the two runs gave, as a result."""
    names = tuple(edge.name for edge in graph.edges) if names is None else names
    return EdgeEffects(
        values=values,
        effects=effects,
        axes=("pair", "edge"),
        coords={"pair": tuple(range(len(clean))), "edge": names},
        **runs,
        **described(metric),
        site="edges",
        source="clean",
        time_cells=time_cells(model, clean.shape[2]),
        n_pairs=len(clean),
        made={"model": model.cfg.model_name, "graph": graph.to_dict(), **made},
    )


def recorded_pairs(
    model: HookedTST,
    clean: Tensor,
    corrupted: Tensor,
    clean_mask: Tensor | None,
    corrupted_mask: Tensor | None,
    metric: Metric,
    most: int = 128,
) -> Iterator[tuple[slice, Recorded, Recorded]]:
    """Blocks of pairs with the components of their clean and corrupted runs.

    A metric that is any function of the outputs sees all pairs at once.
    """
    if not len(clean):
        raise ArgumentError("expected at least one pair, got none")
    most = most if metric.targets else len(clean)
    for start in range(0, len(clean), most):
        rows = slice(start, min(start + most, len(clean)))
        there = record_components(model, clean[rows], _rows(clean_mask, rows))
        here = record_components(model, corrupted[rows], _rows(corrupted_mask, rows))
        check_same_positions(here, there)
        yield rows, there, here


def _rows(mask: Tensor | None, rows: slice) -> Tensor | None:
    return None if mask is None else mask[rows]
