"""Family ``chronos-bolt``: ``ChronosBoltModelForForecasting`` of chronos-forecasting.

| source (chronos.chronos_bolt)                | here                                              |
|----------------------------------------------|---------------------------------------------------|
| ``instance_norm``                            | ``embed.hook_loc``, ``embed.hook_scale``,         |
|                                              | ``embed.hook_scaled``; carried by ``TrunkState``  |
| ``patch`` (values, mask)                     | ``embed.hook_patches``, ``embed.hook_observed``   |
| ``input_patch_embedding``                    | ``embed.block`` (``hook_pre``, ``hook_post``)     |
| ``shared``: token 0, token 1 (REG)           | ``embed.start_token``, ``embed.reg_token``        |
| ``encoder`` (T5 stack)                       | ``encoder`` (see ``t5_layers``),                  |
|                                              | ``encoder_final_ln``, ``hook_encoded``            |
| the decoder's input                          | ``hook_decoder_embed``                            |
| ``decoder`` (T5 stack)                       | ``decoder``, ``decoder_final_ln``                 |
| ``output_patch_embedding``                   | ``head.block``, ``head.hook_quantiles``           |

Covered: the whole configuration of a Bolt model: REG token or none, patches that overlap, any
quantiles, series of any length up to the context, missing values, padding at the start. Several
channels go through the model one by one; their count belongs to the series, so give
``n_channels=``. ``mask`` and NaN are the same thing. Output: [batch, channel, horizon, quantile].

The decoder has one position, which attends to itself alone: queries, keys, scores and position
bias of its self-attention cannot change anything, as in the source.

Refused: series longer than the context (the source cuts them without a word), subclasses.
Horizons beyond ``prediction_length`` are the pipeline's (it feeds quantiles back), not the model's.

Front end and head of Chronos-Bolt: scaled patches with their masks in, quantiles out.

Every channel is scaled by its own mean and standard deviation and goes through the trunk by itself.
Missing values (NaN, or False in the mask: both are the same here) are zeros that the patch's mask
tells apart; a patch without any observed sample is padding to attention. A series that is no whole
number of patches begins with missing values. A special token may stand after the last patch
(``use_reg_token``); the decoder starts from one token, the same for all series.

Source: Ansari et al. 2024, "Chronos: Learning the language of time series", arXiv 2403.07815, and
the package chronos-forecasting.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tstlens.errors import ArgumentError, UnsupportedSourceError
from tstlens.model import HookedTST, HookedTSTConfig
from tstlens.model.norms import watched
from tstlens.model.parts import ActFn, one_of, positive
from tstlens.model.reading import Quantiles, Reading
from tstlens.model.state import TrunkState
from tstlens.points import Hook
from tstlens.shapes import Mask, Output, Residual, Series
from tstlens.zoo.comparing import Tap
from tstlens.zoo.layers import fill
from tstlens.zoo.parity import Trial, context_trials
from tstlens.zoo.parts import EndingPatches, ResidualMLP, observed_in, per_channel
from tstlens.zoo.parts import observed_mean_and_std as mean_and_std
from tstlens.zoo.registry import Built, register_classes
from tstlens.zoo.t5 import (
    activation,
    dotted,
    fill_stack,
    in_full_precision,
    read_t5,
    showing_patterns,
    stack_taps,
)
from tstlens.zoo.transformers_source import (
    block_weights,
    embedding_taps,
    last,
    live_or_rebuilt,
    rebuilder,
)


@dataclass(frozen=True)
class BoltPatchesConfig(EndingPatches):
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

    def time_span(self, pos: int, n_time: int) -> slice:
        """Samples that position ``pos`` was embedded from; none for the special token."""
        if pos == self.n_patches(n_time):
            return slice(0, 0)
        start = pos * self.stride - self.missing_before(n_time)
        return slice(max(start, 0), max(start + self.patch_len, 0))

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

    @property
    def reading(self) -> Reading:
        """How forecasts are read off the output."""
        return Quantiles(self.quantiles, unrolls=True)

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
        self.block = ResidualMLP(
            2 * cfg.patch_len, cfg.d_hidden, d_model, cfg.act_fn, "batch channel pos"
        )
        if cfg.reg_token:
            self.reg_token = nn.Parameter(torch.zeros(d_model))
        self.start_token = nn.Parameter(torch.zeros(d_model))
        self.hook_loc = Hook("batch channel 1")
        self.hook_scale = Hook("batch channel 1")
        self.hook_scaled = Hook("batch channel time")
        self.hook_patches = Hook("batch channel pos patch_len")
        self.hook_observed = Hook("batch channel pos patch_len")

    def forward(self, series: Series, mask: Mask | None) -> tuple[Residual, TrunkState]:
        n_rows, n_channels = len(series) * series.shape[1], series.shape[1]
        observed = observed_in(series, mask)
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
        self.block = ResidualMLP(d_model, cfg.d_hidden, n_out, cfg.act_fn, "row")
        self.hook_pooled = Hook("row d_model")
        self.hook_quantiles = Hook("batch channel time quantile")  # scaled

    def forward(self, residual: Residual, state: TrunkState) -> Output:
        out = self.block(self.hook_pooled(residual[:, 0]))
        by_level = out.unflatten(1, (len(self.cfg.quantiles), self.cfg.horizon)).transpose(1, 2)
        scaled = self.hook_quantiles(by_level.unflatten(0, (-1, state.n_series_channels)))
        loc, scale = per_channel(state, "loc", "scale")
        return scaled * scale + loc


_CLASS = "chronos.chronos_bolt.ChronosBoltModelForForecasting"
_TIED = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_REBUILD = rebuilder(_CLASS, "transformers.T5Config", "chronos-bolt", _TIED)


def build(
    source: nn.Module | Mapping[str, Tensor],
    n_channels: int = 1,
    config: Mapping[str, Any] | None = None,
) -> Built:
    """Convert a Chronos-Bolt model.

    Args:
        source: the model (of a pipeline, ``pipeline.model``), or its state dict.
        n_channels: channels of the series it will be given.
        config: the entries of its ``config.json`` (state dict only, needed there).
    """
    whole = live_or_rebuilt(source, config, _REBUILD)
    if "forward" in vars(whole):
        raise UnsupportedSourceError(f"this {dotted(whole)} has a forward of its own")
    own, t5 = whole.chronos_config, whole.config
    options, decoder = read_t5(whole.encoder), read_t5(whole.decoder)
    act_fn: Any = activation(t5.dense_act_fn, "feed_forward_proj")
    cfg = HookedTSTConfig(
        embed=BoltPatchesConfig(
            patch_len=own.input_patch_size,
            stride=own.input_patch_stride,
            context_length=own.context_length,
            d_hidden=t5.d_ff,
            act_fn=act_fn,
            reg_token=bool(own.use_reg_token),
            flat_scale=whole.instance_norm.eps,
        ),
        head=BoltHeadConfig(
            horizon=own.prediction_length,
            quantiles=tuple(own.quantiles),
            d_hidden=t5.d_ff,
            act_fn=act_fn,
        ),
        n_channels=n_channels,
        n_decoder_layers=decoder["n_layers"],
        model_name="Chronos-Bolt",
        **{**options, "n_layers": options["n_layers"] + decoder["n_layers"]},
    )
    weight = whole.shared.weight
    model = HookedTST(cfg).to(device=weight.device, dtype=weight.dtype)
    _fill_model(model, whole)
    return Built(model, whole, _trials(cfg), dotted(whole))


@torch.no_grad()
def _fill_model(model: HookedTST, source: Any) -> None:
    tokens = {"start_token": source.shared.weight[source.config.decoder_start_token_id]}
    if source.chronos_config.use_reg_token:
        tokens["reg_token"] = source.shared.weight[source.config.reg_token_id]
    fill(model.embed, tokens)
    fill(model.embed, block_weights(source.input_patch_embedding))
    fill(model.head, block_weights(source.output_patch_embedding))
    fill_stack(model.encoder, model.position_bias, model.encoder_final_ln, source.encoder)
    fill_stack(model.decoder, model.decoder_position_bias, model.decoder_final_ln, source.decoder)


def run(source: Any, series: Tensor, mask: Tensor | None) -> Tensor:
    """The source's quantiles [batch, channel, horizon, quantile] for a series."""
    if mask is not None:
        series = series.masked_fill(~mask[:, None], torch.nan)
    with chronos_in_full_precision(source, series.dtype), showing_patterns(source):
        out = source(context=series.flatten(0, 1)).quantile_preds
    return out.unflatten(0, series.shape[:2]).transpose(2, 3)


