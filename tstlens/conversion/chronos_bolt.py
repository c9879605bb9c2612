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
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tstlens.conversion.checking import Trial
from tstlens.conversion.comparing import Tap
from tstlens.conversion.encoder_layers import check_keys, fill
from tstlens.conversion.registry import Built, Family, register
from tstlens.conversion.t5_layers import (
    activation,
    dotted,
    fill_stack,
    in_full_precision,
    read_t5,
    showing_patterns,
    stack_taps,
)
from tstlens.conversion.transformers_source import block_weights
from tstlens.errors import ArgumentError, UnsupportedSourceError
from tstlens.model import HookedTST, HookedTSTConfig
from tstlens.model.families.chronos_bolt import BoltHeadConfig, BoltPatchesConfig

_CLASS = "chronos.chronos_bolt.ChronosBoltModelForForecasting"
_TIED = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


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
    if isinstance(source, Mapping):
        source = _rebuild(source, config)
    elif config is not None:
        raise ArgumentError("config: a live model knows it itself; leave it out")
    whole: Any = source
    if "forward" in vars(whole):
        raise UnsupportedSourceError(f"this {dotted(source)} has a forward of its own")
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
    return Built(model, whole, _trials(cfg), dotted(source))


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


def _run_model(model: HookedTST, series: Tensor, mask: Tensor | None = None) -> Tensor:
    return model(series, mask=mask)


def _run_source(source: nn.Module, series: Tensor, mask: Tensor | None = None) -> Tensor:
    return run(source, series, mask)


def _trials(cfg: HookedTSTConfig) -> tuple[Trial, ...]:
    embed: Any = cfg.embed
    generator = torch.Generator().manual_seed(0)
    longest = min(embed.context_length, 32 * embed.patch_len)
    shape = (4, cfg.n_channels or 1, longest)
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    missing = normal.clone()
    missing[torch.rand(shape, generator=generator) < 0.3] = torch.nan
    padded, empty = normal.clone(), normal.clone()
    least = min(longest, 2 * embed.patch_len)  # strides may drop the last samples
    for row, before in enumerate((0, 1, longest // 2, longest - least)):
        padded[row, :, :before] = torch.nan
    shorter = normal[..., -max(1, longest - embed.patch_len // 2) :].clone()
    given = [
        (f"random {list(shape)} times 10 plus 3", 10 * normal + 3),
        (f"constant {list(shape)}", normal[..., :1].expand(shape).clone()),
        (f"missing values {list(shape)}", missing),
        (f"padded at the start {list(shape)}", padded),
        (f"no whole number of patches {list(shorter.shape)}", shorter),
    ]
    if embed.reg_token:
        empty[0] = torch.nan
        given.append((f"one without observed values {list(shape)}", empty))
    return tuple(Trial(name, (series,), _run_model, _run_source) for name, series in given)


def taps(source: Any, model: HookedTST) -> list[Tap]:
    """Where a Chronos-Bolt model computes our activations."""
    n_channels = model.cfg.n_channels or 1

    def by_series(seen: Tensor) -> Tensor:
        return seen.unflatten(0, (-1, n_channels))

    width = source.chronos_config.input_patch_size
    return [
        Tap(
            "embed.hook_patches",
            "input_patch_embedding",
            lambda seen: by_series(seen)[..., :width],
            "input",
        ),
        Tap(
            "embed.hook_observed",
            "input_patch_embedding",
            lambda seen: by_series(seen)[..., width:],
            "input",
        ),
        Tap("embed.block.hook_pre", "input_patch_embedding.hidden_layer", by_series),
        *stack_taps("encoder", "encoder", source.encoder),
        Tap("hook_encoded", "encoder.final_layer_norm"),
        *stack_taps("decoder", "decoder", source.decoder),
        Tap("head.hook_pooled", "decoder.final_layer_norm", lambda seen: seen[:, 0]),
        Tap("head.block.hook_pre", "output_patch_embedding.hidden_layer", lambda seen: seen[:, 0]),
    ]


def _rebuild(state: Mapping[str, Tensor], config: Mapping[str, Any] | None) -> nn.Module:
    if config is None:
        raise ArgumentError(
            "the weights of a Chronos-Bolt model do not tell its head count and context; give "
            "config=, the entries of its config.json"
        )
    source = _model_class()(import_module("transformers").T5Config(**config))
    expected = {k: v for k, v in source.state_dict().items() if k not in _TIED}
    given = {k: v for k, v in state.items() if k not in _TIED}
    check_keys(given, expected, "chronos-bolt")
    source.to(dtype=state["shared.weight"].dtype)
    source.load_state_dict(given, strict=False)
    return source.eval()


def load(folder: Path) -> nn.Module:
    """The source from a folder with its ``config.json`` and weights."""
    return _model_class().from_pretrained(str(folder)).eval()


def _model_class() -> Any:
    try:
        return import_module("chronos.chronos_bolt").ChronosBoltModelForForecasting
    except ImportError as error:
        raise ArgumentError(
            "the weights of a Chronos-Bolt model are compared with a model rebuilt from them, "
            "which needs its package: pip install chronos-forecasting"
        ) from error


def reads(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is a Chronos-Bolt model's."""
    return "input_patch_size" in config.get("chronos_config", {}) and (
        _CLASS.rsplit(".", 1)[1] in (config.get("architectures") or ())
    )


def recognises(source: nn.Module) -> bool:
    """Whether a module is chronos-forecasting's own, not a subclass."""
    return dotted(source) == _CLASS


register(
    Family(
        name="chronos-bolt",
        summary="Chronos-Bolt (chronos-forecasting): pipeline.model, live, or weights with config=",
        recognises=recognises,
        build=build,
        takes_state_dict=True,
        run=run,
        taps=taps,
        reads=reads,
        load=load,
    )
)
