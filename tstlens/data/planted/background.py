"""Backgrounds: what the series of a planted task hold where nothing was planted.

A background is drawn before any label and knows none, so a classifier that sees only backgrounds
is at chance. Both kinds have mean 0 and standard deviation 1.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from tstlens.errors import UnknownNameError

__all__ = ["BACKGROUNDS", "background"]

BACKGROUNDS = ("narma", "coloured")

_ORDER = 10
_BURN_IN = 100  # samples until the start is forgotten
# Of the recursion below, over 4 million samples.
_NARMA_MEAN, _NARMA_SD = 0.3347, 0.0818
_COLOUR = 0.7  # correlation of neighbouring samples


def background(
    kind: str, n: int, n_channels: int, n_time: int, generator: np.random.Generator
) -> Float[np.ndarray, "series channel time"]:
    """Independent backgrounds, one per series and channel.

    Args:
        kind: ``"narma"``, a nonlinear moving average of order 10, or ``"coloured"``, Gaussian
            noise whose neighbouring samples correlate with 0.7.
        n: series.
        n_channels: channels of each.
        n_time: samples of each.
        generator: of the draws.

    Raises:
        UnknownNameError: no background of this kind.

    Source: Atiya and Parlos 2000 (the NARMA system of order 10).

    Example:
        >>> background("coloured", 3, 2, 50, np.random.default_rng(0)).shape
        (3, 2, 50)
    """
    if kind == "narma":
        return _narma((n, n_channels), n_time, generator)
    if kind == "coloured":
        return _coloured((n, n_channels), n_time, generator)
    raise UnknownNameError(kind, BACKGROUNDS, "this names the background of a planted task")


def _narma(rows: tuple[int, int], n_time: int, generator: np.random.Generator) -> np.ndarray:
    total = _BURN_IN + n_time
    drive = generator.uniform(0.0, 0.5, (*rows, total))
    values = np.zeros((*rows, total))
    for t in range(_ORDER, total):
        before = values[..., t - 1]
        memory = values[..., t - _ORDER : t].sum(-1)
        product = drive[..., t - _ORDER] * drive[..., t - 1]
        # The plain recursion runs off to infinity now and then; tanh is the usual remedy.
        values[..., t] = np.tanh(0.3 * before + 0.05 * before * memory + 1.5 * product + 0.1)
    return (values[..., _BURN_IN:] - _NARMA_MEAN) / _NARMA_SD


def _coloured(rows: tuple[int, int], n_time: int, generator: np.random.Generator) -> np.ndarray:
    fresh = generator.standard_normal((*rows, n_time))
    values = np.empty_like(fresh)
    values[..., 0] = fresh[..., 0]
    for t in range(1, n_time):
        values[..., t] = _COLOUR * values[..., t - 1] + (1 - _COLOUR**2) ** 0.5 * fresh[..., t]
    return values
