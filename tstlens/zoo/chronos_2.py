"""Family ``chronos-2``: ``Chronos2Model`` of chronos-forecasting.

| source (chronos.chronos2)                    | here                                              |
|----------------------------------------------|---------------------------------------------------|
| ``instance_norm``                            | ``embed.hook_loc``, ``embed.hook_scale``,         |
|                                              | ``embed.hook_scaled``; carried by ``TrunkState``  |
| time encoding, patches, masks                | ``embed.hook_times``, ``embed.hook_patches``,     |
|                                              | ``embed.hook_observed``                           |
| ``input_patch_embedding``                    | ``embed.block`` (``hook_pre``, ``hook_post``)     |
| ``shared``: token 1 (REG)                    | ``embed.reg_token``                               |
| ``encoder.block.{l}``: the input             | ``blocks.{l}.hook_resid_pre``                     |
| ``layer.0`` time attention (rotary)          | ``ln1``, ``attn``, ``hook_attn_out``              |
| ``layer.1`` group attention (along the batch)| ``ln2``, ``channel_attn``,                        |
|                                              | ``hook_channel_attn_out``                         |
| ``layer.2`` MLP                              | ``ln3``, ``mlp``, ``hook_mlp_out``                |
| the block's output                           | ``hook_resid_post``                               |
| ``encoder.final_layer_norm``                 | ``ln_final``                                      |
| ``output_patch_embedding``                   | ``head.patch_block``, ``head.hook_quantiles``     |

**Groups.** The channels of one series are one group (``group_ids``), and groups do not see each
other, as ``predict`` does with series of several channels. For channels that are forecast one by
one convert with ``n_channels=1`` and give them as series. Group attention has no order: its pattern
is [batch, pos, head, query channel, key channel].

Covered: the whole config with REG token, patches that overlap, series of any length up to the
context, missing values, padding at the start; ``num_output_patches=`` of horizon, 1 as in the
source. ``mask`` and NaN are the same thing. Output: [batch, channel, horizon, quantile]. A position
of which no channel of the group has a sample is nothing that anybody reads; the source computes
something else there (it lets it attend to the whole batch).

Refused: ``use_reg_token=False`` (fails upstream); series longer than the context (the source cuts
them without a word); subclasses and changed parts. Future covariates are an argument of the
source's ``forward`` which is not offered here (a hook at ``embed.hook_patches`` and
``embed.hook_observed`` can write scaled values into the patches of the horizon).
``model.forecast`` takes any horizon up to the pipeline's ``max_output_patches``; beyond it the
pipeline feeds weighted quantiles back.

Front end and head of Chronos-2: patches with their times and masks in, quantiles of patches out.

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

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
from tstlens.zoo.chronos_bolt import (
    BoltPatchesConfig,
    chronos_in_full_precision,
    location_and_scale,
)
from tstlens.zoo.comparing import Tap
from tstlens.zoo.layers import RESID_PRE, LayerTable, fill
from tstlens.zoo.parity import Trial, context_trials
from tstlens.zoo.parts import ResidualMLP, observed_in, per_channel
from tstlens.zoo.registry import Built, register_classes
from tstlens.zoo.t5 import activation, dotted
from tstlens.zoo.transformers_source import (
    block_weights,
    live_or_rebuilt,
    rebuilder,
    refuse_changed_parts,
)


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
        most_patches: patches of the horizon that its pipeline forecasts in one go.
    """

    horizon: int
    patch_len: int
    quantiles: tuple[float, ...]
    d_hidden: int
    act_fn: ActFn = "relu"
    arcsinh: bool = False
    most_patches: int = 64
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

    @property
    def reading(self) -> Reading:
        """How forecasts are read off the output."""
        return Quantiles(self.quantiles)

    @contextmanager
    def reaching(self, model: Any, horizon: int) -> Iterator[None]:
        """The model with as many patches of horizon as these steps take, for a while.

        Raises:
            ArgumentError: more patches than the source forecasts in one go.
        """
        n_patches = -(-horizon // self.patch_len)
        if n_patches > self.most_patches:
            raise ArgumentError(
                f"the model forecasts {self.most_patches * self.patch_len} steps in one go, got "
                f"horizon={horizon}; beyond them its pipeline weighs paths, which is not offered"
            )
        before = model.cfg.embed, model.cfg.head
        try:
            model.cfg.embed = model.embed.cfg = replace(before[0], n_future=n_patches)
            model.cfg.head = model.head.cfg = replace(self, horizon=n_patches * self.patch_len)
            yield
        finally:
            model.cfg.embed = model.embed.cfg = before[0]
            model.cfg.head = model.head.cfg = before[1]

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
        self.block = ResidualMLP(
            3 * cfg.patch_len, cfg.d_hidden, d_model, cfg.act_fn, "batch channel pos"
        )
        self.reg_token = nn.Parameter(torch.zeros(d_model))
        self.hook_loc = Hook("batch channel 1")
        self.hook_scale = Hook("batch channel 1")
        self.hook_scaled = Hook("batch channel time")
        self.hook_times = Hook("batch channel pos patch_len")
        self.hook_patches = Hook("batch channel pos patch_len")
        self.hook_observed = Hook("batch channel pos patch_len")

    def forward(self, series: Series, mask: Mask | None) -> tuple[Residual, TrunkState]:
        n_channels = series.shape[1]
        observed = observed_in(series, mask)
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
        self.patch_block = ResidualMLP(d_model, cfg.d_hidden, n_out, cfg.act_fn, "row pos")
        self.hook_future = Hook("row pos d_model")
        self.hook_quantiles = Hook("batch channel time quantile")  # scaled

    def forward(self, residual: Residual, state: TrunkState) -> Output:
        loc, scale = per_channel(state, "loc", "scale")
        n_future = self.cfg.horizon // self.cfg.patch_len
        out = self.patch_block(
            self.hook_future(residual[:, -n_future:])
        )  # [row, pos, quantile * step]
        by_level = out.unflatten(2, (len(self.cfg.quantiles), -1)).transpose(2, 3).flatten(1, 2)
        scaled = self.hook_quantiles(by_level.unflatten(0, (-1, state.n_series_channels)))
        return (scaled.sinh() if self.cfg.arcsinh else scaled) * scale + loc


_CLASS = "chronos.chronos2.model.Chronos2Model"
_REBUILD = rebuilder(_CLASS, "chronos.chronos2.config.Chronos2CoreConfig", "chronos-2")
_ATTENTIONS = {"attn": "layer.0.self_attention", "channel_attn": "layer.1.self_attention"}
_LAYER = LayerTable(
    {
        **{
            f"{name}.{letter}": f"{path}.{letter.lower()}"
            for name, path in _ATTENTIONS.items()
            for letter in "QKVO"
        },
        **{f"ln{i + 1}": f"layer.{i}.layer_norm" for i in range(3)},
        "mlp.in": "layer.2.mlp.wi",
        "mlp.out": "layer.2.mlp.wo",
    },
    (
        RESID_PRE,
        Tap("hook_resid_mid_channel", "layer.2", of="input"),
        Tap("hook_resid_post", "layer.2"),
    ),
)


def build(
    source: nn.Module | Mapping[str, Tensor],
    n_channels: int = 1,
    num_output_patches: int = 1,
    config: Mapping[str, Any] | None = None,
) -> Built:
    """Convert a Chronos-2 model.

    Args:
        source: the model (of a pipeline, ``pipeline.model``), or its state dict.
        n_channels: channels of the series it will be given; they form one group.
        num_output_patches: patches of the horizon.
        config: the entries of its ``config.json`` (state dict only, needed there).
    """
    whole = live_or_rebuilt(source, config, _REBUILD)
    refuse_changed_parts(whole, "chronos.chronos2", "chronos.chronos_bolt")
    own, core = whole.chronos_config, whole.config
    if not own.use_reg_token:
        raise UnsupportedSourceError(
            "use_reg_token=False: fails upstream, whose forward counts on the token"
        )
    act_fn: Any = activation(core.dense_act_fn, "feed_forward_proj")
    arcsinh = bool(own.use_arcsinh)
    cfg = HookedTSTConfig(
        n_layers=core.num_layers,
        d_model=core.d_model,
        n_heads=core.num_heads,
        d_head=core.d_kv,
        d_mlp=core.d_ff,
        embed=Chronos2PatchesConfig(
            patch_len=own.input_patch_size,
            stride=own.input_patch_stride,
            context_length=own.context_length,
            d_hidden=core.d_ff,
            act_fn=act_fn,
            flat_scale=whole.instance_norm.eps,
            n_future=num_output_patches,
            time_scale=own.time_encoding_scale,
            arcsinh=arcsinh,
        ),
        head=Chronos2HeadConfig(
            horizon=num_output_patches * own.output_patch_size,
            patch_len=own.output_patch_size,
            quantiles=tuple(own.quantiles),
            most_patches=own.max_output_patches,
            d_hidden=core.d_ff,
            act_fn=act_fn,
            arcsinh=arcsinh,
        ),
        n_channels=n_channels,
        act_fn=act_fn,
        normalization_type="RMS",
        eps=core.layer_norm_epsilon,
        final_norm=True,
        attn_scale=1.0,
        attn_bias=False,
        mlp_bias=False,
        rotary_base=float(core.rope_theta),
        second_attention="channel",
        model_name="Chronos-2",
    )
    weight = whole.shared.weight
    model = HookedTST(cfg).to(device=weight.device, dtype=weight.dtype)
    _fill_model(model, whole)
    return Built(model, whole, _trials(model), dotted(whole))


@torch.no_grad()
def _fill_model(model: HookedTST, source: Any) -> None:
    fill(model.embed, {"reg_token": source.shared.weight[source.config.reg_token_id]})
    fill(model.embed, block_weights(source.input_patch_embedding))
    fill(model.head, block_weights(source.output_patch_embedding, "patch_block"))
    for block, layer in zip(model.blocks, source.encoder.block, strict=True):
        _LAYER.fill(block, layer.state_dict())
    fill(model.ln_final, {"w": source.encoder.final_layer_norm.weight})


def run(source: Any, series: Tensor, mask: Tensor | None, model: HookedTST) -> Tensor:
    """The source's quantiles [batch, channel, horizon, quantile], a group for each series."""
    if mask is not None:
        series = series.masked_fill(~mask[:, None], torch.nan)
    n_series, n_channels = series.shape[:2]
    embed: Any = model.cfg.embed
    with _as_compared(source, series.dtype):
        out = source(
            context=series.flatten(0, 1),
            group_ids=torch.arange(n_series, device=series.device).repeat_interleave(n_channels),
            num_output_patches=embed.n_future,
            output_attentions=series.dtype == torch.float32,
        ).quantile_preds
    return out.unflatten(0, (n_series, n_channels)).transpose(2, 3)


@contextmanager
def _as_compared(source: Any, dtype: torch.dtype) -> Iterator[None]:
    """In float64 all digits count: attention that gives its pattern rounds to float32."""
    config = source.encoder.block[0].layer[0].self_attention.config
    before = config._attn_implementation
    try:
        if dtype == torch.float64:
            config._attn_implementation = "sdpa"
        with chronos_in_full_precision(source, dtype):
            yield
    finally:
        config._attn_implementation = before


def _trials(model: HookedTST) -> tuple[Trial, ...]:
    kinds = ("large", "constant", "missing", "padded", "shorter", "empty")
    theirs = partial(run, mask=None, model=model)
    return context_trials(model.cfg.embed, model.cfg.n_channels, theirs, kinds)


def taps(source: Any, model: HookedTST) -> list[Tap]:
    """Where a Chronos-2 model computes our activations (patterns in float32 only)."""
    n_channels = model.cfg.n_channels or 1

    def from_groups(seen: Tensor) -> Tensor:  # [pos, row, ...] as [row, pos, ...]
        return seen.transpose(0, 1)

    def in_groups(seen: Any) -> Tensor:  # [pos, head, row, row] as [batch, pos, head, query, key]
        apart = seen.attn_weights.unflatten(3, (-1, n_channels)).unflatten(2, (-1, n_channels))
        return torch.einsum("phbqbk->bphqk", apart)

    table = _LAYER
    if model.cfg.dtype == torch.float32:
        shown = {"attn": lambda seen: seen.attn_weights, "channel_attn": in_groups}
        patterns = (Tap(f"{n}.hook_pattern", _ATTENTIONS[n], by) for n, by in shown.items())
        table = replace(table, taps=(*table.taps, *patterns))
    found = [Tap("hook_embed", "encoder.block.0", of="input", observed_only=True)]
    for number in range(model.cfg.n_layers):
        here, there = f"blocks.{number}", f"encoder.block.{number}"
        found += table.find(model, here, there, {"channel_attn": from_groups}, True)
    return [
        *found,
        Tap("head.hook_future", "output_patch_embedding", of="input"),
        Tap("head.patch_block.hook_pre", "output_patch_embedding.hidden_layer"),
    ]


FAMILY = register_classes("chronos-2", (_CLASS,), build, run, taps, folders=True)
