"""Front end and head of TimesFM 2.5: patches scaled as they come, the series and its mirror image.

Every channel goes through the trunk by itself, and with ``both_signs`` twice: as it is and times
-1, with the second forecast mirrored back and averaged with the first. Both passes are rows of one
run: where a trunk's activation has a channel axis, the channels come first and then their mirror
images in the same order, so every hook point holds both.

A channel is scaled by mean and standard deviation over the whole context, in which the zeros before
a shorter series count, and then each patch by those of all samples up to its end.

Source: Das et al. 2024, "A decoder-only foundation model for time-series forecasting", arXiv
2310.10688, in the version 2.5 that transformers ports.
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
from tstlens.model.families.timesfm import check_levels, per_channel
from tstlens.model.parts import ActFn, positive
from tstlens.model.state import TrunkState
from tstlens.shapes import Mask, Output, Residual, Series

TOLERANCE = 1e-6  # a standard deviation below this does not scale, as in the source


@dataclass(frozen=True)
class TimesFM25PatchesConfig(EndingPatches):
    """TimesFM 2.5's front end.

    Args:
        patch_len: samples in one patch; patches do not overlap.
        context_length: most samples of a series.
        d_hidden: hidden units of the patch embedding.
        both_signs: whether the mirrored series goes through the trunk too.
        act_fn: the hidden units' activation.
    """

    patch_len: int
    context_length: int
    d_hidden: int
    both_signs: bool = True
    act_fn: ActFn = "silu"
    kind: str = "timesfm-2.5-patches"
    channel_independent: bool = True
    takes_missing: bool = True

    def __post_init__(self) -> None:
        positive(
            "TimesFM25PatchesConfig",
            patch_len=self.patch_len,
            context_length=self.context_length,
            d_hidden=self.d_hidden,
        )

    @property
    def n_signs(self) -> int:
        """Rows of the trunk per channel."""
        return 2 if self.both_signs else 1

    def build(self, cfg: Any) -> nn.Module:
        """The front end, with new weights."""
        return TimesFM25Patches(self, cfg.d_model)


@dataclass(frozen=True)
class TimesFM25HeadConfig:
    """TimesFM 2.5's head: from the last position to the mean and quantiles of every step.

    Args:
        horizon: steps of the forecast.
        quantiles: levels in 0..1.
        d_hidden: hidden units of both blocks.
        spread_horizon: steps of the second block's output; 0 for no second block. Up to there it
            gives the distance of each quantile from the point forecast.
        point: which of [mean, quantiles ...] is the point forecast.
        output: ``"quantiles"`` gives [batch, channel, horizon, quantile], ``"point"`` the point
            forecast [batch, channel, horizon], ``"both"`` the mean and then the quantiles on one
            axis.
        bias: whether both blocks have biases.
        not_negative: forecasts of a channel that is never below zero are not either.
        act_fn: the hidden units' activation.
    """

    horizon: int
    quantiles: tuple[float, ...]
    d_hidden: int
    spread_horizon: int = 0
    point: int = 5
    output: str = "quantiles"
    bias: bool = False
    not_negative: bool = True
    act_fn: ActFn = "silu"
    n_classes: None = None
    pooling: str = "last"
    kind: str = "timesfm-2.5-quantiles"

    def __post_init__(self) -> None:
        positive("TimesFM25HeadConfig", horizon=self.horizon, d_hidden=self.d_hidden)
        object.__setattr__(self, "quantiles", tuple(self.quantiles))
        check_levels(self.quantiles, self.output)
        if self.point not in range(1 + len(self.quantiles)):
            raise ArgumentError(
                f"point must be one of 0..{len(self.quantiles)}, got {self.point!r}"
            )

    @property
    def columns(self) -> list[int]:
        """What of [mean, quantiles ...] is given."""
        n_columns = 1 + len(self.quantiles)
        kinds = {"quantiles": range(1, n_columns), "point": (self.point,), "both": range(n_columns)}
        return list(kinds[self.output])

    def build(self, cfg: Any) -> nn.Module:
        """The head, with new weights."""
        return TimesFM25Head(self, cfg)


class TimesFM25Patches(nn.Module):
    """From a series to positions, one row per channel and sign.

    From ``hook_scaled`` on the channel axis has the mirrored channels too, where there are any. A
    patch goes through the block as its values followed by 1 where a sample is missing
    (``hook_patches``, and 1 - ``hook_observed``).
    """

    def __init__(self, cfg: TimesFM25PatchesConfig, d_model: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.block = ResidualMLP(2 * cfg.patch_len, cfg.d_hidden, d_model, cfg.act_fn)
        self.hook_loc = HookPoint()  # [batch, channel, 1]
        self.hook_scale = HookPoint()  # [batch, channel, 1]
        self.hook_scaled = HookPoint()  # [batch, channel, time]
        self.hook_running_loc = HookPoint()  # [batch, channel, pos, 1]
        self.hook_running_scale = HookPoint()  # [batch, channel, pos, 1]
        self.hook_patches = HookPoint()  # [batch, channel, pos, patch_len]
        self.hook_observed = HookPoint()  # [batch, channel, pos, patch_len]

    def forward(self, series: Series, mask: Mask | None) -> tuple[Residual, TrunkState]:
        observed = ~series.isnan()
        if mask is not None:
            observed = observed & mask[:, None]
        _check_gaps(observed)
        values = torch.where(observed, series, 0.0)
        whole = nn.functional.pad(values, (self.cfg.context_length - values.shape[2], 0))
        loc = self.hook_loc(whole.mean(-1, keepdim=True))
        scale = self.hook_scale(whole.std(-1, keepdim=True))
        lowest = torch.where(observed, series, torch.inf).amin(-1, keepdim=True)
        scaled = torch.where(observed, (values - loc) / _safe(scale), 0.0)
        both = [scaled, -scaled] if self.cfg.both_signs else [scaled]
        scaled = self.hook_scaled(torch.cat(both, 1))  # [batch, channel and sign, time]
        seen = self.cfg.cut(torch.cat([observed] * len(both), 1).to(series.dtype))
        pos_mask = seen[..., -1].flatten(0, 1) > 0  # [row, pos]
        patches = self.cfg.cut(scaled)  # [batch, channel and sign, pos, patch_len]
        mean, std = running_statistics(patches, seen)
        mean, std = self.hook_running_loc(mean), self.hook_running_scale(std)
        patches = torch.where(seen > 0, (patches - mean) / _safe(std), 0.0)
        patches, seen = self.hook_patches(patches), self.hook_observed(seen)
        x = self.block(torch.cat([patches, 1 - seen], -1)).flatten(0, 1)  # [row, pos, d_model]
        by_row = {"loc": loc, "scale": scale, "lowest": lowest}
        statistics = {k: torch.cat([v] * len(both), 1).flatten(0, 1) for k, v in by_row.items()}
        for name, running in (("running_loc", mean), ("running_scale", std)):
            statistics[name] = running[:, :, -1].flatten(0, 1)
        padded = not bool(pos_mask.all())
        n_pos = torch.arange(x.shape[1], device=x.device)
        return x, TrunkState(
            pos_mask if padded else None,
            seen.shape[1],
            statistics=statistics,
            positions=n_pos - (~pos_mask).sum(1, keepdim=True) if padded else None,
        )


@dataclass
class _Sum:
    count: Tensor
    mean: Tensor
    std: Tensor


def running_statistics(patches: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [..., pos, 1] of observed samples up to the end of each patch.

    Patch after patch and in the source's order of operations: where a series is constant, what is
    left of rounding may be scaled up, and any other order would show.

    Args:
        patches: [..., pos, patch_len].
        seen: 1 where a sample counts, else 0.
    """
    none = patches.new_zeros(patches.shape[:-2])
    so_far = _Sum(none, none, none)
    means, stds = [], []
    for values, valid in zip(patches.unbind(-2), seen.unbind(-2), strict=True):
        n = valid.sum(-1)
        mean = (values * valid).sum(-1) / n.clamp(min=1)
        centred = (values - mean[..., None]) * valid
        std = root(centred.square().sum(-1) / n.clamp(min=1))
        count = so_far.count + n
        new_mean = (so_far.count * so_far.mean + mean * n) / count.clamp(min=1)
        squares = (
            so_far.count * so_far.std.square()
            + n * std.square()
            + so_far.count * (so_far.mean - new_mean).square()
            + n * (mean - new_mean).square()
        )
        so_far = _Sum(count, new_mean, root(squares / count.clamp(min=1)))
        means.append(so_far.mean)
        stds.append(so_far.std)
    return torch.stack(means, -1)[..., None], torch.stack(stds, -1)[..., None]


