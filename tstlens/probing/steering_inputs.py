"""What users pass as series: a tensor with its mask, or data that bring their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from tstlens.data import TimeSeriesData
from tstlens.data.validate import blanked, check_series
from tstlens.errors import ArgumentError, SeriesShapeError
from tstlens.model import HookedTST


def series_and_mask(
    given: Tensor | TimeSeriesData, mask: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Series [batch, channel, time] and mask [batch, time] of what the user passed.

    Padding comes back as zeros.

    Raises:
        ArgumentError: data and a mask beside them, or no series at all.
        SeriesShapeError: something else.
    """
    if isinstance(given, TimeSeriesData):
        if mask is not None:
            raise ArgumentError("data bring their own mask; leave out mask=")
        given, mask = given.series, given.mask
    if not isinstance(given, Tensor):
        raise SeriesShapeError(
            "expected series [batch, channel, time] or a TimeSeriesData, got "
            f"{type(given).__name__}"
        )
    if not len(given):
        raise ArgumentError("expected at least one series, got none")
    check_series(given, mask=mask, missing=True)
    return blanked(given, mask), mask


def as_data(given: Tensor | TimeSeriesData, mask: Tensor | None = None) -> TimeSeriesData:
    """The same as a :class:`TimeSeriesData`."""
    series, mask = series_and_mask(given, mask)
    return TimeSeriesData(series, mask=mask)


@contextmanager
def evaluating(model: HookedTST) -> Iterator[None]:
    """Eval mode for a while."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
