"""Patches of instance-normalised channels: the front end of PatchTST in its original form.

Mean and standard deviation of every channel are taken out before patching, and handed to the head
in ``TrunkState.statistics``, which puts them back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from tstlens.errors import ArgumentError
from tstlens.model.norms import watched
from tstlens.model.parts import check_padding, one_of, positive
from tstlens.model.state import TrunkState
from tstlens.shapes import Mask, Residual, Series

Scaling = Literal["none", "sqrt_var_plus_eps", "std_plus_eps"]


@dataclass(frozen=True)
class RevINPatchesConfig:
    """A linear map of every patch of every channel by itself, after instance normalisation.

    Args:
        patch_len: samples in one patch.
        stride: samples between the starts of two patches; samples that fill no patch are dropped
            at the end.
        pad_start: times the first (scaled) sample is repeated before the series.
        pad_end: times the last one is repeated after it.
        scaling: what a channel is divided by: ``sqrt(var + eps)``, ``std + eps``, or nothing (then
            nothing is taken away either).
        location: what is taken away: the channel's ``"mean"`` or its ``"last"`` sample.
        scale_eps: eps of the scaling.
        affine: a learned gain and shift per channel after scaling.
        affine_eps: added to the gain where the head divides by it.
        bias: whether the linear map has a bias.
    """

    patch_len: int
    stride: int
    pad_start: int = 0
    pad_end: int = 0
    scaling: Scaling = "sqrt_var_plus_eps"
    location: Literal["mean", "last"] = "mean"
    scale_eps: float = 1e-5
    affine: bool = False
    affine_eps: float = 0.0
    bias: bool = True
    channel_independent: bool = True
    kind: str = "revin-patches"

    def __post_init__(self) -> None:
        positive("RevINPatchesConfig", patch_len=self.patch_len, stride=self.stride)
        check_padding(self.pad_start)
        check_padding(self.pad_end)
        one_of(
            "RevINPatchesConfig.scaling",
            self.scaling,
            ("none", "sqrt_var_plus_eps", "std_plus_eps"),
        )
        one_of("RevINPatchesConfig.location", self.location, ("mean", "last"))
        if not self.channel_independent:
            raise ArgumentError("RevINPatchesConfig.channel_independent is always True")
        if self.affine and self.scaling == "none":
            raise ArgumentError("RevINPatchesConfig.affine needs a scaling, got 'none'")

    def build(self, cfg: Any) -> nn.Module:
        """The module, with new weights."""
        return RevINPatches(self, cfg.n_channels, cfg.d_model)

    def n_pos(self, n_time: int) -> int:
        """Positions that a series of ``n_time`` samples becomes."""
        return (n_time + self.pad_start + self.pad_end - self.patch_len) // self.stride + 1

    def time_span(self, pos: int, n_time: int) -> slice:
        """Samples that position ``pos`` was embedded from (the repeated ones count as one)."""
        start = pos * self.stride - self.pad_start
        stop = start + self.patch_len
        return slice(min(max(start, 0), n_time - 1), min(max(stop, 1), n_time))

    def time_cell(self, pos: int, n_time: int) -> slice:
        """The same as :meth:`time_span`: a patch is its own cell."""
        return self.time_span(pos, n_time)


class RevINPatches(nn.Module):
    """Scale every channel, cut it into patches, map each one; ``W_E`` is [patch_len, d_model].

    ``statistics`` of the state: ``loc`` and ``scale``, and with a learned gain ``gain`` (plus
    ``affine_eps``) and ``shift``, each [batch * channel, 1].
    """

    def __init__(self, part: RevINPatchesConfig, n_channels: int, d_model: int) -> None:
        super().__init__()
        self.cfg = part
        self.W_E = nn.Parameter(torch.zeros(part.patch_len, d_model))
        self.b_E = nn.Parameter(torch.zeros(d_model), requires_grad=part.bias)
        if part.affine:
            self.w = nn.Parameter(torch.ones(n_channels))
            self.b = nn.Parameter(torch.zeros(n_channels))
        if part.scaling != "none":
            self.hook_loc = HookPoint()  # [batch, channel, 1]
            self.hook_scale = HookPoint()  # [batch, channel, 1]
            self.hook_scaled = HookPoint()  # [batch, channel, time]
        self.hook_patches = HookPoint()  # [batch, channel, pos, patch_len]

    def forward(self, series: Series, mask: Mask | None) -> tuple[Residual, TrunkState]:
        refuse_mask(mask)
        statistics: dict[str, Tensor] = {}
        if self.cfg.scaling != "none":
            series, statistics = self._scale(series)
        patches = self._cut(series)
        if watched(self.hook_patches):
            patches = self.hook_patches(patches.clone())  # patches may overlap, and are views
        embedded = patches.flatten(0, 1) @ self.W_E + self.b_E  # [batch * channel, pos, d_model]
        rows = {name: x.flatten(0, 1) for name, x in statistics.items()}
        return embedded, TrunkState(n_series_channels=series.shape[1], statistics=rows)

    def _scale(self, series: Series) -> tuple[Series, dict[str, Tensor]]:
        part = self.cfg
        last = part.location == "last"
        loc = series[:, :, -1:].clone() if last else series.mean(2, keepdim=True)
        if part.scaling == "std_plus_eps":
            scale = series.std(2, keepdim=True, unbiased=False) + part.scale_eps
        else:
            scale = (series.var(2, keepdim=True, unbiased=False) + part.scale_eps).sqrt()
        loc, scale = self.hook_loc(loc), self.hook_scale(scale)
        scaled = (series - loc) / scale
        statistics = {"loc": loc, "scale": scale}
        if part.affine:
            gain, shift = self.w[:, None].expand_as(loc), self.b[:, None].expand_as(loc)
            scaled = scaled * gain + shift
            statistics |= {"gain": gain + part.affine_eps, "shift": shift}
        return self.hook_scaled(scaled), statistics

    def _cut(self, x: Tensor) -> Tensor:
        part = self.cfg
        if part.pad_start or part.pad_end:
            x = nn.functional.pad(x, (part.pad_start, part.pad_end), mode="replicate")
        return x.unfold(2, part.patch_len, part.stride)


def refuse_mask(mask: Mask | None) -> None:
    """Raise :class:`ArgumentError` for a mask that hides anything."""
    if mask is not None and not bool(mask.all()):
        raise ArgumentError(
            "this model scales whole series and its source takes no masks; run series of one "
            "length together, without a mask"
        )


def put_back(forecast: Tensor, statistics: Any) -> Tensor:
    """A scaled forecast in the series' units.

    Args:
        forecast: float [row, ...].
        statistics: of the trunk's state; each [row, 1].

    Raises:
        ArgumentError: there are none: the run did not start from a series.
    """
    if "scale" not in statistics:
        raise ArgumentError(
            "this head puts back the series' location and scale, which the front end takes out; "
            "pass state= as embed_series returned it"
        )
    shape = (-1,) + (1,) * (forecast.ndim - 1)
    found = {name: statistics[name].reshape(shape) for name in statistics}
    if "gain" in found:
        forecast = (forecast - found["shift"]) / found["gain"]
    return forecast * found["scale"] + found["loc"]
