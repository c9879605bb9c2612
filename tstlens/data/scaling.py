"""Scaling of series, always asked for and never silent.

Per channel: one mean and one standard deviation per channel, from the training split. Per
series: each channel of each series to mean 0 and standard deviation 1. Do not scale per series
where the amplitude carries the class (JapaneseVowels does not survive it).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tstlens.arguments import check_fields, checked
from tstlens.data.validate import check_series
from tstlens.errors import ArgumentError

if TYPE_CHECKING:
    from tstlens.data.series import TimeSeriesData

__all__ = ["Scaling"]

KINDS = ("per_channel", "per_series")


@dataclass(frozen=True)
class Scaling:
    """A scaling that can be stored with a checkpoint and applied again.

    A channel that is constant is only centred. Padding is left out of the statistics and is
    zero after scaling.

    Args:
        kind: "per_channel" or "per_series".
        mean: one per channel, in the units of the series; empty for "per_series".
        std: one per channel (population standard deviation); empty for "per_series".

    Raises:
        ArgumentError: another kind, or statistics that do not belong to the kind.

    Example:
        >>> import torch
        >>> Scaling("per_channel", mean=(2.0,), std=(4.0,))(torch.full((1, 1, 3), 6.0))
        tensor([[[1., 1., 1.]]])
    """

    kind: str
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ArgumentError(f"expected scaling in {list(KINDS)} or None, got {self.kind!r}")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if isinstance(values, Tensor | np.ndarray | list):
                object.__setattr__(self, name, tuple(float(value) for value in values))
        check_fields(self)
        if self.kind == "per_series" and (self.mean or self.std):
            raise ArgumentError("per_series scaling has no mean and std of its own; leave them out")
        if self.kind == "per_channel" and (not self.mean or len(self.mean) != len(self.std)):
            raise ArgumentError(
                f"per_channel scaling needs one mean and one std per channel, got "
                f"{len(self.mean)} and {len(self.std)}; try Scaling.fit(train)"
            )
        if any(not 0 < value < float("inf") for value in self.std):
            raise ArgumentError(f"expected positive, finite std, got {list(self.std)}")

    @classmethod
    @checked
    def fit(cls, data: TimeSeriesData, kind: str = "per_channel") -> Scaling:
        """The scaling with the statistics of these data, which should be a training split.

        Args:
            data: the training data; padding is left out.
            kind: "per_channel" or "per_series" (which has nothing to fit).

        Raises:
            ArgumentError: another kind, or no series to fit on.
        """
        if kind != "per_channel":
            return cls(kind)
        if len(data) == 0:
            raise ArgumentError("per_channel scaling needs series to fit on, got 0")
        mean, std = _statistics(data.series, data.mask, dims=(0, 2))
        return cls(kind, tuple(mean.flatten().tolist()), tuple(std.flatten().tolist()))

    def __call__(self, series: Tensor, mask: Tensor | None = None) -> Tensor:
        """The scaled series, same shape and dtype.

        Args:
            series: ``[batch, channel, time]``.
            mask: ``[batch, time]`` bool, True where observed.

        Raises:
            SeriesShapeError: another channel count than the one fitted on.
            SeriesValueError: NaN, infinity or integers.
        """
        check_series(series, n_channels=len(self.mean) or None, mask=mask)
        mean, std = self._mean_and_std(series, mask)
        scaled = ((series.double() - mean) / std).to(series.dtype)
        return scaled if mask is None else scaled.masked_fill(~mask[:, None], 0.0)

    @checked
    def inverse(self, series: Tensor, mask: Tensor | None = None) -> Tensor:
        """Scaled series in their original units; "per_channel" only.

        Raises:
            ArgumentError: a per-series scaling, which forgets the scale of each series.
        """
        if self.kind == "per_series":
            raise ArgumentError("per_series scaling keeps no statistics, it cannot be inverted")
        check_series(series, n_channels=len(self.mean), mask=mask)
        mean, std = self._mean_and_std(series, mask)
        original = (series.double() * std + mean).to(series.dtype)
        return original if mask is None else original.masked_fill(~mask[:, None], 0.0)

    @checked
    def apply(self, data: TimeSeriesData) -> TimeSeriesData:
        """The data with scaled series, and this scaling written down in ``.scaling``.

        Raises:
            ArgumentError: the data are scaled already.
            SeriesShapeError: another channel count than the one fitted on.
        """
        if data.scaling is not None:
            raise ArgumentError(
                f"the data are scaled already ({data.scaling.kind}); load them with scaling=None"
            )
        return replace(data, series=self(data.series, data.mask), scaling=self)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"kind": self.kind, "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Scaling:
        """The scaling that `to_dict` wrote.

        Raises:
            ArgumentError: keys that are missing or unknown.
        """
        if not isinstance(values, Mapping) or set(values) != {"kind", "mean", "std"}:
            got = sorted(values) if isinstance(values, Mapping) else values
            raise ArgumentError(f"expected keys kind, mean and std, got {got!r:.100}")
        lists: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
        return cls(**lists)

    def _mean_and_std(self, series: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.kind == "per_series":
            return _statistics(series, mask, dims=(2,))
        stats = torch.tensor([self.mean, self.std], dtype=torch.float64, device=series.device)
        return stats[0, :, None], stats[1, :, None]


def _statistics(
    series: Tensor, mask: Tensor | None, dims: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    # Two passes in float64: a channel far from zero would lose its variance in float32.
    series = series.double()
    weight = torch.ones_like(series[:, :1]) if mask is None else mask[:, None].double()
    count = weight.sum(dims, keepdim=True)
    mean = (series * weight).sum(dims, keepdim=True) / count
    variance = ((series - mean).square() * weight).sum(dims, keepdim=True) / count
    # Rounding leaves a constant channel a variance of about (eps * mean)^2, not 0.
    constant = variance.sqrt() <= 1e-12 * mean.abs()
    return mean, torch.where(constant, torch.ones_like(variance), variance.sqrt())
