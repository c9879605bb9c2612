"""Front end and head of Chronos-2: patches with their times and masks in, quantiles of patches out.

Every channel is scaled by itself (and squashed by arcsinh), and every channel is a row of the
trunk; the channels of one series are one group, which group attention mixes at each position.
Positions are the patches of the series, a special token, and the patches of the horizon, of which
nothing but their place in time is known. Missing values (NaN, or False in the mask: both are the
same here) are zeros that the patch's mask tells apart; a patch without any observed sample is
padding to attention.

Source: Ansari et al. 2025, "Chronos-2: From univariate to universal forecasting", arXiv 2510.15821,
and the package chronos-forecasting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from tstlens.errors import ArgumentError
from tstlens.model.families.chronos_bolt import BoltPatchesConfig, location_and_scale
from tstlens.model.families.residual_mlp import ResidualMLP
from tstlens.model.families.timesfm import per_channel
from tstlens.model.norms import watched
from tstlens.model.parts import ActFn, one_of, positive
from tstlens.model.state import TrunkState
from tstlens.shapes import Mask, Output, Residual, Series


@dataclass(frozen=True)
class Chronos2PatchesConfig(BoltPatchesConfig):
    """Chronos-2's front end: what Chronos-Bolt's has, and further:

    Args:
        n_future: patches of the horizon.
        time_scale: samples that are one unit of the time that the model is told.
        arcsinh: whether scaled values are squashed.
    """

    n_future: int = 1
    time_scale: int = 1
    arcsinh: bool = False
    kind: str = "chronos-2-patches"

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("Chronos2PatchesConfig", n_future=self.n_future, time_scale=self.time_scale)
        if not self.reg_token:
            raise ArgumentError("Chronos-2 has a special token between context and horizon")

    def n_pos(self, n_time: int) -> int:
        """Positions: patches of the series, the special token, patches of the horizon."""
        return self.n_patches(n_time) + 1 + self.n_future

    def time_span(self, pos: int, n_time: int) -> slice:
        """Samples that position ``pos`` was embedded from; none for those after the series."""
        if pos >= self.n_patches(n_time):
            return slice(0, 0)
        return super().time_span(pos, n_time)

    def build(self, cfg: Any) -> nn.Module:
        """The front end, with new weights."""
        return Chronos2Patches(self, cfg.d_model)


@dataclass(frozen=True)
class Chronos2HeadConfig:
    """Chronos-2's head: from each position of the horizon to quantiles of its patch.

    Args:
        horizon: steps of the forecast, a whole number of patches.
        patch_len: steps of one patch.
        quantiles: levels in 0..1.
        d_hidden: hidden units.
        act_fn: their activation.
        arcsinh: whether scaled values were squashed.
    """

    horizon: int
    patch_len: int
    quantiles: tuple[float, ...]
    d_hidden: int
    act_fn: ActFn = "relu"
    arcsinh: bool = False
    n_classes: None = None
    pooling: str = "last"
    kind: str = "chronos-2-quantiles"

    def __post_init__(self) -> None:
        positive(
            "Chronos2HeadConfig",
            horizon=self.horizon,
            patch_len=self.patch_len,
            d_hidden=self.d_hidden,
        )
        object.__setattr__(self, "quantiles", tuple(self.quantiles))
        if not self.quantiles or not all(0 <= level <= 1 for level in self.quantiles):
            raise ArgumentError(f"quantiles must lie between 0 and 1, got {self.quantiles}")
        if self.horizon % self.patch_len:
            raise ArgumentError(
                f"horizon={self.horizon} is no whole number of patches of {self.patch_len} steps"
            )
        one_of("Chronos2HeadConfig.act_fn", self.act_fn, ("relu", "gelu", "gelu_tanh", "silu"))

    def build(self, cfg: Any) -> nn.Module:
        """The head, with new weights."""
        return Chronos2Head(self, cfg.d_model)


class Chronos2Patches(nn.Module):
    """From a series to positions, one row per channel.

    A patch goes through the block as its times, its values and its mask (``hook_times``,
    ``hook_patches``, ``hook_observed``); the patches of the horizon come after those of the series,
    with values and mask of zero. Writing both there gives the model values it may know.
    """

    def __init__(self, cfg: Chronos2PatchesConfig, d_model: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.block = ResidualMLP(3 * cfg.patch_len, cfg.d_hidden, d_model, cfg.act_fn)
        self.reg_token = nn.Parameter(torch.zeros(d_model))
        self.hook_loc = HookPoint()  # [batch, channel, 1]
        self.hook_scale = HookPoint()  # [batch, channel, 1]
        self.hook_scaled = HookPoint()  # [batch, channel, time]
        self.hook_times = HookPoint()  # [batch, channel, patch, patch_len]
        self.hook_patches = HookPoint()  # [batch, channel, patch, patch_len]
        self.hook_observed = HookPoint()  # [batch, channel, patch, patch_len]

    def forward(self, series: Series, mask: Mask | None) -> tuple[Residual, TrunkState]:
        n_channels = series.shape[1]
        observed = ~series.isnan()
        if mask is not None:
            observed = observed & mask[:, None]
        loc, scale = location_and_scale(series, observed, self.cfg.flat_scale)
        loc, scale = self.hook_loc(loc), self.hook_scale(scale)
        scaled = (torch.where(observed, series, 0.0) - loc) / scale
        scaled = scaled.arcsinh() if self.cfg.arcsinh else scaled
        scaled = self.hook_scaled(torch.where(observed, scaled, 0.0))
        patches = self.cfg.cut(scaled)
        seen = self.cfg.cut(observed.to(series.dtype))  # [batch, channel, patch, patch_len]
        n_patches = seen.shape[2]
        future = (0, 0, 0, self.cfg.n_future)
        parts = [
            self._times(n_patches, like=seen),
            nn.functional.pad(patches, future),
            nn.functional.pad(seen, future),
        ]
        points = (self.hook_times, self.hook_patches, self.hook_observed)
        if watched(*points):
            parts = [point(part.clone()) for point, part in zip(points, parts, strict=True)]
        x = self.block(torch.cat(parts, -1)).flatten(0, 1)  # [row, patch, d_model]
        token = self.reg_token.expand(len(x), 1, -1)
        x = torch.cat([x[:, :n_patches], token, x[:, n_patches:]], 1)  # [row, pos, d_model]
        pos_mask = (seen.sum(-1) > 0).flatten(0, 1)
        after = pos_mask.new_ones(len(x), 1 + self.cfg.n_future)
        state = TrunkState(
            None if bool(pos_mask.all()) else torch.cat([pos_mask, after], 1),
            n_channels,
            statistics={"loc": loc.flatten(0, 1), "scale": scale.flatten(0, 1)},
        )
        return x, state

    def _times(self, n_patches: int, like: Tensor) -> Tensor:
        """Times of all patches' samples; the first one of the horizon is 0."""
        width = self.cfg.patch_len
        ends = (-n_patches * width, self.cfg.n_future * width)
        times = torch.arange(*ends, device=like.device, dtype=torch.float32)
        times = (times / self.cfg.time_scale).to(like.dtype).unflatten(0, (-1, width))
        return times.expand(*like.shape[:2], -1, -1)


class Chronos2Head(nn.Module):
    """From the positions of the horizon to quantiles [batch, channel, horizon, quantile]."""

    def __init__(self, cfg: Chronos2HeadConfig, d_model: int) -> None:
        super().__init__()
        self.cfg = cfg
        n_out = cfg.patch_len * len(cfg.quantiles)
        self.patch_block = ResidualMLP(d_model, cfg.d_hidden, n_out, cfg.act_fn)
        self.hook_future = HookPoint()  # [row, pos, d_model]
        self.hook_quantiles = HookPoint()  # [batch, channel, horizon, quantile], scaled

    def forward(self, residual: Residual, state: TrunkState) -> Output:
        loc, scale = per_channel(state, "loc", "scale")
        n_future = self.cfg.horizon // self.cfg.patch_len
        out = self.patch_block(
            self.hook_future(residual[:, -n_future:])
        )  # [row, pos, quantile * step]
        by_level = out.unflatten(2, (len(self.cfg.quantiles), -1)).transpose(2, 3).flatten(1, 2)
        scaled = self.hook_quantiles(by_level.unflatten(0, (-1, state.n_series_channels)))
        return (scaled.sinh() if self.cfg.arcsinh else scaled) * scale + loc