@contextmanager
def chronos_in_full_precision(source: Any, dtype: torch.dtype) -> Iterator[None]:
    """In float64, the source's scaler computes in float64 too, and so do its norms."""
    scaler = source.instance_norm
    try:
        if dtype == torch.float64:
            scaler.forward = partial(_scaled, scaler)
            scaler.inverse = partial(_unscaled, scaler)
        with in_full_precision(source, dtype):
            yield
    finally:
        if dtype == torch.float64:
            del scaler.forward, scaler.inverse


def _scaled(scaler: Any, x: Tensor, loc_scale: Any = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    loc = torch.nan_to_num(torch.nanmean(x, dim=-1, keepdim=True), nan=0.0)
    scale = torch.nan_to_num((x - loc).square().nanmean(dim=-1, keepdim=True).sqrt(), nan=1.0)
    scale = torch.where(scale == 0, scaler.eps, scale)
    scaled = (x - loc) / scale
    return scaled.arcsinh() if scaler.use_arcsinh else scaled, (loc, scale)


def _unscaled(scaler: Any, x: Tensor, loc_scale: tuple[Tensor, Tensor]) -> Tensor:
    return (x.sinh() if scaler.use_arcsinh else x) * loc_scale[1] + loc_scale[0]


def _trials(cfg: HookedTSTConfig) -> tuple[Trial, ...]:
    embed: Any = cfg.embed
    kinds = ["large", "constant", "missing", "padded", "shorter"]
    kinds += ["empty"] if embed.reg_token else []
    least = 2 * embed.patch_len  # strides may drop the last samples
    return context_trials(embed, cfg.n_channels, partial(run, mask=None), kinds, 32, least)


def taps(source: Any, model: HookedTST) -> list[Tap]:
    """Where a Chronos-Bolt model computes our activations."""
    width, path = source.chronos_config.input_patch_size, "input_patch_embedding"
    return [
        *embedding_taps(path, width, model.by_channel, "hidden_layer", "observed"),
        *stack_taps("encoder", "encoder", source.encoder, model),
        Tap("hook_encoded", "encoder.final_layer_norm"),
        *stack_taps("decoder", "decoder", source.decoder, model),
        Tap("head.hook_pooled", "decoder.final_layer_norm", last),
        Tap("head.block.hook_pre", "output_patch_embedding.hidden_layer", last),
    ]


def reads(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is a Chronos-Bolt model's."""
    return "input_patch_size" in config.get("chronos_config", {}) and (
        _CLASS.rsplit(".", 1)[1] in (config.get("architectures") or ())
    )


FAMILY = register_classes("chronos-bolt", (_CLASS,), build, run, taps, reads=reads, folders=True)
