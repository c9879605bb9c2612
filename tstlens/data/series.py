"""Labelled series with their mask: the form in which data enter everything else.

A `TimeSeriesData` is plain data. It checks itself when it is made, so whatever holds one may
rely on its shapes, on finite values and on labels that index the class names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from tstlens.arguments import Count, check_fields, checked
from tstlens.data.frames import series_of_frame
from tstlens.data.labels import IndexNames, as_names, encode_labels, places_in
from tstlens.data.scaling import Scaling
from tstlens.data.validate import blanked, check_series, row_indices, usable_device
from tstlens.errors import LabelError, SeriesShapeError, SeriesValueError
from tstlens.shapes import Labels, Mask, Series

if TYPE_CHECKING:
    import pandas as pd
    from typing_extensions import Self

__all__ = ["TimeSeriesData"]


@dataclass(frozen=True, eq=False, repr=False)
class TimeSeriesData:
    """Series with labels, class names and a mask of observed samples.

    Args:
        series: ``[n, channel, time]``, floating point; kept as float32.
        labels: ``[n]`` class indices 0..n_classes-1, or None where there are none.
        class_names: one name per class, in order of the index; by default "0", "1", ...
        mask: ``[n, time]`` bool, True where a sample was observed, False where it is padding;
            becomes None when everything is observed. What stands in padding becomes 0.
        name: of the data set.
        split: "train", "test" or "all".
        scaling: what was done to the values, None for nothing.

    Raises:
        SeriesShapeError: not three axes, or labels or mask of another length.
        SeriesValueError: NaN, infinity or integers.
        LabelError: a label outside the classes.

    Example:
        >>> import torch
        >>> data = TimeSeriesData(torch.zeros(4, 2, 10), torch.tensor([0, 1, 1, 0]), name="toy")
        >>> data[1:3]
        TimeSeriesData('toy', n=2, channel=2, time=10, classes=2)
    """

    series: Series
    labels: Labels | None = None
    class_names: tuple[str, ...] = ()
    mask: Mask | None = None
    name: str = ""
    split: str = ""
    scaling: Scaling | None = field(default=None, kw_only=True)

    MISSING: ClassVar[bool] = False  # whether NaN stands for a missing value

    def __post_init__(self) -> None:
        check_series(self.series, finite=False)
        _set(self, "series", self.series.to(torch.float32))
        check_series(self.series, mask=self.mask, missing=self.MISSING)
        _set(self, "class_names", as_names(self.class_names))
        if self.mask is not None:
            _set(self, "mask", None if bool(self.mask.all()) else self.mask.to(self.series.device))
            _set(self, "series", blanked(self.series, self.mask))
        if self.labels is not None:
            self._check_labels(self.labels)
        check_fields(self)

    def _check_labels(self, labels: Tensor) -> None:
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
            got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
            raise LabelError(
                f"expected labels as an integer tensor [n={len(self)}], got {got}; "
                "for raw labels use TimeSeriesData.from_numpy, and for numbers to be predicted "
                "target= of the analysis"
            )
        if labels.shape != (len(self),):
            raise SeriesShapeError(
                f"expected one label per series, [n={len(self)}], got {list(labels.shape)}"
            )
        labels = labels.to(device=self.series.device, dtype=torch.int64)
        if not self.class_names:
            highest = int(labels.max()) if len(labels) else -1
            _set(self, "class_names", IndexNames(highest + 1))
        outside = (labels < 0) | (labels >= self.n_classes)
        if bool(outside.any()):
            row = int(outside.nonzero()[0, 0])
            raise LabelError(
                f"expected labels in 0..{self.n_classes - 1} ({self.n_classes} classes), "
                f"got {int(labels[row])} for series {row}"
            )
        _set(self, "labels", labels)

    @classmethod
    @checked
    def from_numpy(
        cls,
        array: Any,
        labels: Any = None,
        *,
        class_names: Any = None,
        mask: Any = None,
        n_channels: int | None = None,
        name: str = "",
        split: str = "",
    ) -> TimeSeriesData:
        """A data set from one array.

        Args:
            array: ``[n, channel, time]``, or ``[n, time]`` for series of one channel; whatever
                numpy makes an array of. Samples that a masked array hides (in all channels, or
                in none) are masked here too.
            labels: ``[n]`` raw labels (strings or whole numbers), or None. Without ``class_names``
                the distinct labels in numerical or alphabetical order become classes 0, 1, ...;
                they are the same class where they are written alike, see `tstlens.data.labels`.
                Numbers to be predicted are no labels: they go as ``target=`` to the analysis.
            class_names: the classes in order; give the training set's to a test set, which may
                lack a class. Labels are looked up by name; integers beside names that are not
                numbers are taken as indices.
            mask: ``[n, time]`` bool, True where observed.
            n_channels: the expected channel count, to catch arrays that are channels last.
            name: of the data set.
            split: "train", "test" or "all".

        Raises:
            SeriesShapeError, SeriesValueError, LabelError: as for the class.

        Example:
            >>> import numpy as np
            >>> TimeSeriesData.from_numpy(np.zeros((3, 8)), labels=["b", "a", "b"]).labels
            tensor([1, 0, 1])
        """
        array, unmasked = _masked(array)
        series = _float_tensor(array)
        if series.ndim == 2:
            series = series[:, None]
        check_series(series, n_channels=n_channels)
        encoded = _encode(labels, class_names)
        observed = None if mask is None else torch.tensor(np.asarray(mask))
        if unmasked is not None:
            check_series(series, mask=observed)
            hidden = torch.from_numpy(unmasked)
            observed = hidden if observed is None else observed & hidden
        return cls(series, *encoded, mask=observed, name=name, split=split)

    @classmethod
    @checked
    def from_arrays(
        cls,
        arrays: Sequence[Any],
        labels: Any = None,
        *,
        class_names: Any = None,
        n_time: Count | None = None,
        name: str = "",
        split: str = "",
    ) -> TimeSeriesData:
        """A data set from series of unequal length, padded at the end with zeros and masked.

        Args:
            arrays: one ``[channel, time_i]`` array or tensor per series, or ``[time_i]`` for
                one channel.
            labels: as for `from_numpy`.
            class_names: as for `from_numpy`.
            n_time: pad to this many samples; None pads to the longest series.
            name: of the data set.
            split: "train", "test" or "all".

        Raises:
            SeriesShapeError, SeriesValueError, LabelError: as for the class.

        Example:
            >>> import numpy as np
            >>> TimeSeriesData.from_arrays([np.ones((2, 3)), np.ones((2, 5))]).mask.sum(1)
            tensor([3, 5])
        """
        bare = [_masked(array, f" for series {row}") for row, array in enumerate(arrays)]
        rows = [_float_tensor(array, f" for series {row}") for row, (array, _) in enumerate(bare)]
        rows = [row[None] if row.ndim == 1 else row for row in rows]
        _check_ragged(rows)
        lengths = torch.tensor([row.shape[1] for row in rows])
        longest = int(lengths.max())
        if n_time is not None and n_time < longest:
            raise SeriesShapeError(
                f"expected series of at most n_time={n_time} samples, got {longest} for series "
                f"{int(lengths.argmax())}; nothing is cut off unasked"
            )
        series = torch.zeros(len(rows), rows[0].shape[0], n_time or longest)
        for index, row in enumerate(rows):
            series[index, :, : row.shape[1]] = row
        mask = torch.arange(series.shape[2]) < lengths[:, None]
        for row, (_, unmasked) in enumerate(bare):
            if unmasked is not None:
                mask[row, : int(lengths[row])] = torch.from_numpy(unmasked)
        return cls(series, *_encode(labels, class_names), mask=mask, name=name, split=split)

    @classmethod
    @checked
    def from_pandas(
        cls,
        frame: pd.DataFrame,
        *,
        label: Any = None,
        series: Any = None,
        time: Any = None,
        channel: Any = None,
        value: Any = None,
        class_names: Any = None,
        name: str = "",
        split: str = "",
    ) -> TimeSeriesData:
        """A data set from a wide or a long frame.

        Wide (``series`` not given): one row per series, one column per sample in order of time;
        columns with two levels are (channel, time). Nested: one row per series, one column per
        channel, a pandas series in every cell. Long (``series`` given): one row per series and
        time step with one column per channel, or, with ``channel``, one row per value; a level of
        the index may stand for a column. Series keep the order in which they first appear;
        unequal lengths are padded and masked.

        Times are numbers or dates, or strings that all are numbers or all ISO 8601 dates. Rows
        without an entry, times that come twice, and steps that are not all the same (a quarter
        of a step is taken for the clock's; days and months count as the calendar has them) are
        refused: each would move samples to another time.

        Args:
            frame: the frame; its index is ignored unless it is named here or holds dates.
            label: column of the raw label, or None.
            series: long: column that tells series apart.
            time: long: column to sort the samples of a series by; None takes an index of dates,
                and else keeps the rows' order.
            channel: long: column that names the channel of a value; channels are sorted by name,
                "dim_2" before "dim_10".
            value: long: column or list of columns with values; by default all that are left.
            class_names: as for `from_numpy`.
            name: of the data set.
            split: "train", "test" or "all".

        Raises:
            ArgumentError: a column that is not in the frame, arguments that do not go together,
                rows without an entry, or times without one order.
            SeriesShapeError: a time that comes twice or is skipped, channels of unequal length.
            SeriesValueError, LabelError: as for the class.

        Example:
            >>> import pandas as pd
            >>> frame = pd.DataFrame({"id": [7, 7, 8], "x": [1.0, 2.0, 3.0], "y": [0.0, 1.0, 2.0]})
            >>> TimeSeriesData.from_pandas(frame, series="id")
            TimeSeriesData(n=2, channel=2, time=2, padded)
        """
        arrays, labels = series_of_frame(
            frame, label=label, series=series, time=time, channel=channel, value=value
        )
        return cls.from_arrays(arrays, labels, class_names=class_names, name=name, split=split)

    def for_model(self, model: Any) -> TimeSeriesData:
        """The data with labels that count as the model's logits do: classes matched by name.

        Whatever compares labels with a model's output does this first. Data whose class names are
        mere indices, and models that know no names, are left as they are.

        Args:
            model: a ``HookedTST``, or anything else; its names are ``model.cfg.class_names``.

        Raises:
            LabelError: a class that the model does not have.
            SeriesShapeError: series that the model does not take.

        Example:
            >>> from types import SimpleNamespace
            >>> model = SimpleNamespace(cfg=SimpleNamespace(class_names=("cat", "dog")))
            >>> data = TimeSeriesData(torch.ones(2, 1, 8), torch.tensor([0, 1]), ("dog", "cat"))
            >>> data.labels, data.for_model(model).labels
            (tensor([0, 1]), tensor([1, 0]))
        """
        if self.labels is not None and hasattr(model, "check_series"):
            mask = None if self.mask is None else self.mask[:1]
            one = self.series[:1].to(model.cfg.dtype)  # whoever runs the model says what to cast
            model.check_series(one, mask)  # series of another kind have other classes
        places = None if self.labels is None else places_in(model, self.class_names)
        if places is None or self.labels is None:
            return self
        order = torch.tensor(places, dtype=torch.int64, device=self.labels.device)
        return replace(self, labels=order[self.labels], class_names=model.cfg.class_names)

    def __len__(self) -> int:
        return self.series.shape[0]

    def __getitem__(self, index: Any) -> Self:
        rows = row_indices(index, len(self)).to(self.series.device)
        return replace(self, **self._rows(rows))

    def _rows(self, rows: Tensor) -> dict[str, Any]:
        """The fields that have an entry per series, of these series."""
        return {
            "series": self.series[rows],
            "labels": None if self.labels is None else self.labels[rows],
            "mask": None if self.mask is None else self.mask[rows],
        }

    def __iter__(self) -> Iterator[TimeSeriesData]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        parts = [repr(self.name)] if self.name else []
        parts += [repr(self.split)] if self.split else []
        parts += [f"n={len(self)}", f"channel={self.n_channels}", f"time={self.n_time}"]
        parts += [f"classes={self.n_classes}"] if self.labels is not None else []
        parts += ["padded"] if self.mask is not None else []
        parts += [f"scaling={self.scaling.kind!r}"] if self.scaling is not None else []
        return f"TimeSeriesData({', '.join(parts)})"

    @property
    def n_classes(self) -> int:
        """Number of classes; 0 for data without labels or class names."""
        return len(self.class_names)

    @property
    def n_channels(self) -> int:
        """Variables of each series."""
        return self.series.shape[1]

    @property
    def n_time(self) -> int:
        """Samples of each series, padding included."""
        return self.series.shape[2]

    @property
    def lengths(self) -> Tensor:
        """``[n]`` observed samples of each series."""
        if self.mask is None:
            return torch.full((len(self),), self.n_time, device=self.series.device)
        return self.mask.sum(dim=1)

    def unpadded(self) -> list[Tensor]:
        """The series as a list of ``[channel, time_i]`` tensors without padding."""
        if self.mask is None:
            return list(self.series)
        return [row[:, seen] for row, seen in zip(self.series, self.mask, strict=True)]

    def to(self, device: torch.device | str) -> TimeSeriesData:
        """The same data on another device."""
        return replace(
            self,
            series=self.series.to(usable_device(device)),
            labels=None if self.labels is None else self.labels.to(device),
            mask=None if self.mask is None else self.mask.to(device),
        )


def _set(data: object, name: str, value: object) -> None:
    object.__setattr__(data, name, value)


def _encode(labels: Any, class_names: Any) -> tuple[Tensor | None, tuple[str, ...]]:
    names = None if class_names is None else as_names(class_names)
    return (None, names or ()) if labels is None else encode_labels(labels, names)


def _masked(array: Any, where: str = "") -> tuple[Any, np.ndarray | None]:
    """An array with zeros for what numpy's mask hides, and ``[..., time]`` where it hides nothing.

    Everything else that takes an array reads what stands under its mask.
    """
    if isinstance(array, list | tuple) and any(isinstance(row, np.ma.MaskedArray) for row in array):
        array = np.ma.array(array)
    if not isinstance(array, np.ma.MaskedArray):
        return array, None
    hidden = np.ma.getmaskarray(array)
    if array.ndim > (1 if where else 2):  # with an axis of channels
        if (hidden != hidden.any(-2, keepdims=True)).any():
            raise SeriesValueError(
                f"expected samples masked in all channels or in none{where}, got some that are "
                "masked in some channels; fill those first, array.filled(0.0) say"
            )
        hidden = hidden.any(-2)
    return array.filled(0), ~hidden


def _float_tensor(array: Any, where: str = "") -> Tensor:
    if isinstance(array, Tensor):
        kind = "f" if array.is_floating_point() else "c" if array.is_complex() else ""
        dtype = array.dtype
    elif isinstance(array, TimeSeriesData):
        raise SeriesValueError(f"expected an array, got TimeSeriesData{where}; use it as it is")
    else:
        try:
            array = np.asarray(array)
        except ValueError as error:  # lists of unequal length
            raise SeriesValueError(
                f"expected an array [n, channel, time]{where}, got lists of unequal length; "
                "for series of unequal length use TimeSeriesData.from_arrays"
            ) from error
        kind, dtype = array.dtype.kind, array.dtype
    if kind != "f":
        advice = 'call .float() on a tensor or .astype("float32") on an array first'
        if kind == "c":
            advice = "take a real representation first, real and imaginary part as two channels say"
        raise SeriesValueError(f"expected floating point series, got {dtype}{where}; {advice}")
    if isinstance(array, Tensor):
        return array.detach().to("cpu", torch.float32)
    # What float32 cannot hold becomes infinity, which the check of values reports.
    with np.errstate(over="ignore"):
        return torch.from_numpy(np.array(array, dtype=np.float32, order="C"))


def _check_ragged(rows: list[Tensor]) -> None:
    if not rows:
        raise SeriesShapeError("expected at least one series, got an empty list")
    for index, row in enumerate(rows):
        if row.ndim != 2:
            raise SeriesShapeError(
                f"expected each series as [channel, time], got {list(row.shape)} for series {index}"
            )
        if 0 in row.shape:
            raise SeriesShapeError(
                f"expected at least one channel and one sample, got {list(row.shape)} for "
                f"series {index}"
            )
        if row.shape[0] != rows[0].shape[0]:
            last = all(other.ndim == 2 and other.shape[1] == rows[0].shape[1] for other in rows)
            advice = "; series are channel-first, try series.T" if last else ""
            raise SeriesShapeError(
                f"expected [channel={rows[0].shape[0]}, time] as in series 0, "
                f"got {list(row.shape)} for series {index}{advice}"
            )
