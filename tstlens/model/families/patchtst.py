"""PatchTST's front end (Hugging Face's form): scale every channel, cut it, embed every patch.

Source: Nie et al. 2023, "A time series is worth 64 words", arXiv 2211.14730, as in
``transformers.models.patchtst``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from tstlens.errors import ArgumentError
from tstlens.model.families.scaling import (
    check_observed,
    fill_missing,
    mean_and_std,
    mean_size,
)
from tstlens.model.norms import watched
from tstlens.model.parts import one_of, positive
from tstlens.model.state import TrunkState
from tstlens.shapes import Mask, Residual, Series

Scaling = Literal["std", "mean", "none"]
_Patches = Float[Tensor, "batch channel patch patch_len"]


@dataclass(frozen=True)
class PatchTSTEmbedConfig:
    """Scale, cut into patches, embed; every channel goes through the trunk by itself.

    Missing samples (NaN, or False in the mask) are zeros before scaling and take no part in mean
    and scale, as in the source; their positions are attended to like all others. Samples that
    fill no patch are dropped at the start.

    Args:
        patch_len: samples in one patch.
        stride: samples between the starts of two patches.
        scaling: ``"std"`` takes out mean and standard deviation, ``"mean"`` the mean absolute
            value, ``"none"`` nothing.
        smallest_scale: added to the variance (``"std"``), or least scale (``"mean"``).
        default_scale: of a channel without observed samples (``"mean"``); None for none.
        shared: one embedding for all channels, or one for each.
        cls_token: whether a token of its own stands before the patches.
        mask_value: what a patch hidden at ``hook_patch_mask`` holds; None where the source hides
            no patches.

    Raises:
        ArgumentError: a value is not possible, naming it.
    """

    patch_len: int
    stride: int
    scaling: Scaling = "std"
    smallest_scale: float = 1e-5
    default_scale: float | None = None
    shared: bool = True
    cls_token: bool = False
    mask_value: float | None = None
    kind: str = "patchtst"

    def __post_init__(self) -> None:
        positive("PatchTSTEmbedConfig", patch_len=self.patch_len, stride=self.stride)
        one_of("PatchTSTEmbedConfig.scaling", self.scaling, ("std", "mean", "none"))
        if not self.smallest_scale > 0:
            raise ArgumentError(f"smallest_scale must be above 0, got {self.smallest_scale}")

    @property
    def channel_independent(self) -> bool:
        """Rows of the trunk are batch x channel."""
        return True

    @property
    def takes_missing(self) -> bool:
        """NaN marks a missing sample."""
        return True

    def n_patches(self, n_time: int) -> int:
        """Patches of a series of ``n_time`` samples."""
        return (n_time - self.patch_len) // self.stride + 1

    def n_pos(self, n_time: int) -> int:
        """Positions: patches, and the CLS token where there is one."""
        n_patches = self.n_patches(n_time)
        return n_patches + self.cls_token if n_patches > 0 else 0

    def start(self, n_time: int) -> int:
        """First sample of the first patch."""
        return n_time - self.patch_len - (self.n_patches(n_time) - 1) * self.stride

    def time_span(self, pos: int, n_time: int) -> slice:
        """Samples that position ``pos`` was embedded from; none for the CLS token."""
        if self.cls_token and pos == 0:
            return slice(0, 0)
        start = self.start(n_time) + (pos - self.cls_token) * self.stride
        return slice(start, start + self.patch_len)

    def time_cell(self, pos: int, n_time: int) -> slice:
        """The same as :meth:`time_span`: a patch is its own cell."""
        return self.time_span(pos, n_time)

    def build(self, cfg: Any) -> nn.Module:
        """The module, with new weights."""
        return PatchTSTEmbed(self, cfg.n_channels, cfg.d_model)


class PatchTSTEmbed(nn.Module):
    """From a series to patches' embeddings; mean and scale go to the head.

    ``W_E`` is [patch_len, d_model], or [channel, patch_len, d_model] where every channel has its
    own. Hook points: ``hook_loc`` and ``hook_scale`` [batch, channel, 1] (edits also reach the
    head), ``hook_scaled`` [batch, channel, time], ``hook_patches`` [batch, channel, patch,
    patch_len], and ``hook_patch_mask`` [batch, channel, patch]: zeros, and a hook that returns
    ones for some patches hides them, as pretraining does.
    """

    def __init__(self, cfg: PatchTSTEmbedConfig, n_channels: int, d_model: int) -> None:
        super().__init__()
        self.cfg = cfg
        each = () if cfg.shared else (n_channels,)
        self.W_E = nn.Parameter(torch.zeros(*each, cfg.patch_len, d_model))
        self.b_E = nn.Parameter(torch.zeros(*each, d_model))
        if cfg.cls_token:
            self.cls_token = nn.Parameter(torch.zeros(d_model))
        if cfg.scaling == "std":
            self.hook_loc = HookPoint()  # [batch, channel, 1]
        if cfg.scaling != "none":
            self.hook_scale = HookPoint()  # [batch, channel, 1]
        self.hook_scaled = HookPoint()  # [batch, channel, time]
        self.hook_patches = HookPoint()  # [batch, channel, patch, patch_len]
        if cfg.mask_value is not None:
            self.hook_patch_mask = HookPoint()  # [batch, channel, patch]

    def forward(self, series: Series, mask: Mask | None) -> tuple[Residual, TrunkState]:
        scaled, statistics = self.scale(series, mask)
        if watched(self.hook_scaled):
            scaled = self.hook_scaled(scaled.clone())  # unscaled, it is the series itself
        patches = self.hide(self.cut(scaled))  # [batch, channel, patch, patch_len]
        if self.cfg.shared:
            rows = patches.flatten(0, 1)  # [batch * channel, patch, patch_len]
            flat = torch.addmm(self.b_E, rows.flatten(0, 1), self.W_E)
            x = flat.view(len(rows), rows.shape[1], flat.shape[1])
        else:
            x = torch.einsum("bcpl,cld->bcpd", patches, self.W_E) + self.b_E[:, None]
            x = x.flatten(0, 1)
        if self.cfg.cls_token:
            x = torch.cat([self.cls_token.expand(len(x), 1, -1), x], 1)
        per_row = {name: value.flatten(0, 1) for name, value in statistics.items()}  # [row, 1]
        return x, TrunkState(n_series_channels=series.shape[1], statistics=per_row)

    def scale(self, series: Series, mask: Mask | None) -> tuple[Series, dict[str, Tensor]]:
        """The scaled series, and what was taken out of it."""
        series, observed = fill_missing(series, mask)
        if self.cfg.scaling == "none":
            return series, {}
        if self.cfg.scaling == "mean":
            if self.cfg.default_scale is None:
                check_observed(observed)
            scale = self.hook_scale(
                mean_size(series, observed, self.cfg.smallest_scale, self.cfg.default_scale)
            )
            return series / scale, {"scale": scale}
        loc, scale = mean_and_std(series, observed, self.cfg.smallest_scale)
        loc, scale = self.hook_loc(loc), self.hook_scale(scale)
        return (series - loc) / scale, {"loc": loc, "scale": scale}

    def cut(self, scaled: Series) -> _Patches:
        """Patches, overlapping where the stride is shorter than they are."""
        start = self.cfg.start(scaled.shape[2])
        patches = scaled[:, :, start:].unfold(2, self.cfg.patch_len, self.cfg.stride)
        if watched(self.hook_patches):
            patches = self.hook_patches(patches.clone())  # they may overlap, and are views
        return patches

    def hide(self, patches: _Patches) -> _Patches:
        """Patches with the mask's value where a hook hides them."""
        if self.cfg.mask_value is None or not watched(self.hook_patch_mask):
            return patches
        hidden = self.hook_patch_mask(torch.zeros_like(patches[..., 0]))[..., None]
        return patches * (1 - hidden) + self.cfg.mask_value * hidden
