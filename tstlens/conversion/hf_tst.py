"""Family ``hf-tst``: Hugging Face's TimeSeriesTransformer, live, a folder, or weights + config.

| source (``transformers.models.time_series_transformer``)| here                                  |
|---------------------------------------------------------|---------------------------------------|
| ``past_values`` then ``future_values``                  | the series' first channels            |
| ``past_time_features`` then ``future_time_features``    | its next channels                     |
| ``static_real_features``, ``static_categorical_…``      | its last channels, constant over time |
| ``scaler`` (mean, std, none), of the context            | ``embed.hook_loc``,                   |
|                                                         | ``embed.hook_scale``; by TrunkState   |
| scaled values                                           | ``embed.hook_scaled``                 |
| ``get_lagged_subsequences``                             | ``embed.hook_lags``                   |
| ``embedder``, static numbers, log of loc and scale      | ``embed.hook_static``                 |
| ``encoder.value_embedding`` (its input)                 | ``embed.encoder.hook_embed``          |
|                                                         | (``embed.encoder.hook_inputs``)       |
| ``encoder.embed_positions``                             | ``embed.encoder.hook_pos_embed``      |
| ``encoder.layernorm_embedding``                         | ``embed.encoder.ln``, ``hook_embed``  |
| the same of ``decoder`` (places offset by the context)  | ``embed.decoder.*``,                  |
|                                                         | ``hook_decoder_embed``                |
| ``encoder.layers.l``, ``decoder.layers.l`` (post-norm)  | ``encoder.l``, ``decoder.l``          |
| ``self_attn``, its layer norm                           | ``attn``, ``hook_attn_out``; ``ln1``  |
| ``encoder_attn``, its layer norm                        | ``cross_attn``,                       |
|                                                         | ``hook_cross_attn_out``; ``ln2``      |
| ``fc1``, ``fc2``, ``final_layer_norm``                  | ``mlp``, ``hook_mlp_out``;            |
|                                                         | ``ln2`` (encoder), ``ln3`` (decoder)  |
| what leaves the encoder                                 | ``hook_encoded``                      |
| ``parameter_projection``                                | ``head.W_U``, ``head.hook_parameters``|

The decoder's pass is the one of ``forward`` with ``future_values``: step h reads the true values up
to step h - 1 (teacher forcing). It says the same as step h of ``generate`` where that has drawn
these values; with a future of one step (NaN will do) it is the first step of ``generate``. Samples
are drawn by the source only. Output: parameters [batch, target, step, parameter] in the series'
units (of a ``TimeSeriesTransformerModel``: the decoder's stream [batch, step, d_model]).

``model(series, covariates={"past_time_features": …, "future_time_features": …, …})`` takes the
source's tensors as they are; ``model.with_covariates(series, covariates)`` is the same with the
covariates as channels, for sweeps and all else that takes series. Missing values (NaN, or False in
``mask``, which is about the values only) are zeros, do not count in the scale, and are attended
to, as in the source.

Covered: any context, future, lags, number of targets, features, scaler and distribution. Refused:
another number of heads or MLP units in the decoder than in the encoder, no layers in one of them, a
lag of 0 (the decoder would see what it forecasts), scalers over another axis, activations that the
blocks lack, replaced modules, subclasses; series without an observed value in the context under
mean scaling (the source scales them by whatever runs beside them).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tstlens.conversion.checking import Trial
from tstlens.conversion.encoder_layers import fill
from tstlens.conversion.hf_tst_source import (
    CLASSES,
    block_weights,
    inner,
    load,
    reads,
    rebuild,
    recognises,
    run,
    run_source,
    taps,
)
from tstlens.conversion.patchtst_source import check_structure
from tstlens.conversion.registry import Built, Family, register
from tstlens.conversion.t5_layers import activation, dotted
from tstlens.errors import ArgumentError, UnsupportedSourceError
from tstlens.model import HookedTST, HookedTSTConfig
from tstlens.model.families.lagged_steps import LaggedStepsConfig
from tstlens.model.families.step_heads import StepParametersConfig, StepStreamConfig

_SCALERS = {"TimeSeriesMeanScaler": "mean", "TimeSeriesStdScaler": "std"}


def build(source: nn.Module | Mapping[str, Tensor], config: Any = None) -> Built:
    """Convert a TimeSeriesTransformer.

    Args:
        source: a ``TimeSeriesTransformerForPrediction`` or ``TimeSeriesTransformerModel``, or the
            state dict of one.
        config: the entries of its ``config.json`` (state dict only, needed there).
    """
    if isinstance(source, Mapping):
        source = rebuild(source, config)
    elif config is not None:
        raise ArgumentError("config: a live model knows it itself; leave it out")
    own: Any = source.config
    _refuse(source)
    check_structure(source)
    embed = _embed(source)
    forecasts = type(source).__qualname__ == CLASSES[0]
    cfg = HookedTSTConfig(
        n_layers=own.encoder_layers + own.decoder_layers,
        n_decoder_layers=own.decoder_layers,
        d_model=own.d_model,
        n_heads=own.encoder_attention_heads,
        d_mlp=own.encoder_ffn_dim,
        act_fn=activation(own.activation_function, "activation_function"),  # type: ignore[arg-type]
        norm_position="post",
        embed=embed,
        head=StepParametersConfig(
            horizon=own.prediction_length,
            n_targets=own.input_size,
            distribution=own.distribution_output,
            statistics=embed.statistics,
        )
        if forecasts
        else StepStreamConfig(),
        n_channels=embed.n_channels,
        model_name=type(source).__qualname__,
    )
    weight = inner(source).encoder.value_embedding.value_projection.weight
    model = HookedTST(cfg).to(device=weight.device, dtype=weight.dtype)
    _fill_model(model, source)
    return Built(model, source, _trials(embed), dotted(source))


def _refuse(source: Any) -> None:
    """Name the option that is not covered, with the reason."""
    own, scaler = source.config, inner(source).scaler
    for name in ("attention_heads", "ffn_dim"):
        first, second = getattr(own, f"encoder_{name}"), getattr(own, f"decoder_{name}")
        if first != second:
            raise UnsupportedSourceError(
                f"encoder_{name}={first} with decoder_{name}={second} is not covered: all layers "
                "of a model have the same number of heads and of hidden units here"
            )
    for name in ("encoder_layers", "decoder_layers"):
        if getattr(own, name) < 1:
            raise UnsupportedSourceError(f"{name}={getattr(own, name)} is not covered: 1 or more")
    if min(own.lags_sequence) < 1:
        raise UnsupportedSourceError(
            f"lags_sequence={list(own.lags_sequence)} is not covered: with a lag of 0 the decoder "
            "sees the value that it forecasts, and transformers' generate fails"
        )
    if scaler.dim != 1 or not scaler.keepdim:
        raise UnsupportedSourceError(
            f"scaling_dim={scaler.dim}, keepdim={scaler.keepdim} is not covered: every channel "
            "is scaled over time here (scaling_dim=1, keepdim=True)"
        )


def _embed(source: Any) -> LaggedStepsConfig:
    own, scaler = source.config, inner(source).scaler
    scaling: Any = _SCALERS.get(type(scaler).__name__, "none")
    options: dict[str, Any] = {}
    if scaling != "none":
        options["smallest_scale"] = float(scaler.minimum_scale)
    if scaling == "mean" and scaler.default_scale is not None:
        options["default_scale"] = float(scaler.default_scale)
    categories = own.num_static_categorical_features > 0
    return LaggedStepsConfig(
        context_length=own.context_length,
        prediction_length=own.prediction_length,
        lags=tuple(own.lags_sequence),
        n_targets=own.input_size,
        n_time_features=own.num_time_features + own.num_dynamic_real_features,
        n_static_real=own.num_static_real_features,
        categories=tuple(own.cardinality) if categories else (),
        d_categories=tuple(own.embedding_dimension) if categories else (),
        scaling=scaling,
        **options,
    )


def _fill_model(model: Any, source: Any) -> None:
    whole = inner(source)
    for ours, blocks, stack in (
        (model.embed.encoder, model.encoder, whole.encoder),
        (model.embed.decoder, model.decoder, whole.decoder),
    ):
        norm = stack.layernorm_embedding
        weights = {
            "W_E": stack.value_embedding.value_projection.weight.T,
            "W_pos": stack.embed_positions.weight,
            "ln.w": norm.weight,
            "ln.b": norm.bias,
        }
        fill(ours, weights)
        for block, layer in zip(blocks, stack.layers, strict=True):
            fill(block, block_weights(layer, model.cfg.n_heads))
    if model.cfg.embed.categories:
        for number, table in enumerate(whole.embedder.embedders):
            fill(model.embed, {f"W_category.{number}": table.weight})
    if source is not whole:
        linears = source.parameter_projection.proj
        W_U, b_U = (torch.cat([getattr(part, n) for part in linears]) for n in ("weight", "bias"))
        fill(model.head, {"W_U": W_U.T, "b_U": b_U})


def _trials(embed: LaggedStepsConfig) -> tuple[Trial, ...]:
    """Whole and short futures, large, constant, padded and gappy series, with covariates."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    n_time = embed.past_length + embed.prediction_length
    values = normal(4, embed.n_targets, n_time)
    codes = [torch.randint(size, (4, 1), generator=generator) for size in embed.categories]
    static = torch.cat([normal(4, embed.n_static_real), *codes], 1)
    known = torch.cat(
        [normal(4, embed.n_time_features, n_time), static[..., None].expand(-1, -1, n_time)], 1
    )
    gaps = torch.rand(values.shape, generator=generator) < 0.3
    gaps[..., embed.past_length - 1] = False  # every context keeps a sample
    starts = torch.tensor([0, 1, embed.past_length // 2, embed.past_length - 1])
    observed = torch.arange(n_time)[None] >= starts[:, None]
    unknown = values[..., : embed.past_length + 1].clone()
    unknown[..., -1] = torch.nan
    given: list[tuple[str, tuple[Tensor, ...]]] = [
        ("random", (values,)),
        ("times 10 plus 3", (10 * values + 3,)),
        ("constant", (values[..., :1].expand_as(values),)),
        ("30 % missing", (values.masked_fill(gaps, torch.nan),)),
        ("padded at the start", (values, observed)),
        ("one step, not known", (unknown,)),
    ]

    def run_model(model: HookedTST, series: Tensor, mask: Tensor | None = None) -> Tensor:
        return model(series, mask=mask)

    def run_theirs(source: Any, series: Tensor, mask: Tensor | None = None) -> Tensor:
        return run_source(source, embed, series, mask)

    trials = []
    for name, (x, *mask) in given:
        x = torch.cat([x, known[..., : x.shape[2]]], 1)
        trials.append(Trial(f"{name} {list(x.shape)}", (x, *mask), run_model, run_theirs))
    return tuple(trials)


register(
    Family(
        name="hf-tst",
        summary="Hugging Face TimeSeriesTransformer (ForPrediction, Model), live, as a folder, or "
        "as a state dict (then give config=)",
        recognises=recognises,
        build=build,
        takes_state_dict=True,
        run=run,
        taps=taps,
        reads=reads,
        load=load,
    )
)
