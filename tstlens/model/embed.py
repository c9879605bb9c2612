"""Front ends: from a series [batch, channel, time] to positions of the residual stream.

Every front end returns the embedding [row, pos, d_model] and the :class:`TrunkState` that belongs
to its rows. A position whose samples are all padding is masked; padded samples never reach an
observed position.

Positions inside attention: T5's relative bias on the scores, rotations of queries and keys.

Covariates: what a model reads beside the values that it forecasts, joined to the series.

A front end that takes covariates takes them as further channels of its series. So they have hooks
(``hook_series``), gradients and a place in every sweep, and everything that takes a series takes
theirs. Its config says how they are joined: ``join(series, covariates)``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tstlens.errors import ArgumentError, SeriesShapeError, SeriesValueError
from tstlens.model.config import HookedTSTConfig
from tstlens.model.mlp import ACTIVATIONS
from tstlens.model.norms import watched
from tstlens.model.parts import (
    ConvStemConfig,
    CustomConfig,
    FamilyPart,
    LinearPatchesConfig,
    PerStepConfig,
)
from tstlens.model.state import TrunkState
from tstlens.points import Hook
from tstlens.shapes import Mask, PerHead, Residual, Series

Embedded = tuple[Residual, TrunkState]
Staged = tuple[Float[Tensor, "batch width step"], Bool[Tensor, "batch step"] | None]


class ConvStage(nn.Module):
    """One convolution over time, its batch norm where there is a live one, its activation."""

    def __init__(self, cfg: ConvStemConfig, stage: int, n_in: int) -> None:
        super().__init__()
        n_out = cfg.channels[stage]
        self.conv = nn.Conv1d(
            n_in,
            n_out,
            cfg.kernel_sizes[stage],
            stride=cfg.strides[stage],
            padding=cfg.paddings[stage],
        )
        self.norm = nn.BatchNorm1d(n_out) if cfg.batch_norm == "live" else nn.Identity()
        self.act = ACTIVATIONS[cfg.activation]
        # A position is observed if a series that ends with the observed samples would have it;
        # where padding is half the kernel, this asks about the sample at its centre.
        self.stride = cfg.strides[stage]
        self.shift = cfg.kernel_sizes[stage] - 1 - 2 * cfg.paddings[stage]
        self.hook_pre = Hook("batch channel time")
        self.hook_post = Hook("batch channel time")

    @torch.no_grad()
    def fold(self) -> None:
        """Multiply the live batch norm into the convolution (eval mode's statistics)."""
        norm: Any = self.norm
        gain = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        self.conv.weight.mul_(gain[:, None, None])
        bias: Any = self.conv.bias
        bias.copy_((bias - norm.running_mean) * gain + norm.bias)
        self.norm = nn.Identity()

    def forward(self, x: Series, mask: Mask | None) -> Staged:
        x = self.hook_post(self.act(self.hook_pre(self.norm(self.conv(x)))))
        if mask is None:
            return x, None
        sample = torch.arange(x.shape[2], device=x.device) * self.stride + self.shift
        mask = mask[:, sample.clamp(0, mask.shape[1] - 1)]
        return x * mask[:, None, :], mask


class ConvStem(nn.Module):
    """Convolution stages one after the other; what the last one gives is the embedding."""

    def __init__(self, cfg: ConvStemConfig, n_channels: int) -> None:
        super().__init__()
        widths = (n_channels, *cfg.channels)
        self.stages = nn.ModuleList(
            ConvStage(cfg, stage, widths[stage]) for stage in range(len(cfg.channels))
        )

    def forward(self, series: Series, mask: Mask | None) -> Embedded:
        x = series if mask is None else series * mask[:, None, :]
        for stage in self.stages:
            x, mask = stage(x, mask)
        return x.transpose(1, 2).contiguous(), TrunkState(pos_mask=mask)


class LinearPatches(nn.Module):
    """Cut the series into patches and map each one linearly.

    ``W_E`` is [patch_len, d_model] when channels are independent, else
    [channel * patch_len, d_model] (channel-major).
    """

    def __init__(self, cfg: LinearPatchesConfig, n_channels: int, d_model: int) -> None:
        super().__init__()
        self.cfg = cfg
        width = cfg.patch_len * (1 if cfg.channel_independent else n_channels)
        self.W_E = nn.Parameter(torch.zeros(width, d_model))
        self.b_E = nn.Parameter(torch.zeros(d_model), requires_grad=cfg.bias)
        self.hook_patches = Hook("batch channel pos patch_len")

    def forward(self, series: Series, mask: Mask | None) -> Embedded:
        n_channels = series.shape[1]
        moves = bool(self.cfg.padding) or self.cfg.leftover == "drop_start"
        if moves and mask is not None and not bool(mask.all()):
            raise ArgumentError(
                "this front end repeats the last samples (padding) or drops the first ones "
                "(leftover='drop_start'), which depend on how far a series is padded; run series "
                "of one length together, without a mask"
            )
        patches = self._cut(series if mask is None else series * mask[:, None])
        if watched(self.hook_patches):
            patches = self.hook_patches(patches.clone())  # patches may overlap, and are views
        pos_mask = None if mask is None else self._cut(mask[:, None])[:, 0].any(-1)
        if self.cfg.channel_independent:
            x = patches.flatten(0, 1)  # [batch * channel, pos, patch_len]
            if pos_mask is not None:
                pos_mask = pos_mask.repeat_interleave(n_channels, 0)
            return x @ self.W_E + self.b_E, TrunkState(pos_mask, n_channels)
        x = patches.transpose(1, 2).flatten(2)  # [batch, pos, channel * patch_len]
        return x @ self.W_E + self.b_E, TrunkState(pos_mask)

    def _cut(self, x: Tensor) -> Float[Tensor, "batch channel pos patch_len"] | Tensor:
        start = self.cfg.offset(x.shape[2])
        if self.cfg.padding:
            x = torch.cat([x, x[:, :, -1:].expand(-1, -1, self.cfg.padding)], 2)
        return x[:, :, start:].unfold(2, self.cfg.patch_len, self.cfg.stride)


class PerStep(nn.Module):
    """Map all channels of every time step linearly; ``W_E`` is [channel, d_model]."""

    def __init__(self, cfg: PerStepConfig, n_channels: int, d_model: int) -> None:
        super().__init__()
        self.W_E = nn.Parameter(torch.zeros(n_channels, d_model))
        self.b_E = nn.Parameter(torch.zeros(d_model), requires_grad=cfg.bias)

    def forward(self, series: Series, mask: Mask | None) -> Embedded:
        x = series if mask is None else series * mask[:, None, :]
        return x.transpose(1, 2) @ self.W_E + self.b_E, TrunkState(pos_mask=mask)


class CustomEmbed(nn.Module):
    """A front end of the user's own: any module from a series to [batch, pos, d_model].

    It is called with ``mask=`` as well where its ``forward`` takes a mask and there is one.
    """

    def __init__(self, module: nn.Module, d_model: int) -> None:
        super().__init__()
        self.module = module
        self.d_model = d_model
        self.takes_mask = "mask" in inspect.signature(module.forward).parameters

    def forward(self, series: Series, mask: Mask | None) -> Embedded:
        given = {"mask": mask} if self.takes_mask and mask is not None else {}
        try:
            embedded = self.module(series, **given)
        except RuntimeError as error:
            own = next((p.dtype for p in self.module.parameters() if p.is_floating_point()), None)
            if own in (None, series.dtype):
                raise
            raise SeriesValueError(
                f"expected {own} series like the weights of your embed module, which does not cast "
                f"them, got {series.dtype}; cast one of them: series.to({own}) or "
                f"model.to({series.dtype}) (torch says: {error})"
            ) from error
        shape = (len(series), self.d_model)
        if embedded.ndim != 3 or (embedded.shape[0], embedded.shape[2]) != shape:
            raise SeriesShapeError(
                f"expected the embed module to give [batch, pos, d_model={self.d_model}], "
                f"got {list(embedded.shape)} from a series {list(series.shape)}"
            )
        if mask is not None and embedded.shape[1] != mask.shape[1]:
            raise SeriesShapeError(
                f"a mask of {mask.shape[1]} samples says nothing about the {embedded.shape[1]} "
                "positions of your embed module; masks need one position per sample there"
            )
        if _same_memory(embedded, series):
            embedded = embedded.clone()  # hooks may edit in place
        return embedded, TrunkState(pos_mask=mask)


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


class Positions(nn.Module):
    """``W_pos`` [n_ctx, d_model]: learned, or fixed sines and cosines (Vaswani et al. 2017)."""

    def __init__(self, n_ctx: int, d_model: int, learned: bool) -> None:
        super().__init__()
        self.n_ctx = n_ctx
        if learned:
            self.W_pos = nn.Parameter(torch.zeros(n_ctx, d_model))
        else:
            self.register_buffer("W_pos", sinusoids(n_ctx, d_model))

    def forward(self, n_pos: int) -> Float[Tensor, "1 pos d_model"]:
        if n_pos > self.n_ctx:
            raise SeriesShapeError(
                f"expected at most n_ctx={self.n_ctx} positions, got {n_pos}; use shorter "
                "series, or build the model with a larger n_ctx"
            )
        return self.W_pos[None, :n_pos]


def sinusoids(n_ctx: int, d_model: int) -> Float[Tensor, "pos d_model"]:
    """Sines in even and cosines in odd dimensions, wavelengths from 2 pi to 10000 * 2 pi."""
    pos = torch.arange(n_ctx, dtype=torch.float64)[:, None]
    rate = 10000.0 ** (-torch.arange(0, d_model, 2, dtype=torch.float64) / d_model)
    table = torch.zeros(n_ctx, d_model, dtype=torch.float64)
    table[:, 0::2] = torch.sin(pos * rate)
    table[:, 1::2] = torch.cos(pos * rate)[:, : d_model // 2]
    return table.float()


def make_embed(cfg: HookedTSTConfig, module: nn.Module | None) -> nn.Module:
    """The front end that the config asks for; a custom one is the module the user brings."""
    if isinstance(cfg.embed, CustomConfig):
        return CustomEmbed(brought_module("embed", cfg.embed, module), cfg.d_model)
    reject_module("embed", module)
    if isinstance(cfg.embed, FamilyPart):
        return cfg.embed.build(cfg)
    if isinstance(cfg.embed, ConvStemConfig):
        return ConvStem(cfg.embed, cfg.n_channels or 0)
    if isinstance(cfg.embed, LinearPatchesConfig):
        return LinearPatches(cfg.embed, cfg.n_channels or 0, cfg.d_model)
    return PerStep(cfg.embed, cfg.n_channels or 0, cfg.d_model)


def brought_module(part: str, cfg: CustomConfig, module: nn.Module | None) -> nn.Module:
    """The user's own module, or the error that asks for it (again)."""
    short = cfg.module_class.rsplit(".", 1)[-1]
    if module is None:
        raise ArgumentError(
            f"this model's {part} is a module of your own ({cfg.module_class}), whose code is not "
            f"saved with the weights; pass it again: "
            f"HookedTST.from_pretrained(..., {part}=<your {short}>)"
        )
    if not isinstance(module, nn.Module):
        got = f"the class {module.__name__}" if isinstance(module, type) else repr(module)
        raise ArgumentError(f"expected {part}= to be a torch module, a {short}(...), got {got}")
    return module


def reject_module(part: str, module: nn.Module | None) -> None:
    """Raise :class:`ArgumentError` if a module was given to a model that brings its own."""
    if module is not None:
        raise ArgumentError(f"{part}= was given, but this model brings its own {part}")


class RelativeBias(nn.Module):
    """A learned number per head for each bucket of ``key - query``, added to every layer's scores.

    Half of the buckets hold one distance each, the others grow logarithmically up to
    ``max_distance``; where attention runs both ways, half of them are for keys that come later.

    Source: Raffel et al. 2020, "Exploring the limits of transfer learning with a unified
    text-to-text transformer" (T5).
    """

    def __init__(self, n_heads: int, n_buckets: int, max_distance: int, causal: bool) -> None:
        super().__init__()
        self.n_buckets, self.max_distance, self.causal = n_buckets, max_distance, causal
        self.weight = nn.Parameter(torch.zeros(n_buckets, n_heads))

    def forward(self, n_pos: int) -> Float[Tensor, "1 head query key"]:
        pos = torch.arange(n_pos, device=self.weight.device)
        bucket = self.bucket(pos[None, :] - pos[:, None])
        return self.weight[bucket].permute(2, 0, 1)[None]

    def bucket(self, distance: Tensor) -> Tensor:
        """The bucket of every ``key - query``."""
        n_buckets = self.n_buckets
        if self.causal:
            first, distance = torch.zeros_like(distance), (-distance).clamp(min=0)
        else:
            n_buckets //= 2
            first, distance = (distance > 0).long() * n_buckets, distance.abs()
        exact = n_buckets // 2
        ratio = torch.log(distance.float().clamp(min=1) / exact) / math.log(
            self.max_distance / exact
        )
        far = (exact + (ratio * (n_buckets - exact)).long()).clamp(max=n_buckets - 1)
        return first + torch.where(distance < exact, distance, far)


def rotate(x: PerHead, positions: Tensor | None, base: float) -> PerHead:
    """Turn dimension pairs ``(i, i + d_head / 2)`` of every head by ``position * base^(-2i/d)``.

    Args:
        x: [row, pos, head, d_head].
        positions: int [row, pos]; None counts from 0.
        base: of the wavelengths.

    Source: Su et al. 2021, "RoFormer", in the layout of Hugging Face's models.
    """
    half = x.shape[-1] // 2
    if positions is None:
        positions = torch.arange(x.shape[1], device=x.device)[None]
    power = torch.arange(0, 2 * half, 2, device=x.device, dtype=torch.float32) / (2 * half)
    rate = 1.0 / base**power
    angle = positions[:, :, None, None].float() * rate  # [row, pos, 1, half]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def with_covariates(embed: Any, series: Tensor, covariates: Any) -> Tensor:
    """:meth:`tstlens.HookedTST.with_covariates`, for a front end's config."""
    if covariates is not None and not isinstance(covariates, Mapping):
        raise ArgumentError(
            f"expected covariates as a dict of tensors by name, got {type(covariates).__name__}"
        )
    join = getattr(embed, "join", None)
    if join is not None and isinstance(series, Tensor) and series.ndim == 3:
        return join(series, covariates)
    if covariates is not None and join is None:
        raise ArgumentError(
            f"this model takes no covariates, got {', '.join(covariates) or 'none in a dict'}; "
            "leave covariates= out"
        )
    return series
