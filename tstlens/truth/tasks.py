"""``planted``: a classification task whose deciding samples are known, by name.

Backgrounds: what the series of a planted task hold where nothing was planted.

A background is drawn before any label and knows none, so a classifier that sees only backgrounds
is at chance. Both kinds have mean 0 and standard deviation 1.

The where-tasks: series whose class is decided by samples that are known.

Every maker draws labels, the deciding samples and what they hold; the background is drawn apart
from all that. Outside the deciding samples a series *is* its background.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tstlens.arguments import Count, Seed, check_fields, checked
from tstlens.data.series import TimeSeriesData
from tstlens.data.validate import check_series, row_indices
from tstlens.errors import ArgumentError, SeriesShapeError, UnknownNameError
from tstlens.shapes import Series

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


_SPLITS = ("train", "test")


@dataclass(frozen=True, eq=False, repr=False)
class PlantedTask:
    """One split of a task with a known answer to "which samples decide?".

    Args:
        name: of the task.
        series: ``[n, channel, time]``, in standard deviations of the background.
        labels: ``[n]`` classes.
        mask: ``[n, channel, time]`` bool, True at the samples that decide. Not to be mistaken for
            the mask of observed samples of a `TimeSeriesData`: here every sample was observed.
        background: ``[n, channel, time]``, what the series held before anything was planted; equal
            to ``series`` where the mask is False.
        class_names: one name per class.
        description: what decides.
        split: ``"train"`` or ``"test"``.
        made: the arguments of `planted` that make the task again.
    """

    name: str
    series: Series
    labels: Int[Tensor, " n"]
    mask: Bool[Tensor, "n channel time"]
    background: Series
    class_names: tuple[str, ...]
    description: str
    split: str
    made: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self)
        check_series(self.series)
        shapes = {name: list(getattr(self, name).shape) for name in ("mask", "background")}
        if any(shape != list(self.series.shape) for shape in shapes.values()):
            raise SeriesShapeError(
                f"expected mask and background like the series {list(self.series.shape)}, "
                f"got {shapes}"
            )

    @cached_property
    def data(self) -> TimeSeriesData:
        """The series and labels as training and analyses take them."""
        return TimeSeriesData(
            self.series, self.labels, self.class_names, name=self.name, split=self.split
        )

    @cached_property
    def test(self) -> PlantedTask:
        """The test split of the same task, whole, also where this is a part of a split."""
        return planted(self.name, split="test", **self.made)

    @cached_property
    def without(self) -> TimeSeriesData:
        """The control: the background alone in place of the deciding samples, same labels.

        No classifier can do better than chance on it. One that does knows something else about
        the series than what was planted.
        """
        return replace(self.data, series=self.background)

    @checked
    def transplanted(self, seed: Seed = 0) -> Series:
        """The deciding samples on the backgrounds of other series: same classes, other context.

        Args:
            seed: of the exchange; no series keeps its own background where there are two or more.

        Returns:
            ``[n, channel, time]``.
        """
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self), generator=generator)
        other = torch.empty_like(order)
        other[order] = order.roll(1)
        return torch.where(self.mask, self.series, self.background[other])

    def __len__(self) -> int:
        return len(self.series)

    def __getitem__(self, index: Any) -> PlantedTask:
        rows = row_indices(index, len(self))
        names = ("series", "labels", "mask", "background")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})

    def __iter__(self) -> Iterator[PlantedTask]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        n, n_channels, n_time = self.series.shape
        return (
            f"PlantedTask({self.name!r}, {self.split!r}, n={n}, channel={n_channels}, "
            f"time={n_time}, classes={len(self.class_names)}, "
            f"{float(self.mask.float().mean()):.1%} of the samples decide)"
        )


def planted_names() -> list[str]:
    """The names that `planted` knows.

    Example:
        >>> "low-var" in planted_names()
        True
    """
    return list(WHERE)


@checked
def planted(
    name: str,
    seed: Seed = 0,
    *,
    split: str = "train",
    n_train: Count = 1000,
    n_test: Count = 400,
    n_time: Count | None = None,
    n_channels: int | None = None,
    background: str = "narma",
) -> PlantedTask:
    """A classification task with a mask of the samples that decide.

    It answers whether a method that says *where* a model looks is right, since here the answer is
    known. What can mislead: a model may do well by a part of the deciding samples (half of a trend
    tells its direction), so even a perfect account of the model need not cover the whole mask; and
    a model that has not learned the task has nothing to be right about, so look at its accuracy
    first.

    The tasks are in the manner of TimeX's and made anew from its description. They differ from it
    in this: the trends of ``seq-comb`` count in their order, and there is no class without any,
    so that every series has deciding samples and all of them are needed.

    Args:
        name: one of `planted_names`.
        seed: another seed is another draw of the same task; splits never share a draw.
        split: ``"train"`` or ``"test"``; a task's ``test`` is its test split.
        n_train: series of the training split, classes in equal parts.
        n_test: series of the test split.
        n_time: samples of a series; None for the task's own choice.
        n_channels: channels of a series; None for the task's own choice.
        background: ``"narma"`` or ``"coloured"``; it knows nothing of the class.

    Returns:
        A PlantedTask: ``series``, ``labels``, ``mask``, ``data`` for training, ``test``.

    Raises:
        UnknownNameError: no task, split or background of this name.
        ArgumentError: sizes that the task cannot have.

    Source: Queen et al. 2023, arXiv 2306.02109 (FreqShapes, SeqComb-UV, SeqComb-MV, LowVar).

    Example:
        >>> task = planted("seq-comb-multivariate", seed=0, n_train=8)
        >>> task.series.shape, task.labels.shape, task.mask.dtype
        (torch.Size([8, 4, 96]), torch.Size([8]), torch.bool)
        >>> task.test
        PlantedTask('seq-comb-multivariate', 'test', n=400, channel=4, time=96, classes=4, \
8.9% of the samples decide)
    """
    if name not in WHERE:
        raise UnknownNameError(name, WHERE, "this names a task of truth.planted")
    if split not in _SPLITS:
        raise UnknownNameError(split, _SPLITS, "this names the split of a planted task")
    if background not in BACKGROUNDS:
        raise UnknownNameError(
            background, BACKGROUNDS, "this names the background of a planted task"
        )
    made = {
        "seed": seed,
        "n_train": n_train,
        "n_test": n_test,
        "n_time": n_time,
        "n_channels": n_channels,
        "background": background,
    }
    sizes = _sizes(name, n_train if split == "train" else n_test, n_channels, n_time)
    return _draw(name, sizes, split, made)


def _sizes(name: str, n: int, n_channels: int | None, n_time: int | None) -> Sizes:
    task = WHERE[name]
    sizes = Sizes(
        n,
        task.n_channels if n_channels is None else n_channels,
        task.n_time if n_time is None else n_time,
    )
    if sizes.n_channels < task.fewest_channels:
        raise ArgumentError(
            f"n_channels: {name} needs at least {task.fewest_channels}, got {sizes.n_channels}"
        )
    if sizes.n_time < task.fewest_samples:
        raise ArgumentError(
            f"n_time: {name} needs at least {task.fewest_samples} samples, got {sizes.n_time}"
        )
    return sizes


def _draw(name: str, sizes: Sizes, split: str, made: dict[str, Any]) -> PlantedTask:
    task = WHERE[name]
    # Apart from each other: what is planted, and the background that it is planted in.
    key = (made["seed"], zlib.crc32(name.encode()), _SPLITS.index(split))
    of_plant, of_background = np.random.SeedSequence(key).spawn(2)
    drawn = task.make(sizes, np.random.default_rng(of_plant))
    under = background(made["background"], *sizes, np.random.default_rng(of_background))
    series = np.where(drawn.mask, drawn.motif, under)
    return PlantedTask(
        name,
        torch.from_numpy(series.astype(np.float32)),
        torch.from_numpy(drawn.labels.astype(np.int64)),
        torch.from_numpy(drawn.mask),
        torch.from_numpy(under.astype(np.float32)),
        task.class_names,
        task.description,
        split,
        made,
    )
