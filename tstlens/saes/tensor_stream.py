"""Rows of a tensor as an endless, shuffled, seeded stream of batches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from tstlens.arguments import checked
from tstlens.errors import ArgumentError
from tstlens.saes.checks import check_at_least, drawn_by


class TensorStream:
    """Batches of a tensor's rows without end; every epoch visits every row once.

    Args:
        rows: activations [row, width].
        batch_size: rows per batch.
        seed: of the order.
    """

    @checked
    def __init__(self, rows: Float[Tensor, "row width"], batch_size: int, seed: int = 0) -> None:
        if rows.ndim != 2 or not len(rows):
            raise ArgumentError(f"expected activations [row, width], got {list(rows.shape)}")
        if not rows.is_floating_point() or not bool(rows.isfinite().all()):
            raise ArgumentError(
                f"expected finite activations in floating point, got {rows.dtype}"
                + (" with NaN or infinity" if rows.is_floating_point() else "")
            )
        check_at_least(1, batch_size=batch_size)
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.batches_drawn = 0
        self._batches = self._run(0)

    def __iter__(self) -> TensorStream:
        return self

    def __next__(self) -> Tensor:
        self.batches_drawn += 1
        return next(self._batches)

    def state_dict(self) -> dict[str, int]:
        """How far the stream has got."""
        return {"batches_drawn": self.batches_drawn, "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on as a stream with the same arguments would after so many batches."""
        self.batches_drawn = drawn_by(state, self.seed)
        self._batches = self._run(self.batches_drawn)

    def _run(self, skip: int) -> Iterator[Tensor]:
        n = len(self.rows)
        epoch, within = divmod(skip * self.batch_size, n)
        order = self._order(epoch)[within:]
        while True:
            while len(order) < self.batch_size:
                epoch += 1
                order = torch.cat([order, self._order(epoch)])
            taken, order = order[: self.batch_size], order[self.batch_size :]
            yield self.rows[taken.to(self.rows.device)]

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.rows), generator=generator)
