"""Checks that every analysis of pairs makes first."""

from __future__ import annotations

from torch import Tensor

from tstlens.data.validate import blanked
from tstlens.errors import ArgumentError, SeriesShapeError
from tstlens.model import HookedTST


def check_pairs(
    model: HookedTST,
    clean: Tensor,
    corrupted: Tensor,
    clean_mask: Tensor | None = None,
    corrupted_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Clean and corrupted series as [pair, channel, time], checked against each other and model.

    Padding comes back as zeros.

    Raises:
        SeriesShapeError: they differ in shape, or do not fit the model.
        SeriesValueError: NaN, infinity or integers.
    """
    if clean.shape != corrupted.shape:
        raise SeriesShapeError(
            "clean and corrupted must have the same shape, got "
            f"{list(clean.shape)} and {list(corrupted.shape)}; a pair is one series of each"
        )
    if clean.ndim == 2:
        clean, corrupted = clean[None], corrupted[None]
    model.check_series(clean, clean_mask)
    model.check_series(corrupted, corrupted_mask)
    return blanked(clean, clean_mask), blanked(corrupted, corrupted_mask)


def require_one_stack(model: HookedTST, what: str) -> None:
    """Raise :class:`ArgumentError` for a model with an encoder and a decoder."""
    if model.cfg.n_decoder_layers:
        raise ArgumentError(
            f"{what} follows one stream from the first layer to the head; this model has an "
            "encoder and a decoder. Sweep sites instead: patching.sweep"
        )


def require_two_writers(model: HookedTST, what: str) -> None:
    """Raise unless a block's attention and MLP are all that writes to the stream, as they are.

    Raises:
        ArgumentError: a second attention, norms after the sublayers, scores that are handed on, or
            an encoder and a decoder.
    """
    cfg = model.cfg
    reasons = {
        f"a second ({cfg.second_attention}) attention": cfg.second_attention != "none",
        "an encoder and a decoder, which do not share a stream": bool(cfg.n_decoder_layers),
        "norms after attention and MLP": cfg.use_normalization_before_and_after,
        "attention scores handed on from layer to layer": cfg.residual_attention,
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise ArgumentError(
            f"{what} takes blocks in which heads and one MLP write to the stream; this model "
            f"has {' and '.join(found)}. Sweep sites instead: patching.sweep"
        )
