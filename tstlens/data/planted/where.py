"""The where-tasks: series whose class is decided by samples that are known.

Every maker draws labels, the deciding samples and what they hold; the background is drawn apart
from all that. Outside the deciding samples a series *is* its background.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

__all__ = ["WHERE", "Drawn", "Sizes", "WhereTask"]


class Sizes(NamedTuple):
    """How large a split is: series, channels, samples."""

    n: int
    n_channels: int
    n_time: int


class Drawn(NamedTuple):
    """What was planted: a label per series, where it was put, and what it holds."""

    labels: Int[np.ndarray, " series"]
    mask: Bool[np.ndarray, "series channel time"]
    motif: Float[np.ndarray, "series channel time"]  # read where the mask is True


@dataclass(frozen=True)
class WhereTask:
    """A kind of where-task.

    Args:
        make: draws what is planted.
        class_names: one name per class.
        description: what decides, in a sentence or two.
        n_channels: by default.
        n_time: by default.
        fewest_channels: that the task needs.
        fewest_samples: that the task needs in a series.
    """

    make: Callable[[Sizes, np.random.Generator], Drawn]
    class_names: tuple[str, ...]
    description: str
    n_channels: int = 1
    n_time: int = 96
    fewest_channels: int = 1
    fewest_samples: int = 48


_SPIKE = np.array([2.5, 4.0, 2.5])  # in standard deviations of the background
_SPIKE_JITTER = 0.2
_PERIODS = (10, 17)  # samples, as in TimeX

_SHORTEST, _LONGEST = 14, 20  # samples of a trend
_RISE = 6.0  # of a trend from end to end, in standard deviations of the background
_WIGGLE = 0.5  # amplitude of the sine that rides on a trend
_TREND_NOISE = 0.2

_QUIET = (16, 24)  # samples of a quiet stretch
_QUIET_SD = 0.1
_QUIET_LEVEL = 1.5  # well inside the background's range: level alone does not give it away


def _balanced(n: int, n_classes: int, generator: np.random.Generator) -> np.ndarray:
    return generator.permutation(np.arange(n) % n_classes)


def _empty(sizes: Sizes) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(tuple(sizes), dtype=bool), np.zeros(tuple(sizes))


def _freq_shapes(sizes: Sizes, generator: np.random.Generator) -> Drawn:
    """Classes 0..3: up every 10, up every 17, down every 10, down every 17 samples."""
    labels = _balanced(sizes.n, 4, generator)
    mask, motif = _empty(sizes)
    for row, label in enumerate(labels):
        period, sign = _PERIODS[label % 2], 1.0 - 2.0 * (label // 2)
        channel = generator.integers(sizes.n_channels)
        for start in range(generator.integers(period), sizes.n_time - 2, period):
            at = slice(start, start + 3)
            mask[row, channel, at] = True
            motif[row, channel, at] = sign * _SPIKE + _SPIKE_JITTER * generator.standard_normal(3)
    return Drawn(labels, mask, motif)


def _seq_comb(sizes: Sizes, generator: np.random.Generator) -> Drawn:
    """Classes 0..3: the first and the second trend go up up, up down, down up, down down."""
    labels = _balanced(sizes.n, 4, generator)
    mask, motif = _empty(sizes)
    for row, label in enumerate(labels):
        lengths = generator.integers(_SHORTEST, _LONGEST + 1, 2).tolist()
        free = sizes.n_time - sum(lengths) - 1  # at least one sample lies between the two
        first, second = sorted(generator.integers(0, free + 1, 2).tolist())
        starts = (first, second + lengths[0] + 1)
        for start, length, down in zip(starts, lengths, (label // 2, label % 2), strict=True):
            channel = generator.integers(sizes.n_channels)
            at = slice(start, start + length)
            mask[row, channel, at] = True
            motif[row, channel, at] = _trend(length, float(1 - 2 * down), generator)
    return Drawn(labels, mask, motif)


def _trend(length: int, sign: float, generator: np.random.Generator) -> np.ndarray:
    ramp = sign * np.linspace(-_RISE / 2, _RISE / 2, length)
    cycles, phase = generator.uniform(1.0, 3.0), generator.uniform(0.0, 2 * np.pi)
    sine = np.sin(2 * np.pi * cycles * np.arange(length) / length + phase)
    return ramp + _WIGGLE * sine + _TREND_NOISE * generator.standard_normal(length)


def _low_var(sizes: Sizes, generator: np.random.Generator) -> Drawn:
    """Classes 0..3: quiet low or high in channel 0, low or high in channel 1."""
    labels = _balanced(sizes.n, 4, generator)
    mask, motif = _empty(sizes)
    for row, label in enumerate(labels):
        length = generator.integers(_QUIET[0], _QUIET[1] + 1)
        start = generator.integers(0, sizes.n_time - length + 1)
        at = slice(start, start + length)
        level = _QUIET_LEVEL * (2.0 * (label % 2) - 1.0)
        mask[row, label // 2, at] = True
        motif[row, label // 2, at] = level + _QUIET_SD * generator.standard_normal(length)
    return Drawn(labels, mask, motif)


_SPIKES = ("up, every 10", "up, every 17", "down, every 10", "down, every 17")
_TRENDS = ("up, up", "up, down", "down, up", "down, down")
_LEVELS = ("channel 0 low", "channel 0 high", "channel 1 low", "channel 1 high")

_FREQ = (
    "Spikes three samples wide return every 10 or every 17 samples from a random start; the class "
    "is their direction and their period."
)
_COMB = (
    "Two stretches of 14 to 20 samples rise or fall; the class is the direction of the first and "
    "of the second, so that each of the two is needed and their order counts."
)

WHERE: dict[str, WhereTask] = {
    "freq-shapes": WhereTask(_freq_shapes, _SPIKES, _FREQ),
    "freq-shapes-multivariate": WhereTask(
        _freq_shapes,
        _SPIKES,
        f"{_FREQ} All spikes of a series are in one channel, which is drawn at random.",
        n_channels=3,
    ),
    "seq-comb-univariate": WhereTask(_seq_comb, _TRENDS, _COMB),
    "seq-comb-multivariate": WhereTask(
        _seq_comb, _TRENDS, f"{_COMB} Each is in a channel drawn at random.", n_channels=4
    ),
    "low-var": WhereTask(
        _low_var,
        _LEVELS,
        "A stretch of 16 to 24 samples is nearly constant; the class is the channel that it is in "
        "(0 or 1) and whether its level is low or high. Both levels lie within the range of the "
        "background.",
        n_channels=2,
        fewest_channels=2,
    ),
}
