"""Front end and head of Chronos-Bolt: scaled patches with their masks in, quantiles out.

Every channel is scaled by its own mean and standard deviation and goes through the trunk by itself.
Missing values (NaN, or False in the mask: both are the same here) are zeros that the patch's mask
tells apart; a patch without any observed sample is padding to attention. A series that is no whole
number of patches begins with missing values. A special token may stand after the last patch
(``use_reg_token``); the decoder starts from one token, the same for all series.

Source: Ansari et al. 2024, "Chronos: Learning the language of time series", arXiv 2403.07815, and
the package chronos-forecasting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from tstlens.errors import ArgumentError, SeriesShapeError
from tstlens.model.families.observed import mean_and_std
from tstlens.model.families.residual_mlp import ResidualMLP
from tstlens.model.norms import watched
from tstlens.model.parts import ActFn, one_of, positive
from tstlens.model.state import TrunkState
from tstlens.shapes import Mask, Output, Residual, Series


@dataclass(frozen=True)
class BoltPatchesConfig:
    """Chronos-Bolt's front end.

    Args:
        patch_len: samples in one patch.
        stride: samples between the starts of two patches.
        context_length: most samples of a series.
        d_hidden: hidden units of the patch embedding.
        act_fn: its activation.
        reg_token: whether a special token stands after the last patch.
        flat_scale: the scale of a series that does not vary.
    """

    patch_len: int
    stride: int
    context_length: int
    d_hidden: int
    act_fn: ActFn = "relu"
    reg_token: bool = True
    flat_scale: float = 1e-5
    kind: str = "chronos-bolt-patches"
    channel_independent: bool = True
    takes_missing: bool = True

    def __post_init__(self) -> None:
        positive(
            "BoltPatchesConfig",
            patch_len=self.patch_len,
            stride=self.stride,
            context_length=self.context_length,
            d_hidden=self.d_hidden,
        )
        one_of("BoltPatchesConfig.act_fn", self.act_fn, ("relu", "gelu", "gelu_tanh", "silu"))

    def missing_before(self, n_time: int) -> int:
        """Missing values put before the series, so that it is a whole number of patches."""
        return -n_time % self.patch_len

    def n_patches(self, n_time: int) -> int:
        """Patches of a series of ``n_time`` samples."""
        return (n_time + self.missing_before(n_time) - self.patch_len) // self.stride + 1

    def n_pos(self, n_time: int) -> int:
        """Positions: patches, and the special token where there is one."""
        return self.n_patches(n_time) + self.reg_token

    def cut(self, x: Tensor) -> Tensor:
        """[batch, channel, time] as [batch, channel, patch, patch_len], zeros before it."""
        before = self.missing_before(x.shape[2])
        if before:
            x = nn.functional.pad(x, (before, 0))
        return x.unfold(2, self.patch_len, self.stride)

    def check(self, n_time: int) -> None:
        """Raise :class:`SeriesShapeError` unless the series fits into the context."""
        if n_time > self.context_length:
            raise SeriesShapeError(
                f"expected at most context_length={self.context_length} samples, got {n_time}; "
                f"cut the series: series[..., -{self.context_length}:] (which is what the source "
                "does without a word)"
            )

    def time_span(self, pos: int, n_time: int) -> slice:
        """Samples that position ``pos`` was embedded from; none for the special token."""
        if pos == self.n_patches(n_time):
            return slice(0, 0)
        start = pos * self.stride - self.missing_before(n_time)
        return slice(max(start, 0), max(start + self.patch_len, 0))

    def time_cell(self, pos: int, n_time: int) -> slice:
        """The same as :meth:`time_span`."""
        return self.time_span(pos, n_time)

    def build(self, cfg: Any) -> nn.Module:
        """The front end, with new weights."""
        return BoltPatches(self, cfg.d_model)


@dataclass(frozen=True)
class BoltHeadConfig:
    """Chronos-Bolt's head: from the decoder's one position to quantiles of every step.

    Args:
        horizon: steps of the forecast.
        quantiles: levels in 0..1.
        d_hidden: hidden units.
        act_fn: their activation.
    """

    horizon: int
    quantiles: tuple[float, ...]
    d_hidden: int
    act_fn: ActFn = "relu"
    n_classes: None = None
    pooling: str = "first"
    kind: str = "chronos-bolt-quantiles"

    def __post_init__(self) -> None:
        positive("BoltHeadConfig", horizon=self.horizon, d_hidden=self.d_hidden)
        object.__setattr__(self, "quantiles", tuple(self.quantiles))
        if not self.quantiles or not all(0 < level < 1 for level in self.quantiles):
            raise ArgumentError(f"quantiles must lie between 0 and 1, got {self.quantiles}")
        one_of("BoltHeadConfig.act_fn", self.act_fn, ("relu", "gelu", "gelu_tanh", "silu"))

    def build(self, cfg: Any) -> nn.Module:
        """The head, with new weights."""
        return BoltHead(self, cfg.d_model)


class BoltPatches(nn.Module):
    """From a series to positions, one row per channel, and the decoder's first position.

    A patch goes through the block as its values followed by its mask (``hook_patches`` and
    ``hook_observed``).
    """

    def __init__(self, cfg: BoltPatchesConfig, d_model: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.block = ResidualMLP(2 * cfg.patch_len, cfg.d_hidden, d_model, cfg.act_fn)
        if cfg.reg_token:
            self.reg_token = nn.Parameter(torch.zeros(d_model))
        self.start_token = nn.Parameter(torch.zeros(d_model))
        self.hook_loc = HookPoint()  # [batch, channel, 1]
        self.hook_scale = HookPoint()  # [batch, channel, 1]
        self.hook_scaled = HookPoint()  # [batch, channel, time]
        self.hook_patches = HookPoint()  # [batch, channel, pos, patch_len]
        self.hook_observed = HookPoint()  # [batch, channel, pos, patch_len]

    def forward(self, series: Series, mask: Mask | None) -> tuple[Residual, TrunkState]:
        n_rows, n_channels = len(series) * series.shape[1], series.shape[1]
        observed = ~series.isnan()
        if mask is not None:
            observed = observed & mask[:, None]
        loc, scale = location_and_scale(series, observed, self.cfg.flat_scale)
        loc, scale = self.hook_loc(loc), self.hook_scale(scale)
        scaled = (torch.where(observed, series, 0.0) - loc) / scale
        scaled = self.hook_scaled(torch.where(observed, scaled, 0.0))
        patches = self.cfg.cut(scaled)
        seen = self.cfg.cut(observed.to(series.dtype))  # [batch, channel, pos, patch_len]
        pos_mask = (seen.sum(-1) > 0).flatten(0, 1)  # [row, pos]
        if watched(self.hook_patches, self.hook_observed):
            patches = self.hook_patches(patches.clone())  # patches may overlap, and are views
            seen = self.hook_observed(seen.clone())
        x = self.block(torch.cat([patches, seen], -1)).flatten(0, 1)  # [row, pos, d_model]
        if self.cfg.reg_token:
            x = torch.cat([x, self.reg_token.expand(n_rows, 1, -1)], 1)
            pos_mask = torch.cat([pos_mask, pos_mask.new_ones(n_rows, 1)], 1)
        state = TrunkState(
            None if bool(pos_mask.all()) else pos_mask,
            n_channels,
            statistics={"loc": loc.flatten(0, 1), "scale": scale.flatten(0, 1)},
            decoder_embedded=self.start_token.expand(n_rows, 1, -1),
        )
        return x, state


def location_and_scale(
    series: Tensor, observed: Tensor, flat_scale: float
) -> tuple[Tensor, Tensor]:
    """Location and scale [batch, channel, 1] as Chronos takes them; 0 and 1 of nothing observed.

    Args:
        series: [batch, channel, time].
        observed: where a sample counts.
        flat_scale: the scale of a channel that does not vary.
    """
    loc, scale = mean_and_std(series, observed)
    empty = loc.isnan()
    loc, scale = torch.where(empty, 0.0, loc), torch.where(empty, 1.0, scale)
    return loc, torch.where(scale == 0, flat_scale, scale)


class BoltHead(nn.Module):
    """From the decoder's position to quantiles [batch, channel, horizon, quantile]."""

    def __init__(self, cfg: BoltHeadConfig, d_model: int) -> None:
        super().__init__()
        self.cfg = cfg
        n_out = cfg.horizon * len(cfg.quantiles)
        self.block = ResidualMLP(d_model, cfg.d_hidden, n_out, cfg.act_fn)
        self.hook_pooled = HookPoint()  # [row, d_model]
        self.hook_quantiles = HookPoint()  # [batch, channel, horizon, quantile], scaled

    def forward(self, residual: Residual, state: TrunkState) -> Output:
        if "scale" not in state.statistics:
            raise ArgumentError(
                "this head puts back what the front end took out of each channel; pass the state "
                "that embed_series returned as state="
            )
        out = self.block(self.hook_pooled(residual[:, 0]))
        by_series = (-1, state.n_series_channels)
        by_level = out.unflatten(1, (len(self.cfg.quantiles), self.cfg.horizon)).transpose(1, 2)
        scaled = self.hook_quantiles(by_level.unflatten(0, by_series))
        loc, scale = (
            state.statistics[name].unflatten(0, by_series)[..., None] for name in ("loc", "scale")
        )
        return scaled * scale + loc
