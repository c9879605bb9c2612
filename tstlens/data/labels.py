"""Class names and class indices: how raw labels become 0..n_classes-1.

Raw labels are whatever a file holds ('1', 'walking', 3.0). Their order decides the order of the
model's logits, so it is fixed here once: numerically where every label is a number, else
alphabetically.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from tstlens.errors import LabelError

__all__ = ["as_class_names", "class_index", "encode_labels"]


def as_class_names(raw: Iterable[object]) -> tuple[str, ...]:
    """Distinct labels as strings, in numerical order where all are numbers, else alphabetical."""
    names = {_canonical(label) for label in raw}
    numbers = {name: _number(name) for name in names}
    if all(number is not None for number in numbers.values()):
        return tuple(sorted(names, key=lambda name: numbers[name] or 0.0))
    return tuple(sorted(names))


def encode_labels(
    raw: Iterable[Any], class_names: Sequence[str] | None = None
) -> tuple[Tensor, tuple[str, ...]]:
    """Raw labels as int64 indices into the class names.

    Args:
        raw: one label per series: strings or numbers.
        class_names: the classes in order of their index; each label is looked up by name.
            Integer labels beside names that are not numbers are taken as indices. None: the
            distinct labels are the classes, in the order of `as_class_names`.

    Returns:
        The indices ``[n]`` and the class names.

    Raises:
        LabelError: a label is not among ``class_names``.

    Example:
        >>> encode_labels(["10", "9", "10"])
        (tensor([1, 0, 1]), ('9', '10'))
    """
    labels = [label.item() if hasattr(label, "item") else label for label in raw]
    for row, label in enumerate(labels):
        if label is None or label != label:
            raise LabelError(f"expected a label for every series, got {label} for series {row}")
    if class_names is None:
        names = as_class_names(labels)
    else:
        names = tuple(str(name) for name in class_names)
    if len(set(names)) < len(names):
        raise LabelError(f"expected distinct class names, got {list(names)}")
    position = {name: index for index, name in enumerate(names)}
    by_index = bool(labels) and all(
        isinstance(label, int) and not isinstance(label, bool) for label in labels
    )
    by_index = by_index and any(_number(name) is None for name in names)
    if by_index:
        for row, label in enumerate(labels):
            if not 0 <= label < len(names):
                raise LabelError(f"label {label} of series {row} {_outside(names)}")
        return torch.tensor(labels, dtype=torch.int64), names
    by_value = {_canonical(name): index for name, index in position.items()}
    indices = []
    for row, label in enumerate(labels):
        index = position.get(str(label), by_value.get(_canonical(label)))
        if index is None:
            raise LabelError(f"label {label!r} of series {row} {_outside(names)}")
        indices.append(index)
    return torch.tensor(indices, dtype=torch.int64), names


def class_index(which: int | str, class_names: Sequence[str]) -> int:
    """The index of a class given as index (int) or as class name (str).

    Raises:
        LabelError: no such class.

    Example:
        >>> class_index("9", ("9", "10")), class_index(1, ("9", "10"))
        (0, 1)
    """
    if isinstance(which, str):
        if which not in class_names:
            raise LabelError(f"class {which!r} {_outside(class_names)}")
        return list(class_names).index(which)
    if not hasattr(which, "__index__") or isinstance(which, bool):
        raise LabelError(f"class {which!r} {_outside(class_names)}")
    index = int(which)
    if not 0 <= index < len(class_names):
        raise LabelError(f"class {index} {_outside(class_names)}")
    return index


def _outside(names: Sequence[str]) -> str:
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return f"is outside the {len(names)} classes; expected an index 0..{len(names) - 1} of: {shown}"


def _number(label: object) -> float | None:
    try:
        value = float(str(label))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _canonical(label: object) -> str:
    # Some archives write the classes as "1" in the header and "1.0" in the rows.
    value = _number(label)
    if value is None:
        return str(label)
    return str(int(value)) if value.is_integer() else repr(value)
