"""Missing samples, and location and scale of every channel, as Hugging Face's scalers take them."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tstlens.errors import SeriesValueError
from tstlens.shapes import Mask, Series

_PerChannel = Float[Tensor, "batch channel 1"]
_Observed = Bool[Tensor, "batch channel time"]


def fill_missing(series: Series, mask: Mask | None) -> tuple[Series, _Observed]:
    """The series with zeros where nothing was observed, and where something was.

    Args:
        series: float [batch, channel, time]; NaN is missing.
        mask: bool [batch, time], True where a sample was observed; None when all were.
    """
    observed = ~series.isnan()
    if mask is not None:
        observed = observed & mask[:, None]
    return torch.where(observed, series, torch.zeros_like(series)), observed


def mean_and_std(
    series: Series, observed: _Observed, smallest_scale: float
) -> tuple[_PerChannel, _PerChannel]:
    """Mean over the observed samples, and ``sqrt(variance + smallest_scale)``.

    Args:
        series: zeros where nothing was observed.
        observed: True where a sample counts.
        smallest_scale: added to the variance.
    """
    count = observed.sum(2, keepdim=True).clamp(min=1)
    loc = series.sum(2, keepdim=True) / count
    variance = ((series - loc) * observed).square().sum(2, keepdim=True) / count
    return loc, (variance + smallest_scale).sqrt()


def mean_size(
    series: Series, observed: _Observed, smallest_scale: float, default_scale: float | None
) -> _PerChannel:
    """The mean absolute value over the observed samples, at least ``smallest_scale``.

    Args:
        series: zeros where nothing was observed.
        observed: True where a sample counts.
        smallest_scale: the least scale.
        default_scale: of a channel without observed samples; None takes the batch's mean.
    """
    count = observed.sum(2, keepdim=True)
    total = series.abs().sum(2, keepdim=True)
    scale = total / count.clamp(min=1)
    if default_scale is None:
        default = total.sum(0, keepdim=True) / count.sum(0, keepdim=True).clamp(min=1)
    else:
        default = torch.full_like(scale, default_scale)
    return torch.where(count > 0, scale, default).clamp(min=smallest_scale)


def check_observed(observed: _Observed, where: str = "every channel") -> None:
    """Raise :class:`SeriesValueError` where a channel has no scale of its own.

    Args:
        observed: True where a sample counts.
        where: where a sample is needed, for the message.
    """
    empty = ~observed.any(-1)
    if bool(empty.any()):
        row, channel = (int(i) for i in empty.nonzero()[0])
        raise SeriesValueError(
            f"expected an observed sample in {where}, got none in channel {channel} of "
            f"series {row}; the source would take its scale from whatever series run beside "
            "it, so fill that channel, or leave the series out"
        )
