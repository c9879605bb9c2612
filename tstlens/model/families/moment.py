"""Front end and head of MOMENT: reversible instance norm, patches, one head per task.

What the source does with a mask is kept exactly, and it differs between tasks. A patch counts as
observed where all of its samples are; the others are padding to attention in every task. Their
embedding is the mask embedding (a learned vector), except in forecasting, where it is that of
whatever samples stand there. Heads that flatten or average positions take padded ones in, except
for the embedding task. Reconstruction takes location and scale from whole observed patches, the
others from all observed samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from tstlens.errors import ArgumentError, SeriesShapeError, SeriesValueError
from tstlens.model.families.observed import mean_and_std
from tstlens.model.norms import watched
from tstlens.model.parts import one_of, positive
from tstlens.model.state import TrunkState
from tstlens.shapes import Mask, Output, Residual, Series

MomentTask = Literal["reconstruction", "forecasting", "classification", "embedding"]
TASKS = ("reconstruction", "forecasting", "classification", "embedding")


@dataclass(frozen=True)
class MomentPatchesConfig:
    """MOMENT's front end: scale each channel, cut it into patches, map each patch linearly.

    Args:
        patch_len: samples in one patch; patches do not overlap.
        task: what the model is for, which decides what padding does (see the module).
        bias: whether the linear map has a bias.
        affine: whether the scaled series is multiplied and shifted by learned numbers.
        eps: added to the standard deviation.
    """

    patch_len: int
    task: MomentTask
    bias: bool = False
    affine: bool = False
    eps: float = 1e-5
    kind: str = "moment-patches"
    channel_independent: bool = True
    takes_missing: bool = True

    def __post_init__(self) -> None:
        positive("MomentPatchesConfig", patch_len=self.patch_len)
        one_of("MomentPatchesConfig.task", self.task, TASKS)

    def n_pos(self, n_time: int) -> int:
        """Positions that a series of ``n_time`` samples becomes."""
        return n_time // self.patch_len

    def check(self, n_time: int) -> None:
        """Raise :class:`SeriesShapeError` unless the samples divide into patches."""
        if n_time % self.patch_len:
            raise SeriesShapeError(
                f"expected a whole number of patches of {self.patch_len} samples, got {n_time} "
                "samples; cut the series, or pad it and pass mask="
            )

    def time_span(self, pos: int, n_time: int) -> slice:
        """Samples that position ``pos`` was embedded from."""
        return slice(pos * self.patch_len, (pos + 1) * self.patch_len)

    def time_cell(self, pos: int, n_time: int) -> slice:
        """The same as :meth:`time_span`."""
        return self.time_span(pos, n_time)

    def build(self, cfg: Any) -> nn.Module:
        """The front end, with new weights."""
        return MomentPatches(self, cfg.d_model)


@dataclass(frozen=True)
class MomentHeadConfig:
    """MOMENT's head.

    Args:
        task: ``"reconstruction"`` maps every position to its patch, ``"forecasting"`` all positions
            of a channel to the horizon, ``"classification"`` the mean over positions to logits, and
            ``"embedding"`` averages over channels and observed positions.
        patch_len: samples in one patch.
        n_classes: logits, of a classifier.
        horizon: steps, of a forecaster.
        reduction: how a classifier joins channels: ``"concat"`` or ``"mean"``.
    """

    task: MomentTask
    patch_len: int
    n_classes: int | None = None
    horizon: int | None = None
    reduction: Literal["concat", "mean"] = "concat"
    kind: str = "moment-head"

    def __post_init__(self) -> None:
        one_of("MomentHeadConfig.task", self.task, TASKS)
        one_of("MomentHeadConfig.reduction", self.reduction, ("concat", "mean"))
        needed = {"classification": "n_classes", "forecasting": "horizon"}.get(self.task)
        for name in ("n_classes", "horizon"):
            value = getattr(self, name)
            if name == needed and value is not None:
                positive("MomentHeadConfig", **{name: value})
            elif (name == needed) != (value is not None):
                raise ArgumentError(
                    f"a {self.task} head takes {needed or 'neither n_classes nor horizon'}, "
                    f"got {name}={value}"
                )

    @property
    def pooling(self) -> str | None:
        """How positions are pooled; None where every position has an output of its own."""
        pooled = {"forecasting": "flatten", "classification": "mean", "embedding": "mean"}
        return pooled.get(self.task)

    def build(self, cfg: Any) -> nn.Module:
        """The head, with new weights."""
        return MomentHead(self, cfg)


class MomentPatches(nn.Module):
    """From a series to positions, one row per channel; ``W_E`` is [patch_len, d_model].

    ``hook_visible`` holds 1 for patches that are embedded and 0 for those that become the mask
    embedding, so a hook there asks the model to fill a stretch in (with reconstruction the hidden
    patches are also left out of location and scale, as in the source).
    """

    def __init__(self, cfg: MomentPatchesConfig, d_model: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.W_E = nn.Parameter(torch.zeros(cfg.patch_len, d_model))
        self.b_E = nn.Parameter(torch.zeros(d_model), requires_grad=cfg.bias)
        self.mask_embedding = nn.Parameter(torch.zeros(d_model))
        if cfg.affine:
            self.w = nn.Parameter(torch.ones(1))
            self.b = nn.Parameter(torch.zeros(1))
        self.hook_visible = HookPoint()  # [batch, channel, pos, 1]
        self.hook_loc = HookPoint()  # [batch, channel, 1]
        self.hook_scale = HookPoint()  # [batch, channel, 1]
        self.hook_scaled = HookPoint()  # [batch, channel, time]
        self.hook_patches = HookPoint()  # [batch, channel, pos, patch_len]

    def forward(self, series: Series, mask: Mask | None) -> tuple[Residual, TrunkState]:
        batch, n_channels, n_time = series.shape
        n_pos = self.cfg.n_pos(n_time)
        whole = None  # bool [batch, pos], True where every sample of a patch is observed
        if mask is not None:
            whole = mask.unflatten(1, (n_pos, self.cfg.patch_len)).all(-1)
        visible = self._visible(whole, (batch, n_channels, n_pos, 1), series)
        missing = series.isnan()
        observed = self._counted(mask, visible, missing)
        if not bool(observed.any(-1).all()):
            row, channel = (int(i) for i in (~observed.any(-1)).nonzero()[0])
            raise SeriesValueError(
                f"expected an observed sample in every channel, got none in series {row}, channel "
                f"{channel}, that MOMENT counts (for reconstruction, samples of whole observed "
                "patches); leave the channel out"
            )
        loc, std = mean_and_std(series, observed)
        loc = self.hook_loc(loc)
        scale = self.hook_scale(std + self.cfg.eps)
        scaled = (torch.where(missing, 0.0, series) - loc) / scale
        statistics = {"loc": loc.flatten(0, 1), "scale": scale.flatten(0, 1)}
        if self.cfg.affine:
            scaled = scaled * self.w + self.b
            statistics |= {
                name: getattr(self, name).expand(len(loc) * n_channels, 1) for name in "wb"
            }
        scaled = self.hook_scaled(torch.where(missing, 0.0, scaled))
        patches = self.hook_patches(scaled.unflatten(2, (n_pos, self.cfg.patch_len)))
        x = patches @ self.W_E + self.b_E  # [batch, channel, pos, d_model]
        if visible is not None:
            x = visible * x + (1 - visible) * self.mask_embedding
        pos_mask = None if whole is None else whole.repeat_interleave(n_channels, 0)
        state = TrunkState(pos_mask, n_channels, statistics=statistics)
        return x.flatten(0, 1), state

    def _visible(
        self, whole: Tensor | None, shape: tuple[int, int, int, int], like: Tensor
    ) -> Tensor | None:
        """[batch, channel, pos, 1], 1 where a patch is embedded; None where all are."""
        hidden = whole is not None and self.cfg.task != "forecasting"
        if not hidden and not watched(self.hook_visible):
            return None
        visible = like.new_ones(shape)
        if hidden and whole is not None:
            visible = visible * whole[:, None, :, None]
        return self.hook_visible(visible)

    def _counted(self, mask: Mask | None, visible: Tensor | None, missing: Tensor) -> Tensor:
        """bool [batch, channel, time], True for samples that location and scale are taken from."""
        counted = ~missing
        if mask is not None:
            counted = counted & mask[:, None]
        if visible is not None and self.cfg.task == "reconstruction":
            shown = visible[..., 0] > 0
            counted = counted & shown.repeat_interleave(self.cfg.patch_len, 2)
        return counted


class MomentHead(nn.Module):
    """From the stream [row, pos, d_model] to what the task asks for, in the series' units.

    Reconstruction gives [batch, channel, time], forecasting [batch, channel, horizon],
    classification [batch, class], embedding [batch, d_model]. ``W_U`` of a classifier that
    concatenates channels is [channel * d_model, class], channel-major.
    """

    def __init__(self, cfg: MomentHeadConfig, model: Any) -> None:
        super().__init__()
        self.cfg = cfg
        self.n_ctx = model.n_ctx
        self.eps = getattr(model.embed, "eps", 0.0)
        n_channels = model.n_channels or 1
        sizes = {
            "reconstruction": (model.d_model, cfg.patch_len),
            "forecasting": (model.d_model * (model.n_ctx or 1), cfg.horizon or 0),
            "classification": (
                model.d_model * (n_channels if cfg.reduction == "concat" else 1),
                cfg.n_classes or 0,
            ),
        }
        if cfg.task in sizes:
            self.W_U = nn.Parameter(torch.zeros(*sizes[cfg.task]))
            self.b_U = nn.Parameter(torch.zeros(sizes[cfg.task][1]))
        if cfg.task != "reconstruction":
            self.hook_pooled = HookPoint()  # [row, d_model], or [row, pos * d_model] when flat
        if cfg.task in ("reconstruction", "forecasting"):
            self.hook_scaled = HookPoint()  # [batch, channel, time or horizon]

    def forward(self, residual: Residual, state: TrunkState) -> Output:
        n_channels = state.n_series_channels
        if self.cfg.task == "reconstruction":
            return self._unscaled((residual @ self.W_U + self.b_U).flatten(1), state)
        if self.cfg.task == "forecasting":
            if residual.shape[1] != self.n_ctx:
                raise SeriesShapeError(
                    f"this forecast head takes exactly {self.n_ctx} positions, got "
                    f"{residual.shape[1]}"
                )
            pooled = self.hook_pooled(residual.flatten(1))
            return self._unscaled(pooled @ self.W_U + self.b_U, state)
        if self.cfg.task == "embedding":
            pooled = self.hook_pooled(_observed_mean(residual, state.pos_mask))
            return pooled.unflatten(0, (-1, n_channels)).mean(1)
        pooled = self.hook_pooled(residual.mean(1)).unflatten(0, (-1, n_channels))
        joined = pooled.flatten(1) if self.cfg.reduction == "concat" else pooled.mean(1)
        return joined @ self.W_U + self.b_U

    def _unscaled(self, x: Tensor, state: TrunkState) -> Tensor:
        """[row, sample] in scaled units as [batch, channel, sample] in the series' units."""
        statistics = state.statistics
        if "scale" not in statistics:
            raise ArgumentError(
                "this head puts back what the front end took out of each channel; pass the state "
                "that embed_series returned as state="
            )
        by_series = (-1, state.n_series_channels)
        x = self.hook_scaled(x.unflatten(0, by_series))
        given = {name: value.unflatten(0, by_series) for name, value in statistics.items()}
        if "w" in given:
            x = (x - given["b"]) / (given["w"] + self.eps * self.eps)
        return x * given["scale"] + given["loc"]


def _observed_mean(residual: Residual, pos_mask: Tensor | None) -> Tensor:
    if pos_mask is None:
        return residual.mean(1)
    weight = pos_mask[:, :, None].to(residual.dtype)
    return (weight * residual).sum(1) / weight.sum(1)
