"""Codes like each other, codes that tell two series apart, codes that a set of series shares."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from annotated_types import Gt, Le
from jaxtyping import Float, Int
from scipy.sparse import hstack

from tstlens.arguments import Count, checked
from tstlens.codebooks.book import Named, cosines
from tstlens.data.labels import class_index
from tstlens.errors import ArgumentError, LabelError
from tstlens.results import TableResult

if TYPE_CHECKING:
    from tstlens.codebooks.index import CodeIndex


@dataclass(frozen=True, eq=False)
class CodeTable(TableResult):
    """Numbers of codes; a row per code: hook, group, head, code, and the numbers.

    Args:
        codes: (hook, group, head, code) of each.
    """

    codes: tuple[Named, ...]

    @abstractmethod
    def _numbers(self) -> dict[str, Any]:
        """The numbers by name, one array per column."""

    def _rows(self) -> dict[str, Any]:
        names = zip(*self.codes, strict=True) if self.codes else [()] * 4
        named = zip(("hook", "group", "head", "code"), names, strict=True)
        return {**{key: list(values) for key, values in named}, **self._numbers()}

    def __len__(self) -> int:
        return len(self.codes)


@dataclass(frozen=True, eq=False)
class SimilarCodes(CodeTable):
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

    def _numbers(self) -> dict[str, Any]:
        return {"overlap": self.overlap, "lift": self.lift, "cosine": self.cosine}


@dataclass(frozen=True, eq=False)
class ChangedCodes(CodeTable):
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

    def _numbers(self) -> dict[str, Any]:
        return {
            "share": self.share[:, 0],
            "share_other": self.share[:, 1],
            "difference": self.share[:, 1] - self.share[:, 0],
            "only": self.only[:, 0],
            "only_other": self.only[:, 1],
            "both": self.both,
        }


@dataclass(frozen=True, eq=False)
class CommonCodes(CodeTable):
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

    def _numbers(self) -> dict[str, Any]:
        return {"inside": self.inside, "outside": self.outside}


@checked
def similar_codes(
    index: CodeIndex,
    hook: str,
    code: int,
    *,
    group: int | None = None,
    head: int | None = None,
    by: Literal["overlap", "cosine"] = "overlap",
    n: Count = 10,
) -> SimilarCodes:
    """Codes of all hook points that are active where one is, or that lie in its direction.

    Args:
        index: of the codes.
        hook: hook point of the code.
        code: its number.
        group: its group, where there are several.
        head: its head, where heads have tables of their own or share one.
        by: "overlap" (of places), or "cosine" (of entries, within its own table).
        n: so many.

    Raises:
        UnknownHookError: no such hook point in the index.
        ArgumentError: no such code, or a group or head that has to be said.
    """
    own = index.book(hook)
    unit = own.unit(code, group, head)
    active = own.matrix()[:, [unit]].toarray()[:, 0]
    names: list[Named] = []
    parts: list[np.ndarray] = []
    for book in index.books.values():
        both = np.asarray(book.matrix().T @ active)
        here = float((active * book.observed).sum())
        n_places = max(int((book.observed & own.observed).sum()), 1)
        either, expected = book.support + here - both, book.support * here / n_places
        with np.errstate(divide="ignore", invalid="ignore"):
            overlap = np.where(either > 0, both / either, 0.0)
            lift = np.where(expected > 0, both / expected, np.nan)
        cosine = cosines(own, unit) if book is own else np.full(book.n_units, np.nan)
        names += book.names()
        parts.append(np.stack([overlap, lift, cosine]))
    found = np.concatenate(parts, axis=1)
    by_key = np.where(np.isnan(found[2]), -np.inf, found[2]) if by == "cosine" else found[0]
    this = names.index((hook, *own.named(unit)))
    order = [at for at in np.argsort(-by_key, kind="stable") if at != this and by_key[at] > -np.inf]
    overlap, lift, cosine = found[:, order[:n]]
    codes = tuple(names[at] for at in order[:n])
    return SimilarCodes(codes, names[this], by, overlap, lift, cosine)


@checked
def changed_codes(index: CodeIndex, series: int, other: int) -> ChangedCodes:
    """Codes that two series do not have alike, by the difference of their shares of positions.

    What can mislead: shares say nothing of order; ``only`` and ``both`` compare position by
    position, which means something where the two series are aligned.

    Args:
        index: of the codes.
        series: index of a series in the data.
        other: of another.

    Raises:
        ArgumentError: no such series, or the same twice.
    """
    _check_series(index, series, other)
    if series == other:
        raise ArgumentError(f"expected two series, got {series} twice")
    names: list[Named] = []
    parts: list[np.ndarray] = []
    for book in index.books.values():
        matrix = book.matrix().tocsr()
        size = book.n_channels * book.n_pos
        rows = [slice(one * size, (one + 1) * size) for one in (series, other)]
        on = np.stack([matrix[at].toarray() > 0 for at in rows])  # [two, slot, unit]
        seen = np.stack([book.observed[at] for at in rows])[:, :, None]
        share = on.sum(1) / np.maximum(seen.sum(1), 1)
        only = (on & ~on[::-1] & seen[::-1]).sum(1)
        kept = np.flatnonzero(on.any(0).any(0))
        parts.append(np.concatenate([share, only, on.all(0).sum(0)[None]])[:, kept])
        names += [(book.hook, *book.named(unit)) for unit in kept.tolist()]
    found = np.concatenate(parts, axis=1)
    order = np.argsort(-np.abs(found[1] - found[0]), kind="stable")
    found = found[:, order]
    return ChangedCodes(
        codes=tuple(names[at] for at in order),
        series=(series, other),
        share=found[:2].T,
        only=found[2:4].T.astype(np.int64),
        both=found[4].astype(np.int64),
    )


@checked
def common_codes(
    index: CodeIndex,
    series: Sequence[int] | None = None,
    *,
    label: int | str | None = None,
    at_least: Annotated[float, Gt(0), Le(1)] = 1.0,
) -> CommonCodes:
    """Codes that are active in all (or most) series of a set, with how often elsewhere.

    Args:
        index: of the codes.
        series: indices of the set, or ``label=``.
        label: the set of one class.
        at_least: share of the set's series in which a code has to be active.

    Raises:
        ArgumentError: not one of series and label, or an empty set.
        LabelError: no such class, or data without labels.
    """
    if (series is None) == (label is None):
        raise ArgumentError("expected either series or label=")
    member = np.zeros(len(index.data), dtype=bool)
    if label is not None:
        if index.data.labels is None:
            raise LabelError("label= was given, but the series of the index have no labels")
        wanted = class_index(label, index.data.class_names)
        member = index.data.labels.numpy() == wanted
        asked = f"class {index.data.class_names[wanted]}"
    else:
        chosen = list(series or ())
        _check_series(index, *chosen)
        member[chosen] = True
        asked = f"{int(member.sum())} series"
    if not member.any():
        raise ArgumentError(f"expected at least one series in the set, got none ({asked})")
    fired = hstack([book.in_series() for book in index.books.values()], format="csr")
    inside, outside = (
        np.asarray(fired.T @ one).astype(float) / (one.sum() or np.nan) for one in (member, ~member)
    )
    names = [name for book in index.books.values() for name in book.names()]
    kept = np.flatnonzero(inside >= at_least - 1e-9)
    order = kept[np.lexsort((-inside[kept], outside[kept]))]
    return CommonCodes(
        codes=tuple(names[at] for at in order),
        asked=asked,
        n_series=int(member.sum()),
        inside=inside[order],
        outside=outside[order],
    )


def _check_series(index: CodeIndex, *series: int) -> None:
    n = len(index.data)
    for one in series:
        if not 0 <= one < n:
            raise ArgumentError(f"expected a series in 0..{n - 1}, got {one!r}")
