"""Family ``timesfm-2.5``: ``TimesFm2_5ModelForPrediction`` of Hugging Face transformers.

| source (``model`` and heads)                | here                                             |
|---------------------------------------------|--------------------------------------------------|
| ``_revin`` of the whole context             | ``embed.hook_loc``, ``embed.hook_scale``,        |
|                                             | ``embed.hook_scaled``; carried by ``TrunkState`` |
| ``_update_running_stats``                   | ``embed.hook_running_loc``,                      |
|                                             | ``embed.hook_running_scale``; by ``TrunkState``  |
| patches and 1 - their padding               | ``embed.hook_patches``, ``embed.hook_observed``  |
| ``input_ff_layer``                          | ``embed.block`` (``hook_pre``, ``hook_post``)    |
| ``layers.{l}``: the input                   | ``blocks.{l}.hook_resid_pre``                    |
| ``input_layernorm``                         | ``ln1``                                          |
| ``self_attn`` q, k, v, o                    | ``attn``, ``attn.hook_q/k/v``, ``hook_pattern``, |
|                                             | ``hook_z``                                       |
| ``self_attn.q_norm``, ``k_norm``            | ``attn.q_norm``, ``attn.k_norm``, after rotation |
| ``self_attn.scaling`` (per dimension)       | ``attn.q_scale``, after the norm                 |
| ``post_attention_layernorm``                | ``ln1_post``, ``hook_attn_out``                  |
| ``pre_feedforward_layernorm``               | ``ln2``                                          |
| ``mlp.fc1``, activation, ``mlp.fc2``        | ``mlp``                                          |
| ``post_feedforward_layernorm``              | ``ln2_post``, ``hook_mlp_out``                   |
| the layer's output                          | ``hook_resid_post``                              |
| ``output_projection_point``                 | ``head.block``                                   |
| ``output_projection_quantiles``             | ``head.spread_block``                            |
| the forecast before the context's scale     | ``head.hook_quantiles``                          |

**Two passes.** The source runs its stack on the scaled series and on its mirror image (times -1)
and averages both forecasts. Here both passes are rows of one run: activations of the trunk hold,
for each series, its channels and then their mirror images, so ``model.by_channel`` gives
[batch, 2 * channel, ...] and the axis ``channel`` of patching goes on with the mirror images
(``channel + n_channels`` is the mirror image of ``channel``). A hook sees and edits both. With
``both_signs=False`` there is one pass, the source called with ``force_flip_invariance=False``;
reading SAE features asks for that, as a feature has one place in a series.

Location and scale of the whole context cancel wherever patches vary: the running ones scale once
more. So edits at ``embed.hook_loc`` and ``embed.hook_scale`` change nothing there, as in the
source.

Covered: the whole config with the default kind of rotary positions, grouped keys and values
(repeated for each head), series of any length up to the context, padding before a series (``mask``
or NaN; a shorter series, to the source). Several channels go through the model one by one; their
count belongs to the series, so give ``n_channels=``. ``output=``: ``"quantiles"``
[batch, channel, horizon, quantile], ``"point"`` (the source's ``mean_predictions``)
[batch, channel, horizon], or ``"both"`` (its ``full_predictions``).

With ``infer_is_positive`` the source cuts forecasts at zero where the least sample of the *whole
batch* is not negative, so that a forecast depends on the series beside it. Here each channel is
looked at by itself, as the source does where it is given that channel alone.

The source pads every series to the whole context with patches that no observed one sees; here they
are left out (they count in location and scale, as in the source). At a patch of padding the
source attends to other positions, which nothing reads.

Refused: series longer than the context (the source cuts them without a word); gaps (the source
takes none); other kinds of rotary positions; changed parts and subclasses. ``window_size`` is an
argument of the source's ``forward``, not of the model; call the source for it.

Front end and head of TimesFM 2.5: patches scaled as they come, the series and its mirror image.

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

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tstlens.errors import ArgumentError, SeriesValueError, UnsupportedSourceError
from tstlens.model import HookedTST, HookedTSTConfig
from tstlens.model.parts import ActFn, positive
from tstlens.model.reading import Reading
from tstlens.model.state import TrunkState
from tstlens.points import Hook
from tstlens.shapes import Mask, Output, Residual, Series
from tstlens.zoo.comparing import Tap
from tstlens.zoo.layers import RESID_POST, RESID_PRE, LayerTable, fill
from tstlens.zoo.parity import Trial, context_trials
from tstlens.zoo.parts import (
    EndingPatches,
    ResidualMLP,
    first_place,
    observed_in,
    per_channel,
    root,
)
from tstlens.zoo.registry import Built, register_classes
from tstlens.zoo.t5 import activation, dotted
from tstlens.zoo.timesfm import check_levels, chosen_output, read_columns
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

    @property
    def reading(self) -> Reading:
        """How forecasts are read off the output."""
        return read_columns(self.quantiles, self.output)

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
        self.block = ResidualMLP(
            2 * cfg.patch_len, cfg.d_hidden, d_model, cfg.act_fn, "batch channel pos"
        )
        self.hook_loc = Hook("batch channel 1")
        self.hook_scale = Hook("batch channel 1")
        self.hook_scaled = Hook("batch channel time")
        self.hook_running_loc = Hook("batch channel pos 1")
        self.hook_running_scale = Hook("batch channel pos 1")
        self.hook_patches = Hook("batch channel pos patch_len")
        self.hook_observed = Hook("batch channel pos patch_len")

    def forward(self, series: Series, mask: Mask | None) -> tuple[Residual, TrunkState]:
        observed = observed_in(series, mask)
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
        self.hook_pooled = Hook("row d_model")
        self.hook_quantiles = Hook("batch channel time output")  # scaled

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
    block = ResidualMLP(d_in, d_hidden, d_out, cfg.act_fn, "row")
    for name in ("b_in", "b_out", "b_skip"):
        getattr(block, name).requires_grad_(cfg.bias)
    return block


_PACKAGE = "transformers.models.timesfm2_5.modeling_timesfm2_5"
_CLASS = f"{_PACKAGE}.TimesFm2_5ModelForPrediction"
_REBUILD = rebuilder(_CLASS, "transformers.TimesFm2_5Config", "timesfm-2.5")
_LAYER = LayerTable(
    ATTENTION
    | {
        "attn.q_norm": "self_attn.q_norm",
        "attn.k_norm": "self_attn.k_norm",
        "ln1": "input_layernorm",
        "ln1_post": "post_attention_layernorm",
        "ln2": "pre_feedforward_layernorm",
        "ln2_post": "post_feedforward_layernorm",
        "mlp.in": "mlp.fc1",
        "mlp.out": "mlp.fc2",
    },
    (
        RESID_PRE,
        Tap("hook_attn_out", "post_attention_layernorm"),
        Tap("hook_resid_mid", "pre_feedforward_layernorm", of="input"),
        Tap("hook_mlp_out", "post_feedforward_layernorm"),
        RESID_POST,
    ),
)


def build(
    source: nn.Module | Mapping[str, Tensor],
    n_channels: int = 1,
    both_signs: bool | None = None,
    output: str = "quantiles",
    config: Mapping[str, Any] | None = None,
) -> Built:
    """Convert a TimesFM 2.5 model.

    Args:
        source: the model, or its state dict.
        n_channels: channels of the series it will be given.
        both_signs: whether the mirrored series goes through the model too; by default as its
            config has it (``force_flip_invariance``).
        output: what a forecast holds.
        config: the entries of its ``config.json`` (state dict only, needed there).
    """
    whole = live_or_rebuilt(source, config, _REBUILD)
    refuse_changed_parts(whole, _PACKAGE)
    own = whole.config
    rotary = dict(own.rope_parameters or {})
    if rotary.get("rope_type", "default") != "default":
        raise UnsupportedSourceError(
            f"rope_parameters: rope_type {rotary['rope_type']!r} is not covered, 'default' is"
        )
    if own.context_length % own.patch_length:
        raise UnsupportedSourceError(
            f"context_length={own.context_length} is no multiple of patch_length="
            f"{own.patch_length}, which fails upstream"
        )
    if own.decode_index < 0:
        raise UnsupportedSourceError(f"decode_index={own.decode_index} is not covered, 0 and up is")
    act_fn: Any = activation(own.activation, "activation")
    cfg = HookedTSTConfig(
        n_layers=own.num_hidden_layers,
        d_model=own.hidden_size,
        n_heads=own.num_attention_heads,
        d_head=own.head_dim,
        d_mlp=own.intermediate_size,
        embed=TimesFM25PatchesConfig(
            patch_len=own.patch_length,
            context_length=own.context_length,
            d_hidden=own.hidden_size,
            both_signs=own.force_flip_invariance if both_signs is None else both_signs,
            act_fn=act_fn,
        ),
        head=TimesFM25HeadConfig(
            horizon=own.horizon_length,
            quantiles=tuple(own.quantiles),
            d_hidden=own.hidden_size,
            spread_horizon=own.output_quantile_len if own.use_continuous_quantile_head else 0,
            point=min(own.decode_index, len(own.quantiles)),
            output=output,
            bias=whole.output_projection_point.input_layer.bias is not None,
            not_negative=own.infer_is_positive,
            act_fn=act_fn,
        ),
        n_channels=n_channels,
        act_fn=act_fn,
        normalization_type="RMS",
        use_normalization_before_and_after=True,
        eps=own.rms_norm_eps,
        attn_scale=1.0,
        query_scale=True,
        qk_norm="after_rotary",
        rotary_base=float(rotary.get("rope_theta", 10_000.0)),
        causal=True,
        attn_bias=own.attention_bias,
        mlp_bias=own.use_bias,
        model_name="TimesFM 2.5",
    )
    weight = whole.output_projection_point.input_layer.weight
    model = HookedTST(cfg).to(device=weight.device, dtype=weight.dtype)
    _fill_model(model, whole)
    return Built(model, whole, _trials(model), dotted(whole))


@torch.no_grad()
def _fill_model(model: HookedTST, source: Any) -> None:
    fill(model.embed, block_weights(source.model.input_ff_layer))
    fill(model.head, block_weights(source.output_projection_point))
    if hasattr(model.head, "spread_block"):
        fill(model.head, block_weights(source.output_projection_quantiles, "spread_block"))
    for block, layer in zip(model.blocks, source.model.layers, strict=True):
        _LAYER.fill(block, layer.state_dict())


def run(source: Any, series: Tensor, mask: Tensor | None, model: HookedTST) -> Tensor:
    """The source's forecast in the converted model's layout.

    Its stack runs once more before that, on the rows of the converted model's trunk, so that what
    forward hooks see first can be compared with it.
    """
    if mask is not None:
        series = series.masked_fill(~mask[:, None], torch.nan)
    embed: Any = model.cfg.embed
    with as_compared(source, series.dtype):
        before = embed.context_length - series.shape[2]
        whole = nn.functional.pad(series, (before, 0), value=torch.nan).flatten(0, 1)
        padding = whole.isnan().to(series.dtype)
        whole = whole.nan_to_num()
        loc, scale = whole.mean(1, keepdim=True), whole.std(1, keepdim=True)
        reach = embed.n_pos(series.shape[2]) * embed.patch_len
        scaled, padding = (
            x[:, -reach:].unflatten(0, series.shape[:2])
            for x in (source.model._revin(whole, loc, scale), padding)
        )
        if embed.both_signs:
            scaled, padding = torch.cat([scaled, -scaled], 1), torch.cat([padding, padding], 1)
        source._decode_and_project(scaled.flatten(0, 1), padding.flatten(0, 1))
    return _forecast(source, series, model)


def _forecast(source: Any, series: Tensor, model: HookedTST) -> Tensor:
    """The source's forecast; channels that are never negative run without the others."""
    rows = [row[~row.isnan()] for row in series.flatten(0, 1)]
    negative = torch.tensor([bool((row < 0).any()) for row in rows])
    found: dict[int, Tensor] = {}
    embed: Any = model.cfg.embed
    with as_compared(source, series.dtype):
        for which in (negative, ~negative):
            chosen = [int(i) for i in which.nonzero()[:, 0]]
            if chosen:
                given = [rows[i] for i in chosen]
                out = source(past_values=given, force_flip_invariance=embed.both_signs)
                found |= dict(zip(chosen, chosen_output(out, model), strict=True))
    return torch.stack([found[i] for i in range(len(rows))]).unflatten(0, series.shape[:2])


def _trials(model: HookedTST) -> tuple[Trial, ...]:
    kinds = ("large", "never negative", "constant", "padded", "shorter")
    theirs = partial(_forecast, model=model)
    return context_trials(model.cfg.embed, model.cfg.n_channels, theirs, kinds)


def taps(source: Any, model: HookedTST) -> list[Tap]:
    """Where a TimesFM 2.5 model computes our activations (patterns in float32 only)."""
    found = embedding_taps("model.input_ff_layer", source.config.patch_length, model.by_channel)
    for number in range(model.cfg.n_layers):
        found += attention_taps(_LAYER, model, f"blocks.{number}", f"model.layers.{number}")
    blocks = {"block": "output_projection_point", "spread_block": "output_projection_quantiles"}
    found.append(Tap("head.hook_pooled", blocks["block"], last, "input"))
    return found + [
        Tap(f"head.{ours}.hook_pre", f"{theirs}.input_layer", last)
        for ours, theirs in blocks.items()
        if hasattr(model.head, ours)
    ]


FAMILY = register_classes("timesfm-2.5", (_CLASS,), build, run, taps, folders=True)
