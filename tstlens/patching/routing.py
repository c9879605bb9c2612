"""How a head's pooling routes positions into its pooled vector, as weights that were in force.

| pooling     | weight of a position, for each dimension                                       |
|-------------|--------------------------------------------------------------------------------|
| max         | 1 at the position that is largest in that dimension, else 0                    |
| mean        | 1 / observed positions, 0 at padding                                           |
| first, last | 1 at that (observed) position                                                  |
| flatten     | every position has its own slice of the pooled vector; 0 at padding            |

With these weights held fixed, pooling is linear in what stands at the positions. For all but max
they depend on the mask only; under max another input may have other winners.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tstlens.model.parts import Pooling
from tstlens.shapes import PosMask, Residual


@dataclass(frozen=True)
class Routing:
    """The weights of one run.

    Args:
        weight: share of the pooled vector that comes from each position, [row, pos]; sums to 1
            (under flatten: 1 divided among the observed positions).
        winner: the position that each dimension was taken from under max pooling, [row, d_model];
            None for other poolings.
        flat: whether positions have slices of their own.
    """

    weight: Float[Tensor, "row pos"]
    winner: Int[Tensor, "row d_model"] | None = None
    flat: bool = False

    def unpool(self, direction: Float[Tensor, "row d_pooled"]) -> Residual:
        """A direction over the pooled vector as one over every position, [row, pos, d_model].

        The product with what stands at the positions, summed, is the product with what was pooled.
        """
        n_pos = self.weight.shape[1]
        if self.flat:
            return direction.unflatten(1, (n_pos, -1)) * (self.weight > 0)[:, :, None]
        if self.winner is None:
            return self.weight[:, :, None] * direction[:, None]
        spread = direction.new_zeros(len(direction), n_pos, direction.shape[1])
        return spread.scatter_(1, self.winner[:, None], direction[:, None])


def route(final: Residual, pooling: Pooling, mask: PosMask | None) -> Routing:
    """The weights with which a pooling took each position of the stream that it was given.

    Where several positions are largest in a dimension at once, max pooling is credited to one.

    Args:
        final: what the head pools, [row, pos, d_model]: after the final norm where there is one.
        pooling: the head's.
        mask: bool [row, pos], False at padding; None where there is none.
    """
    n_rows, n_pos = final.shape[:2]
    observed = torch.ones_like(final[:, :, 0]) if mask is None else mask.to(final.dtype)
    if pooling == "max":
        if mask is not None:
            final = final.masked_fill(~mask[:, :, None], float("-inf"))
        winner = final.argmax(1)
        weight = torch.nn.functional.one_hot(winner, n_pos).to(final.dtype).mean(1)
        return Routing(weight, winner)
    if pooling in ("mean", "flatten"):
        return Routing(observed / observed.sum(1, keepdim=True), flat=pooling == "flatten")
    taken = torch.zeros(n_rows, dtype=torch.long, device=final.device)
    if pooling == "last":
        taken = n_pos - 1 - observed.flip(1).argmax(1)
    return Routing(torch.nn.functional.one_hot(taken, n_pos).to(final.dtype))
