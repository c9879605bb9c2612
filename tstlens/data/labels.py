"""Class names and class indices: how raw labels become 0..n_classes-1.

Raw labels are whatever a file holds ('1', 'walking', 3.0). Their order decides the order of the
model's logits, so it is fixed here once: numerically where every label is a number, else
alphabetically. Labels are the same class where they are written alike; only where all of them are
plain decimal numbers are they compared as numbers, exactly, so that "1" is "1.0" ("01", "1e0" and
"1_0" are not plain: beside them every label stands for itself).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tstlens.arguments import warn
from tstlens.errors import ArgumentError, LabelError

__all__ = [
    "IndexNames",
    "as_class_names",
    "as_names",
    "class_index",
    "encode_labels",
    "indices_in",
    "places_in",
]

_PLAIN = re.compile(r"(?!-0(\.0+)?$)-?(0|[1-9][0-9]*)(\.[0-9]+)?")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,4})?")
_TIMES = (np.datetime64, np.timedelta64)  # whose items may be bare integers
_EXACT = {"float16": 2**11, "bfloat16": 2**8, "float32": 2**24}  # beyond, integers coincide


class IndexNames(tuple[str, ...]):
    """Class names that nobody gave: each is its own index."""

    def __new__(cls, n: int) -> IndexNames:
        return super().__new__(cls, (str(index) for index in range(n)))

    def __reduce__(self) -> tuple[Any, ...]:
        return IndexNames, (len(self),)


def as_names(names: Any, what: str = "class_names") -> tuple[str, ...]:
    """Names in their order, as strings.

    Raises:
        ArgumentError: not a sequence (a set or dict has no order of classes), or an entry that is
            no string, integer or bool.
        LabelError: the same name twice.
    """
    if isinstance(names, IndexNames):
        return names
    if isinstance(names, str | bytes | set | frozenset | Mapping) or not isinstance(
        names, Iterable
    ):
        advice = (
            f"; a set has no order, try sorted({what})"
            if isinstance(names, set | frozenset)
            else ""
        )
        raise ArgumentError(
            f"expected {what} as a sequence of names, one per class in order of the index, "
            f"got {names!r:.100}{advice}"
        )
    try:
        found = tuple(_written(name) for name in _entries(names))
    except LabelError as error:
        raise ArgumentError(f"{what}: {error}") from None
    if len(set(found)) < len(found):
        raise LabelError(f"expected distinct {what.replace('_', ' ')}, got {list(found)}")
    return found


def as_class_names(raw: Iterable[object]) -> tuple[str, ...]:
    """Distinct labels as strings, in numerical order where all are numbers, else alphabetical.

    Raises:
        LabelError: a label that is missing, or no name: NaN, a fraction, bytes.

    Example:
        >>> as_class_names(["10", "9", "9.0"]), as_class_names(["1", "01"])
        (('9', '10'), ('01', '1'))
    """
    names = {_written(label) for label in _entries(raw)}
    if all(map(_PLAIN.fullmatch, names)):
        names = set(map(_shortest, names))
    if all(map(NUMBER.fullmatch, names)):
        return tuple(sorted(names, key=lambda name: (Decimal(name), name)))
    return tuple(sorted(names))


def encode_labels(
    raw: Iterable[Any], class_names: Sequence[str] | None = None
) -> tuple[Tensor, tuple[str, ...]]:
    """Raw labels as int64 indices into the class names.

    Args:
        raw: one label per series: strings, bools or whole numbers.
        class_names: the classes in order of their index; each label is looked up by name.
            Integer labels beside names that are not numbers are taken as indices. None: the
            distinct labels are the classes, in the order of `as_class_names`.

    Returns:
        The indices ``[n]`` and the class names.

    Raises:
        LabelError: a label is not among ``class_names``, is missing, or is no name of a class:
            a fraction, bytes; or strings stand beside numbers.

    Example:
        >>> encode_labels(["10", "9", "10"])
        (tensor([1, 0, 1]), ('9', '10'))
    """
    labels = _entries(raw)
    written = [_written(label, f" for series {row}") for row, label in enumerate(labels)]
    kinds = {_kind(label) for label in labels}
    if len(kinds) > 1:
        raise LabelError(f"expected labels of one kind, got {' beside '.join(sorted(kinds))}")
    names = as_class_names(written) if class_names is None else as_names(class_names)
    whole = all(isinstance(label, int) for label in labels)
    if kinds == {"numbers"} and whole and not all(map(NUMBER.fullmatch, names)):
        for row, label in enumerate(labels):
            if not 0 <= label < len(names):
                raise LabelError(f"label {label} of series {row} {_outside(names)}")
            if str(label) in names and names[label] != str(label):
                raise LabelError(
                    f"label {label} of series {row} is the name of one class and the index of "
                    f"another, {names[label]!r}; give all labels as strings"
                )
        return torch.tensor(labels, dtype=torch.int64), names
    found = indices_in(written, names)
    for row, index in enumerate(found):
        if index is None:
            raise LabelError(f"label {labels[row]!r} of series {row} {_outside(names)}")
    return torch.tensor(found, dtype=torch.int64), names


def indices_in(written: Sequence[str], names: Sequence[str]) -> list[int | None]:
    """The index of each label among the names, None where it is not one of them."""
    position = {name: index for index, name in enumerate(names)}
    if all(map(_PLAIN.fullmatch, [*names, *written])):
        by_value = {_shortest(name): index for name, index in position.items()}
        if len(by_value) == len(position):
            return [position.get(label, by_value.get(_shortest(label))) for label in written]
    return [position.get(label) for label in written]


def places_in(model: Any, names: tuple[str, ...]) -> list[int] | None:
    """Where each class of data stands among a model's logits, by name; None: where it stands.

    Data whose classes have no names of their own, and models that know none, go by index.

    Raises:
        LabelError: a class that the model does not have.
    """
    theirs = tuple(getattr(getattr(model, "cfg", None), "class_names", None) or ())
    if not theirs or names == theirs or isinstance(names, IndexNames):
        return None
    if names == IndexNames(len(names)) and not all(map(NUMBER.fullmatch, theirs)):
        return None  # integer labels beside words are indices, as in `encode_labels`
    found = indices_in(names, theirs)
    unknown = [name for name, index in zip(names, found, strict=True) if index is None]
    if unknown:
        raise LabelError(
            f"expected data with the model's classes {list(theirs)[:20]}, got "
            f"{list(names)[:20]}: the model has no class {unknown[0]!r}; give the data "
            "class_names=model.cfg.class_names, in the order of its logits"
        )
    return [index for index in found if index is not None]


def class_index(which: int | str, class_names: Sequence[str]) -> int:
    """The index of a class given as class name (a string) or as index (an integer).

    An integer is always an index. Where it is also the name of another class (classes "1" to "9"
    have indices 0 to 8), a warning says so.

    Raises:
        LabelError: no such class.

    Warns:
        UserWarning: an integer that is also the name of another class.

    Example:
        >>> class_index("9", ("9", "10")), class_index(1, ("9", "10"))
        (0, 1)
    """
    names = list(class_names)
    if isinstance(which, str):
        if which not in names:
            raise LabelError(f"class {which!r} {_outside(names)}")
        return names.index(which)
    given: Any = which.item() if getattr(which, "ndim", 1) == 0 else which  # type: ignore[attr-defined]
    if not isinstance(given, int | np.integer) or isinstance(given, bool):
        raise LabelError(f"class {which!r} {_outside(names)}")
    index = int(given)
    if not 0 <= index < len(names):
        raise LabelError(f"class {index} {_outside(names)}")
    if str(index) in names and names[index] != str(index):
        warn(
            f"class {index} is taken as an index, which is class {names[index]!r}; the class of "
            f"that name is {str(index)!r} (index {names.index(str(index))}): say which in quotes"
        )
    return index


def _outside(names: Sequence[str]) -> str:
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return f"is outside the {len(names)} classes; expected an index 0..{len(names) - 1} of: {shown}"


def _entries(raw: Any) -> list[Any]:
    """The labels one by one, as Python's own values."""
    if isinstance(raw, str | bytes | set | frozenset | Mapping) or not isinstance(raw, Iterable):
        raise LabelError(f"expected labels as a sequence, one per series, got {raw!r:.100}")
    shape = getattr(raw, "shape", None)
    if shape is not None and len(shape) != 1:
        raise LabelError(
            f"expected one label per series [n], got {list(shape)}; of one-hot rows take "
            "labels.argmax(1)"
        )
    limit = _EXACT.get(str(getattr(raw, "dtype", "")).removeprefix("torch."), 2**53)
    labels = [
        label.item() if hasattr(label, "item") and not isinstance(label, _TIMES) else label
        for label in _unmasked(raw)
    ]
    for row, label in enumerate(labels):
        if isinstance(label, float) and limit <= abs(label) < float("inf"):
            raise LabelError(
                f"expected labels that can be told apart, got {label:.0f} for series {row}: "
                f"from {limit} on neighbours are the same floating point number; read them as "
                "strings or integers"
            )
    return labels


