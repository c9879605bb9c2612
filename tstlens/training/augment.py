"""Seeded augmentations for data sets of a few dozen series.

Each draw is made afresh for every series of every batch. All are off by default: whether one
leaves the class alone depends on the data (in JapaneseVowels amplitude carries the class, so
``scale`` would hurt), which is for a person to judge or a validation split to measure.
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from tstlens.arguments import check_fields
from tstlens.errors import ArgumentError
from tstlens.shapes import Series


@dataclasses.dataclass(frozen=True)
class Augment:
    """How a training batch is varied; everything off by default.

    Args:
        jitter: standard deviation of added white noise, in units of the channel's standard
            deviation over the training split.
        scale: standard deviation of the logarithm of a factor on the whole series, one draw
            per series and channel.
        window: largest fraction of a series cut away at its ends; what is left is stretched to
            the full length by linear interpolation (window slicing).
        shift: largest shift along time, as a fraction of the series' length, either way.
        wrap: a shifted series enters again at the other end (for outlines, which are closed
            curves); otherwise its first or last sample is repeated.
        mixup: alpha of the Beta distribution from which a series is mixed with another of its
            batch, targets alike; at most 1 (uniform), 0.2 to 0.4 is usual.

    Raises:
        ArgumentError: a strength that is not possible.

    Source: Le Guennec et al. 2016 (window slicing); arXiv 1710.09412 (mixup).

    Example:
        >>> augment = Augment(jitter=0.1, shift=0.05)
        >>> targets = torch.eye(2)[[0, 1, 1, 0]]
        >>> generator = torch.Generator().manual_seed(0)
        >>> series, targets = augment(torch.randn(4, 1, 30), targets, generator=generator)
        >>> series.shape
        torch.Size([4, 1, 30])
    """

    jitter: float = 0.0
    scale: float = 0.0
    window: float = 0.0
    shift: float = 0.0
    wrap: bool = False
    mixup: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        limits = {"jitter": None, "scale": None, "window": 0.99, "shift": 0.99, "mixup": 1.0}
        for name, limit in limits.items():
            strength = getattr(self, name)
            if strength < 0 or (limit is not None and strength > limit):
                possible = "0 or more" if limit is None else f"0 to {limit:g}"
                raise ArgumentError(f"{name}: expected {possible}, got {strength}")

    @property
    def moves_time(self) -> bool:
        """Whether samples change place or series, which a padding mask would not follow."""
        return bool(self.window or self.shift or self.mixup)

    def __call__(
        self,
        series: Series,
        targets: Float[Tensor, "batch class"],
        spread: Float[Tensor, " channel"] | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Series, Float[Tensor, "batch class"]]:
        """Vary one batch.

        Args:
            series: [batch, channel, time].
            targets: [batch, class], probabilities.
            spread: [channel], the channels' standard deviations; 1 if left out.
            generator: a generator on the CPU, the source of every draw.

        Returns:
            The varied series and their targets.
        """
        n, n_channels, n_time = series.shape
        if self.window or self.shift:
            series = self._resample(series, generator)
        if self.scale:
            draws = torch.randn(n, n_channels, 1, generator=generator)
            series = series * (self.scale * draws).exp().to(series)
        if self.jitter:
            noise = torch.randn(n, n_channels, n_time, generator=generator).to(series)
            unit = torch.ones_like(series[0, :, :1]) if spread is None else spread[:, None]
            series = series + self.jitter * unit.to(series) * noise
        if self.mixup:
            partner = torch.randperm(n, generator=generator).to(series.device)
            kept = _beta(self.mixup, n, generator).to(series)
            series = torch.lerp(series[partner], series, kept[:, None, None])
            targets = torch.lerp(targets[partner], targets, kept[:, None])
        return series, targets

    def _resample(self, series: Tensor, generator: torch.Generator | None) -> Tensor:
        n, n_channels, n_time = series.shape
        draws = torch.rand(3, n, 1, generator=generator).to(series)
        kept = 1 - self.window * draws[0]  # fraction of the series that stays
        start = (1 - kept) * draws[1] * (n_time - 1)
        offset = self.shift * n_time * (2 * draws[2] - 1)
        steps = torch.arange(n_time, device=series.device, dtype=series.dtype)
        place = start + kept * steps + offset
        place = place % n_time if self.wrap else place.clamp(0, n_time - 1)
        left = place.floor().long().clamp(max=n_time - 1)
        right = (left + 1) % n_time if self.wrap else (left + 1).clamp(max=n_time - 1)
        weight = (place - left)[:, None]

        def at(index: Tensor) -> Tensor:
            return series.gather(2, index[:, None].expand(n, n_channels, n_time))

        return torch.lerp(at(left), at(right), weight)


def _beta(alpha: float, n: int, generator: torch.Generator | None) -> Tensor:
    """Draws of Beta(alpha, alpha), by Jöhnk's method (torch's own takes no generator)."""
    drawn = torch.empty(0)
    while len(drawn) < n:
        logs = torch.rand(2, 4 * n, generator=generator).clamp_min(1e-30).log() / alpha
        top = logs.amax(dim=0)
        log_sum = top + (logs - top).exp().sum(dim=0).log()
        drawn = torch.cat([drawn, (logs[0] - log_sum).exp()[log_sum <= 0]])
    return drawn[:n]
