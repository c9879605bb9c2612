"""Hugging Face's TimeSeriesTransformer as a source: recognise, rebuild and run it, and tap it.

Nothing here imports ``transformers`` until a source has to be rebuilt from weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import einops
import torch
from torch import Tensor, nn

from tstlens.conversion.comparing import Tap
from tstlens.conversion.folders import CONFIG
from tstlens.conversion.t5_layers import dotted, showing_patterns
from tstlens.conversion.transformers_source import class_of, first, rebuilt, second
from tstlens.model import HookedTST
from tstlens.model.families.lagged_steps import LaggedStepsConfig

MODULE = "transformers.models.time_series_transformer.modeling_time_series_transformer"
CLASSES = ("TimeSeriesTransformerForPrediction", "TimeSeriesTransformerModel")


def recognises(source: nn.Module) -> bool:
    """Whether a module is one of transformers' two classes, not a subclass."""
    return dotted(source) in {f"{MODULE}.{name}" for name in CLASSES}


def reads(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is of a TimeSeriesTransformer."""
    return config.get("model_type") == "time_series_transformer"


def load(folder: Path) -> nn.Module:
    """The source from a folder that transformers' ``save_pretrained`` wrote."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    named = [name for name in CLASSES if name in (config.get("architectures") or ())]
    return class_of(f"{MODULE}.{(named or CLASSES)[0]}").from_pretrained(str(folder)).eval()


def rebuild(state: Mapping[str, Tensor], config: Any) -> nn.Module:
    """The source from its weights and the entries of its config, or the config itself."""
    entries = config.to_dict() if hasattr(config, "to_dict") else config
    with_head = any(name.startswith("parameter_projection.") for name in state)
    return rebuilt(
        state,
        entries,
        f"{MODULE}.{CLASSES[0 if with_head else 1]}",
        "transformers.TimeSeriesTransformerConfig",
        "hf-tst",
    )


def inner(source: Any) -> Any:
    """The ``TimeSeriesTransformerModel`` of a source."""
    return source if type(source).__qualname__ == CLASSES[1] else source.model


def block_weights(layer: Any, n_heads: int) -> dict[str, Tensor]:
    """A block's state dict from a layer's of the encoder or the decoder."""
    attentions = {"attn": layer.self_attn}
    norms = {"ln1": layer.self_attn_layer_norm}
    if hasattr(layer, "encoder_attn"):
        attentions["cross_attn"] = layer.encoder_attn
        norms["ln2"] = layer.encoder_attn_layer_norm
    norms[f"ln{len(norms) + 1}"] = layer.final_layer_norm
    weights = {}
    for name, norm in norms.items():
        weights |= {f"{name}.w": norm.weight, f"{name}.b": norm.bias}
    for name, attention in attentions.items():
        for letter in "QKV":
            linear = getattr(attention, f"{letter.lower()}_proj")
            weights[f"{name}.W_{letter}"] = einops.rearrange(
                linear.weight, "(head d) m -> head m d", head=n_heads
            )
            weights[f"{name}.b_{letter}"] = linear.bias.unflatten(0, (n_heads, -1))
        out = attention.out_proj
        weights[f"{name}.W_O"] = einops.rearrange(
            out.weight, "m (head d) -> head d m", head=n_heads
        )
        weights[f"{name}.b_O"] = out.bias
    for name, linear in (("in", layer.fc1), ("out", layer.fc2)):
        weights |= {f"mlp.W_{name}": linear.weight.T, f"mlp.b_{name}": linear.bias}
    return weights


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
    """The source's output for :func:`tstlens.conversion.compare`."""
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
        n_layers = len(getattr(model, stack))
        for layer in range(n_layers):
            found += _layer_taps(
                f"{stack}.{layer}", f"{there}.layers.{layer}", model.cfg.n_heads, stack == "decoder"
            )
    last = model.cfg.n_encoder_layers - 1
    found.append(Tap("hook_encoded", f"{prefix}encoder.layers.{last}"))
    if prefix:
        found.append(Tap("head.hook_parameters", "parameter_projection", _by_target))
    return found


def _layer_taps(here: str, there: str, n_heads: int, of_decoder: bool) -> list[Tap]:
    def per_head(seen: Tensor) -> Tensor:
        return seen.unflatten(-1, (n_heads, -1))

    attentions = {"attn": ("self_attn", "hook_attn_out", "hook_resid_mid")}
    if of_decoder:
        attentions["cross_attn"] = (
            "encoder_attn",
            "hook_cross_attn_out",
            "hook_resid_mid_cross",
        )
    found = [Tap(f"{here}.hook_resid_pre", there, of="input")]
    for name, (attention, written, summed) in attentions.items():
        path = f"{there}.{attention}"
        found += [
            Tap(f"{here}.{name}.hook_{letter}", f"{path}.{letter}_proj", per_head)
            for letter in "qkv"
        ]
        found += [
            Tap(f"{here}.{name}.hook_pattern", path, second),
            Tap(f"{here}.{name}.hook_z", f"{path}.out_proj", per_head, "input"),
            Tap(f"{here}.{written}", path, first),
            Tap(f"{here}.{summed}", f"{path}_layer_norm", of="input"),
        ]
    return [
        *found,
        Tap(f"{here}.mlp.hook_pre", f"{there}.fc1"),
        Tap(f"{here}.mlp.hook_post", f"{there}.fc2", of="input"),
        Tap(f"{here}.hook_mlp_out", f"{there}.fc2"),
        Tap(f"{here}.hook_resid_post", f"{there}.final_layer_norm", of="input"),
        Tap(f"{here}.hook_normalized_resid_post", there),
    ]
