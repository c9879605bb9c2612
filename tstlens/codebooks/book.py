"""The codes of one codebook over a data set, as the activity of a dictionary that is on or off.

And the stretches of raw series under a code, with their mean: its prototype.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from jaxtyping import Float, Int

from tstlens.arguments import Count, checked
from tstlens.data import TimeSeriesData
from tstlens.data.window_properties import SHORTEST
from tstlens.errors import ArgumentError
from tstlens.results import TableResult
from tstlens.saes.reading.activity import Activity, Spans, top_slots

if TYPE_CHECKING:
    import pandas as pd

    from tstlens.codebooks.index import CodeIndex

Named = tuple[str, int, int | None, int]  # hook, group, head, code


def named_code(name: Named) -> str:
    """A code in words: "17 at blocks.0.hook_mlp_out"."""
    hook, group, head, code = name
    where = f" of head {head}" if head is not None else f" of group {group}" if group else ""
    return f"{code}{where} at {hook}"


@dataclass(frozen=True, eq=False, repr=False)
class IndexedBook(Activity):
    """The activity of every code of one codebook, and how its latents are named as codes.

    A latent is a *unit*: a code of one table at one head. unit = table * n_codes + code, where
    tables are groups, or (head, group) where heads share one table. ``values`` holds, where a code
    is active, how like it the activation was in the codebook's sense: larger is more alike, and it
    may be negative. ``observed`` is False where the codebook is bypassed, too.

    Args:
        hook: the hook point.
        n_codes: codes per table.
        n_groups: groups of the codebook.
        n_heads: heads at this hook point, or None.
        shared: whether heads share one table.
        k: codes that are active at once in each table.
        kind: similarity that chooses the codes.
        table: [group, code, d_group].
    """

    hook: str
    n_codes: int
    n_groups: int
    n_heads: int | None
    shared: bool
    k: int
    kind: str
    table: Float[np.ndarray, "group code d_group"]

    least: ClassVar[float] = -np.inf

    @property
    def n_units(self) -> int:
        """Codes, counted once per table and head."""
        return self.n_latents

    @property
    def support(self) -> Int[np.ndarray, " unit"]:
        """Places at which every unit is active."""
        return np.diff(self.values.indptr)

    @cached_property
    def tables(self) -> list[tuple[int, int | None]]:
        """(group, head) of every table; head is None where codes have none."""
        tables = range(self.n_units // self.n_codes)
        if self.shared:
            return [(table % self.n_groups, table // self.n_groups) for table in tables]
        per_head = self.n_groups // self.n_heads if self.n_heads else 0
        return [(table, table // per_head if per_head else None) for table in tables]

    def unit(self, code: int, group: int | None = None, head: int | None = None) -> int:
        """The unit that a code, its group and its head name.

        Raises:
            ArgumentError: no such code, or more than one table that could be meant.
        """
        if head is not None and self.n_heads is None:
            raise ArgumentError(f"head={head} was given, but codes at {self.hook} have no head")
        sizes = {"code": self.n_codes, "group": self.n_groups, "head": self.n_heads or 0}
        for value, (name, size) in zip((code, group, head), sizes.items(), strict=True):
            if value is not None and not 0 <= value < size:
                raise ArgumentError(f"expected {name} in 0..{size - 1} at {self.hook}, got {value}")
        tables = [
            table
            for table, (of_group, of_head) in enumerate(self.tables)
            if group in (None, of_group) and head in (None, of_head)
        ]
        if len(tables) != 1:
            which = "head=" if self.shared and head is None else "group= or head="
            raise ArgumentError(
                f"code {code} at {self.hook} names one code in each of {len(tables)} tables; "
                f"say which: {which}"
                if tables
                else f"group={group} does not belong to head={head} at {self.hook}"
            )
        return tables[0] * self.n_codes + int(code)

    def named(self, unit: int) -> tuple[int, int | None, int]:
        """(group, head, code) of a unit."""
        table, code = divmod(int(unit), self.n_codes)
        return *self.tables[table], code

    def names(self) -> list[Named]:
        """Every unit with its hook point, as tables and pages name codes."""
        return [(self.hook, *self.named(unit)) for unit in range(self.n_units)]

    def matrix(self) -> Any:
        """Sparse [slot, unit] of ones."""
        from scipy.sparse import csc_matrix

        ones = np.ones(self.values.nnz, dtype=np.float32)
        parts = (ones, self.values.indices, self.values.indptr)
        return csc_matrix(parts, shape=self.values.shape)

    def in_series(self) -> Any:
        """Sparse [series, unit], 1 where a unit is active anywhere in a series."""
        found = self.matrix()
        series = self.values.indices // (self.n_channels * self.n_pos)
        shape = (self.n_series, self.n_units)
        found = type(found)((found.data, series, self.values.indptr.copy()), shape=shape)
        found.sum_duplicates()
        found.data[:] = 1
        return found

    def row(self, unit: int) -> Float[np.ndarray, " d_group"]:
        """The code's entry in its table."""
        group, _, code = self.named(unit)
        return self.table[group, code]

    def __repr__(self) -> str:
        return (
            f"IndexedBook({self.hook!r}, {self.n_units} codes, {self.values.nnz} activations at "
            f"{self.n_observed} places)"
        )


