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
seen). Output: logits [batch, channel, step, token]; ``model.forecast`` draws paths from them as the
source does.

Not differentiable before ``hook_embed``: samples are sorted into bins.

Refused: causal models (``model_type="causal"``), other tokenizers, subclasses, series longer than
the context (which the source cuts without a word).

Front end and head of Chronos-T5: a token for every sample in, logits of the next token out.

Every channel is divided by its mean absolute value, its samples are sorted into bins of equal
width, and the bins are the tokens of a T5. A missing value (NaN, or False in the mask: both are
the same here) is a padding token that nothing attends to. Sorting into bins has no gradient: what
comes before ``hook_embed`` can be edited, but gradients end there.

The last ``decoder_steps`` samples of a series are given to the decoder as the steps that it has
already seen, and the samples before them to the encoder. The output is the distribution of each of
these steps and of the one after them.

Source: Ansari et al. 2024, "Chronos: Learning the language of time series", arXiv 2403.07815, and
the package chronos-forecasting.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tstlens.errors import ArgumentError, SeriesShapeError, UnsupportedSourceError
from tstlens.model import HookedTST, HookedTSTConfig
from tstlens.model.parts import positive
from tstlens.model.reading import Reading, Unreadable
from tstlens.model.state import TrunkState
from tstlens.points import Hook
from tstlens.shapes import Mask, Output, Residual, Series
from tstlens.zoo.comparing import Tap
from tstlens.zoo.layers import fill
from tstlens.zoo.parity import Trial, run_model
from tstlens.zoo.parts import OwnCells, observed_in
from tstlens.zoo.registry import Built, class_of, register_classes
from tstlens.zoo.t5 import (
    dotted,
    fill_stack,
    in_full_precision,
    read_t5,
    showing_patterns,
    stack_taps,
)
from tstlens.zoo.transformers_source import live_or_rebuilt, load_weights

_EDGE = 1e20  # the outermost bins end here, as in the source


@dataclass(frozen=True)
class BinnedTokensConfig(OwnCells):
    """Chronos-T5's front end.

    Args:
        n_tokens: tokens, special ones included.
        n_special_tokens: tokens before the first bin.
        low_limit: centre of the lowest bin, in multiples of the scale.
        high_limit: centre of the highest bin.
        context_length: most samples that the encoder takes.
        pad_token: token of a missing value.
        eos_token: token after the last sample; None for none.
        start_token: the decoder's first token.
        decoder_steps: samples at the end of a series that the decoder has already seen.
    """

    n_tokens: int
    n_special_tokens: int
    low_limit: float
    high_limit: float
    context_length: int
    pad_token: int = 0
    eos_token: int | None = 1
    start_token: int = 0
    decoder_steps: int = 0
    kind: str = "chronos-t5-tokens"
    channel_independent: bool = True
    takes_missing: bool = True

    def __post_init__(self) -> None:
        positive("BinnedTokensConfig", n_tokens=self.n_tokens, context_length=self.context_length)
        if not 0 <= self.n_special_tokens < self.n_tokens - 2:
            raise ArgumentError(
                f"{self.n_tokens} tokens with {self.n_special_tokens} special ones leave no bins"
            )
        if not self.low_limit < self.high_limit:
            raise ArgumentError(f"no bins between {self.low_limit} and {self.high_limit}")
        steps = self.decoder_steps
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
            raise ArgumentError(f"decoder_steps must be 0 or more, got {steps!r}")

    @property
    def centers(self) -> Float[Tensor, " bin"]:
        """Values in the middle of the bins, in multiples of the scale."""
        count = self.n_tokens - self.n_special_tokens - 1
        return torch.linspace(self.low_limit, self.high_limit, count)

    def n_context(self, n_time: int) -> int:
        """Samples of a series that the encoder takes."""
        return n_time - self.decoder_steps

    def n_pos(self, n_time: int) -> int:
        """Positions of the encoder: samples, and the end token where there is one."""
        n_context = self.n_context(n_time)
        return n_context + (self.eos_token is not None) if n_context > 0 else 0

    def check(self, n_time: int) -> None:
        """Raise :class:`SeriesShapeError` unless the series fits into the context."""
        if self.n_context(n_time) > self.context_length:
            raise SeriesShapeError(
                f"expected at most context_length={self.context_length} samples before the "
                f"{self.decoder_steps} that the decoder takes, got {self.n_context(n_time)}; cut "
                "the series at its start (the source does so without a word)"
            )

    def time_span(self, pos: int, n_time: int) -> slice:
        """The one sample of position ``pos``; none for the end token."""
        last = pos == self.n_context(n_time)
        return slice(0, 0) if last else slice(pos, pos + 1)

    def build(self, cfg: Any) -> nn.Module:
        """The front end, with new weights."""
        return BinnedTokens(self, cfg.d_model)


