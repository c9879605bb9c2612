"""Family ``chronos-t5``: ``ChronosModel`` of chronos-forecasting around an encoder–decoder T5.

| source (chronos.chronos)                     | here                                              |
|----------------------------------------------|---------------------------------------------------|
| ``MeanScaleUniformBins``                     | ``embed.hook_scale``, ``embed.hook_scaled``;      |
|                                              | ``embed.values`` turns tokens back                |
| ``model.shared``                             | ``embed.W_E``, ``hook_embed``,                    |
|                                              | ``hook_decoder_embed``                            |
| ``model.encoder`` (T5 stack)                 | ``encoder`` (see ``t5_layers``),                  |
|                                              | ``encoder_final_ln``, ``hook_encoded``            |
| ``model.decoder`` (T5 stack)                 | ``decoder``, ``decoder_final_ln``                 |
| ``model.lm_head``                            | ``head.W_U``                                      |

Covered: tied and untied output weights, with and without end token, missing values, several
decoder steps (``decoder_steps=``: the last samples of a series are what the decoder has already
seen). Output: logits [batch, channel, step, token]; drawing samples from them is the source's.

Not differentiable before ``hook_embed``: samples are sorted into bins.

Refused: causal models (``model_type="causal"``), other tokenizers, subclasses, series longer than
the context (which the source cuts without a word).
"""

from __future__ import annotations

from collections.abc import Mapping
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
    dotted,
    fill_stack,
    in_full_precision,
    read_t5,
    showing_patterns,
    stack_taps,
)
from tstlens.errors import ArgumentError, UnsupportedSourceError
from tstlens.model import HookedTST, HookedTSTConfig
from tstlens.model.families.chronos_t5 import BinnedTokensConfig, TokenLogitsConfig

_CLASS = "chronos.chronos.ChronosModel"
_INNER = "transformers.models.t5.modeling_t5.T5ForConditionalGeneration"
_TIED = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")


def build(
    source: nn.Module | Mapping[str, Tensor],
    n_channels: int = 1,
    decoder_steps: int = 0,
    config: Mapping[str, Any] | None = None,
) -> Built:
    """Convert a Chronos-T5 model.

    Args:
        source: the model (of a pipeline, ``pipeline.model``), or its state dict.
        n_channels: channels of the series it will be given.
        decoder_steps: samples at the end of a series that the decoder has already seen.
        config: the entries of its ``config.json`` (state dict only, needed there).
    """
    if isinstance(source, Mapping):
        source = _rebuild(source, config)
    elif config is not None:
        raise ArgumentError("config: a live model knows it itself; leave it out")
    whole: Any = source
    own, t5 = whole.config, whole.model
    _check(own, t5)
    options, decoder = read_t5(t5.encoder), read_t5(t5.decoder)
    limits = own.tokenizer_kwargs
    scaled = getattr(t5.config, "scale_decoder_outputs", t5.config.tie_word_embeddings)
    cfg = HookedTSTConfig(
        embed=BinnedTokensConfig(
            n_tokens=own.n_tokens,
            n_special_tokens=own.n_special_tokens,
            low_limit=float(limits["low_limit"]),
            high_limit=float(limits["high_limit"]),
            context_length=own.context_length,
            pad_token=own.pad_token_id,
            eos_token=own.eos_token_id if own.use_eos_token else None,
            start_token=t5.config.decoder_start_token_id,
            decoder_steps=decoder_steps,
        ),
        head=TokenLogitsConfig(
            n_tokens=len(t5.lm_head.weight),
            horizon=decoder_steps + 1,
            scale=t5.config.d_model**-0.5 if scaled else 1.0,
        ),
        n_channels=n_channels,
        n_decoder_layers=decoder["n_layers"],
        model_name="Chronos-T5",
        **{**options, "n_layers": options["n_layers"] + decoder["n_layers"]},
    )
    weight = t5.shared.weight
    model = HookedTST(cfg).to(device=weight.device, dtype=weight.dtype)
    fill(model.embed, {"W_E": weight})
    fill_stack(model.encoder, model.position_bias, model.encoder_final_ln, t5.encoder)
    fill_stack(model.decoder, model.decoder_position_bias, model.decoder_final_ln, t5.decoder)
    fill(model.head, {"W_U": t5.lm_head.weight.T})
    return Built(model, whole, _trials(cfg), dotted(source))


def _check(own: Any, t5: Any) -> None:
    if own.model_type != "seq2seq" or dotted(t5) != _INNER or "forward" in vars(t5):
        raise UnsupportedSourceError(
            f"expected a seq2seq model on {_INNER}, got model_type {own.model_type!r} on "
            f"{dotted(t5)}; causal models and other networks are not covered"
        )
    if own.tokenizer_class != "MeanScaleUniformBins":
        raise UnsupportedSourceError(
            f"tokenizer_class {own.tokenizer_class!r} is not covered; MeanScaleUniformBins is"
        )
    if own.n_tokens != len(t5.shared.weight):
        raise UnsupportedSourceError(
            f"n_tokens={own.n_tokens}, but the model embeds {len(t5.shared.weight)} tokens"
        )


