"""Checks that every analysis of pairs makes first."""

from __future__ import annotations

from torch import Tensor

from tstlens.errors import SeriesShapeError
from tstlens.model import HookedTST


def check_pairs(
    model: HookedTST,
    clean: Tensor,
    corrupted: Tensor,
    clean_mask: Tensor | None = None,
    corrupted_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Clean and corrupted series as [pair, channel, time], checked against each other and model.

    Raises:
        SeriesShapeError: they differ in shape, or do not fit the model.
        SeriesValueError: NaN, infinity or integers.
    """
    if clean.shape != corrupted.shape:
        raise SeriesShapeError(
            "clean and corrupted must have the same shape, got "
            f"{list(clean.shape)} and {list(corrupted.shape)}; a pair is one series of each"
        )
    if clean.ndim == 2:
        clean, corrupted = clean[None], corrupted[None]
    model.check_series(clean, clean_mask)
    model.check_series(corrupted, corrupted_mask)
    return clean, corrupted
