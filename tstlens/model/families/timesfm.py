"""Front end and head of TimesFM 2.0: scaled patches with their masks in, mean and quantiles out.

Every channel goes through the trunk by itself, scaled by the mean and standard deviation of its
first patch with at least three observed samples. Missing values (NaN, or False in the mask: both
are the same here) are zeros that the patch's mask tells apart; a patch without any observed sample
is padding to attention. A series that is no whole number of patches begins with missing values.

Source: Das et al. 2024, "A decoder-only foundation model for time-series forecasting", arXiv
2310.10688, as transformers ports it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from tstlens.errors import ArgumentError, SeriesValueError
from tstlens.model.families.context import EndingPatches, first_place, root
from tstlens.model.families.residual_mlp import ResidualMLP
from tstlens.model.norms import watched
from tstlens.model.parts import ActFn, one_of, positive
from tstlens.model.state import TrunkState
from tstlens.shapes import Mask, Output, Residual, Series

OUTPUTS = ("quantiles", "point", "both")
ENOUGH = 3  # observed samples of the patch that location and scale are taken from


@dataclass(frozen=True)
class TimesFMPatchesConfig(EndingPatches):
    """TimesFM 2.0's front end.

    Args:
        patch_len: samples in one patch; patches do not overlap.
        context_length: most samples of a series.
        d_hidden: hidden units of the patch embedding.
        n_freq: kinds of sampling frequency that have an embedding.
        freq: the kind of all series: 0 for high frequencies (up to daily), 1 for weekly and
            monthly, 2 for quarterly and yearly.
        sinusoids: whether positions are added, counted from the first observed patch.
        timescales: shortest and longest wavelength of them, in parts of 2 pi.
        tolerance: the least scale.
        pad_value: a sample of this value is missing too, as in the source.
    """

    patch_len: int
    context_length: int
    d_hidden: int
    n_freq: int = 3
    freq: int = 0
    sinusoids: bool = False
    timescales: tuple[float, float] = (1.0, 10_000.0)
    tolerance: float = 1e-6
    pad_value: float = 1123581321.0
    kind: str = "timesfm-patches"
    channel_independent: bool = True
    takes_missing: bool = True

    def __post_init__(self) -> None:
        positive(
            "TimesFMPatchesConfig",
            patch_len=self.patch_len,
            context_length=self.context_length,
            d_hidden=self.d_hidden,
            n_freq=self.n_freq,
        )
        object.__setattr__(self, "timescales", tuple(self.timescales))
        if self.freq not in range(self.n_freq):
            raise ArgumentError(f"freq must be one of 0..{self.n_freq - 1}, got {self.freq!r}")

    def build(self, cfg: Any) -> nn.Module:
        """The front end, with new weights."""
        return TimesFMPatches(self, cfg.d_model)


@dataclass(frozen=True)
class TimesFMHeadConfig:
    """TimesFM 2.0's head: from the last position to the mean and quantiles of every step.

    Args:
        horizon: steps of the forecast.
        quantiles: levels in 0..1.
        d_hidden: hidden units.
        output: ``"quantiles"`` gives [batch, channel, horizon, quantile], ``"point"`` the mean
            [batch, channel, horizon], ``"both"`` the mean and then the quantiles on one axis.
        act_fn: the hidden units' activation.
    """

    horizon: int
    quantiles: tuple[float, ...]
    d_hidden: int
    output: str = "quantiles"
    act_fn: ActFn = "silu"
    n_classes: None = None
    pooling: str = "last"
    kind: str = "timesfm-quantiles"

    def __post_init__(self) -> None:
        positive("TimesFMHeadConfig", horizon=self.horizon, d_hidden=self.d_hidden)
        object.__setattr__(self, "quantiles", tuple(self.quantiles))
        check_levels(self.quantiles, self.output)

    def build(self, cfg: Any) -> nn.Module:
        """The head, with new weights."""
        return TimesFMHead(self, cfg.d_model)


def check_levels(quantiles: tuple[float, ...], output: str) -> None:
    """Raise :class:`ArgumentError` unless levels and kind of output are possible."""
    one_of("output", output, OUTPUTS)
    if not all(0 < level < 1 for level in quantiles):
        raise ArgumentError(f"quantiles must lie between 0 and 1, got {quantiles}")
    if not quantiles and output == "quantiles":
        raise ArgumentError("this model has no quantiles; take output='point'")


class TimesFMPatches(nn.Module):
    """From a series to positions, one row per channel.

    A patch goes through the block as its values followed by 1 where a sample is missing
    (``hook_patches``, and 1 - ``hook_observed``). ``W_freq`` is [freq, d_model].
    """

    rates: Tensor

    def __init__(self, cfg: TimesFMPatchesConfig, d_model: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.block = ResidualMLP(2 * cfg.patch_len, cfg.d_hidden, d_model, "silu")
        self.W_freq = nn.Parameter(torch.zeros(cfg.n_freq, d_model))
        self.hook_loc = HookPoint()  # [batch, channel, 1]
        self.hook_scale = HookPoint()  # [batch, channel, 1]
        self.hook_scaled = HookPoint()  # [batch, channel, time]
        self.hook_patches = HookPoint()  # [batch, channel, pos, patch_len]
        self.hook_observed = HookPoint()  # [batch, channel, pos, patch_len]
        self.hook_freq = HookPoint()  # [batch, channel, d_model]
        if cfg.sinusoids:
            shortest, longest = cfg.timescales
            power = torch.arange(d_model // 2) / max(d_model // 2 - 1, 1)
            self.register_buffer("rates", shortest * (longest / shortest) ** -power)
            self.hook_pos_embed = HookPoint()  # [batch, channel, pos, d_model]

    def forward(self, series: Series, mask: Mask | None) -> tuple[Residual, TrunkState]:
        n_channels = series.shape[1]
        observed = ~series.isnan() & ((series - self.cfg.pad_value).abs() >= self.cfg.tolerance)
        if mask is not None:
            observed = observed & mask[:, None]
        values = torch.where(observed, series, 0.0)
        seen = self.cfg.cut(observed.to(series.dtype))  # [batch, channel, pos, patch_len]
        pos_mask = seen.any(-1)  # [batch, channel, pos]
        _check_end(pos_mask)
        loc, scale = self._statistics(self.cfg.cut(values), seen)
        scaled = self.hook_scaled(torch.where(observed, (values - loc) / scale, 0.0))
        patches = self.cfg.cut(scaled)
        if watched(self.hook_patches, self.hook_observed):
            patches = self.hook_patches(patches.clone())  # a view of what hook_scaled gave
            seen = self.hook_observed(seen)
        x = self.block(torch.cat([patches, 1 - seen], -1))  # [batch, channel, pos, d_model]
        if self.cfg.sinusoids:
            x = x + self.hook_pos_embed(self._positions(pos_mask))
        freq = self.W_freq[self.cfg.freq]
        if watched(self.hook_freq):
            freq = self.hook_freq(freq.expand(*x.shape[:2], -1).clone())[:, :, None]
        state = TrunkState(
            None if bool(pos_mask.all()) else pos_mask.flatten(0, 1),
            n_channels,
            statistics={"loc": loc.flatten(0, 1), "scale": scale.flatten(0, 1)},
        )
        return (x + freq).flatten(0, 1), state

    def _statistics(self, patches: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Location and scale [batch, channel, 1] of the first patch that holds enough samples."""
        enough = seen.sum(-1) >= ENOUGH  # [batch, channel, pos]
        last = torch.full_like(enough[..., 0], enough.shape[2] - 1, dtype=torch.long)
        index = torch.where(enough.any(-1), enough.int().argmax(-1), last)[..., None, None]
        index = index.expand(-1, -1, 1, self.cfg.patch_len)
        # Summed as the source sums: where a patch is constant, what is left of rounding is divided
        # by the tolerance, and any other order would show.
        patch, seen = patches.gather(2, index)[:, :, 0], seen.gather(2, index)[:, :, 0]
        count = seen.sum(-1, keepdim=True)
        loc = (patch * seen).sum(-1, keepdim=True) / count
        variance = ((patch - loc) * seen).square().sum(-1, keepdim=True) / count
        return self.hook_loc(loc), self.hook_scale(root(variance).clamp(min=self.cfg.tolerance))

    def _positions(self, pos_mask: Tensor) -> Tensor:
        """Sines and cosines [batch, channel, pos, d_model] of places after the first observed."""
        n_pos = pos_mask.shape[2]
        place = torch.arange(n_pos, device=pos_mask.device) - pos_mask.int().argmax(2, keepdim=True)
        angle = (place % n_pos)[..., None].to(self.rates.dtype) * self.rates
        return torch.cat([angle.sin(), angle.cos()], -1)


