"""What crosses the trunk beside the residual stream, passed explicitly and never stored."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tstlens.shapes import PosMask


@dataclass(frozen=True)
class TrunkState:
    """Facts about the rows of the residual stream that blocks and head need.

    Args:
        pos_mask: bool [row, pos], False at positions that hold padding; None when all are observed.
        n_series_channels: rows per series: the channel count where every channel goes through the
            trunk by itself, else 1. Rows are series-major.
    """

    pos_mask: PosMask | None = None
    n_series_channels: int = 1

    def rows(self, index: Tensor) -> TrunkState:
        """The state of the series at ``index`` (an integer tensor), repeats allowed."""
        if self.pos_mask is None:
            return self
        grouped = self.pos_mask.unflatten(0, (-1, self.n_series_channels))
        return replace(self, pos_mask=grouped[index].flatten(0, 1))

    @property
    def key_mask(self) -> Tensor | None:
        """bool [row, 1, 1, key], True where a key may be attended to."""
        return None if self.pos_mask is None else self.pos_mask[:, None, None, :]


def causal_mask(n_pos: int, device: torch.device) -> Tensor:
    """bool [query, key], True where key <= query."""
    return torch.ones(n_pos, n_pos, dtype=torch.bool, device=device).tril()
