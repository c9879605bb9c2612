"""What a probe is to read off: a class or a number per series, or per position."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError, LabelError

Values = np.ndarray | Tensor
Target = str | Values | tuple[Values, Values] | Callable[[TimeSeriesData], Values]


@dataclass(frozen=True, eq=False)
class Targets:
    """Targets of one split, as codes of classes or as numbers.

    Args:
        values: [series] or [series, channel or 1, pos]; int codes, or floats.
        names: of the classes, by code; () for numbers.
    """

    values: np.ndarray
    names: tuple[str, ...]

    @property
    def by_position(self) -> bool:
        """Whether each position has a target of its own."""
        return self.values.ndim == 3

    @property
    def is_class(self) -> bool:
        """Classes rather than numbers."""
        return self.values.dtype.kind == "i"


def targets_of(
    target: Target, train: TimeSeriesData, test: TimeSeriesData | None
) -> tuple[Targets, Targets | None, str]:
    """The targets of both splits, coded alike, and what to call them.

    Raises:
        LabelError: labels that are not there.
        ArgumentError: targets of another shape, kind, or number of splits.
    """
    splits = [train] if test is None else [train, test]
    if isinstance(target, str):
        if target != "labels":
            raise ArgumentError(
                f"expected target='labels', an array or a function of the data, got {target!r}"
            )
        if any(split.labels is None for split in splits):
            raise LabelError("expected labelled series for target='labels', got data without them")
        given: list[Any] = [split.labels for split in splits]
        names = train.class_names
        if test is not None and test.class_names != names:
            raise LabelError(
                f"expected the same classes in both splits, got {names} and {test.class_names}"
            )
        coded = [Targets(_array(one).astype(np.int64), names) for one in given]
        return coded[0], coded[1] if test is not None else None, "labels"
    name = "target"
    if callable(target):
        given, name = [target(split) for split in splits], getattr(target, "__name__", "target")
    elif isinstance(target, tuple):
        given = list(target)
    else:
        given = [target]
    if len(given) != len(splits):
        raise ArgumentError(
            f"expected one array of targets per split ({len(splits)}), got {len(given)}; with a "
            "test split give target=(train_target, test_target), or a function of the data"
        )
    arrays = [_shaped(_array(one), len(split)) for one, split in zip(given, splits, strict=True)]
    kinds = {array.dtype.kind == "f" for array in arrays}
    if len(kinds) > 1 or len({array.ndim for array in arrays}) > 1:
        raise ArgumentError("expected targets of one kind and shape in both splits")
    if kinds == {True}:
        if not all(np.isfinite(array).all() for array in arrays):
            raise ArgumentError("expected finite targets, got NaN or infinity")
        coded = [Targets(array.astype(np.float64), ()) for array in arrays]
    else:
        classes = np.unique(np.concatenate([array.ravel() for array in arrays]))
        names = tuple(str(one) for one in classes.tolist())
        coded = [Targets(np.searchsorted(classes, array), names) for array in arrays]
    return coded[0], coded[1] if test is not None else None, name


def check_varied(*splits: Targets) -> None:
    """Raise :class:`ArgumentError` where one class, or one number, is all that there is."""
    # A classifier needs two classes to fit; R² divides by the spread of what it is scored on.
    for split in splits[:1] if splits[0].is_class else splits:
        found = np.unique(split.values)
        if len(found) < 2:
            one = [split.names[int(found[0])] if split.is_class else found[0]] if len(found) else []
            raise ArgumentError(
                f"expected targets of at least two classes, or numbers that vary, got {one} for "
                "every series; there is nothing to tell apart"
            )


def _array(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _shaped(array: np.ndarray, n_series: int) -> np.ndarray:
    if array.dtype.kind not in "biufUO":
        raise ArgumentError(f"expected targets as classes or real numbers, got {array.dtype}")
    if not 1 <= array.ndim <= 3 or len(array) != n_series:
        raise ArgumentError(
            f"expected targets [series={n_series}], [series, pos] or [series, channel, pos], got "
            f"{list(array.shape)}"
        )
    return array[:, None] if array.ndim == 2 else array
