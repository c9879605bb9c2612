"""What crosses the trunk beside the residual stream, passed explicitly and never stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

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
        statistics: what the front end took out of each row and the head puts back, such as
            ``"loc"`` and ``"scale"``, each [row, ...].
        positions: int [row, pos], the place of each position for rotary embeddings; None counts
            from 0.
        score_bias: what is added to every layer's attention scores, [1 or row, head, query, key].
        previous_scores: attention scores of the layer before the first one that runs, [row, head,
            query, key], for models whose layers hand their scores on.
        encoded: what a decoder's cross attention reads, [row, key, d_model].
        encoded_mask: bool [row, key], False where ``encoded`` holds padding.
        decoder_embedded: what enters a decoder's first block, [row, pos, d_model]; the front end
            of a model with a decoder makes it.
    """

    pos_mask: PosMask | None = None
    n_series_channels: int = 1
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    positions: Tensor | None = None
    score_bias: Tensor | None = None
    previous_scores: Tensor | None = None
    encoded: Tensor | None = None
    encoded_mask: Tensor | None = None
    decoder_embedded: Tensor | None = None
    handed_on: list[Tensor] | None = field(default=None, compare=False)

    def rows(self, index: Tensor) -> TrunkState:
        """The state of the series at ``index`` (an integer tensor), repeats allowed."""
        return replace(
            self,
            pos_mask=self._rows(self.pos_mask, index),
            statistics={name: self._rows(x, index) for name, x in self.statistics.items()},
            positions=self._rows(self.positions, index),
            score_bias=self._shared_rows(self.score_bias, index),
            previous_scores=self._rows(self.previous_scores, index),
            encoded=self._rows(self.encoded, index),
            encoded_mask=self._rows(self.encoded_mask, index),
            decoder_embedded=self._rows(self.decoder_embedded, index),
            handed_on=None,
        )

    def _rows(self, x: Tensor | None, index: Tensor) -> Tensor | None:
        if x is None:
            return None
        return x.unflatten(0, (-1, self.n_series_channels))[index].flatten(0, 1)

    def _shared_rows(self, x: Tensor | None, index: Tensor) -> Tensor | None:
        return x if x is None or len(x) == 1 else self._rows(x, index)

    def handing_on(self) -> TrunkState:
        """A state whose layers hand their attention scores on, starting from what came before."""
        before = [] if self.previous_scores is None else [self.previous_scores]
        return replace(self, handed_on=before)

    @property
    def key_mask(self) -> Tensor | None:
        """bool [row, 1, 1, key], True where a key may be attended to."""
        return None if self.pos_mask is None else self.pos_mask[:, None, None, :]


def causal_mask(n_pos: int, device: torch.device) -> Tensor:
    """bool [query, key], True where key <= query."""
    return torch.ones(n_pos, n_pos, dtype=torch.bool, device=device).tril()