@dataclass(frozen=True)
class TokenLogitsConfig:
    """Chronos-T5's head: logits of every token at every position of the decoder.

    Args:
        n_tokens: tokens.
        horizon: positions of the decoder.
        scale: the stream is multiplied by it first (T5: ``d_model ** -0.5``).
        temperature: what logits are divided by before a token is drawn.
        top_k: the most likely tokens that are drawn from; None for all.
        top_p: tokens are drawn from the most likely ones that have this probability together.
        n_samples: paths that are drawn where nobody says how many.
        reach: steps that are drawn before the encoder sees what was drawn.
        eos_token: the token that ends a path, which none does before the others.
    """

    n_tokens: int
    horizon: int = 1
    scale: float = 1.0
    n_classes: None = None
    pooling: None = None
    temperature: float = 1.0
    top_k: int | None = 50
    top_p: float = 1.0
    n_samples: int = 20
    reach: int = 64
    eos_token: int | None = 1
    kind: str = "chronos-t5-logits"

    def __post_init__(self) -> None:
        positive("TokenLogitsConfig", n_tokens=self.n_tokens, horizon=self.horizon)

    @property
    def reading(self) -> Reading:
        """Logits of tokens are no values: forecasts are drawn."""
        return Unreadable(
            self.n_tokens, "logits of tokens, in multiples of the series' own scale; model.forecast"
        )

    def sample(
        self,
        model: Any,
        series: Tensor,
        covariates: Any,
        horizon: int,
        n_samples: int | None,
        seed: int,
    ) -> Float[Tensor, "batch sample channel horizon"]:
        """Paths drawn token by token, as the source draws them (the same ones under one seed).

        After ``reach`` steps the encoder sees the median of what was drawn.

        Args:
            model: the model.
            series: [batch, channel, time].
            covariates: none are taken.
            horizon: steps.
            n_samples: paths of every series.
            seed: of the draws.
        """
        if covariates is not None:
            raise ArgumentError("this model takes no covariates; leave covariates= out")
        n = n_samples or self.n_samples
        generator = torch.Generator(model.device).manual_seed(seed)
        seen = model.cfg.embed.decoder_steps
        pieces: list[Tensor] = []
        with_decoder_steps(model, 0)
        try:
            model.check_series(series)
            while (left := horizon - sum(piece.shape[3] for piece in pieces)) > 0:
                context = series[..., -model.cfg.embed.context_length :].to(model.device)
                drawn = _paths(model, context, min(left, self.reach), n, generator)
                pieces.append(drawn)
                series = torch.cat([series, drawn.median(1).values.to(series)], 2)
        finally:
            with_decoder_steps(model, seen)
        return torch.cat(pieces, 3)

    def build(self, cfg: Any) -> nn.Module:
        """The head, with new weights."""
        return TokenLogits(self, cfg.d_model)