def _unmasked(raw: Iterable[Any]) -> list[Any]:
    labels = list(raw)
    for row, label in enumerate(labels):
        if label is np.ma.masked:
            raise LabelError(
                f"expected a label for every series, got a masked one for series {row}"
            )
    return labels


def _written(label: Any, where: str = "") -> str:
    """A label as text."""
    if isinstance(label, str):
        return str(label)
    if isinstance(label, bool | int | np.bool_ | np.integer):
        return str(label)
    if label is None or type(label).__name__ in ("NAType", "NaTType"):
        raise LabelError(f"expected a label for every series, got {label}{where}")
    if isinstance(label, float | np.floating):
        if label != label:
            raise LabelError(f"expected a label for every series, got {label}{where}")
        if float(label).is_integer():
            return str(int(label))
        raise LabelError(
            f"expected labels as names of classes, got the number {label}{where}; numbers to be "
            "predicted are given as target= (to probing.probe, saes.score, codebooks.fit), "
            "classes as strings"
        )
    advice = "; decode them first, label.decode()" if isinstance(label, bytes) else ""
    raise LabelError(
        f"expected labels as strings or whole numbers, got {label!r:.60}{where}{advice}"
    )


def _kind(label: Any) -> str:
    if isinstance(label, str):
        return "strings"
    return "bools" if isinstance(label, bool | np.bool_) else "numbers"


def _shortest(plain: str) -> str:
    """A plain number without zeros that say nothing: some archives declare "1" and write "1.0"."""
    return plain.rstrip("0").rstrip(".") if "." in plain else plain
