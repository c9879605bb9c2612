"""Where the codes of one codebook were active: the part of an index that belongs to one hook.

The stretches of raw series under a code, and their mean: its prototype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int

from tstlens.data import TimeSeriesData
from tstlens.data.window_properties import SHORTEST
from tstlens.errors import ArgumentError
from tstlens.results import Result
from tstlens.saes.reading.activity import Spans

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class IndexedBook:
    """Every activation of every code of one codebook.

    A *unit* is a code of one table at one head: unit = table * n_codes + code, where tables are
    groups, or (head, group) where heads share one table. A *slot* is a place in the data:
    slot = (series * n_channels + channel) * n_pos + pos.

    Args:
        hook: the hook point.
        n_codes: codes per table.
        n_groups: groups of the codebook.
        n_heads: heads at this hook point, or None.
        shared: whether heads share one table.
        k: codes that are active at once in each table.
        kind: similarity that chooses the codes.
        table: [group, code, d_group].
        start: [unit + 1] where each unit's activations begin in ``slot``.
        slot: [activation] slots, rising within a unit.
        similarity: [activation] how like the code the activation was there, in the codebook's
            sense (larger is more alike).
        observed: bool [slot]; False at padding and where the codebook is bypassed.
    """

    hook: str
    n_codes: int
    n_groups: int
    n_heads: int | None
    shared: bool
    k: int
    kind: str
    table: Float[np.ndarray, "group code d_group"]
    start: Int[np.ndarray, " unit1"]
    slot: Int[np.ndarray, " activation"]
    similarity: Float[np.ndarray, " activation"]
    observed: Bool[np.ndarray, " slot"]

    @property
    def n_units(self) -> int:
        """Codes, counted once per table and head."""
        return len(self.start) - 1

    @property
    def support(self) -> Int[np.ndarray, " unit"]:
        """Places at which every unit is active."""
        return np.diff(self.start)

    def unit(self, code: Any, group: Any = None, head: Any = None) -> int:
        """The unit that a code, its group and its head name.

        Raises:
            ArgumentError: no such code, or more than one table that could be meant.
        """
        for name, value, size in (
            ("code", code, self.n_codes),
            ("group", group, self.n_groups),
            ("head", head, self.n_heads or 0),
        ):
            if value is None and name != "code":
                continue
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise ArgumentError(f"expected {name} as an integer, got {value!r}")
            if name == "head" and self.n_heads is None:
                raise ArgumentError(f"head={head} was given, but codes at {self.hook} have no head")
            if not 0 <= value < size:
                raise ArgumentError(f"expected {name} in 0..{size - 1} at {self.hook}, got {value}")
        tables = [
            table
            for table in range(self.n_units // self.n_codes)
            if group in (None, self.group_of(table)) and head in (None, self.head_of(table))
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

    def group_of(self, table: int) -> int:
        """The group that a table is of."""
        return table % self.n_groups if self.shared else table

    def head_of(self, table: int) -> int | None:
        """The head that a table is at; None where codes have no head."""
        if self.n_heads is None:
            return None
        if self.shared:
            return table // self.n_groups
        per_head = self.n_groups // self.n_heads
        return table // per_head if per_head else None

    def named(self, unit: int) -> tuple[int, int | None, int]:
        """(group, head, code) of a unit."""
        table, code = divmod(int(unit), self.n_codes)
        return self.group_of(table), self.head_of(table), code

    def slots(self, unit: int) -> tuple[np.ndarray, np.ndarray]:
        """Slots at which a unit is active, rising, and its similarities there."""
        at = slice(self.start[unit], self.start[unit + 1])
        return self.slot[at], self.similarity[at]

    def matrix(self) -> Any:
        """Sparse [slot, unit] of ones."""
        from scipy.sparse import csc_matrix

        ones = np.ones(len(self.slot), dtype=np.float32)
        shape = (len(self.observed), self.n_units)
        return csc_matrix((ones, self.slot, self.start), shape=shape)

    def row(self, unit: int) -> Float[np.ndarray, " d_group"]:
        """The code's entry in its table."""
        group, _, code = self.named(unit)
        return self.table[group, code]

    def __repr__(self) -> str:
        return (
            f"IndexedBook({self.hook!r}, {self.n_units} codes, {len(self.slot)} activations at "
            f"{int(self.observed.sum())} places)"
        )


@dataclass(frozen=True, eq=False, repr=False)
class CodeWindows(Result):
    """Raw windows at which a code is active, most similar first.

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

    def to_dataframe(self) -> pd.DataFrame:
        """One row per window: series, channel, pos, start, stop, similarity, label."""
        import pandas as pd

        names = ("series", "channel", "pos", "start", "stop", "similarity")
        frame = pd.DataFrame({name: getattr(self, name) for name in names})
        named = [self.class_names[one] if one >= 0 else None for one in self.label]
        return frame.assign(label=named).rename_axis("rank")

    def __repr__(self) -> str:
        shown = ", ".join(
            f"series {self.series[i]} [{self.start[i]}:{self.stop[i]}]"
            for i in range(min(4, len(self)))
        )
        more = ", ..." if len(self) > 4 else ""
        return f"CodeWindows(code {self.code} at {self.hook}, {len(self)}: {shown}{more})"


def mean_and_spread(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation over the first axis, leaving out NaN; NaN where all are."""
    seen = np.isfinite(values)
    count = seen.sum(0)
    total = np.where(seen, values, 0).sum(0)
    mean = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    square = (np.where(seen, values - np.nan_to_num(mean), 0) ** 2).sum(0)
    spread = np.where(count > 0, np.sqrt(square / np.maximum(count, 1)), np.nan)
    return mean, spread


def windows_of(
    book: IndexedBook,
    data: TimeSeriesData,
    spans: Spans,
    sizes: tuple[int, int],
    unit: int,
    n: int | None,
    per_series: int | None,
) -> CodeWindows:
    """The windows of one code.

    Args:
        book: of the code.
        data: the series.
        spans: samples of every position.
        sizes: rows of the trunk per series, and positions.
        unit: the code.
        n: the most similar ones; None for all.
        per_series: at most so many of one row (series, or series and channel); None for no limit.
    """
    n_channels, n_pos = sizes
    slots, similarity = book.slots(unit)
    order = np.lexsort((slots, -similarity))
    if per_series is not None:
        rows = slots[order] // n_pos
        by_row = np.argsort(rows, kind="stable")  # keeps the order of similarity within a row
        firsts = np.searchsorted(rows[by_row], rows[by_row], side="left")
        nth = np.empty(len(rows), dtype=np.int64)
        nth[by_row] = np.arange(len(rows)) - firsts
        order = order[nth < per_series]
    order = order if n is None else order[:n]
    row, pos = np.divmod(slots[order].astype(np.int64), n_pos)
    series, channel = np.divmod(row, n_channels)
    ends = np.array(spans)[pos].reshape(-1, 2)
    values, first = cut(data, series, channel if n_channels > 1 else None, pos, spans)
    labels = np.full(len(order), -1)
    if data.labels is not None:
        labels = data.labels.cpu().numpy()[series]
    group, head, code = book.named(unit)
    return CodeWindows(
        hook=book.hook,
        code=code,
        group=group,
        head=head,
        series=series,
        channel=channel if n_channels > 1 else np.full(len(order), -1),
        pos=pos,
        start=ends[:, 0],
        stop=ends[:, 1],
        similarity=similarity[order],
        label=labels,
        values=values,
        first=first,
        class_names=tuple(data.class_names) if data.labels is not None else (),
        n_places=len(slots),
    )


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