def cosines(book: IndexedBook, unit: int) -> Float[np.ndarray, " unit"]:
    """Between a code's entry and those of all units; NaN for other groups, and without a length."""
    group, table = book.named(unit)[0], book.table[book.named(unit)[0]]
    size = np.linalg.norm(table, axis=1)
    length = size * np.linalg.norm(book.row(unit))
    of_code = np.where(length > 0, table @ book.row(unit) / np.where(length > 0, length, 1), np.nan)
    nothing = np.full(book.n_codes, np.nan)
    return np.concatenate([of_code if one == group else nothing for one, _ in book.tables])


@dataclass(frozen=True, eq=False, repr=False)
class CodeWindows(TableResult):
    """Raw windows at which a code is active, most similar first.

    ``to_dataframe()`` has one row per window: series, channel, pos, start, stop, similarity, label.

    Args:
        hook: hook point of the code.
        code: its number; ``group`` and ``head`` say of which table.
        group: its group.
        head: its head, or None.
        series: [window] index of the series in the data.
        channel: [window] the channel that was read; -1 where the model mixes channels.
        pos: [window] position of the trunk.
        start: [window] first sample that the position was embedded from.
        stop: [window] one past the last.
        similarity: [window] how like the code the activation was.
        label: [window] class index; -1 for data without labels.
        values: [window, channel, sample] raw values around the position, as wide as the widest
            span (8 samples at least), NaN at padding and outside of the series; one channel where
            every channel is read by itself.
        first: [window] the sample that ``values`` begin at; may lie before the series.
        class_names: of the data.
        n_places: places at which the code is active, of which the windows may be some.
    """

    hook: str
    code: int
    group: int
    head: int | None
    series: Int[np.ndarray, " window"]
    channel: Int[np.ndarray, " window"]
    pos: Int[np.ndarray, " window"]
    start: Int[np.ndarray, " window"]
    stop: Int[np.ndarray, " window"]
    similarity: Float[np.ndarray, " window"]
    label: Int[np.ndarray, " window"]
    values: Float[np.ndarray, "window channel sample"]
    first: Int[np.ndarray, " window"]
    class_names: tuple[str, ...]
    n_places: int

    def __len__(self) -> int:
        return len(self.series)

    def prototype(
        self,
    ) -> tuple[Float[np.ndarray, "channel sample"], Float[np.ndarray, "channel sample"]]:
        """Mean and standard deviation over the windows, in the units of the series.

        NaN where no window has an observed sample. What can mislead: the mean of windows that are
        alike only in another layer's eyes is no shape that any of them has; look at the spread.
        """
        return mean_and_spread(self.values)

    def _rows(self) -> pd.DataFrame:
        import pandas as pd

        names = ("series", "channel", "pos", "start", "stop", "similarity")
        label = [self.class_names[one] if one >= 0 else None for one in self.label]
        frame = pd.DataFrame({name: getattr(self, name) for name in names})
        return frame.assign(label=label).rename_axis("rank")

    def __repr__(self) -> str:
        shown = ", ".join(
            f"series {self.series[i]} [{self.start[i]}:{self.stop[i]}]"
            for i in range(min(4, len(self)))
        )
        more = ", ..." if len(self) > 4 else ""
        return f"CodeWindows(code {self.code} at {self.hook}, {len(self)}: {shown}{more})"


