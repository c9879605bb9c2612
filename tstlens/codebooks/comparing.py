"""Codes like each other, codes that tell two series apart, codes that a set of series shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float, Int

from tstlens.codebooks.index_book import IndexedBook
from tstlens.data.labels import class_index
from tstlens.errors import ArgumentError, LabelError
from tstlens.results import Result

if TYPE_CHECKING:
    import pandas as pd

    from tstlens.codebooks.index import CodeIndex

Named = tuple[str, int, int | None, int]  # hook, group, head, code


def named_code(name: Named) -> str:
    """A code in words: "17 at blocks.0.hook_mlp_out"."""
    hook, group, head, code = name
    where = f" of head {head}" if head is not None else f" of group {group}" if group else ""
    return f"{code}{where} at {hook}"


@dataclass(frozen=True, eq=False)
class _Table(Result):
    """Numbers of codes, one column each."""

    codes: tuple[Named, ...]

    def _columns(self) -> dict[str, Any]:
        return {}

    def to_dataframe(self) -> pd.DataFrame:
        """One row per code: hook, group, head, code, and the numbers."""
        import pandas as pd

        frame = pd.DataFrame(list(self.codes), columns=["hook", "group", "head", "code"])
        return frame.assign(**self._columns())

    def __len__(self) -> int:
        return len(self.codes)


@dataclass(frozen=True, eq=False)
class SimilarCodes(_Table):
    """Codes like one code, most alike first.

    Args:
        codes: (hook, group, head, code) of each.
        of: the same of the code itself.
        by: what they are sorted by.
        overlap: [code] Jaccard index of the places at which the two are active.
        lift: [code] how many times more often both are active at a place than if they were
            independent.
        cosine: [code] between the entries of their table; NaN where tables differ in hook point
            or group, so that entries cannot be compared.
    """

    of: Named
    by: str
    overlap: Float[np.ndarray, " code"]
    lift: Float[np.ndarray, " code"]
    cosine: Float[np.ndarray, " code"]

    def _columns(self) -> dict[str, Any]:
        return {"overlap": self.overlap, "lift": self.lift, "cosine": self.cosine}


@dataclass(frozen=True, eq=False)
class ChangedCodes(_Table):
    """Codes that differ between two series, most different first.

    Args:
        codes: (hook, group, head, code) of each.
        series: the two series.
        share: [code, 2] share of each series' observed positions at which the code is active.
        only: [code, 2] positions at which it is active in one series and, though observed, not in
            the other; what to look at where the two belong together position by position, as a
            clean and a corrupted series do.
        both: [code] positions at which it is active in both.
    """

    series: tuple[int, int]
    share: Float[np.ndarray, "code two"]
    only: Int[np.ndarray, "code two"]
    both: Int[np.ndarray, " code"]

    def _columns(self) -> dict[str, Any]:
        return {
            "share": self.share[:, 0],
            "share_other": self.share[:, 1],
            "difference": self.share[:, 1] - self.share[:, 0],
            "only": self.only[:, 0],
            "only_other": self.only[:, 1],
            "both": self.both,
        }


@dataclass(frozen=True, eq=False)
class CommonCodes(_Table):
    """Codes that are active in the series of a set, rarest elsewhere first.

    Args:
        codes: (hook, group, head, code) of each.
        asked: the set, in words.
        n_series: series in it.
        inside: [code] share of the set's series in which the code is active anywhere.
        outside: [code] share of all other series; NaN where there are none.
    """

    asked: str
    n_series: int
    inside: Float[np.ndarray, " code"]
    outside: Float[np.ndarray, " code"]

    def _columns(self) -> dict[str, Any]:
        return {"inside": self.inside, "outside": self.outside}


def similar_codes(
    books: Mapping[str, IndexedBook],
    hook: str,
    unit: int,
    *,
    by: Literal["overlap", "cosine"] = "overlap",
    n: int = 10,
) -> SimilarCodes:
    """Codes of all hook points that are active where one is, or that lie in its direction.

    Args:
        books: of the index.
        hook: hook point of the code.
        unit: the code.
        by: "overlap" (of places), or "cosine" (of entries, within its own table).
        n: so many.

    Raises:
        ArgumentError: n below 1, or another ``by``.
    """
    if by not in ("overlap", "cosine"):
        raise ArgumentError(f"expected by='overlap' or 'cosine', got {by!r}")
    if n < 1:
        raise ArgumentError(f"expected n of at least 1, got {n}")
    own = books[hook]
    active = np.zeros(len(own.observed), dtype=np.float32)
    active[own.slots(unit)[0]] = 1
    group, vector = own.named(unit)[0], own.row(unit)
    rows: list[tuple[float, float, float, Named]] = []
    for name, book in books.items():
        both = np.asarray(book.matrix().T @ active)
        here = active * book.observed
        n_places = max(int((book.observed & own.observed).sum()), 1)
        either = book.support + here.sum() - both
        expected = book.support * float(here.sum()) / n_places
        with np.errstate(divide="ignore", invalid="ignore"):
            overlap = np.where(either > 0, both / either, 0.0)
            lift = np.where(expected > 0, both / expected, np.nan)
        for other in range(book.n_units):
            if name == hook and other == unit:
                continue
            named = book.named(other)
            alike = float("nan")
            if name == hook and named[0] == group:
                alike = _cosine(vector, book.row(other))
            rows.append((float(overlap[other]), float(lift[other]), alike, (name, *named)))
    if by == "overlap":
        rows.sort(key=lambda row: -row[0])
    else:
        rows = sorted((row for row in rows if np.isfinite(row[2])), key=lambda row: -row[2])
    rows = rows[:n]
    return SimilarCodes(
        codes=tuple(row[3] for row in rows),
        of=(hook, *own.named(unit)),
        by=by,
        overlap=np.array([row[0] for row in rows]),
        lift=np.array([row[1] for row in rows]),
        cosine=np.array([row[2] for row in rows]),
    )


def _cosine(first: np.ndarray, second: np.ndarray) -> float:
    size = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second) / size if size > 0 else float("nan")


def changed_codes(index: CodeIndex, series: int, other: int) -> ChangedCodes:
    """Codes that two series do not have alike, by the difference of their shares of positions.

    What can mislead: shares say nothing of order; ``only`` and ``both`` compare position by
    position, which means something where the two series are aligned.

    Args:
        index: the index.
        series: index of a series in the data.
        other: of another.

    Raises:
        ArgumentError: no such series, or the same twice.
    """
    for one in (series, other):
        _check_series(index, one)
    if series == other:
        raise ArgumentError(f"expected two series, got {series} twice")
    per_series = index.n_channels * index.n_pos
    names: list[Named] = []
    shares, only, both = [], [], []
    for hook, book in index.books.items():
        matrix = book.matrix().tocsr()
        dense, seen = [], []
        for one in (series, other):
            at = slice(one * per_series, (one + 1) * per_series)
            dense.append(matrix[at].toarray() > 0)
            seen.append(book.observed[at])
        kept = dense[0].any(0) | dense[1].any(0)
        for unit in np.flatnonzero(kept):
            first, second = dense[0][:, unit], dense[1][:, unit]
            names.append((hook, *book.named(int(unit))))
            shares.append(
                [d.sum() / max(s.sum(), 1) for d, s in zip((first, second), seen, strict=True)]
            )
            only.append([(first & ~second & seen[1]).sum(), (second & ~first & seen[0]).sum()])
            both.append((first & second).sum())
    share = np.array(shares, dtype=float).reshape(-1, 2)
    order = np.argsort(-np.abs(share[:, 1] - share[:, 0]), kind="stable")
    return ChangedCodes(
        codes=tuple(names[i] for i in order),
        series=(int(series), int(other)),
        share=share[order],
        only=np.array(only, dtype=np.int64).reshape(-1, 2)[order],
        both=np.array(both, dtype=np.int64)[order],
    )


def common_codes(
    index: CodeIndex,
    series: Sequence[int] | None,
    *,
    label: int | str | None = None,
    at_least: float = 1.0,
) -> CommonCodes:
    """Codes that are active in all (or most) series of a set, with how often elsewhere.

    Args:
        index: the index.
        series: indices of the set, or ``label=``.
        label: the set of one class.
        at_least: share of the set's series in which a code has to be active.

    Raises:
        ArgumentError: not one of series and label, an empty set, or a share outside of 0..1.
        LabelError: no such class, or data without labels.
    """
    if (series is None) == (label is None):
        raise ArgumentError("expected either series or label=")
    if not 0 < at_least <= 1:
        raise ArgumentError(f"expected at_least in 0..1, got {at_least}")
    member = np.zeros(len(index.data), dtype=bool)
    if label is not None:
        if index.data.labels is None:
            raise LabelError("label= was given, but the series of the index have no labels")
        wanted = class_index(label, index.data.class_names)
        member = index.data.labels.numpy() == wanted
        asked = f"class {index.data.class_names[wanted]}"
    else:
        for one in series or ():
            _check_series(index, one)
            member[one] = True
        asked = f"{int(member.sum())} series"
    if not member.any():
        raise ArgumentError(f"expected at least one series in the set, got none ({asked})")
    per_series = index.n_channels * index.n_pos
    found: list[tuple[float, float, Named]] = []
    for hook, book in index.books.items():
        unit = np.repeat(np.arange(book.n_units), book.support)
        pairs = np.unique(unit * np.int64(len(member)) + book.slot // per_series)
        unit, of = np.divmod(pairs, len(member))
        inside = np.bincount(unit[member[of]], minlength=book.n_units) / member.sum()
        rest = int((~member).sum())
        outside = np.bincount(unit[~member[of]], minlength=book.n_units) / max(rest, 1)
        for one in np.flatnonzero(inside >= at_least - 1e-9):
            elsewhere = float(outside[one]) if rest else float("nan")
            found.append((float(inside[one]), elsewhere, (hook, *book.named(int(one)))))
    found.sort(key=lambda one: (one[1], -one[0]))
    return CommonCodes(
        codes=tuple(one[2] for one in found),
        asked=asked,
        n_series=int(member.sum()),
        inside=np.array([one[0] for one in found]),
        outside=np.array([one[1] for one in found]),
    )


def _check_series(index: CodeIndex, series: Any) -> None:
    n = len(index.data)
    if isinstance(series, bool) or not isinstance(series, int | np.integer) or not 0 <= series < n:
        raise ArgumentError(f"expected a series in 0..{n - 1}, got {series!r}")