def _safe(scale: Tensor) -> Tensor:
    return torch.where(scale < TOLERANCE, 1.0, scale)


def _check_gaps(observed: Tensor) -> None:
    """Samples of every channel [batch, channel, time] are missing only before the first one."""
    gaps = (observed[..., :-1] & ~observed[..., 1:]).any(-1) | ~observed[..., -1]
    if bool(gaps.any()):
        row, channel = first_place(gaps)
        raise SeriesValueError(
            f"expected missing samples only before a series begins, got others in series {row}, "
            f"channel {channel}; TimesFM 2.5 takes shorter series, padded at the start, but no "
            "gaps: fill them, or cut the series"
        )


class TimesFM25Head(nn.Module):
    """From the last position to the forecast, in the series' units.

    ``block`` gives [mean, quantiles ...] of every step, ``spread_block`` quantiles whose distances
    from the point forecast are taken.
    """

    def __init__(self, cfg: TimesFM25HeadConfig, model: Any) -> None:
        super().__init__()
        self.cfg = cfg
        self.n_signs = model.embed.n_signs
        n_columns = 1 + len(cfg.quantiles)
        sizes = (model.d_model, cfg.d_hidden)
        self.block = _block(*sizes, cfg.horizon * n_columns, cfg)
        if cfg.spread_horizon and cfg.output != "point":
            self.spread_block = _block(*sizes, cfg.spread_horizon * n_columns, cfg)
        self.hook_pooled = HookPoint()  # [row, d_model]
        self.hook_quantiles = HookPoint()  # [batch, channel, horizon, output], scaled

    def forward(self, residual: Residual, state: TrunkState) -> Output:
        names = ("running_loc", "running_scale", "loc", "scale", "lowest")
        running_loc, running_scale, *of_channel = per_channel(state, *names)
        n_channels = state.n_series_channels // self.n_signs
        pooled = self.hook_pooled(residual[:, -1])

        def forecast(block: nn.Module, steps: int) -> Tensor:
            """What a block forecasts, averaged over signs: [batch, channel, step, column]."""
            by_step = block(pooled).unflatten(1, (steps, -1))
            by_step = by_step.unflatten(0, (-1, state.n_series_channels))
            by_step = by_step * running_scale + running_loc
            if self.n_signs == 1:
                return by_step
            as_it_is, mirrored = by_step.split(n_channels, 1)
            back = torch.cat([mirrored[..., :1], mirrored[..., 1:].flip(-1)], -1)
            return (as_it_is - back) / 2

        full, point = forecast(self.block, self.cfg.horizon), self.cfg.point
        if hasattr(self, "spread_block"):
            steps = min(self.cfg.horizon, self.cfg.spread_horizon)
            spread = forecast(self.spread_block, self.cfg.spread_horizon)[:, :, :steps]
            near = full[:, :, :steps]
            apart = spread - spread[..., point, None] + near[..., point, None]
            kept = torch.arange(full.shape[-1], device=full.device)
            kept = (kept == 0) | (kept == point)  # mean and point forecast are the first block's
            full = torch.cat([torch.where(kept, near, apart), full[:, :, steps:]], 2)
        full = self.hook_quantiles(full[..., self.cfg.columns])
        loc, scale, lowest = (x[:, :n_channels] for x in of_channel)
        full = full * scale + loc
        if self.cfg.not_negative:
            full = torch.where(lowest >= 0, full.clamp(min=0), full)
        return full[..., 0] if self.cfg.output == "point" else full


def _block(d_in: int, d_hidden: int, d_out: int, cfg: TimesFM25HeadConfig) -> ResidualMLP:
    block = ResidualMLP(d_in, d_hidden, d_out, cfg.act_fn)
    for name in ("b_in", "b_out", "b_skip"):
        getattr(block, name).requires_grad_(cfg.bias)
    return block
