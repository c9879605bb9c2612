"""Labelled results: numbers on named axes, and what every result of that form can do.

Whatever an analysis measures site by site (a sweep, a map of probes, a table of similarities) is
an array with named axes, entries along each, and further numbers beside it: ends of an interval, a
control, p-values. :class:`Labelled` is what follows from that alone: a frame, a choice by label, a
figure by the number of axes. :class:`Effects` is the plain result; a subclass of ``Labelled`` has
fields and properties of its own, and says in ``columns`` what belongs in a frame.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor

from tstlens.arguments import Count, checked
from tstlens.errors import ArgumentError, UnknownAxisError, UnknownNameError
from tstlens.results import Result

if TYPE_CHECKING:
    import pandas as pd
    from typing_extensions import Self

Array = Tensor | np.ndarray
Labels = tuple[Any, ...]


class Labelled(Result):
    """Base of the results whose numbers lie on named axes.

    A subclass is a frozen dataclass (``eq=False, repr=False``) with ``axes`` and ``coords`` as
    fields; one without them says in ``entries`` what its rows are, and has no :meth:`at`.

    Attributes:
        axes: names of the axes, in order.
        coords: for every axis what its entries are.
        ALONG: the fields that :meth:`at` chooses from, and the axes that each of them has; None
            for all axes of the result. An axis that the result no longer has is passed over; one
            that only the field has, such as draws of a control, is named with a star.
    """

    axes: tuple[str, ...]
    coords: dict[str, Labels]
    ALONG: ClassVar[Mapping[str, tuple[str, ...] | None]] = {"values": None}

    @abstractmethod
    def columns(self) -> dict[str, Any]:
        """The numbers of a frame by name: arrays [*axes], or 1 along some (see :meth:`spread`)."""

    def entries(self) -> dict[str, Sequence[Any]]:
        """The index of a frame: a name for every axis, and its entries."""
        return {axis: self.coords[axis] for axis in self.axes}

    def spread(self, array: Any, *axes: str) -> Any:
        """An array that has only these axes, with 1 along the others: [*axes]."""
        array = _array(array)
        sizes = iter(array.shape)
        return array.reshape([next(sizes, 1) if axis in axes else 1 for axis in self.axes])

    def tables(self) -> dict[str, np.ndarray]:
        """The columns as numpy arrays [*axes]."""
        shape = tuple(len(some) for some in self.entries().values())
        return {name: np.broadcast_to(_numpy(part), shape) for name, part in self.columns().items()}

    def to_dataframe(self) -> pd.DataFrame:
        """Long format: a column per axis, then the numbers, one row per entry."""
        import pandas as pd

        entries = self.entries()
        frame = pd.DataFrame({name: part.reshape(-1) for name, part in self.tables().items()})
        if not entries:
            return frame
        frame.index = pd.MultiIndex.from_product(list(entries.values()), names=list(entries))
        return frame.reset_index()

    @checked
    def at(self, labels: Mapping[str, Any] | None = None, /, **more: Any) -> Self:
        """The part of the result at some entries of some axes.

        Args:
            labels: entries by axis: one (the axis goes) or a list of them (it stays).
            **more: the same, for axes whose names Python allows here.

        Raises:
            UnknownAxisError: the result has no such axis.
            UnknownNameError: the axis has no such entry.
            ArgumentError: a kind of result that has no ``coords``.

        Example:
            >>> import numpy as np
            >>> axes = {"layer": (0, 1), "head": (0, 1, 2)}
            >>> effects = Effects(np.arange(6.0).reshape(2, 3), ("layer", "head"), axes)
            >>> effects.at(layer=1).values, effects.at(head=[2, 0]).values[0]
            (array([3., 4., 5.]), array([2., 0.]))
        """
        if not hasattr(self, "coords"):
            raise ArgumentError(
                f"a {type(self).__name__} has no entries to choose by; choose rows of its frame"
            )
        chosen = {**(labels or {}), **more}
        places = {axis: self._places(axis, wanted) for axis, wanted in chosen.items()}
        parts: dict[str, Any] = {}
        for name, axes in self.ALONG.items():
            own = self.axes
            if axes is not None:
                own = tuple(a for a in axes if a in self.axes or a.startswith("*"))
            parts[name] = _taken(getattr(self, name), own, places)
        gone = {axis for axis, place in places.items() if isinstance(place, int)}
        coords = {
            axis: tuple(entries[place] for place in places[axis]) if axis in places else entries
            for axis, entries in self.coords.items()
            if axis not in gone
        }
        kept = tuple(axis for axis in self.axes if axis not in gone)
        parts |= {"axes": kept, "coords": coords}
        return replace(self, **parts)  # pyright: ignore[reportArgumentType]  (a dataclass)

    def _places(self, axis: str, wanted: Any) -> Any:
        if axis not in self.axes:
            raise UnknownAxisError(axis, self.axes, "This result has these")
        place_of = {entry: place for place, entry in enumerate(self.coords[axis])}
        if isinstance(wanted, np.ndarray | Tensor):
            wanted = wanted.tolist()
        many = isinstance(wanted, list | range)
        names = wanted if many else [wanted]
        for name in names:
            if name not in place_of:
                known = [str(entry) for entry in place_of]
                raise UnknownNameError(str(name), known, f"Axis {axis!r} of this result has these")
        places = [place_of[name] for name in names]
        return places if many else places[0]

    def shape_text(self) -> str:
        """The axes with their lengths, as ``repr`` shows them: "layer=2, head=4"."""
        return ", ".join(f"{axis}={len(some)}" for axis, some in self.entries().items())

    def __repr__(self) -> str:
        return f"{type(self).__name__}([{self.shape_text()}])"


@dataclass(frozen=True, eq=False, repr=False)
class Effects(Labelled):
    """Numbers on named axes, with intervals, a control and whatever else lies beside them.

    Args:
        values: [*axes].
        axes: names of the axes.
        coords: for every axis what its entries are.
        name: what the values are, as the frame's column calls them: ``"effect"``, ``"cka"``.
        unit: their unit; ``""`` where they have none.
        low: lower ends of intervals, like ``values``; NaN where there is none.
        high: upper ends.
        control: what there would be without anything to find, like ``values``.
        more: further columns by name: like ``values``, or with 1 along some axes.
        time_cells: first and one-past-last sample that each entry of ``pos`` stands for, or None.
        made: how.

    Example:
        >>> import numpy as np
        >>> found = Effects(np.array([0.1, 0.7]), ("layer",), {"layer": (0, 1)}, "auc")
        >>> found.top(1)
           layer  auc
        0      1  0.7
    """

    values: Array
    axes: tuple[str, ...]
    coords: dict[str, Labels]
    name: str = "value"
    unit: str = ""
    low: Array | None = None
    high: Array | None = None
    control: Array | None = None
    more: dict[str, Any] = field(default_factory=dict)
    time_cells: tuple[tuple[int, int], ...] | None = None
    made: dict[str, Any] = field(default_factory=dict)

    ALONG: ClassVar[Mapping[str, tuple[str, ...] | None]] = dict.fromkeys(
        ("values", "low", "high", "control", "more")
    )

    def __post_init__(self) -> None:
        shape = tuple(len(self.coords[axis]) for axis in self.axes)
        for name in ("values", "low", "high", "control"):
            part = getattr(self, name)
            if part is not None and tuple(part.shape) != shape:
                raise ArgumentError(
                    f"expected {name} of [{self.shape_text()}], got {list(part.shape)}"
                )

    def columns(self) -> dict[str, Any]:
        """The values under their own name, then low, high, control and what else there is."""
        found = {self.name: self.values}
        found |= {name: getattr(self, name) for name in ("low", "high", "control")}
        return {name: part for name, part in {**found, **self.more}.items() if part is not None}

    @checked
    def mean(self, axis: str) -> Effects:
        """Values and control averaged over one axis; intervals and other columns are dropped.

        Raises:
            UnknownAxisError: the result has no such axis.
        """
        if axis not in self.axes:
            raise UnknownAxisError(axis, self.axes, "This result has these")
        place = self.axes.index(axis)
        return replace(
            self,
            values=_array(self.values.mean(place)),
            control=None if self.control is None else _array(self.control.mean(place)),
            low=None,
            high=None,
            more={},
            axes=tuple(name for name in self.axes if name != axis),
            coords={name: some for name, some in self.coords.items() if name != axis},
        )

    @checked
    def top(self, n: Count = 5) -> pd.DataFrame:
        """The ``n`` entries whose values are largest in size, strongest first."""
        return strongest(self.to_dataframe(), self.name, n)

    def __repr__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        return f"Effects({self.name}{unit} [{self.shape_text()}])"


def strongest(frame: pd.DataFrame, column: str, n: int | None = None) -> pd.DataFrame:
    """The rows of a frame whose entries are largest in size, strongest first; NaN last."""
    order = frame[column].abs().sort_values(ascending=False, kind="stable").index
    return frame.loc[order[:n]].reset_index(drop=True)


def _numpy(part: Any) -> np.ndarray:
    return part.detach().cpu().numpy() if isinstance(part, Tensor) else np.asarray(part)


def _taken(part: Any, axes: tuple[str, ...], places: Mapping[str, Any]) -> Any:
    """Entries of an array that has these axes; of each where there are several by name."""
    if part is None:
        return None
    if isinstance(part, dict):
        return {name: _taken(one, axes, places) for name, one in part.items()}
    if isinstance(part, tuple):  # one number (or word) for every entry of one axis
        place = places.get(axes[0], range(len(part))) if axes else range(len(part))
        return tuple(part[one] for one in ([place] if isinstance(place, int) else place))
    for number in reversed(range(len(axes))):
        place = places.get(axes[number])
        if place is None:
            continue
        if part.shape[number] == 1:  # the same along this axis
            place = 0 if isinstance(place, int) else [0]
        part = part[(slice(None),) * number + (place,)]
    return _array(part)


def _array(part: Any) -> Array:
    """A number of numpy's as an array without axes."""
    return part if isinstance(part, Tensor) else np.asarray(part)