class BinnedTokens(nn.Module):
    """From a series to embedded tokens for encoder and decoder; ``W_E`` is [token, d_model]."""

    boundaries: Tensor

    def __init__(self, cfg: BinnedTokensConfig, d_model: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.W_E = nn.Parameter(torch.zeros(cfg.n_tokens, d_model))
        centers = cfg.centers
        edge = torch.tensor([_EDGE])
        inner = (centers[1:] + centers[:-1]) / 2
        self.register_buffer("boundaries", torch.cat([-edge, inner, edge]), persistent=False)
        self.hook_scale = Hook("batch channel 1")
        self.hook_scaled = Hook("batch channel time")

    def forward(self, series: Series, mask: Mask | None) -> tuple[Residual, TrunkState]:
        n_channels, n_context = series.shape[1], self.cfg.n_context(series.shape[2])
        observed = observed_in(series, mask)
        # Bins are a matter of single precision: the source sorts in it whatever it runs in.
        x = torch.where(observed, series, 0.0).float()
        scale = self.hook_scale(self._scale(x[..., :n_context], observed[..., :n_context]))
        tokens = self.tokens(self.hook_scaled(x / scale), observed).flatten(0, 1)  # [row, time]
        rows, pos_mask = len(tokens), observed.flatten(0, 1)[:, :n_context]
        context, seen = tokens[:, :n_context], tokens[:, n_context:]
        if self.cfg.eos_token is not None:
            context = torch.cat([context, context.new_full((rows, 1), self.cfg.eos_token)], 1)
            pos_mask = torch.cat([pos_mask, pos_mask.new_ones(rows, 1)], 1)
        start = seen.new_full((rows, 1), self.cfg.start_token)
        state = TrunkState(
            None if bool(pos_mask.all()) else pos_mask,
            n_channels,
            statistics={"scale": scale.flatten(0, 1).to(self.W_E.dtype)},
            decoder_embedded=self.W_E[torch.cat([start, seen], 1)],
        )
        return self.W_E[context], state

    def tokens(
        self, scaled: Float[Tensor, "batch channel time"], observed: Tensor
    ) -> Int[Tensor, "batch channel time"]:
        """The token of every sample.

        Args:
            scaled: values in multiples of the scale.
            observed: False where a value is missing.
        """
        bins = torch.bucketize(scaled.detach().contiguous(), self.boundaries.float(), right=True)
        tokens = (bins + self.cfg.n_special_tokens).clamp(0, self.cfg.n_tokens - 1)
        return torch.where(observed, tokens, self.cfg.pad_token)

    def values(self, tokens: Int[Tensor, "*tokens"], scale: Tensor) -> Float[Tensor, "*tokens"]:
        """Values in the middle of the tokens' bins, times the scale.

        Args:
            tokens: integers; special ones count as the lowest bin, as in the source.
            scale: ``embed.hook_scale``, with axes that fit those of the tokens.
        """
        centers = self.cfg.centers.to(scale)
        first = self.cfg.n_special_tokens + 1
        return centers[(tokens - first).clamp(0, len(centers) - 1)] * scale

    def _scale(self, context: Tensor, observed: Tensor) -> Tensor:
        """Mean absolute value [batch, channel, 1]; 1 where it is zero or nothing is observed."""
        # nansum, like the source: another order of summation could move a sample to the next bin.
        total = torch.nansum(context.abs() * observed, -1, keepdim=True)
        scale = total / torch.nansum(observed, -1, keepdim=True)
        return torch.where(scale > 0, scale, torch.ones_like(scale))


class TokenLogits(nn.Module):
    """From the decoder's stream to logits [batch, channel, step, token]."""

    def __init__(self, cfg: TokenLogitsConfig, d_model: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.W_U = nn.Parameter(torch.zeros(d_model, cfg.n_tokens))

    def forward(self, residual: Residual, state: TrunkState) -> Output:
        logits = (residual * self.cfg.scale) @ self.W_U
        return logits.unflatten(0, (-1, state.n_series_channels))


def _paths(
    model: Any, context: Tensor, n_steps: int, n: int, generator: torch.Generator
) -> Float[Tensor, "batch sample channel step"]:
    """Paths of values drawn after a context [batch, channel, time]."""
    head, embed, first = model.cfg.head, model.embed, model.cfg.n_encoder_layers
    residual, state = model.embed_series(context)
    left = model.run_layers(residual, state, 0, first)[0]  # what leaves the encoder's layers
    state = replace(state, n_series_channels=1)  # every row on its own
    rows = torch.arange(len(left), device=left.device).repeat_interleave(n)
    left, state = left[rows], state.rows(rows)
    tokens = torch.full((len(left), 1), embed.cfg.start_token, device=left.device)
    for _ in range(n_steps):
        after = replace(state, decoder_embedded=embed.W_E[tokens])
        stream, after = model.run_layers(left, after, first, model.cfg.n_layers)
        logits = model.unembed(stream[:, -1:], after)[:, 0, 0]  # [row, token]
        if head.eos_token is not None:
            logits[:, head.eos_token] = -torch.inf
        chosen = torch.multinomial(_likely(logits, head), 1, generator=generator)
        tokens = torch.cat([tokens, chosen], 1)
    values = embed.values(tokens[:, 1:], state.statistics["scale"])
    return values.unflatten(0, (len(context), -1, n)).transpose(1, 2)


def _likely(logits: Float[Tensor, "row token"], head: TokenLogitsConfig) -> Tensor:
    """Probabilities that tokens are drawn with: tempered, then of the likely ones only."""
    logits = logits / head.temperature
    if head.top_k is not None:
        least = logits.topk(min(head.top_k, logits.shape[1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if head.top_p < 1.0:
        ordered, places = logits.sort()
        unlikely = ordered.softmax(-1).cumsum(-1) <= 1 - head.top_p
        unlikely[:, -1] = False
        logits = logits.masked_fill(unlikely.scatter(1, places, unlikely), -torch.inf)
    return logits.softmax(-1)


def with_decoder_steps(model: Any, steps: int) -> Any:
    """Let the decoder of a converted Chronos-T5 take the last ``steps`` samples from now on.

    No weight depends on it; the model is changed in place and returned.

    Args:
        model: the converted model.
        steps: samples at the end of a series that the decoder has already seen.

    Raises:
        ArgumentError: the model's front end has no tokens, or the steps are negative.
    """
    if not isinstance(model.cfg.embed, BinnedTokensConfig):
        raise ArgumentError("only a converted Chronos-T5 takes samples in its decoder")
    embed = replace(model.cfg.embed, decoder_steps=steps)
    head = replace(model.cfg.head, horizon=steps + 1)
    model.cfg.embed = model.embed.cfg = embed
    model.cfg.head = model.head.cfg = head
    return model


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
    whole = live_or_rebuilt(source, config, _rebuild)
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
            temperature=own.temperature,
            top_k=own.top_k or None,
            top_p=own.top_p,
            n_samples=own.num_samples,
            reach=own.prediction_length,
            eos_token=own.eos_token_id,
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
    return Built(model, whole, _trials(cfg), dotted(whole))


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

    theirs = partial(run, mask=None, steps=steps)
    return tuple(Trial(name, (series,), run_model, theirs) for name, series in given)


def taps(source: Any, model: HookedTST) -> list[Tap]:
    """Where a Chronos-T5 computes our activations."""
    return [
        *stack_taps("model.encoder", "encoder", source.model.encoder, model),
        Tap("hook_encoded", "model.encoder.final_layer_norm"),
        *stack_taps("model.decoder", "decoder", source.model.decoder, model),
    ]


def _rebuild(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
    entries = dict(config)
    inner = class_of(_INNER)(class_of("transformers.T5Config")(**entries))
    own = class_of("chronos.chronos.ChronosConfig")(**entries["chronos_config"])
    source = class_of(_CLASS)(own, inner)
    given = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    load_weights(inner, given, "chronos-t5", [name for name in _TIED if name not in given])
    return source


def load(folder: Path) -> nn.Module:
    """The source from a folder with its ``config.json`` and weights."""
    return class_of("chronos.chronos.ChronosPipeline").from_pretrained(str(folder)).model.eval()


def reads(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is a Chronos-T5's."""
    own = config.get("chronos_config", {})
    return "tokenizer_class" in own and own.get("model_type") == "seq2seq"


def _run(source: Any, series: Tensor, mask: Tensor | None, model: HookedTST) -> Tensor:
    embed: Any = model.cfg.embed
    return run(source, series, mask, embed.decoder_steps)


FAMILY = register_classes("chronos-t5", (_CLASS,), build, _run, taps, reads=reads, load=load)
