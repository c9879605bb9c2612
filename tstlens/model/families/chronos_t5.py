"""Front end and head of Chronos-T5: a token for every sample in, logits of the next token out.

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

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from tstlens.errors import ArgumentError, SeriesShapeError
from tstlens.model.parts import positive
from tstlens.model.state import TrunkState
from tstlens.shapes import Mask, Output, Residual, Series

_EDGE = 1e20  # the outermost bins end here, as in the source


@dataclass(frozen=True)
class BinnedTokensConfig:
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

    def time_cell(self, pos: int, n_time: int) -> slice:
        """The same as :meth:`time_span`."""
        return self.time_span(pos, n_time)

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
    """

    n_tokens: int
    horizon: int = 1
    scale: float = 1.0
    n_classes: None = None
    pooling: None = None
    kind: str = "chronos-t5-logits"

    def __post_init__(self) -> None:
        positive("TokenLogitsConfig", n_tokens=self.n_tokens, horizon=self.horizon)

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
        self.hook_scale = HookPoint()  # [batch, channel, 1]
        self.hook_scaled = HookPoint()  # [batch, channel, time]

    def forward(self, series: Series, mask: Mask | None) -> tuple[Residual, TrunkState]:
        n_channels, n_context = series.shape[1], self.cfg.n_context(series.shape[2])
        observed = ~series.isnan()
        if mask is not None:
            observed = observed & mask[:, None]
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
