"""Recorded series cut into windows: what a forecaster sees, and what came next.

The stretch that a window's *targets* lie in decides its split, so no value that a model is tested
on was ever a target in training; what it sees before them may reach back into the training
stretch, as it would in use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tstlens.arguments import Count, Share, checked
from tstlens.data.recordings import Fill, Recording, Twice, of_entries, of_frame, samples_per_season
from tstlens.data.series import TimeSeriesData
from tstlens.data.validate import row_indices
from tstlens.errors import (
    ArgumentError,
    DownloadError,
    SeriesShapeError,
    UnknownDatasetError,
)

if TYPE_CHECKING:
    import pandas as pd

TEST_FRACTION = 0.2  # of the recorded samples, at the end
Reference = Literal["mean", "mean season", "mean day", "mean week", "mean year"]
Unit = str | int


@dataclass(frozen=True, eq=False, repr=False)
class ForecastWindows(TimeSeriesData):
    """Windows of recorded series with their times: what a forecaster sees, and what came next.

    They go wherever :class:`TimeSeriesData` goes. Missing values stay NaN, which the models that
    take missing values take, and which others refuse. Make them with :meth:`from_pandas` and its
    like.

    Args:
        series: float [batch, channel, time], what a forecaster sees.
        future: float [batch, channel, horizon], what came next; NaN where nothing was recorded.
        starts: the time of the first step to forecast, one per window, as text.
        freq: the step as pandas writes it; None where times are whole numbers.
        step: the step of whole numbers.
        tz: time zone of the dates.
        ids: which recorded series each window is from; () where there is one.
        channel_names: a name for each channel; () for their numbers.
        period: samples of one season.
        unit: of the values.

    Raises:
        SeriesShapeError: parts of unequal size.
        SeriesValueError: infinity or integers.
    """

    future: Float[Tensor, "batch channel horizon"] = field(kw_only=True)
    starts: tuple[str, ...] = field(kw_only=True)
    freq: str | None = field(default=None, kw_only=True)
    step: int = field(default=1, kw_only=True)
    tz: str | None = field(default=None, kw_only=True)
    ids: tuple[str, ...] = field(default=(), kw_only=True)
    channel_names: tuple[str, ...] = field(default=(), kw_only=True)
    period: int = field(default=1, kw_only=True)
    unit: str = field(default="", kw_only=True)

    MISSING: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        n, n_channels = self.series.shape[:2]
        if self.future.ndim != 3 or self.future.shape[:2] != (n, n_channels):
            raise SeriesShapeError(
                f"expected future [batch={n}, channel={n_channels}, horizon], got "
                f"{list(self.future.shape)}"
            )
        for name, size in (("starts", n), ("ids", n), ("channel_names", n_channels)):
            given = getattr(self, name)
            if len(given) != size and (given or name == "starts"):
                raise SeriesShapeError(f"expected {size} {name}, got {len(given)}")
        object.__setattr__(self, "future", self.future.to(self.series))

    @classmethod
    @checked
    def from_pandas(
        cls,
        frame: pd.DataFrame,
        n_time: Count,
        horizon: Count,
        time: Any = None,
        series: Any = None,
        values: Any = None,
        freq: str | None = None,
        *,
        stride: Count = 1,
        missing: Fill = "error",
        duplicates: Twice = "error",
        open_end: bool = False,
        unit: str = "",
        name: str = "",
    ) -> ForecastWindows:
        """Windows of a frame that has a row per time (and per series, where there are several).

        The last window of each series ends with its last row; the others start every ``stride``
        rows before it. A window of which nothing was seen, or nothing came, is left out.

        Args:
            frame: the frame.
            n_time: samples that a forecaster sees.
            horizon: samples to forecast.
            time: column, or level of the index, of dates or whole numbers; None for an index of
                dates. Strings have to be ISO 8601.
            series: column, or level of the index, that tells series apart; None for one series.
            values: columns of the channels; None for all that are left.
            freq: the step, as pandas writes it ("30min", "D", "MS"); None to read it off the times.
            stride: samples between two windows.
            missing: what a time that is left out becomes: ``"error"`` names it; ``"nan"`` keeps it
                as missing; ``"previous"`` and ``"linear"`` fill it, and missing values too.
            duplicates: which of several rows at one time counts: ``"error"`` names them;
                ``"first"``, ``"last"`` or their ``"mean"``.
            open_end: one more window of each series, whose future is not known yet.
            unit: of the values.
            name: of the data.

        Raises:
            ArgumentError: columns that are not there, times that are no times, or sizes that leave
                a series without a window.
            SeriesShapeError: times that come twice, are left out, or lie beside the others' grid.
            SeriesValueError: values that are no finite numbers.

        Example:
            >>> import pandas as pd
            >>> times = pd.date_range("2024-01-01", periods=96, freq="h")
            >>> frame = pd.DataFrame({"timestamp": times, "load": range(96)})
            >>> ForecastWindows.from_pandas(frame, 48, 24, time="timestamp", stride=24)
            ForecastWindows(n=2, channel=1, time=48, horizon=24, first 2024-01-03, last 2024-01-04)
        """
        found = of_frame(frame, time, series, values, freq, missing, duplicates)
        return cls._cut(found, n_time, horizon, stride, open_end, unit=unit, name=name)

    @classmethod
    @checked
    def from_numpy(
        cls,
        array: Any,
        n_time: Count,
        horizon: Count,
        *,
        start: Any = 0,
        freq: str | None = None,
        stride: Count = 1,
        open_end: bool = False,
        unit: str = "",
        name: str = "",
    ) -> ForecastWindows:
        """Windows of an array: [time], [series, time] or [series, channel, time].

        Args:
            array: the recorded values; NaN is missing.
            n_time: samples that a forecaster sees.
            horizon: samples to forecast.
            start: the time of the first sample: a whole number, or a date where there is ``freq``.
            freq: the step of dates, as pandas writes it; None counts samples.
            stride, open_end, unit, name: as for :meth:`from_pandas`.

        Raises:
            ArgumentError, SeriesShapeError, SeriesValueError: as for :meth:`from_pandas`.

        Example:
            >>> import numpy as np
            >>> ForecastWindows.from_numpy(np.arange(10.0), 4, 2, stride=2).series[:, 0, 0]
            tensor([0., 2., 4.])
        """
        import pandas as pd

        try:
            values: Any = np.asarray(array, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ArgumentError(
                f"expected an array of numbers, got {type(array).__name__}: {error}; series of "
                "unequal length go through from_pandas or from_gluonts"
            ) from error
        if not 1 <= values.ndim <= 3 or not values.size:
            raise SeriesShapeError(
                f"expected [time], [series, time] or [series, channel, time], got "
                f"{list(values.shape)}"
            )
        values = values.reshape((1,) * (2 - values.ndim) + values.shape)
        values = values[:, None] if values.ndim == 2 else values
        n = values.shape[2]
        if freq is None:
            if not isinstance(start, int) or isinstance(start, bool):
                raise ArgumentError(f"start={start!r} needs its step: give freq=, 'h' say")
            times: Any = pd.RangeIndex(start, start + n)
        else:
            times = pd.date_range(start, periods=n, freq=freq)
        channels = tuple(map(str, range(values.shape[1])))
        found = [Recording(str(row), times, one, channels) for row, one in enumerate(values)]
        return cls._cut(found, n_time, horizon, stride, open_end, unit=unit, name=name)

    @classmethod
    @checked
    def from_gluonts(
        cls,
        entries: Iterable[Any],
        n_time: Count,
        horizon: Count,
        *,
        freq: str | None = None,
        stride: Count = 1,
        open_end: bool = False,
        unit: str = "",
        name: str = "",
    ) -> ForecastWindows:
        """Windows of a GluonTS dataset, or of anything in its form.

        Args:
            entries: mappings with ``"target"`` ([time] or [channel, time]) and ``"start"`` (or a
                ``"timestamp"`` for each sample), and ``"item_id"`` where series have names.
            n_time: samples that a forecaster sees.
            horizon: samples to forecast.
            freq: the step, as pandas writes it; None where the entries tell it.
            stride, open_end, unit, name: as for :meth:`from_pandas`.

        Raises:
            ArgumentError, SeriesShapeError, SeriesValueError: as for :meth:`from_pandas`.

        Example:
            >>> entries = [{"start": "2024-01-01", "target": range(40), "item_id": "a"}]
            >>> len(ForecastWindows.from_gluonts(entries, 28, 7, freq="D"))
            6
        """
        found = of_entries(entries, freq)
        return cls._cut(found, n_time, horizon, stride, open_end, unit=unit, name=name)

    @classmethod
    def from_datasets(cls, dataset: Any, n_time: int, horizon: int, **options: Any) -> Any:
        """Windows of a Hugging Face ``Dataset`` whose rows are series, as GluonTS has them.

        The arguments are those of :meth:`from_gluonts`.
        """
        return cls.from_gluonts(dataset, n_time, horizon, **options)

    @classmethod
    def from_darts(cls, series: Any, n_time: int, horizon: int, **options: Any) -> Any:
        """Windows of a darts ``TimeSeries``, or of a sequence of them.

        The arguments are those of :meth:`from_gluonts`.
        """
        return cls.from_gluonts(
            [series] if hasattr(series, "time_index") else series, n_time, horizon, **options
        )

    @classmethod
    def _cut(
        cls,
        recordings: Sequence[Recording],
        n_time: int,
        horizon: int,
        stride: int,
        open_end: bool,
        **words: Any,
    ) -> ForecastWindows:
        first = recordings[0]
        seen, future, starts, ids = [], [], [], []
        for one in recordings:
            if (one.freq, one.channels) != (first.freq, first.channels):
                raise SeriesShapeError(
                    f"expected series of one step and the same channels, got {one.freq}, "
                    f"{list(one.channels)} in series {one.name!r} and {first.freq}, "
                    f"{list(first.channels)} in {first.name!r}"
                )
            values = torch.tensor(one.values)
            length = values.shape[1]
            if length < n_time + (0 if open_end else horizon):
                raise ArgumentError(
                    f"n_time={n_time} and horizon={horizon} leave no window in the {length} "
                    f"samples of series {one.name!r}"
                )
            last = length - horizon
            at = [length] * open_end + list(range(last, n_time - 1, -stride))
            targets = torch.tensor(at[::-1])
            padded = torch.nn.functional.pad(values, (0, horizon), value=torch.nan)
            before = values.unfold(1, n_time, 1)[:, targets - n_time].transpose(0, 1)
            after = padded.unfold(1, horizon, 1)[:, targets].transpose(0, 1)
            known = ~before.isnan().all(2).all(1)
            known &= ~after.isnan().all(2).all(1) | (targets == length)
            seen.append(before[known].float())
            future.append(after[known].float())
            starts += _texts(one.times, targets[known].tolist())
            ids += [one.name] * int(known.sum())
        zone = getattr(first.times, "tz", None)
        if not starts:
            raise ArgumentError("every window is without a value seen, or without one to come")
        return cls(
            torch.cat(seen),
            future=torch.cat(future),
            starts=tuple(starts),
            freq=first.freq,
            step=getattr(first.times, "step", 1),
            tz=None if zone is None else str(zone),
            ids=tuple(ids) if len(recordings) > 1 else (),
            channel_names=first.channels,
            period=samples_per_season(first.freq),
            split="all",
            **words,
        )

    @property
    def horizon(self) -> int:
        """Steps to forecast."""
        return self.future.shape[2]

    def _rows(self, rows: Tensor) -> dict[str, Any]:
        places = rows.tolist()
        return {
            **super()._rows(rows),
            "future": self.future[rows],
            "starts": tuple(self.starts[row] for row in places),
            "ids": tuple(self.ids[row] for row in places) if self.ids else (),
        }

    def __repr__(self) -> str:
        named = [repr(self.name)] if self.name else []
        named += [repr(self.split)] if self.split not in ("", "all") else []
        parts = [
            *named,
            f"n={len(self)}",
            f"channel={self.n_channels}",
            f"time={self.n_time}",
            f"horizon={self.horizon}",
        ]
        if len(self):
            parts += [f"first {self.starts[0]}", f"last {self.starts[-1]}"]
        return f"ForecastWindows({', '.join(parts)})"

    @checked
    def times(self, window: int = 0) -> pd.Index:
        """When the samples of one window were taken: [time + horizon], seen and to come.

        Args:
            window: which.

        Raises:
            RowIndexError: there is no such window.
        """
        import pandas as pd

        (row,) = row_indices(window, len(self)).tolist()
        before, after = self.n_time, self.horizon
        if self.freq is None:
            start = int(self.starts[row])
            return pd.RangeIndex(start - before * self.step, start + after * self.step, self.step)
        start = pd.Timestamp(self.starts[row])
        start = start if self.tz is None else start.tz_convert(self.tz)
        past = pd.date_range(end=start, periods=before + 1, freq=self.freq)
        return past.append(pd.date_range(start, periods=after, freq=self.freq)[1:])

    @checked
    def split_in_time(self, validation: Share | None = None, test: Share = 0.2) -> Any:
        """Windows to train on, to choose by and to test on, in the order of time.

        The recorded times are cut where these shares of them are left, for all series at once; a
        window belongs to the stretch that all of its targets lie in, and one that reaches over a
        cut to none.

        Args:
            validation: share of the times to choose by; None for no such part.
            test: share of the times, at the end.

        Returns:
            (train, test), or (train, validation, test).

        Raises:
            ArgumentError: shares that leave a part without a window.

        Example:
            >>> import numpy as np
            >>> windows = ForecastWindows.from_numpy(np.random.randn(300), 20, 10)
            >>> [len(part) for part in windows.split_in_time(validation=0.1)]
            [181, 21, 51]
        """
        first, last = self._instants()
        begin, end = first.min(), last.max() + 1
        shares = [test] if validation is None else [validation + test, test]
        cuts = [begin, *(end - round(share * (end - begin)) for share in shares), end + 1]
        names = ["train", "test"] if validation is None else ["train", "validation", "test"]
        parts = []
        for name, low, high in zip(names, cuts, cuts[1:], strict=False):
            rows = np.flatnonzero((first >= low) & (last < high))
            if not len(rows):
                raise ArgumentError(
                    f"validation={validation} and test={test} leave no window whose {self.horizon} "
                    f"targets lie in the {name} stretch; give other shares, or more windows"
                )
            parts.append(replace(self[rows], split=name))
        return tuple(parts)

    def _instants(self) -> tuple[np.ndarray, np.ndarray]:
        """Steps since the first target of all, of the first and the last target of each window."""
        import pandas as pd

        if self.freq is None:
            first = np.array([int(start) for start in self.starts]) // self.step
        else:
            at = self._dates()
            grid = pd.date_range(at.min(), at.max(), freq=self.freq)
            first = grid.get_indexer(at, method="pad")  # series may lie between others' times
        first = first - first.min()
        return first, first + self.horizon - 1

    def _dates(self) -> Any:
        import pandas as pd

        utc = self.tz is not None
        dates = pd.DatetimeIndex(pd.to_datetime(list(self.starts), utc=utc, format="ISO8601"))
        return dates.tz_convert(self.tz) if utc else dates

    @checked
    def pair(
        self, index: Any, back: Unit | None = None, to: Reference | None = None
    ) -> tuple[ForecastWindows, ForecastWindows]:
        """Windows and what to compare them with, as (clean, corrupted) of patching.

        Args:
            index: which windows: a number, a slice or several.
            back: compare with the window of the same series that starts so much earlier: "7D", or
                a number of samples. It has to be among these windows.
            to: compare with the window's own mean: ``"mean"`` of all samples, ``"mean season"`` by
                place in the season (``period``), ``"mean day"`` by time of day, ``"mean week"`` by
                weekday and time, ``"mean year"`` by day of the year and time. Missing values are
                left out of means, and stay missing.

        Returns:
            The windows, and as many others. The analyses of pairs put the first one's activations
            into a run of the second; ``reversed(windows.pair(...))`` asks what is lost instead.

        Raises:
            ArgumentError: neither or both of ``back`` and ``to``, a window that is not there, or
                less than two of the unit to average over.

        Example:
            >>> import numpy as np
            >>> windows = ForecastWindows.from_numpy(np.arange(12.0) % 4, 8, 2)
            >>> clean, corrupted = windows.pair(-1, back=1)
            >>> (clean.series - corrupted.series).unique()
            tensor([-3.,  1.])
        """
        if (back is None) == (to is None):
            raise ArgumentError(f"expected one of back= and to=, got back={back!r} and to={to!r}")
        clean = self[index]
        if back is not None:
            return clean, self[self._earlier(row_indices(index, len(self)).tolist(), back)]
        means = [clean._mean(row, str(to)) for row in range(len(clean))]
        return clean, replace(clean, series=torch.stack(means), name=f"{to} of {self.name}".strip())

    def _earlier(self, rows: Sequence[int], back: Unit) -> list[int]:
        import pandas as pd

        at: Any = self._dates() if self.freq is not None else pd.Index(map(int, self.starts))
        if isinstance(back, int):
            by: Any = back * (_offset(self.freq) if self.freq is not None else self.step)
        elif self.freq is None:
            raise ArgumentError(f"back={back!r} is for dates; these windows count samples")
        else:
            by = _offset(back)
        names = self.ids or ("",) * len(self)
        places = {key: row for row, key in enumerate(zip(names, at, strict=True))}
        found = []
        for row in rows:
            wanted = at[row] - by
            if (names[row], wanted) not in places:
                of = f" of series {names[row]!r}" if self.ids else ""
                raise ArgumentError(
                    f"no window{of} starts at {wanted}, {back} before {self.starts[row]}; cut the "
                    "windows with a stride that divides it, and take the pair before choosing some"
                )
            found.append(places[names[row], wanted])
        return found

    def _mean(self, row: int, to: str) -> Float[Tensor, "channel time"]:
        """The means of one window that stand in the place of its samples."""
        kind = to.removeprefix("mean").strip()
        times = self.times(row)[: self.n_time]
        if kind in ("day", "week", "year") and self.freq is None:
            raise ArgumentError(
                f"to={to!r} is for dates; these windows count samples: to='mean season' goes by "
                f"period={self.period}"
            )
        unit, key = {
            "": lambda: (np.arange(self.n_time), np.zeros(self.n_time)),
            "season": lambda: (
                np.arange(self.n_time) // self.period,
                np.arange(self.n_time) % self.period,
            ),
            "day": lambda: (times.normalize(), times.time),
            "week": lambda: (times.tz_localize(None).to_period("W"), _joined(times, "dayofweek")),
            "year": lambda: (times.year, _joined(times, "month", "day")),
        }[kind]()
        if len(set(unit)) < 2 or len(set(key)) == self.n_time:
            raise ArgumentError(
                f"to={to!r} averages over several {kind or 'sample'}s, and a window of "
                f"{self.n_time} samples holds less than two"
            )
        index = {value: place for place, value in enumerate(dict.fromkeys(key))}
        places = torch.tensor([index[value] for value in key])
        seen = self.series[row].cpu()
        known = ~seen.isnan()
        total = seen.new_zeros(len(seen), len(index), dtype=torch.float64)
        count = total.index_add(1, places, known.double())
        total = total.index_add(1, places, torch.where(known, seen, 0.0).double())
        mean = (total / count)[:, places]
        return torch.where(known, mean, torch.nan).to(self.series)

    @checked
    def spans(self, unit: Unit) -> dict[str, tuple[int, int]]:
        """The samples seen, cut by the calendar: first and one-past-last sample of every unit.

        Args:
            unit: of pandas' steps ("1D", "6h", "W", "MS"), from midnight on; or a number of
                samples, counted back from the end. A first or last unit may be cut short.

        Returns:
            Spans by name: the date that they begin at, where all windows begin there, and else how
            many units they lie before the forecast.

        Raises:
            ArgumentError: a unit of dates where samples are counted, or windows that it cuts at
                different samples.

        Example:
            >>> import numpy as np
            >>> windows = ForecastWindows.from_numpy(
            ...     np.arange(96.0), 48, 24, start="2024-01-01 12:00", freq="h", stride=24)
            >>> windows[:1].spans("1D")
            {'Mon 2024-01-01': (0, 12), 'Tue 2024-01-02': (12, 36), 'Wed 2024-01-03': (36, 48)}
        """
        import pandas as pd

        if not len(self):
            raise ArgumentError("expected at least one window, got none")
        if isinstance(unit, int):
            if not 1 <= unit <= self.n_time:
                raise ArgumentError(f"expected unit in 1..{self.n_time} samples, got {unit}")
            stops = list(range(self.n_time, 0, -unit))[::-1]
            found = [(max(0, stop - unit), stop) for stop in stops]
            if len(self) == 1:
                times = self.times()
                return {_said(times[start], self.freq): (start, stop) for start, stop in found}
            return {f"{place - len(found)}": span for place, span in enumerate(found)}
        if self.freq is None:
            raise ArgumentError(f"unit={unit!r} is for dates; these windows count samples")
        every, offset = [], _offset(unit)
        for row in range(len(self)):
            times = self.times(row)[: self.n_time]
            grouper: Any = pd.Grouper(freq=offset, origin="start_day")  # pyright: ignore[reportCallIssue]
            sizes: Any = pd.Series(1, index=times).groupby(grouper).sum()
            stops = sizes[sizes > 0].cumsum().tolist()
            every.append(list(zip([0, *stops], stops, strict=False)))
            if every[-1] != every[0]:
                raise ArgumentError(
                    f"{unit!r} cuts window {row} (forecast from {self.starts[row]}) at other "
                    f"samples than the first (from {self.starts[0]}); take windows that begin at "
                    "the same place of the calendar, with another stride, or one at a time"
                )
        if len(self) > 1:
            return {f"{place - len(every[0])}": span for place, span in enumerate(every[0])}
        times = self.times()
        return {_said(times[start], unit): (start, stop) for start, stop in every[0]}


def _offset(step: str | None) -> Any:
    import pandas as pd

    try:
        return pd.tseries.frequencies.to_offset(step)
    except ValueError as error:
        raise ArgumentError(
            f"expected a step as pandas writes it ('30min', '7D', 'MS'), got {step!r}"
        ) from error


def _joined(times: Any, *parts: str) -> list[Any]:
    """Parts of the date and the time of day, one tuple per time."""
    return list(zip(*(getattr(times, part) for part in parts), times.time, strict=True))


def _said(time: Any, unit: Any) -> str:
    """A time as figures name a span that begins there."""
    if not hasattr(time, "strftime"):
        return str(time)
    return time.strftime("%a %Y-%m-%d" if time == time.normalize() else "%a %Y-%m-%d %H:%M")


def _texts(times: Any, places: Sequence[int]) -> list[str]:
    """The times at these places as text, one step after the last where there is none."""
    after = [*times, times[-1] + (times.freq if hasattr(times, "freq") else times.step)]
    texts = [str(after[place]) for place in places]
    midnight = " 00:00:00"
    if getattr(times, "tz", None) is None and all(text.endswith(midnight) for text in texts):
        texts = [text.removesuffix(midnight) for text in texts]
    return texts


@dataclass(frozen=True)
class _Recorded:
    """Where a recorded series comes from."""

    read: Callable[[], pd.Series]
    period: int
    unit: str
    summary: str


def _co2() -> pd.Series:
    try:
        from statsmodels.datasets import co2
    except ImportError as error:
        raise DownloadError(
            "the series 'co2' ships with statsmodels, which is not installed: "
            "pip install statsmodels"
        ) from error
    table: Any = co2.load_pandas().data
    return table["co2"]


_KNOWN = {
    "co2": _Recorded(
        _co2,
        52,
        "ppm",
        "weekly carbon dioxide at Mauna Loa, March 1958 to December 2001, 59 of 2284 weeks "
        "missing (Keeling and Whorf 2004, public domain; in statsmodels)",
    )
}


def recorded_series() -> dict[str, str]:
    """Names of the recorded series that :func:`load_forecasting` knows, and what they are."""
    return {name: known.summary for name, known in _KNOWN.items()}


@checked
def load_forecasting(
    name: str,
    split: str = "test",
    n_time: Count = 208,
    horizon: Count = 52,
    step: Count = 1,
) -> ForecastWindows:
    """Windows of a recorded series that ships with a dependency.

    The last fifth of the samples are the test stretch. Windows overlap where ``step`` is shorter
    than they are, so their errors are not independent. A window without a recorded target, or
    without a recorded sample to see, is left out.

    Args:
        name: a recorded series; see :func:`recorded_series`.
        split: "train", or "test" for the last fifth.
        n_time: samples that a forecaster sees.
        horizon: samples to forecast.
        step: samples between the starts of two windows.

    Raises:
        UnknownDatasetError: no recorded series of this name.
        ArgumentError: sizes that leave no window, or another split.
        DownloadError: the package that the series ships with is not installed.

    Example:
        >>> load_forecasting("co2", "test", n_time=208, horizon=52)
        ForecastWindows('co2', 'test', n=405, channel=1, time=208, horizon=52, first 1993-04-10, \
last 2001-01-06)
    """
    if name not in _KNOWN:
        raise UnknownDatasetError(name, _KNOWN, "These are recorded series, to forecast")
    if split not in ("train", "test"):
        raise ArgumentError(f"expected split in ['train', 'test'], got {split!r}")
    known = _KNOWN[name]
    recorded = known.read()
    boundary = len(recorded) - int(TEST_FRACTION * len(recorded))
    first, last = (n_time, boundary) if split == "train" else (max(boundary, n_time), len(recorded))
    if last - horizon < first:
        stretch = boundary if split == "train" else len(recorded) - boundary
        raise ArgumentError(
            f"n_time={n_time} and horizon={horizon} leave no window in the {stretch} samples of "
            f"the {split} stretch of {name!r}"
        )
    recording = of_frame(recorded.to_frame("value").rename_axis("time"), "time")[0]
    last -= (last - horizon - first) % step  # windows are counted from the stretch's beginning
    stretch = slice(first - n_time, last)
    part = replace(recording, times=recording.times[stretch], values=recording.values[:, stretch])
    windows = ForecastWindows._cut([part], n_time, horizon, step, False, name=name, unit=known.unit)
    return replace(windows, split=split, period=known.period)
