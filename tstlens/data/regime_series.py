"""Series of a `RegimeMachine`: a data set that knows the state behind every patch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tstlens.data.indexing import row_indices
from tstlens.data.series import TimeSeriesData
from tstlens.errors import SeriesShapeError

__all__ = ["RegimeSeries"]


@dataclass(frozen=True, eq=False, repr=False)
class RegimeSeries(TimeSeriesData):
    """Series of a `RegimeMachine`, with the state behind every patch.

    Args:
        states: ``[n, pos]`` the state that wrote each patch.
        patch_len: samples in one patch; ``time = pos * patch_len``.

    The other fields are those of `TimeSeriesData`; there are no labels and nothing is padded.
    """

    states: Tensor = None  # type: ignore[assignment]  # fields before it have defaults
    patch_len: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        shape = (len(self), self.n_time // max(self.patch_len, 1))
        if not isinstance(self.states, Tensor) or self.states.shape != shape:
            got = list(self.states.shape) if isinstance(self.states, Tensor) else self.states
            raise SeriesShapeError(f"expected states [n={shape[0]}, pos={shape[1]}], got {got}")

    @property
    def patches(self) -> Float[Tensor, "n pos patch_len"]:
        """The series cut into patches."""
        return self.series[:, 0].unflatten(1, (-1, self.patch_len))

    @property
    def next_patches(self) -> Float[Tensor, "n next patch_len"]:
        """What a forecaster at each position but the last should say: the patch after it."""
        return self.patches[:, 1:]

    @property
    def inputs(self) -> RegimeSeries:
        """All but the last patch: what a forecaster reads that is asked for `next_patches`."""
        series = self.series[..., : -self.patch_len]
        return replace(self, series=series, states=self.states[:, :-1])

    def __getitem__(self, index: Any) -> RegimeSeries:
        rows = row_indices(index, len(self)).to(self.series.device)
        return replace(self, series=self.series[rows], states=self.states[rows])

    def to(self, device: torch.device | str) -> RegimeSeries:
        """The same data on another device."""
        return replace(self, series=self.series.to(device), states=self.states.to(device))

    def __repr__(self) -> str:
        n_pos = self.states.shape[1]
        return (
            f"RegimeSeries({self.name!r}, n={len(self)}, pos={n_pos}, patch_len={self.patch_len})"
        )
