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
these values; with a future of one step (NaN will do) it is the first step of ``generate``.
``model.forecast`` draws as ``generate`` does, step by step. Output: parameters
[batch, target, step, parameter] in the series' units (of a ``TimeSeriesTransformerModel``: the
decoder's stream [batch, step, d_model]).

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

Hugging Face's TimeSeriesTransformer as a source: recognise, rebuild and run it, and tap it.

Nothing here imports ``transformers`` until a source has to be rebuilt from weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tstlens.errors import UnsupportedSourceError
from tstlens.model import HookedTST, HookedTSTConfig
from tstlens.zoo.comparing import Tap
from tstlens.zoo.lagged_steps import LaggedStepsConfig, StepParametersConfig, StepStreamConfig
from tstlens.zoo.layers import NORMALIZED_POST, RESID_PRE, LayerTable, fill
from tstlens.zoo.parity import Trial, run_model
from tstlens.zoo.patchtst_source import check_structure
from tstlens.zoo.registry import Built, register_classes
from tstlens.zoo.t5 import activation, dotted, showing_patterns
from tstlens.zoo.transformers_source import live_or_rebuilt, rebuilder, second

MODULE = "transformers.models.time_series_transformer.modeling_time_series_transformer"
CLASSES = (f"{MODULE}.TimeSeriesTransformerForPrediction", f"{MODULE}.TimeSeriesTransformerModel")