def _check_end(pos_mask: Tensor) -> None:
    """The last patch of every channel [batch, channel, pos] holds an observed sample."""
    empty = ~pos_mask[..., -1]
    if bool(empty.any()):
        row, channel = first_place(empty)
        raise SeriesValueError(
            f"expected an observed sample in the last patch of every channel, got none in series "
            f"{row}, channel {channel}; the forecast is read from that patch: put padding before "
            "a series, not after it, and cut missing values off its end"
        )


class TimesFMHead(nn.Module):
    """From the last position to the forecast, in the series' units."""

    def __init__(self, cfg: TimesFMHeadConfig, d_model: int) -> None:
        super().__init__()
        self.cfg = cfg
        n_out = cfg.horizon * (1 + len(cfg.quantiles))
        self.block = ResidualMLP(d_model, cfg.d_hidden, n_out, cfg.act_fn)
        self.hook_pooled = HookPoint()  # [row, d_model]
        self.hook_quantiles = HookPoint()  # [batch, channel, horizon, output], scaled

    def forward(self, residual: Residual, state: TrunkState) -> Output:
        out = self.block(self.hook_pooled(residual[:, -1]))
        by_step = out.unflatten(1, (self.cfg.horizon, -1)).unflatten(
            0, (-1, state.n_series_channels)
        )
        first, last = {"quantiles": (1, None), "point": (0, 1), "both": (0, None)}[self.cfg.output]
        scaled = self.hook_quantiles(by_step[..., first:last])
        loc, scale = per_channel(state, "loc", "scale")
        forecast = scaled * scale + loc
        return forecast[..., 0] if self.cfg.output == "point" else forecast


def per_channel(state: TrunkState, *names: str) -> list[Tensor]:
    """What the front end took out of each channel, [batch, channel, 1, 1]."""
    if not set(names) <= set(state.statistics):
        raise ArgumentError(
            "this head puts back what the front end took out of each channel; pass the state "
            "that embed_series returned as state="
        )
    by_series = (-1, state.n_series_channels)
    return [state.statistics[name].unflatten(0, by_series)[..., None] for name in names]
