"""Checks that every analysis of pairs makes first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from tstlens.data.forecasting import ForecastWindows
from tstlens.data.validate import blanked
from tstlens.errors import ArgumentError, SeriesShapeError
from tstlens.metrics import Metric
from tstlens.model import HookedTST
from tstlens.shapes import PairSeries

PairData = PairSeries | ForecastWindows  # one pair may come without the pair axis


def series_of(given: Tensor | ForecastWindows) -> Tensor:
    """The series themselves."""
    return given.series if isinstance(given, ForecastWindows) else given


def described_by(
    given: Tensor | ForecastWindows, metric: Metric | Callable[..., Any]
) -> dict[str, Any]:
    """What a result takes over from windows: when samples were taken, and the unit of the values.

    Args:
        given: series, or windows; several windows are of several times.
        metric: what is measured.
    """
    if not isinstance(given, ForecastWindows):
        return {}
    found: dict[str, Any] = {"times": _times(given)}
    own = {"units": given.unit, "squared units": f"{given.unit}²"}
    if given.unit and getattr(metric, "unit", None) in own:
        found["unit"] = own[getattr(metric, "unit", "")]
    return found


def _times(given: Tensor | ForecastWindows) -> tuple[str, ...] | None:
    if not isinstance(given, ForecastWindows) or len(given) != 1 or given.freq is None:
        return None
    return tuple(map(str, given.times()[: given.n_time]))


def spans_of(
    given: Tensor | ForecastWindows, slices: str | int | Sequence[tuple[int, int]]
) -> dict[str, tuple[int, int]]:
    """Runs of samples by name.

    Args:
        given: series, or windows with their times.
        slices: a unit of the calendar, samples of each run (counted back from the end), or first
            and one-past-last samples.

    Raises:
        ArgumentError: a unit without times, or runs that the series do not have.
    """
    if isinstance(given, ForecastWindows) and isinstance(slices, str | int):
        return given.spans(slices)
    n_time = given.shape[-1] if isinstance(given, Tensor) else given.n_time
    if isinstance(slices, str):
        raise ArgumentError(
            f"slices={slices!r} is a unit of the calendar, and a tensor has no times: give "
            "ForecastWindows, or a number of samples"
        )
    if isinstance(slices, int):
        if not 1 <= slices <= n_time:
            raise ArgumentError(f"expected slices in 1..{n_time} samples, got {slices}")
        found = [(max(0, stop - slices), stop) for stop in range(n_time, 0, -slices)][::-1]
    else:
        found = [(int(start), int(stop)) for start, stop in slices]
    if not found or not all(0 <= start < stop <= n_time for start, stop in found):
        raise ArgumentError(
            f"expected slices as (first, one past last) samples within 0..{n_time}, got {found}"
        )
    times = _times(given)
    return {
        f"{times[start]} to {times[stop - 1]}" if times else f"{start} to {stop - 1}": (start, stop)
        for start, stop in found
    }


def check_pairs(
    model: HookedTST,
    clean: Tensor | ForecastWindows,
    corrupted: Tensor | ForecastWindows,
    clean_mask: Tensor | None = None,
    corrupted_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Clean and corrupted series as [pair, channel, time], checked against each other and model.

    Padding comes back as zeros.

    Raises:
        SeriesShapeError: they differ in shape, or do not fit the model.
        SeriesValueError: NaN, infinity or integers.
    """
    clean, corrupted = series_of(clean), series_of(corrupted)
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
