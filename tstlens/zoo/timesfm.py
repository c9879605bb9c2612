"""Family ``timesfm``: TimesFM 2.0, ``TimesFmModelForPrediction`` of Hugging Face transformers.

| source (``decoder`` and head)               | here                                             |
|---------------------------------------------|--------------------------------------------------|
| ``_forward_transform``                      | ``embed.hook_loc``, ``embed.hook_scale``,        |
|                                             | ``embed.hook_scaled``; carried by ``TrunkState`` |
| patches and 1 - their padding               | ``embed.hook_patches``, ``embed.hook_observed``  |
| ``input_ff_layer``                          | ``embed.block`` (``hook_pre``, ``hook_post``)    |
| ``position_emb`` (off by default)           | ``embed.hook_pos_embed``                         |
| ``freq_emb``                                | ``embed.W_freq``, ``embed.hook_freq``            |
| ``layers.{l}``: the input                   | ``blocks.{l}.hook_resid_pre``                    |
| ``input_layernorm`` (RMS)                   | ``ln1``                                          |
| ``self_attn`` q, k, v, o                    | ``attn``, ``attn.hook_q/k/v``, ``hook_pattern``, |
|                                             | ``hook_z``, ``hook_attn_out``                    |
| ``self_attn.scaling`` (per dimension)       | ``attn.q_scale`` (after ``hook_q``)              |
| ``mlp.layer_norm`` (LayerNorm)              | ``ln2``                                          |
| ``mlp.gate_proj``, ReLU, ``mlp.down_proj``  | ``mlp``, ``hook_mlp_out``                        |
| the layer's output                          | ``hook_resid_post``                              |
| ``horizon_ff_layer``                        | ``head.block``, ``head.hook_quantiles``          |

Covered: every option of the config; series of any length up to the context; padding before a
series (shorter series, to the source) and missing values anywhere else (``mask`` and NaN are the
same thing; to the source they are ``config.pad_val``). Several channels go through the model one
by one; their count belongs to the series, so give ``n_channels=``. ``freq=`` is the kind of
sampling frequency of all series, 0 as in the source. ``output=``: ``"quantiles"``
[batch, channel, horizon, quantile], ``"point"`` (the source's ``mean_predictions``)
[batch, channel, horizon], or ``"both"`` (its ``full_predictions``).

The source pads every series to the whole context with patches that no observed one sees; here they
are left out. At a patch without observed samples the source computes something else (no MLP,
attention to the future), which nothing reads.

Refused: series longer than the context (the source cuts them without a word); a last patch without
observed samples (the source reads its forecast from that padded position); ``rms_norm_eps`` other
than the 1e-6 of the LayerNorms; odd ``hidden_size`` with positions (fails upstream); changed parts
and subclasses. ``window_size``, ``truncate_negative`` and forecasts on the context are arguments of
the source's ``forward``, not of the model; call the source for them.

Front end and head of TimesFM 2.0: scaled patches with their masks in, mean and quantiles out.

Every channel goes through the trunk by itself, scaled by the mean and standard deviation of its
first patch with at least three observed samples. Missing values (NaN, or False in the mask: both
are the same here) are zeros that the patch's mask tells apart; a patch without any observed sample
is padding to attention. A series that is no whole number of patches begins with missing values.

Source: Das et al. 2024, "A decoder-only foundation model for time-series forecasting", arXiv
2310.10688, as transformers ports it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tstlens.errors import ArgumentError, SeriesValueError, UnsupportedSourceError
from tstlens.model import HookedTST, HookedTSTConfig
from tstlens.model.norms import watched
from tstlens.model.parts import ActFn, one_of, positive
from tstlens.model.reading import Points, Quantiles, Reading
from tstlens.model.state import TrunkState
from tstlens.points import Hook
from tstlens.shapes import Mask, Output, Residual, Series
from tstlens.zoo.comparing import Tap
from tstlens.zoo.layers import RESID_POST, RESID_PRE, LayerTable, fill
from tstlens.zoo.parity import Trial, context_trials
from tstlens.zoo.parts import EndingPatches, ResidualMLP, first_place, per_channel, root
from tstlens.zoo.registry import Built, register_classes
from tstlens.zoo.t5 import dotted
from tstlens.zoo.transformers_source import (
    ATTENTION,
    as_compared,
    attention_taps,
    block_weights,
    embedding_taps,
    last,
    live_or_rebuilt,
    rebuilder,
    refuse_changed_parts,
)

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

    @property
    def reading(self) -> Reading:
        """How forecasts are read off the output."""
        return read_columns(self.quantiles, self.output)

    def build(self, cfg: Any) -> nn.Module:
        """The head, with new weights."""
        return TimesFMHead(self, cfg.d_model)


def read_columns(quantiles: tuple[float, ...], output: str) -> Reading:
    """How a forecast of one of :data:`OUTPUTS` is read."""
    return Points() if output == "point" else Quantiles(quantiles, mean_first=output == "both")


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
        self.block = ResidualMLP(
            2 * cfg.patch_len, cfg.d_hidden, d_model, "silu", "batch channel pos"
        )
        self.W_freq = nn.Parameter(torch.zeros(cfg.n_freq, d_model))
        self.hook_loc = Hook("batch channel 1")
        self.hook_scale = Hook("batch channel 1")
        self.hook_scaled = Hook("batch channel time")
        self.hook_patches = Hook("batch channel pos patch_len")
        self.hook_observed = Hook("batch channel pos patch_len")
        self.hook_freq = Hook("batch channel d_model")
        if cfg.sinusoids:
            shortest, longest = cfg.timescales
            power = torch.arange(d_model // 2) / max(d_model // 2 - 1, 1)
            self.register_buffer("rates", shortest * (longest / shortest) ** -power)
            self.hook_pos_embed = Hook("batch channel pos d_model")

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
        self.block = ResidualMLP(d_model, cfg.d_hidden, n_out, cfg.act_fn, "row")
        self.hook_pooled = Hook("row d_model")
        self.hook_quantiles = Hook("batch channel time output")  # scaled

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


_PACKAGE = "transformers.models.timesfm.modeling_timesfm"
_CLASS = f"{_PACKAGE}.TimesFmModelForPrediction"
_REBUILD = rebuilder(_CLASS, "transformers.TimesFmConfig", "timesfm")
_LAYER = LayerTable(
    ATTENTION
    | {
        "ln1": "input_layernorm",
        "ln2": "mlp.layer_norm",
        "mlp.in": "mlp.gate_proj",
        "mlp.out": "mlp.down_proj",
    },
    (RESID_PRE, Tap("hook_resid_mid", "mlp", of="input"), RESID_POST),
)
_EPS = 1e-6  # of the MLPs' LayerNorms, fixed in the source


def build(
    source: nn.Module | Mapping[str, Tensor],
    n_channels: int = 1,
    freq: int = 0,
    output: str = "quantiles",
    config: Mapping[str, Any] | None = None,
) -> Built:
    """Convert a TimesFM 2.0 model.

    Args:
        source: the model, or its state dict.
        n_channels: channels of the series it will be given.
        freq: the kind of sampling frequency of all series.
        output: what a forecast holds.
        config: the entries of its ``config.json`` (state dict only, needed there).
    """
    whole = live_or_rebuilt(source, config, _REBUILD)
    refuse_changed_parts(whole, _PACKAGE)
    own = whole.config
    if own.rms_norm_eps != _EPS:
        raise UnsupportedSourceError(
            f"rms_norm_eps: expected {_EPS}, the eps of the MLPs' LayerNorms, got "
            f"{own.rms_norm_eps}; blocks have one eps for all norms"
        )
    if own.use_positional_embedding and own.hidden_size % 2:
        raise UnsupportedSourceError(
            f"use_positional_embedding with hidden_size={own.hidden_size}: fails upstream, its "
            "sines and cosines need an even width"
        )
    if own.context_length % own.patch_length:
        raise UnsupportedSourceError(
            f"context_length={own.context_length} is no multiple of patch_length="
            f"{own.patch_length}, which fails upstream"
        )
    cfg = HookedTSTConfig(
        n_layers=own.num_hidden_layers,
        d_model=own.hidden_size,
        n_heads=own.num_attention_heads,
        d_head=own.head_dim,
        d_mlp=own.intermediate_size,
        embed=TimesFMPatchesConfig(
            patch_len=own.patch_length,
            context_length=own.context_length,
            d_hidden=own.intermediate_size,
            n_freq=own.freq_size,
            freq=freq,
            sinusoids=own.use_positional_embedding,
            timescales=(float(own.min_timescale), float(own.max_timescale)),
            tolerance=float(own.tolerance),
            pad_value=float(own.pad_val),
        ),
        head=TimesFMHeadConfig(
            horizon=own.horizon_length,
            quantiles=tuple(own.quantiles),
            d_hidden=own.intermediate_size,
            output=output,
        ),
        n_channels=n_channels,
        normalization_type="RMS",
        mlp_normalization_type="LN",
        eps=_EPS,
        attn_scale=1.0,
        query_scale=True,
        causal=True,
        model_name="TimesFM 2.0",
    )
    weight = whole.horizon_ff_layer.input_layer.weight
    model = HookedTST(cfg).to(device=weight.device, dtype=weight.dtype)
    _fill_model(model, whole)
    return Built(model, whole, _trials(model), dotted(whole))


@torch.no_grad()
def _fill_model(model: HookedTST, source: Any) -> None:
    decoder = source.decoder
    embed = {"W_freq": decoder.freq_emb.weight, **block_weights(decoder.input_ff_layer)}
    if source.config.use_positional_embedding:
        embed["rates"] = decoder.position_emb.inv_timescales
    fill(model.embed, embed)
    fill(model.head, block_weights(source.horizon_ff_layer))
    for block, layer in zip(model.blocks, decoder.layers, strict=True):
        _LAYER.fill(block, layer.state_dict())


def run(source: Any, series: Tensor, mask: Tensor | None, model: HookedTST) -> Tensor:
    """The source's forecast in the converted model's layout.

    The source is told to look back no further than the series reach: what lies before is padding
    that nothing sees.
    """
    embed: Any = model.cfg.embed
    if mask is not None:
        series = series.masked_fill(~mask[:, None], torch.nan)
    given = torch.where(series.isnan(), embed.pad_value, series)
    rows = list(given.flatten(0, 1))
    reach = embed.n_pos(series.shape[2]) * embed.patch_len
    with as_compared(source, series.dtype):
        out = source(past_values=rows, freq=[embed.freq] * len(rows), forecast_context_len=reach)
    return chosen_output(out, model).unflatten(0, series.shape[:2])


def chosen_output(out: Any, model: HookedTST) -> Tensor:
    """What the converted model gives, of a TimesFM model's output."""
    head: Any = model.cfg.head
    if head.output == "point":
        return out.mean_predictions
    return out.full_predictions[..., 1 if head.output == "quantiles" else 0 :]


def _trials(model: HookedTST) -> tuple[Trial, ...]:
    kinds = ("large", "constant", "missing inside", "padded", "shorter")
    theirs = partial(run, mask=None, model=model)
    return context_trials(model.cfg.embed, model.cfg.n_channels, theirs, kinds)


def taps(source: Any, model: HookedTST) -> list[Tap]:
    """Where a TimesFM 2.0 model computes our activations (patterns in float32 only)."""
    width = source.config.patch_length
    found = embedding_taps("decoder.input_ff_layer", width, model.by_channel)
    for number in range(model.cfg.n_layers):
        found += attention_taps(_LAYER, model, f"blocks.{number}", f"decoder.layers.{number}")
    return [
        *found,
        Tap("head.hook_pooled", "horizon_ff_layer", last, "input"),
        Tap("head.block.hook_pre", "horizon_ff_layer.input_layer", last),
    ]


FAMILY = register_classes("timesfm", (_CLASS,), build, run, taps, folders=True)
