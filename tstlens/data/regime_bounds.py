"""The best that anyone can know about a `RegimeMachine` from its last few patches, exactly."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tstlens.errors import ArgumentError

__all__ = ["RegimeBounds", "exact_bounds"]

_MOST_PATHS = 2_000_000  # of states


class RegimeBounds(NamedTuple):
    """The best that is possible from the last few patches, without noise.

    Args:
        accuracy: of the most probable next prototype.
        valid_mass: probability that the best forecast puts on prototypes that may follow.
        state_accuracy: of the most probable state now.
    """

    accuracy: float
    valid_mass: float
    state_accuracy: float


def exact_bounds(
    n_patches: int,
    stationary: Float[Tensor, " state"],
    transition: Float[Tensor, "state next"],
    successors: Int[Tensor, "state edge"],
    prototype_of: Int[Tensor, " state"],
) -> RegimeBounds:
    """Follow every path of states and gather those that write the same word of prototypes.

    Args:
        n_patches: length of the paths.
        stationary: probability of each state where a path starts.
        transition: probability of each next state.
        successors: states that may follow each.
        prototype_of: what each state writes.

    Raises:
        ArgumentError: no patches, or more paths than there is memory for.
    """
    n_states, n_edges = successors.shape
    n_prototypes = int(prototype_of.max()) + 1
    n_paths = n_states * n_edges ** max(n_patches - 1, 0)
    if n_patches < 1 or n_paths > _MOST_PATHS:
        raise ArgumentError(
            f"n_patches: expected at least 1 and at most {_MOST_PATHS:,} paths of states, "
            f"got {n_patches} ({n_paths:,} paths)"
        )
    shares = transition.gather(1, successors)
    state = torch.arange(n_states)  # of each path, where it ends
    weight, word = stationary, prototype_of
    for _ in range(n_patches - 1):
        weight = (weight[:, None] * shares[state]).flatten()
        state = successors[state].flatten()
        word = word.repeat_interleave(n_edges) * n_prototypes + prototype_of[state]
        word = word.unique(return_inverse=True)[1]
    joint = torch.zeros(int(word.max()) + 1, n_states, dtype=torch.float64)
    joint.index_put_((word, state), weight, accumulate=True)  # probability of word and state
    shown = torch.nn.functional.one_hot(prototype_of, n_prototypes).double()
    shown_next = transition @ shown  # [state, prototype]
    following = joint @ shown_next  # probability of word and next prototype
    forecast = following / joint.sum(1, keepdim=True)
    return RegimeBounds(
        accuracy=float(following.amax(1).sum()),
        valid_mass=float((joint * (forecast @ (shown_next > 0).double().T)).sum()),
        state_accuracy=float(joint.amax(1).sum()),
    )