def reads(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is of a TimeSeriesTransformer."""
    return config.get("model_type") == "time_series_transformer"


def rebuild(state: Mapping[str, Tensor], config: Any) -> nn.Module:
    """The source from its weights and the entries of its config, or the config itself."""
    entries = config.to_dict() if hasattr(config, "to_dict") else config
    with_head = any(name.startswith("parameter_projection.") for name in state)
    kind = CLASSES[0 if with_head else 1]
    return rebuilder(kind, "transformers.TimeSeriesTransformerConfig", "hf-tst")(state, entries)


def inner(source: Any) -> Any:
    """The ``TimeSeriesTransformerModel`` of a source."""
    return source if dotted(source) == CLASSES[1] else source.model


def _table(of_decoder: bool) -> LayerTable:
    """A layer of the encoder, or of the decoder, which attends across too."""
    attentions = {"attn": ("self_attn", "hook_resid_mid")}
    if of_decoder:
        attentions["cross_attn"] = ("encoder_attn", "hook_resid_mid_cross")
    rows: dict[str, str] = {}
    taps = [RESID_PRE]
    for number, (name, (path, summed)) in enumerate(attentions.items()):
        rows |= {f"{name}.{letter}": f"{path}.{letter.lower()}_proj" for letter in "QKV"}
        rows |= {f"{name}.O": f"{path}.out_proj", f"ln{number + 1}": f"{path}_layer_norm"}
        taps.append(Tap(f"{name}.hook_pattern", path, second))
        taps.append(Tap(summed, f"{path}_layer_norm", of="input"))
    rows |= {"mlp.in": "fc1", "mlp.out": "fc2", f"ln{len(attentions) + 1}": "final_layer_norm"}
    taps += [Tap("hook_resid_post", "final_layer_norm", of="input"), NORMALIZED_POST]
    return LayerTable(rows, tuple(taps))


_TABLES = {"encoder": _table(False), "decoder": _table(True)}


def inputs(
    embed: LaggedStepsConfig, series: Tensor, mask: Tensor | None
) -> dict[str, Tensor | None]:
    """The arguments of the source's forward for a series with its covariates."""
    values, past = series[:, : embed.n_targets], embed.past_length
    observed = ~values.isnan()
    if mask is not None:
        observed = observed & mask[:, None]
    values = torch.where(observed, values, torch.zeros_like(values))
    sizes = [embed.n_time_features, embed.n_static_real, len(embed.categories)]
    time, real, codes = series[:, embed.n_targets :].split(sizes, 1)

    def by_step(x: Tensor) -> Tensor:  # [batch, time, target], without an axis for a single one
        return x[:, 0] if embed.n_targets == 1 else x.transpose(1, 2)

    return {
        "past_values": by_step(values[..., :past]),
        "past_observed_mask": by_step(observed[..., :past].to(values.dtype)),
        "future_values": by_step(values[..., past:]),
        "past_time_features": time[..., :past].transpose(1, 2),
        "future_time_features": time[..., past:].transpose(1, 2),
        "static_real_features": real[..., 0] if sizes[1] else None,
        "static_categorical_features": codes[..., 0].long() if sizes[2] else None,
    }


def run_source(
    source: Any, embed: LaggedStepsConfig, series: Tensor, mask: Tensor | None = None
) -> Tensor:
    """The source's parameters in our layout and in the series' units, or its decoder's stream.

    As its ``forward`` with ``future_values`` computes them; the loss, which that also computes, is
    left out (for counts it refuses values that are not whole numbers).

    Args:
        source: the source.
        embed: what its config says about its inputs.
        series: float [batch, channel, time] with the covariates as channels.
        mask: bool [batch, time] of observed values.
    """
    whole = inner(source)
    with _steps(whole, series.shape[2] - embed.past_length):
        out = whole(**inputs(embed, series, mask), use_cache=False)
    if whole is source:
        return out.last_hidden_state
    parts = list(source.parameter_projection(out.last_hidden_state))  # [batch, step(, target)]
    if source.config.distribution_output == "negative_binomial":
        parts[1] = parts[1] + out.scale.log()
    else:
        parts[-2] = parts[-2] * out.scale + out.loc
        parts[-1] = parts[-1] * out.scale
    return _by_target(parts)


def _by_target(parts: Any) -> Tensor:
    """Parameters, each [batch, step(, target)], as [batch, target, step, parameter]."""
    stacked = torch.stack(list(parts), -1)
    return stacked[:, None] if stacked.ndim == 3 else stacked.transpose(1, 2)


@contextmanager
def _steps(whole: Any, n_steps: int) -> Iterator[None]:
    """The source forecasts fewer steps than its ``prediction_length``."""
    config, before = whole.config, whole.config.prediction_length
    config.prediction_length = n_steps
    try:
        yield
    finally:
        config.prediction_length = before


def run(source: Any, series: Tensor, mask: Tensor | None, model: HookedTST) -> Tensor:
    """The source's output for :func:`tstlens.zoo.compare`."""
    embed: Any = model.cfg.embed
    with showing_patterns(source):
        return run_source(source, embed, model.with_covariates(series), mask)


def taps(source: Any, model: HookedTST) -> list[Tap]:
    """Where a TimeSeriesTransformer computes our activations."""
    prefix = "" if inner(source) is source else "model."
    embed: Any = model.cfg.embed

    def statistic(index: int, seen: Any) -> Tensor:  # [batch, 1(, target)] as [batch, target, 1]
        return seen[index][:, None] if seen[index].ndim == 2 else seen[index].transpose(1, 2)

    places = {"loc": 1, "scale": 2}
    found = [
        Tap(f"embed.hook_{name}", f"{prefix}scaler", partial(statistic, places[name]))
        for name in embed.statistics
    ]
    entered = {"encoder": "hook_embed", "decoder": "hook_decoder_embed"}
    for stack, name in entered.items():
        here, there = f"embed.{stack}", f"{prefix}{stack}"
        found += [
            Tap(f"{here}.hook_inputs", f"{there}.value_embedding", of="input"),
            Tap(f"{here}.hook_embed", f"{there}.value_embedding"),
            Tap(name, f"{there}.layernorm_embedding"),
        ]
        for layer in range(len(getattr(model, stack))):
            path = f"{there}.layers.{layer}"
            found += _TABLES[stack].find(model, f"{stack}.{layer}", path)
    last = model.cfg.n_encoder_layers - 1
    found.append(Tap("hook_encoded", f"{prefix}encoder.layers.{last}"))
    if prefix:
        found.append(Tap("head.hook_parameters", "parameter_projection", _by_target))
    return found


_SCALERS = {"TimeSeriesMeanScaler": "mean", "TimeSeriesStdScaler": "std"}


def build(source: nn.Module | Mapping[str, Tensor], config: Any = None) -> Built:
    """Convert a TimeSeriesTransformer.

    Args:
        source: a ``TimeSeriesTransformerForPrediction`` or ``TimeSeriesTransformerModel``, or the
            state dict of one.
        config: the entries of its ``config.json`` (state dict only, needed there).
    """
    whole = live_or_rebuilt(source, config, rebuild)
    own: Any = whole.config
    _refuse(whole)
    check_structure(whole)
    embed = _embed(whole)
    forecasts = dotted(whole) == CLASSES[0]
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
        model_name=type(whole).__qualname__,
    )
    weight = inner(whole).encoder.value_embedding.value_projection.weight
    model = HookedTST(cfg).to(device=weight.device, dtype=weight.dtype)
    _fill_model(model, whole)
    return Built(model, whole, _trials(embed), dotted(whole))


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
    for name, table in _TABLES.items():
        ours, blocks = getattr(model.embed, name), getattr(model, name)
        stack = getattr(whole, name)
        norm = stack.layernorm_embedding
        weights = {
            "W_E": stack.value_embedding.value_projection.weight.T,
            "W_pos": stack.embed_positions.weight,
            "ln.w": norm.weight,
            "ln.b": norm.bias,
        }
        fill(ours, weights)
        for block, layer in zip(blocks, stack.layers, strict=True):
            table.fill(block, layer.state_dict())
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

    theirs = partial(_run_trial, embed)
    trials = []
    for name, (x, *mask) in given:
        x = torch.cat([x, known[..., : x.shape[2]]], 1)
        trials.append(Trial(f"{name} {list(x.shape)}", (x, *mask), run_model, theirs))
    return tuple(trials)


def _run_trial(embed: Any, source: Any, series: Tensor, mask: Tensor | None = None) -> Tensor:
    return run_source(source, embed, series, mask)


FAMILY = register_classes("hf-tst", CLASSES, build, run, taps, reads=reads, folders=True)
