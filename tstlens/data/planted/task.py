"""``planted``: a classification task whose deciding samples are known, by name."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tstlens.arguments import check_fields, checked
from tstlens.data.indexing import row_indices
from tstlens.data.planted.background import BACKGROUNDS, background
from tstlens.data.planted.where import WHERE, Sizes
from tstlens.data.series import TimeSeriesData
from tstlens.data.validate import check_series
from tstlens.errors import ArgumentError, SeriesShapeError, UnknownNameError
from tstlens.shapes import Series

__all__ = ["PlantedTask", "planted", "planted_names"]

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
    def transplanted(self, seed: int = 0) -> Series:
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
    seed: int = 0,
    *,
    split: str = "train",
    n_train: int = 1000,
    n_test: int = 400,
    n_time: int | None = None,
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
        raise UnknownNameError(name, WHERE, "this names a task of data.planted")
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
    if n < 1:
        raise ArgumentError(f"n_train and n_test: expected at least 1 series, got {n}")
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
    if made["seed"] < 0:
        raise ArgumentError(f"seed: expected 0 or more, got {made['seed']}")
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
