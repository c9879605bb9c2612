"""Where patches lie that end with the series, of models that put missing values before it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tstlens.errors import SeriesShapeError


class EndingPatches:
    """For configs of front ends: patches side by side, the last one ends with the series.

    The class that takes this in has ``patch_len`` and ``context_length`` (samples).
    """

    patch_len: int
    context_length: int

    def missing_before(self, n_time: int) -> int:
        """Missing values put before the series, so that it is a whole number of patches."""
        return -n_time % self.patch_len

    def n_pos(self, n_time: int) -> int:
        """Positions that a series of ``n_time`` samples becomes."""
        return (n_time + self.missing_before(n_time)) // self.patch_len

    def check(self, n_time: int) -> None:
        """Raise :class:`SeriesShapeError` unless the series fits into the context."""
        if n_time > self.context_length:
            raise SeriesShapeError(
                f"expected at most context_length={self.context_length} samples, got {n_time}; "
                f"cut the series: series[..., -{self.context_length}:] (which is what the source "
                "does without a word)"
            )

    def time_span(self, pos: int, n_time: int) -> slice:
        """Samples that position ``pos`` was embedded from."""
        start = pos * self.patch_len - self.missing_before(n_time)
        return slice(max(start, 0), start + self.patch_len)

    def time_cell(self, pos: int, n_time: int) -> slice:
        """The same as :meth:`time_span`."""
        return self.time_span(pos, n_time)

    def cut(self, x: Tensor) -> Tensor:
        """[..., time] as [..., pos, patch_len], zeros before it."""
        before = self.missing_before(x.shape[-1])
        if before:
            x = nn.functional.pad(x, (before, 0))
        return x.unflatten(-1, (-1, self.patch_len))


def root(variance: Tensor) -> Tensor:
    """The square root, with a gradient of zero (not infinity) where there is nothing to root."""
    nothing = variance <= 0
    return torch.where(nothing, 0.0, torch.where(nothing, 1.0, variance).sqrt())


def first_place(found: Tensor) -> tuple[int, ...]:
    """The index of the first True of a tensor that has one."""
    return tuple(int(i) for i in torch.nonzero(found)[0])
