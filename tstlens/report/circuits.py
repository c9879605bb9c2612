"""The circuit between classes: edges chosen on one half of the pairs, judged on the other."""

from __future__ import annotations

from dataclasses import dataclass

from tstlens.data import Pairs
from tstlens.errors import ArgumentError
from tstlens.figures import over_pairs
from tstlens.figures.intervals import Interval
from tstlens.model import HookedTST
from tstlens.patching import (
    Circuit,
    Completeness,
    Faithfulness,
    Minimality,
    SweepResult,
    component_graph,
    log_prob,
)

BUDGET = 0.05  # share of edges in the circuit
STEPS = 5  # of integrated gradients
N_RANDOM = 5  # random orders of edges
N_SAMPLES = 20  # sets of nodes taken out, for completeness
FEWEST_PAIRS = 4  # in each half; a circuit of fewer is one of single series
MOST_POSITIONS = 64  # more positions are one node: the graph would have a node for each
MOST_EDGES = 20_000


@dataclass(frozen=True)
class CircuitFound:
    """A circuit with what it was chosen on, what it was judged on, and the verdict.

    Args:
        circuit: chosen on ``chosen_on``.
        chosen_on: rows of the pair set.
        judged_on: rows of the pair set; they share no series with the others where ``apart``.
        apart: whether no series is in both halves.
        faithfulness: on ``judged_on``, beside random edges.
        of_chosen: on ``chosen_on``, to see how much the choice fits its own pairs.
        interval: of the circuit's faithfulness over the pairs of ``judged_on``.
        completeness: on ``judged_on``.
        minimality: node by node, on ``judged_on``.
    """

    circuit: Circuit
    chosen_on: tuple[int, ...]
    judged_on: tuple[int, ...]
    apart: bool
    faithfulness: Faithfulness
    of_chosen: Faithfulness
    interval: Interval
    completeness: Completeness
    minimality: Minimality


def find(model: HookedTST, pairs: Pairs, seed: int) -> CircuitFound | str:
    """The circuit of these pairs with its faithfulness, or why there is none.

    Args:
        model: the model.
        pairs: between classes, with indices into the data.
        seed: of random edges and nodes.
    """
    chosen_on, judged_on, apart = halves(pairs)
    if min(len(chosen_on), len(judged_on)) < FEWEST_PAIRS:
        return (
            f"No circuit: {len(pairs)} pairs make halves of {len(chosen_on)} and "
            f"{len(judged_on)} that share no series; choosing edges on one and judging them on "
            f"the other takes at least {FEWEST_PAIRS} pairs in each."
        )
    n_time = pairs.clean.shape[2]
    n_pos = model.n_pos(n_time)
    try:
        graph = component_graph(model, n_time)
        positions = n_pos is not None and n_pos <= MOST_POSITIONS
        positions = positions and len(graph.edges) <= MOST_EDGES
        circuit = Circuit.from_edge_attribution(
            model, pairs[list(chosen_on)], metric=log_prob(pairs.target[list(chosen_on)]),
            budget=BUDGET, steps=STEPS, positions=positions, progress=False,
        )  # fmt: skip
        judged = pairs[list(judged_on)]
        faithful = circuit.faithfulness(model, judged, n_random=N_RANDOM, seed=seed, progress=False)
        own = circuit.faithfulness(model, pairs[list(chosen_on)], progress=False)
        complete = circuit.completeness(
            model, judged, n_samples=N_SAMPLES, seed=seed, progress=False
        )
        minimal = circuit.minimality(model, judged, of="node", progress=False)
    except ArgumentError as error:
        return f"No circuit: {error}."
    clusters = None if judged.corrupted_index is None else judged.corrupted_index.tolist()
    kept = SweepResult(
        faithful.circuit[:, None], ("pair", "circuit"),
        {"pair": tuple(range(len(judged))), "circuit": (0,)},
        faithful.empty, faithful.full, faithful.metric, faithful.unit, "edges",
    )  # fmt: skip
    interval = over_pairs(kept, "normalized", clusters=clusters, seed=seed)
    return CircuitFound(
        circuit, chosen_on, judged_on, apart, faithful, own, interval, complete, minimal
    )


def halves(pairs: Pairs) -> tuple[tuple[int, ...], tuple[int, ...], bool]:
    """Rows in two halves that share no series, the classes spread over both.

    Pairs that share a series, clean or corrupted, stay together. Where that leaves the smaller
    half with less than a third, only corrupted series are kept apart.

    Returns:
        Rows of one half, of the other, and whether no series at all is in both.
    """
    clean, corrupted = pairs.clean_index, pairs.corrupted_index
    own = list(range(len(pairs)))
    corrupted_of = own if corrupted is None else corrupted.tolist()
    clean_of = corrupted_of if clean is None else clean.tolist()
    for apart in (True, False):
        groups = _connected(clean_of if apart else corrupted_of, corrupted_of)
        first, second = _dealt(groups, _ways(pairs))
        if 3 * min(len(first), len(second)) >= len(pairs) or not apart:
            break
    known = clean is not None and corrupted is not None
    return first, second, apart and known  # type: ignore[possibly-undefined]


def _ways(pairs: Pairs) -> list[tuple[int, int]]:
    seen = pairs.target if pairs.predicted is None else pairs.predicted
    return list(zip(pairs.target.tolist(), seen.tolist(), strict=True))


def _connected(one: list[int], other: list[int]) -> list[list[int]]:
    """Rows that share a series, however indirectly, in groups; the largest first."""
    parent: dict[int, int] = {}

    def root(node: int) -> int:
        while parent.setdefault(node, node) != node:
            node = parent[node]
        return node

    for a, b in zip(one, other, strict=True):
        parent[root(a)] = root(b)
    groups: dict[int, list[int]] = {}
    for row, node in enumerate(other):
        groups.setdefault(root(node), []).append(row)
    return sorted(groups.values(), key=lambda rows: (-len(rows), rows[0]))


def _dealt(
    groups: list[list[int]], ways: list[tuple[int, int]]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Groups dealt to two halves, each to the one that has fewer pairs of its classes."""
    sides: tuple[list[int], list[int]] = ([], [])
    for rows in groups:
        kinds = {ways[row] for row in rows}
        alike = [sum(ways[row] in kinds for row in side) for side in sides]
        sides[(alike[1], len(sides[1])) < (alike[0], len(sides[0]))].extend(rows)
    first, second = (tuple(sorted(side)) for side in sides)
    return first, second