def run(source: Any, series: Tensor, mask: Tensor | None, steps: int = 0) -> Tensor:
    """The source's logits [batch, channel, step, token] for a series.

    Args:
        source: the source.
        series: float [batch, channel, time].
        mask: bool [batch, time].
        steps: samples at the end that the decoder has already seen.
    """
    if mask is not None:
        series = series.masked_fill(~mask[:, None], torch.nan)
    rows = series.flatten(0, 1).float()
    n_context = rows.shape[1] - steps
    tokenizer = source.config.create_tokenizer()
    tokens, observed, scale = tokenizer.context_input_transform(rows[:, :n_context])
    seen = tokenizer._input_transform(rows[:, n_context:], scale)[0]
    start = torch.full((len(rows), 1), source.model.config.decoder_start_token_id)
    with in_full_precision(source, series.dtype), showing_patterns(source):
        logits = source.model(
            input_ids=tokens,
            attention_mask=observed,
            decoder_input_ids=torch.cat([start, seen], 1),
        ).logits
    return logits.unflatten(0, series.shape[:2])


def _trials(cfg: HookedTSTConfig) -> tuple[Trial, ...]:
    embed: Any = cfg.embed
    steps = embed.decoder_steps
    generator = torch.Generator().manual_seed(0)
    shape = (4, cfg.n_channels or 1, min(embed.context_length, 64) + steps)
    # Numbers of single precision in both: bins are sorted in it.
    normal = torch.randn(shape, generator=generator).double()
    missing, padded = normal.clone(), normal.clone()
    missing[torch.rand(shape, generator=generator) < 0.3] = torch.nan
    missing[..., 0] = 1.0
    for row, before in enumerate((0, 1, shape[2] // 2, shape[2] - steps - 1)):
        padded[row, :, :before] = torch.nan
    given = [
        (f"random {list(shape)}", normal),
        (f"large and far from zero {list(shape)}", (100 * normal + 30).float().double()),
        (f"constant {list(shape)}", normal[..., :1].expand(shape).clone()),
        (f"missing values {list(shape)}", missing),
        (f"padded at the start {list(shape)}", padded),
    ]

    def run_model(model: HookedTST, series: Tensor) -> Tensor:
        return model(series)

    def run_source(source: Any, series: Tensor) -> Tensor:
        return run(source, series, None, steps)

    return tuple(Trial(name, (series,), run_model, run_source) for name, series in given)


def taps(source: Any, model: HookedTST) -> list[Tap]:
    """Where a Chronos-T5 computes our activations."""
    return [
        *stack_taps("model.encoder", "encoder", source.model.encoder),
        Tap("hook_encoded", "model.encoder.final_layer_norm"),
        *stack_taps("model.decoder", "decoder", source.model.decoder),
    ]


def _rebuild(state: Mapping[str, Tensor], config: Mapping[str, Any] | None) -> nn.Module:
    if config is None:
        raise ArgumentError(
            "the weights of a Chronos-T5 do not tell its bins and head count; give config=, the "
            "entries of its config.json"
        )
    entries = dict(config)
    chronos = _package()
    transformers = import_module("transformers")
    inner = transformers.T5ForConditionalGeneration(transformers.T5Config(**entries))
    source = chronos.ChronosModel(chronos.ChronosConfig(**entries["chronos_config"]), inner)
    given = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    tied = [name for name in _TIED if name not in given]
    expected = {k: v for k, v in inner.state_dict().items() if k not in tied}
    check_keys(given, expected, "chronos-t5")
    inner.to(dtype=given["shared.weight"].dtype)
    inner.load_state_dict(given, strict=False)
    return source.eval()


def load(folder: Path) -> nn.Module:
    """The source from a folder with its ``config.json`` and weights."""
    return _package().ChronosPipeline.from_pretrained(str(folder)).model.eval()


def _package() -> Any:
    try:
        return import_module("chronos.chronos")
    except ImportError as error:
        raise ArgumentError(
            "the weights of a Chronos-T5 are compared with a model rebuilt from them, which needs "
            "its package: pip install chronos-forecasting"
        ) from error


def reads(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is a Chronos-T5's."""
    own = config.get("chronos_config", {})
    return "tokenizer_class" in own and own.get("model_type") == "seq2seq"


def recognises(source: nn.Module) -> bool:
    """Whether a module is chronos-forecasting's own, not a subclass."""
    return dotted(source) == _CLASS


def _run(source: Any, series: Tensor, mask: Tensor | None, model: HookedTST) -> Tensor:
    embed: Any = model.cfg.embed
    return run(source, series, mask, embed.decoder_steps)


register(
    Family(
        name="chronos-t5",
        summary="Chronos-T5 (chronos-forecasting): pipeline.model, live, or weights with config=",
        recognises=recognises,
        build=build,
        takes_state_dict=True,
        run=_run,
        taps=taps,
        reads=reads,
        load=load,
    )
)
