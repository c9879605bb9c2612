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
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tstlens.conversion.checking import Trial
from tstlens.conversion.comparing import Tap
from tstlens.conversion.encoder_layers import fill
from tstlens.conversion.registry import Built, Family, register
from tstlens.conversion.t5_layers import dotted
from tstlens.conversion.transformers_source import (
    as_compared,
    attention_taps,
    attention_weights,
    block_weights,
    class_of,
    embedding_taps,
    first,
    last,
    rebuilt,
    refuse_changed_parts,
)
from tstlens.errors import ArgumentError, UnsupportedSourceError
from tstlens.model import HookedTST, HookedTSTConfig
from tstlens.model.families.timesfm import TimesFMHeadConfig, TimesFMPatchesConfig

_PACKAGE = "transformers.models.timesfm.modeling_timesfm"
_CLASS = f"{_PACKAGE}.TimesFmModelForPrediction"
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
    if isinstance(source, Mapping):
        source = rebuilt(source, config, _CLASS, "transformers.TimesFmConfig", "timesfm")
    elif config is not None:
        raise ArgumentError("config: a live model knows it itself; leave it out")
    refuse_changed_parts(source, _PACKAGE)
    whole: Any = source
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
    return Built(model, whole, _trials(model), dotted(source))


@torch.no_grad()
def _fill_model(model: HookedTST, source: Any) -> None:
    decoder = source.decoder
    embed = {"W_freq": decoder.freq_emb.weight, **block_weights(decoder.input_ff_layer)}
    if source.config.use_positional_embedding:
        embed["rates"] = decoder.position_emb.inv_timescales
    fill(model.embed, embed)
    fill(model.head, block_weights(source.horizon_ff_layer))
    for block, layer in zip(model.blocks, decoder.layers, strict=True):
        mlp = layer.mlp
        weights = {
            "ln1.w": layer.input_layernorm.weight,
            "ln2.w": mlp.layer_norm.weight,
            "ln2.b": mlp.layer_norm.bias,
            "mlp.W_in": mlp.gate_proj.weight.T,
            "mlp.b_in": mlp.gate_proj.bias,
            "mlp.W_out": mlp.down_proj.weight.T,
            "mlp.b_out": mlp.down_proj.bias,
        }
        fill(block, weights | attention_weights(layer.self_attn, model.cfg.n_heads))


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
    embed: Any = model.cfg.embed
    generator = torch.Generator().manual_seed(0)
    longest = min(embed.context_length, 16 * embed.patch_len)
    shape = (4, model.cfg.n_channels or 1, longest)
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    missing, padded = normal.clone(), normal.clone()
    missing[torch.rand(shape, generator=generator) < 0.3] = torch.nan
    missing[..., -1] = 1.0
    for row, before in enumerate((0, 1, longest // 2, longest - 1)):
        padded[row, :, :before] = torch.nan
    shorter = normal[..., -max(1, longest - embed.patch_len // 2) :].clone()
    given = [
        (f"random {list(shape)} times 10 plus 3", 10 * normal + 3),
        (f"constant {list(shape)}", normal[..., :1].expand(shape).clone()),
        (f"missing values {list(shape)}", missing),
        (f"padded at the start {list(shape)}", padded),
        (f"no whole number of patches {list(shorter.shape)}", shorter),
    ]

    def run_source(source: nn.Module, series: Tensor) -> Tensor:
        return run(source, series, None, model)

    return tuple(Trial(name, (series,), _run_model, run_source) for name, series in given)


def _run_model(model: HookedTST, series: Tensor) -> Tensor:
    return model(series)


def taps(source: Any, model: HookedTST) -> list[Tap]:
    """Where a TimesFM 2.0 model computes our activations (patterns in float32 only)."""
    n_channels, width = model.cfg.n_channels or 1, source.config.patch_length
    patterns = model.cfg.dtype == torch.float32

    def by_series(seen: Tensor) -> Tensor:
        return seen.unflatten(0, (-1, n_channels))

    found = embedding_taps("decoder.input_ff_layer", width, by_series)
    for number, layer in enumerate(source.decoder.layers):
        here, there = f"blocks.{number}", f"decoder.layers.{number}"
        found += attention_taps(here, there, layer.self_attn, patterns)
        found += [
            Tap(f"{here}.hook_attn_out", f"{there}.self_attn", first, observed_only=True),
            Tap(f"{here}.hook_resid_mid", f"{there}.mlp", of="input", observed_only=True),
            Tap(f"{here}.mlp.hook_pre", f"{there}.mlp.gate_proj", observed_only=True),
            Tap(f"{here}.hook_mlp_out", f"{there}.mlp.down_proj", observed_only=True),
            Tap(f"{here}.hook_resid_post", there, observed_only=True),
        ]
    return [
        *found,
        Tap("head.hook_pooled", "horizon_ff_layer", last, "input"),
        Tap("head.block.hook_pre", "horizon_ff_layer.input_layer", last),
    ]


def load(folder: Path) -> nn.Module:
    """The source from a folder with its ``config.json`` and weights."""
    return class_of(_CLASS).from_pretrained(str(folder)).eval()


def reads(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is a TimesFM 2.0 model's, as transformers writes it."""
    return _CLASS.rsplit(".", 1)[1] in (config.get("architectures") or ())


def recognises(source: nn.Module) -> bool:
    """Whether a module is transformers' own, not a subclass."""
    return dotted(source) == _CLASS


register(
    Family(
        name="timesfm",
        summary="TimesFM 2.0 (transformers' TimesFmModelForPrediction), live or weights and "
        "config=",
        recognises=recognises,
        build=build,
        takes_state_dict=True,
        run=run,
        taps=taps,
        reads=reads,
        load=load,
    )
)