@checked
def code_windows(
    index: CodeIndex,
    hook: str,
    code: int,
    *,
    group: int | None = None,
    head: int | None = None,
    n: Count | None = None,
    per_series: Count | None = None,
) -> CodeWindows:
    """The raw windows at which a code is active, most similar first.

    Args:
        index: of the codes.
        hook: hook point of the code.
        code: its number.
        group: its group, where there are several.
        head: its head, where heads have tables of their own or share one.
        n: so many; None for all.
        per_series: at most so many of one series (and channel): neighbouring positions see
            nearly the same samples.

    Raises:
        UnknownHookError: no such hook point in the index.
        ArgumentError: no such code, or a group or head that has to be said.
    """
    book, data = index.book(hook), index.data
    unit = book.unit(code, group, head)
    slots, similarity = book.column(unit)
    chosen = top_slots(book, unit, n, per_series)
    series, channel, pos = book.places(chosen)
    own = channel if book.n_channels > 1 else None
    values, first = cut(data, series, own, pos, index.spans)
    ends = np.array(index.spans)[pos].reshape(-1, 2)
    none = np.full(len(chosen), -1)
    of_group, of_head, _ = book.named(unit)
    return CodeWindows(
        hook=hook,
        code=code,
        group=of_group,
        head=of_head,
        series=series,
        channel=none if own is None else own,
        pos=pos,
        start=ends[:, 0],
        stop=ends[:, 1],
        similarity=similarity[np.searchsorted(slots, chosen)],
        label=none if data.labels is None else data.labels.cpu().numpy()[series],
        values=values,
        first=first,
        class_names=tuple(data.class_names) if data.labels is not None else (),
        n_places=len(slots),
    )


def mean_and_spread(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation over the first axis, leaving out NaN; NaN where all are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of slices that are all NaN
        return np.nanmean(values, axis=0), np.nanstd(values, axis=0)


def width_of(spans: Spans, shortest: int = SHORTEST) -> int:
    """Samples of windows that hold every span."""
    return max(shortest, max(last - first for first, last in spans))


def cut(
    data: TimeSeriesData,
    series: np.ndarray,
    channel: np.ndarray | None,
    pos: np.ndarray,
    spans: Spans,
    width: int | None = None,
) -> tuple[Float[np.ndarray, "window channel sample"], Int[np.ndarray, " window"]]:
    """Equally wide raw windows around positions, NaN at padding and outside of the series.

    Args:
        data: the series.
        series: [window].
        channel: [window] the channel to cut; None for all.
        pos: [window] position, the middle of whose span is the window's.
        spans: samples of every position.
        width: samples; as :func:`width_of` where None.

    Returns:
        Values, and the sample that each begins at.
    """
    width = width or width_of(spans)
    ends = np.array(spans, dtype=np.int64)[pos].reshape(-1, 2)
    first = ends[:, 0] - (width - (ends[:, 1] - ends[:, 0])) // 2
    at = first[:, None] + np.arange(width)  # [window, sample]
    inside = (at >= 0) & (at < data.n_time)
    at = at.clip(0, data.n_time - 1)
    if data.mask is not None:
        inside = inside & data.mask.cpu().numpy()[series[:, None], at]
    raw = data.series.cpu().numpy()
    if channel is None:
        found = raw[series[:, None], :, at].transpose(0, 2, 1)
    else:
        found = raw[series[:, None], channel[:, None], at][:, None]
    return np.where(inside[:, None], found.astype(np.float64), np.nan), first
