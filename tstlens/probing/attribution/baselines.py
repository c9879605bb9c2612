"""What a series is compared with: never left unsaid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tstlens.data import TimeSeriesData
from tstlens.data.validate import check_series
from tstlens.errors import ArgumentError, SeriesShapeError, SeriesValueError
from tstlens.probing.steering_inputs import series_and_mask

NAMES = ("zero", "mean", "samples")


@dataclass(frozen=True, eq=False)
class Baseline:
    """The series that attribution starts from.

    Args:
        values: [batch, channel, time], one for every series, equal to the series where it is
            padding or missing; or [sample, channel, time] for ``"samples"``.
        name: in words, with where it comes from.
        many: whether the values are a set that every series is compared with.
    """

    values: Tensor
    name: str
    many: bool = False


def make_baseline(
    baseline: str | Tensor,
    series: Tensor,
    mask: Tensor | None,
    background: Tensor | TimeSeriesData | None,
) -> Baseline:
    """The baseline that was asked for, for every series.

    Raises:
        ArgumentError: another name, or samples without a background.
        SeriesShapeError: a tensor that does not fit the series.
    """
    if isinstance(baseline, Tensor):
        return Baseline(_keeping_padding(_given(baseline, series), series, mask), "given series")
    if baseline not in NAMES:
        raise ArgumentError(
            f"expected baseline as one of {', '.join(NAMES)}, or series [channel, time] or "
            f"[batch, channel, time], got {baseline!r}"
        )
    if baseline == "zero":
        return Baseline(_keeping_padding(torch.zeros_like(series), series, mask), "zero")
    if background is None:
        if baseline == "samples":
            raise ArgumentError(
                "baseline='samples' takes every series of background= as a baseline; give it"
            )
        others, seen, whose = series, mask, "the series given"
    else:
        others, seen = series_and_mask(background)
        whose = "the background series"
        if others.shape[1:] != series.shape[1:]:
            raise SeriesShapeError(
                f"expected a background [batch, channel={series.shape[1]}, "
                f"time={series.shape[2]}], got {list(others.shape)}"
            )
        check_series(others, mask=seen, missing=True)
        others = others.to(series)
    if baseline == "samples":
        if seen is not None or mask is not None:
            raise ArgumentError(
                "baseline='samples' mixes series, so none of them may be padded; use 'mean' or a "
                "tensor"
            )
        return Baseline(others, f"each of {len(others)} background series", many=True)
    mean = _mean(others, seen)[None].expand_as(series)
    return Baseline(_keeping_padding(mean, series, mask), f"mean of {whose} ({len(others)})")


def _given(baseline: Tensor, series: Tensor) -> Tensor:
    if baseline.ndim == 2:
        baseline = baseline[None]
    fits = baseline.shape[1:] == series.shape[1:] and len(baseline) in (1, len(series))
    if not fits:
        raise SeriesShapeError(
            f"expected a baseline [channel={series.shape[1]}, time={series.shape[2]}], or one for "
            f"each of the {len(series)} series, got {list(baseline.shape)}"
        )
    check_series(baseline)
    return baseline.to(series).expand_as(series)


def _mean(series: Tensor, mask: Tensor | None) -> Tensor:
    """[channel, time] over the series that observed each sample; elsewhere the channel's mean."""
    seen = ~series.isnan() if mask is None else ~series.isnan() & mask[:, None]
    values, count = torch.where(seen, series, 0.0), seen.sum(0)
    empty = ~seen.any(2).any(0)
    if bool(empty.any()):
        raise SeriesValueError(
            f"expected an observed value in every channel to take the mean of, got none in channel "
            f"{int(empty.nonzero()[0, 0])}; give other series as background="
        )
    overall = values.sum((0, 2)) / seen.sum((0, 2))
    return torch.where(count > 0, values.sum(0) / count.clamp(min=1), overall[:, None])


def _keeping_padding(baseline: Tensor, series: Tensor, mask: Tensor | None) -> Tensor:
    """Padded and missing samples are the series' own: nothing can be attributed to them."""
    seen = ~series.isnan() if mask is None else ~series.isnan() & mask[:, None].to(series.device)
    return torch.where(seen, baseline, series)
