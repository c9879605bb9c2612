"""Front ends over time steps: a scaled linear map per step (mvts, tsai), a strided one (tsai)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from tstlens.errors import ArgumentError
from tstlens.model.norms import watched
from tstlens.model.parts import check_padding, positive
from tstlens.model.state import TrunkState
from tstlens.shapes import Mask, Residual, Series


@dataclass(frozen=True)
class ScaledStepsConfig:
    """``factor * (x W_E + b_E)`` of all channels at every time step; every step is a position.

    Args:
        factor: what the linear map's result is multiplied by; mvts takes ``sqrt(d_model)``.
        nan_is_missing: NaN counts as zero, and a step without any observed channel is padding.
    """

    factor: float = 1.0
    nan_is_missing: bool = False
    kind: str = "scaled-steps"

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise ArgumentError(
                f"ScaledStepsConfig.factor must be a positive number, got {self.factor!r}"
            )

    @property
    def takes_missing(self) -> bool:
        """Whether NaN stands for a missing value."""
        return self.nan_is_missing

    def build(self, cfg: Any) -> nn.Module:
        """The module, with new weights."""
        return ScaledSteps(self, cfg.n_channels, cfg.d_model)

    def n_pos(self, n_time: int) -> int:
        """Positions that a series of ``n_time`` samples becomes."""
        return n_time

    def time_span(self, pos: int, n_time: int) -> slice:
        """The one sample that position ``pos`` was embedded from."""
        return slice(pos, pos + 1)

    def time_cell(self, pos: int, n_time: int) -> slice:
        """The same as :meth:`time_span`."""
        return self.time_span(pos, n_time)


class ScaledSteps(nn.Module):
    """Map all channels of every time step linearly; ``W_E`` is [channel, d_model]."""

    def __init__(self, part: ScaledStepsConfig, n_channels: int, d_model: int) -> None:
        super().__init__()
        self.cfg = part
        self.W_E = nn.Parameter(torch.zeros(n_channels, d_model))
        self.b_E = nn.Parameter(torch.zeros(d_model))

    def forward(self, series: Series, mask: Mask | None) -> tuple[Residual, TrunkState]:
        if self.cfg.nan_is_missing:
            missing = series.isnan()
            if bool(missing.any()):
                series = torch.where(missing, torch.zeros_like(series), series)
                seen = ~missing.all(1)  # [batch, time]
                mask = seen if mask is None else mask & seen
        if mask is not None:
            series = series * mask[:, None]
        embedded = (series.transpose(1, 2) @ self.W_E + self.b_E) * self.cfg.factor
        return embedded, TrunkState(pos_mask=mask)


@dataclass(frozen=True)
class ConvStepsConfig:
    """One linear map of every window of ``kernel_size`` samples, all channels together.

    A convolution over time with zeros added at both ends; every window is a position.

    Args:
        kernel_size: samples that a window takes from each channel.
        stride: samples between the starts of two windows.
        pad_start: zeros before the first sample.
        pad_end: zeros after the last sample.
        dilation: samples between two samples of one window.
        bias: whether the map has a bias.
    """

    kernel_size: int
    stride: int = 1
    pad_start: int = 0
    pad_end: int = 0
    dilation: int = 1
    bias: bool = True
    kind: str = "conv-steps"

    def __post_init__(self) -> None:
        positive(
            "ConvStepsConfig",
            kernel_size=self.kernel_size,
            stride=self.stride,
            dilation=self.dilation,
        )
        check_padding(self.pad_start)
        check_padding(self.pad_end)

    @property
    def reach(self) -> int:
        """Samples from the first to one past the last of a window."""
        return (self.kernel_size - 1) * self.dilation + 1

    def build(self, cfg: Any) -> nn.Module:
        """The module, with new weights."""
        return ConvSteps(self, cfg.n_channels, cfg.d_model)

    def n_pos(self, n_time: int) -> int:
        """Positions that a series of ``n_time`` samples becomes."""
        return (n_time + self.pad_start + self.pad_end - self.reach) // self.stride + 1

    def time_span(self, pos: int, n_time: int) -> slice:
        """Samples between the first and the last that position ``pos`` was embedded from."""
        start = pos * self.stride - self.pad_start
        stop = min(max(start + self.reach, 0), n_time)
        return slice(min(max(start, 0), stop), stop)

    def time_cell(self, pos: int, n_time: int) -> slice:
        """Samples nearest to the middle of the window; cells of all positions tile time."""
        middle = pos * self.stride - self.pad_start + self.reach // 2 - self.stride // 2
        last = pos == self.n_pos(n_time) - 1
        start = 0 if pos == 0 else min(max(middle, 0), n_time)
        return slice(start, n_time if last else min(max(middle + self.stride, start), n_time))


class ConvSteps(nn.Module):
    """Map windows linearly; ``W_E`` is [channel * kernel, d_model], channel-major."""

    def __init__(self, part: ConvStepsConfig, n_channels: int, d_model: int) -> None:
        super().__init__()
        self.cfg = part
        self.W_E = nn.Parameter(torch.zeros(n_channels * part.kernel_size, d_model))
        self.b_E = nn.Parameter(torch.zeros(d_model), requires_grad=part.bias)
        self.hook_patches = HookPoint()  # [batch, channel, pos, kernel]

    def forward(self, series: Series, mask: Mask | None) -> tuple[Residual, TrunkState]:
        if mask is not None and not bool(mask.all()):
            raise ArgumentError(
                "this model's windows span several samples and its source takes no masks; run "
                "series of one length together, without a mask"
            )
        part = self.cfg
        padded = nn.functional.pad(series, (part.pad_start, part.pad_end))
        windows: Tensor = padded.unfold(2, part.reach, part.stride)[..., :: part.dilation]
        if watched(self.hook_patches):
            windows = self.hook_patches(windows.clone())  # windows may overlap, and are views
        flat = windows.transpose(1, 2).flatten(2)  # [batch, pos, channel * kernel]
        return flat @ self.W_E + self.b_E, TrunkState()
