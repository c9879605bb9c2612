"""The graph of a `RegimeMachine`: who may follow whom.

The union of ``n_edges`` permutations of the states, the first of them one cycle through all:
every state is reached from every other and has as many ways in as out.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from tstlens.errors import ArgumentError

__all__ = ["draw_transitions"]

_FORBIDDEN = 1e6  # beside costs between 0 and 1
_ATTEMPTS = 200


def draw_transitions(
    n_states: int, n_edges: int, n_prototypes: int, generator: np.random.Generator
) -> tuple[Int[np.ndarray, " state"], Int[np.ndarray, "state edge"]]:
    """Draw which prototype each state writes and which states may follow it.

    The successors of a state differ in their prototypes, no state follows itself, states are
    not visited in a rhythm, and no two states are indistinguishable.

    Args:
        n_states: states.
        n_edges: successors of each.
        n_prototypes: prototypes, dealt to the states in parts as equal as can be.
        generator: of the draws.

    Returns:
        The prototype of each state, and its successors.

    Raises:
        ArgumentError: no such graph was found.
    """
    for _ in range(_ATTEMPTS):
        prototype = generator.permutation(np.arange(n_states) % n_prototypes)
        successors = _successors(prototype, n_edges, n_prototypes, generator)
        if successors is None or not _mixing(successors):
            continue
        if _told_apart(prototype, successors, n_prototypes):
            return prototype, successors
    raise ArgumentError(
        f"found no machine with n_states={n_states}, n_edges={n_edges}, "
        f"n_prototypes={n_prototypes}; take fewer edges or more prototypes"
    )


def _successors(
    prototype: np.ndarray, n_edges: int, n_prototypes: int, generator: np.random.Generator
) -> np.ndarray | None:
    from scipy.optimize import linear_sum_assignment

    n = len(prototype)
    tour = generator.permutation(n)
    successors = np.empty((n, n_edges), dtype=np.int64)
    successors[tour, 0] = np.roll(tour, -1)
    taken = np.zeros((n, n_prototypes), dtype=bool)
    for edge in range(n_edges):
        if edge:
            cost = generator.random((n, n)) + _FORBIDDEN * taken[:, prototype]
            np.fill_diagonal(cost, _FORBIDDEN)
            rows, columns = linear_sum_assignment(cost)
            if cost[rows, columns].max() >= _FORBIDDEN:
                return None
            successors[rows, edge] = columns
        taken[np.arange(n), prototype[successors[:, edge]]] = True
    return successors


def _mixing(successors: np.ndarray) -> bool:
    """Whether, after enough steps, any state can follow any other (Wielandt's bound)."""
    n = len(successors)
    reach = np.zeros((n, n), dtype=bool)
    np.put_along_axis(reach, successors, True, axis=1)
    for _ in range(int(np.ceil(np.log2(n * n))) + 1):
        reach = (reach.astype(np.float32) @ reach.astype(np.float32)) > 0
    return bool(reach.all())


def _told_apart(prototype: np.ndarray, successors: np.ndarray, n_prototypes: int) -> bool:
    """Whether what follows tells any two states apart (the refinement of Moore's algorithm)."""
    block = prototype
    while True:
        # Two states stay together if the same prototypes lead both into the same blocks.
        leads = np.full((len(prototype), n_prototypes), -1)
        np.put_along_axis(leads, prototype[successors], block[successors], axis=1)
        signature = np.column_stack([block, leads])
        finer = np.unique(signature, axis=0, return_inverse=True)[1].reshape(-1)
        if len(np.unique(finer)) == len(np.unique(block)):
            return len(np.unique(finer)) == len(prototype)
        block = finer
