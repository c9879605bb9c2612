"""Corruptions of a series that leave the rest of it alone, each giving clean/corrupted pairs.

The clean series is the one that is passed, the corrupted one is a copy in which a channel, a
stretch of time, or both are replaced. A mean removes the shape and keeps the level; another
sample keeps everything typical of the data but the class; noise removes the shape and keeps
level and spread; a shift keeps the shape and moves it. All but another sample take the series
off the data: a large effect may only say that the model has never seen such input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tstlens.arguments import checked
from tstlens.data.indexing import row_indices
from tstlens.data.pairs import Pairs
from tstlens.data.series import TimeSeriesData
from tstlens.data.validate import blanked, check_series
from tstlens.errors import ArgumentError, LabelError, SeriesShapeError

__all__ = ["corrupt_with_mean", "corrupt_with_noise", "corrupt_with_sample", "corrupt_with_shift"]

Where = int | slice | Sequence[int] | None


@checked
def corrupt_with_mean(
    series: Tensor | TimeSeriesData,
    target: int | Tensor | None = None,
    channel: Where = None,
    time: Where = None,
    mask: Tensor | None = None,
) -> Pairs:
    """Pairs whose corrupted series have the chosen samples replaced by their own mean.

    The mean is taken per series and channel over the samples that are replaced, padding left out.

    Args:
        series: one ``[channel, time]``, a batch ``[batch, channel, time]``, or a data set.
        target: true class, one for all or ``[batch]``; a data set brings its labels.
        channel: index, slice or indices; None for all.
        time: sample, slice or samples; None for all.
        mask: ``[batch, time]`` bool, True where observed; a data set brings its own.

    Raises:
        ArgumentError: fewer than two observed samples to average over, or an index outside.
        LabelError: no target.
        SeriesShapeError, SeriesValueError: series that do not pass `check_series`.

    Example:
        >>> pairs = corrupt_with_mean(torch.tensor([[1.0, 3.0, 8.0]]), target=0, time=slice(0, 2))
        >>> pairs.corrupted
        tensor([[[2., 2., 8.]]])
    """
    batch = _Batch(series, target, channel, time, mask, "corrupt_with_mean")
    mean, _ = batch.mean_and_std()
    return batch.pairs(mean.expand_as(batch.series), {})


@checked
def corrupt_with_noise(
    series: Tensor | TimeSeriesData,
    target: int | Tensor | None = None,
    channel: Where = None,
    time: Where = None,
    mask: Tensor | None = None,
    seed: int = 0,
) -> Pairs:
    """Pairs whose corrupted series have the chosen samples replaced by white Gaussian noise.

    The noise has exactly the mean and the standard deviation of what it replaces, per series
    and channel.

    Args:
        series: as for `corrupt_with_mean`.
        target: as for `corrupt_with_mean`.
        channel: as for `corrupt_with_mean`.
        time: as for `corrupt_with_mean`.
        mask: as for `corrupt_with_mean`.
        seed: of the noise.

    Raises:
        ArgumentError, LabelError, SeriesShapeError, SeriesValueError: as for `corrupt_with_mean`.

    Example:
        >>> corrupt_with_noise(torch.randn(3, 2, 50), target=0, channel=1)
        Pairs(n=3, channel=2, time=50, corrupt_with_noise)
    """
    batch = _Batch(series, target, channel, time, mask, "corrupt_with_noise")
    mean, std = batch.mean_and_std()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch.series.shape, generator=generator, dtype=torch.float64)
    noise = noise.to(batch.series.device)
    noise_mean, noise_std = batch.mean_and_std(noise)
    matched = (noise - noise_mean) / noise_std * std + mean
    return batch.pairs(matched, {"seed": seed})


@checked
def corrupt_with_sample(
    series: Tensor | TimeSeriesData,
    donor: Tensor | TimeSeriesData,
    target: int | Tensor | None = None,
    channel: Where = None,
    time: Where = None,
    mask: Tensor | None = None,
) -> Pairs:
    """Pairs whose corrupted series have the chosen samples replaced by those of another series.

    Args:
        series: as for `corrupt_with_mean`.
        donor: the other series: one ``[channel, time]`` for all, or one per series. A data set
            with padding must cover what it replaces.
        target: as for `corrupt_with_mean`.
        channel: as for `corrupt_with_mean`.
        time: as for `corrupt_with_mean`.
        mask: as for `corrupt_with_mean`.

    Raises:
        ArgumentError, LabelError, SeriesValueError: as for `corrupt_with_mean`; also a donor whose
            padding would be copied in.
        SeriesShapeError: a donor of another shape.

    Example:
        >>> corrupt_with_sample(torch.zeros(1, 3), torch.ones(1, 3), target=0, time=1).corrupted
        tensor([[[0., 1., 0.]]])
    """
    batch = _Batch(series, target, channel, time, mask, "corrupt_with_sample")
    other = donor.series if isinstance(donor, TimeSeriesData) else donor
    other = other[None] if isinstance(other, Tensor) and other.ndim == 2 else other
    check_series(other)
    if other.shape[1:] != batch.series.shape[1:] or other.shape[0] not in (1, len(batch.series)):
        raise SeriesShapeError(
            f"expected a donor {list(batch.series.shape[1:])} or {list(batch.series.shape)}, "
            f"got {list(other.shape)}"
        )
    if isinstance(donor, TimeSeriesData) and donor.mask is not None:
        uncovered = batch.chosen.any(dim=1) & ~donor.mask.to(batch.series.device)
        if bool(uncovered.any()):
            row, sample = uncovered.nonzero()[0].tolist()
            raise ArgumentError(
                f"expected donors that cover what they replace, got padding at sample {sample} for "
                f"series {row}; choose a longer donor or an earlier stretch"
            )
    return batch.pairs(other.to(batch.series.device).expand_as(batch.series), {})


@checked
def corrupt_with_shift(
    series: Tensor | TimeSeriesData,
    samples: int,
    target: int | Tensor | None = None,
    channel: Where = None,
    mask: Tensor | None = None,
) -> Pairs:
    """Pairs whose corrupted series are shifted in time, what leaves one end entering at the other.

    The shift is circular within the observed samples of each series, so padding stays at the end.

    Args:
        series: as for `corrupt_with_mean`.
        samples: how far; positive is later, negative earlier.
        target: as for `corrupt_with_mean`.
        channel: as for `corrupt_with_mean`.
        mask: as for `corrupt_with_mean`.

    Raises:
        ArgumentError, LabelError, SeriesShapeError, SeriesValueError: as for `corrupt_with_mean`.

    Example:
        >>> corrupt_with_shift(torch.tensor([[1.0, 2.0, 3.0]]), samples=1, target=0).corrupted
        tensor([[[3., 1., 2.]]])
    """
    batch = _Batch(series, target, channel, None, mask, "corrupt_with_shift")
    if batch.mask is None:
        shifted = batch.series.roll(samples, dims=2)
    else:
        shifted = batch.series.clone()
        for row, seen in enumerate(batch.mask):
            shifted[row, :, seen] = batch.series[row][:, seen].roll(samples, dims=1)
    return batch.pairs(shifted, {"samples": samples})


class _Batch:
    """The series, targets and chosen samples that every corruption starts from."""

    def __init__(
        self,
        series: Tensor | TimeSeriesData,
        target: int | Tensor | None,
        channel: Where,
        time: Where,
        mask: Tensor | None,
        how: str,
    ) -> None:
        self.index = None
        self.made: dict[str, Any] = {"how": how}
        if isinstance(series, TimeSeriesData):
            self.index = torch.arange(len(series), device=series.series.device)
            self.made |= {"data": series.name, "split": series.split}
            target = series.labels if target is None else target
            mask = series.mask if mask is None else mask
            series = series.series
        elif isinstance(series, Tensor) and series.ndim == 2:
            series = series[None]
            mask = mask[None] if mask is not None and mask.ndim == 1 else mask
        check_series(series, mask=mask)
        self.series, self.mask = blanked(series, mask), mask
        self.target = _targets(target, series)
        channels = _positions(channel, series.shape[1], "channel")
        times = _positions(time, series.shape[2], "time")
        self.made["channel"] = None if channel is None else channels
        self.made["time"] = None if time is None else times
        chosen = torch.zeros(series.shape, dtype=torch.bool)
        chosen[:, torch.tensor(channels)[:, None], torch.tensor(times)] = True
        self.chosen = chosen.to(series.device)
        if mask is not None:
            self.chosen &= mask[:, None]
        nothing = ~self.chosen.flatten(1).any(dim=1)
        if bool(nothing.any()):
            raise ArgumentError(
                "expected a stretch with observed samples, got only padding in series "
                f"{int(nothing.nonzero()[0, 0])}; choose an earlier stretch"
            )

    def mean_and_std(self, values: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation ``[batch, channel, 1]`` of the chosen samples, float64."""
        count = self.chosen.sum(dim=2, keepdim=True)
        short = (count == 1).any(dim=1)[:, 0]
        if bool(short.any()):
            raise ArgumentError(
                "expected a stretch of at least 2 observed samples, got 1 in series "
                f"{int(short.nonzero()[0, 0])}; widen time=, or use corrupt_with_sample"
            )
        values = (self.series if values is None else values).double()
        count = count.clamp(min=1)
        mean = (values * self.chosen).sum(dim=2, keepdim=True) / count
        centred = (values - mean) * self.chosen
        return mean, (centred.square().sum(dim=2, keepdim=True) / count).sqrt()

    def pairs(self, replacement: Tensor, made: dict[str, Any]) -> Pairs:
        """The pairs with the chosen samples replaced."""
        replacement = replacement.to(self.series.dtype)
        return Pairs(
            clean=self.series,
            corrupted=torch.where(self.chosen, replacement, self.series),
            target=self.target,
            clean_mask=self.mask,
            corrupted_mask=self.mask,
            clean_index=self.index,
            corrupted_index=self.index,
            made={**self.made, **made},
        )


def _targets(target: int | Tensor | None, series: Tensor) -> Tensor:
    if target is None:
        raise LabelError("expected target, the true class of the series, got none")
    targets = torch.as_tensor(target, device=series.device)
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise LabelError(f"expected target as class index, got {targets.dtype}")
    if targets.ndim == 0:
        targets = targets.expand(len(series))
    return targets.to(torch.int64)


def _positions(where: Where, size: int, axis: str) -> list[int]:
    if where is None:
        return list(range(size))
    try:
        positions = row_indices(where, size).tolist()
    except IndexError:
        positions = []
    if not positions:
        raise ArgumentError(f"expected {axis} within 0..{size - 1} and not empty, got {where!r}")
    return sorted(set(positions))
