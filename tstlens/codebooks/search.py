"""Which codes are active where something holds: picked on one split, reported on another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Bool

from tstlens.codebooks.index_book import IndexedBook
from tstlens.codebooks.search_result import CodeSearch, FoundCode, Score
from tstlens.codebooks.search_rivals import Places, best_rivals, score_of
from tstlens.codebooks.search_windows import SearchWindows, evaluated
from tstlens.data.labels import class_index
from tstlens.errors import ArgumentError, LabelError, SeriesShapeError

if TYPE_CHECKING:
    from tstlens.codebooks.index import CodeIndex

FEWEST_PERMUTATIONS = 100
BLOCK = 2_000_000  # entries of a block of permutations


def search_codes(
    index: CodeIndex,
    predicate: Callable[[Any], Any] | None,
    *,
    label: int | str | None = None,
    mask: Any = None,
    test: CodeIndex | Literal["split"] | None = None,
    test_mask: Any = None,
    hooks: str | Sequence[str] | None = None,
    unit: Literal["position", "series"] = "position",
    min_recall: float = 0.02,
    min_support: int = 10,
    n: int = 10,
    n_permutations: int = 200,
    min_samples: int = 8,
    seed: int = 0,
) -> CodeSearch:
    """Rank codes by how precisely they mark a class, a regime or a property of the window.

    Codes are ranked on the index's own series and reported on others: those of ``index.test``, or
    else a random half of the series that the ranking did not see. Beside each stands the neuron
    that is most precise at (at least) the same recall, with a threshold set on the same series, and
    the SAE latent likewise; both are picked among many, as the code is, and reported on the same
    other series. The null deals what is searched for out to the series at random, whole series at a
    time, and takes the best of all codes each time: ``null`` is the precision that the best of them
    reaches at a code's recall (95th percentile), and ``p`` allows for having looked at all codes
    (not for several searches).

    What can mislead: a precise code with a low recall marks a part of what was asked for; a high
    base rate makes every code precise; later layers have mixed in the rest of the series, so a code
    may be active *because* of samples outside its window; and what marks a class need not drive the
    output: see :func:`~tstlens.codebooks.effects`.

    Args:
        index: of the split to pick on.
        predicate: gets an object ``window`` (:class:`SearchWindows`: level, slope, curvature, peak,
            trough, range, variance, low, middle, high, frequency, distance(motif) …) of all windows
            at once and gives bool, one per window; a function that cannot work on arrays is called
            window by window, more slowly.
        label: a class (index or name), instead of a predicate.
        mask: bool [series, pos] or [series, channel, pos], instead of a predicate.
        test: index of the split to report on; None for ``index.test``, and halves of the series
            where there is none; ``"split"`` for halves in any case.
        test_mask: the mask of the test split.
        hooks: codes of which hook points; None for all.
        unit: count positions, or series (a code counts as active in a series where it is active at
            any position, a neuron with its largest activation, and the predicate holds where it
            holds at any position).
        min_recall: of a code on the split to pick on.
        min_support: places at which a code is active there.
        n: codes to report.
        n_permutations: of the null.
        min_samples: windows narrower than so many samples are widened before they are measured.
        seed: of halves and permutations.

    Raises:
        ArgumentError: not one of predicate, label and mask; nothing, or everything, fits.
        LabelError: no such class, or data without labels.
        SeriesShapeError: a mask of another shape.

    Source: Tamkin, Taufeeque, Goodman 2023 (precision and recall of codes beside neurons); Westfall
    and Young 1993 (the maximum over candidates as null).

    Example:
        >>> index.search(lambda window: window.slope > 1.0).to_dataframe()  # doctest: +SKIP
    """
    if sum(given is not None for given in (predicate, label, mask)) != 1:
        raise ArgumentError("expected one of a predicate, label= and mask=, got none or several")
    _check(unit, min_recall, min_support, n, n_permutations)
    names = list(index.books) if hooks is None else [hooks] if isinstance(hooks, str) else hooks
    books = {name: index.book(name) for name in names}
    other = index.test if test is None else None if test == "split" else test
    other = None if isinstance(other, str) else other
    if mask is not None and other is not None and test_mask is None:
        raise ArgumentError(
            "the index has a test split, so give its mask too: test_mask=, or test='split' to "
            "report on a half of these series"
        )
    asked = (predicate, label, min_samples)
    holds, vectorised = _held(index, mask, *asked)
    generator = np.random.default_rng(seed)
    if other is None:
        train_series, test_series = _halves(index, generator)
        report, report_holds = index, holds
    else:
        _check_test(index, other, names)
        report, report_holds = other, _held(other, test_mask, *asked)[0]
        train_series, test_series = np.arange(len(index.data)), np.arange(len(other.data))
    train = _Side(index, books, holds, train_series, unit)
    report_books = {name: report.book(name) for name in names}
    tested = _Side(report, report_books, report_holds, test_series, unit)
    found = _ranked(train, min_recall, min_support)
    chosen = [(hook, code) for _, hook, code in found[:n]]
    recalls = [train.score(hook, code).recall for hook, code in chosen]
    shuffled, of = train.shuffled(n_permutations, generator), train.number
    active, right = (np.concatenate([one[i] for one in train.counts.values()]) for i in (1, 0))
    precision, recall, p = shuffled.against(active, right, min_support)
    null = [np.where(recall >= one - 1e-9, precision, 0).max(0) for one in recalls]
    rivals = {}
    for kind, signs in (("neurons", (1, -1)), ("saes", (1,))):
        values = getattr(index, kind), getattr(report, kind)
        rivals[kind] = best_rivals(
            values[0], signs, train.places(), recalls, values[1], tested.places()
        )
    codes = []
    for at, (hook, code) in enumerate(chosen):
        group, head, number = books[hook].named(code)
        codes.append(
            FoundCode(
                hook=hook,
                code=number,
                group=group,
                head=head,
                train=train.score(hook, code),
                test=tested.score(hook, code),
                p=float(p[of(hook, code)]),
                null=float(np.quantile(null[at], 0.95)),
                neuron=rivals["neurons"][at],
                latent=rivals["saes"][at],
                several_groups=books[hook].n_groups > 1,
                shared=books[hook].shared,
            )
        )
    return CodeSearch(
        codes=tuple(codes),
        asked=_said(index, predicate, label),
        unit=unit,
        base_rate=tested.base_rate,
        train_base_rate=train.base_rate,
        null=np.array(null).reshape(len(null), n_permutations),
        n_candidates=len(found),
        made={
            **index.made,
            "test": "the other half of the series" if other is None else report.made,
            "n_train": len(train_series),
            "n_test": len(test_series),
            "min_recall": min_recall,
            "min_support": min_support,
            "n_permutations": n_permutations,
            "seed": seed,
            "at_once": vectorised,
        },
    )


def _check(unit: str, min_recall: float, min_support: int, n: int, n_permutations: int) -> None:
    if unit not in ("position", "series"):
        raise ArgumentError(f"expected unit='position' or 'series', got {unit!r}")
    if not 0 <= min_recall <= 1:
        raise ArgumentError(f"expected min_recall in 0..1, got {min_recall}")
    if min_support < 1 or n < 1:
        raise ArgumentError(f"expected min_support and n of at least 1, got {min_support} and {n}")
    if n_permutations < FEWEST_PERMUTATIONS:
        raise ArgumentError(
            f"expected n_permutations of at least {FEWEST_PERMUTATIONS}, got {n_permutations}"
        )


def _check_test(index: CodeIndex, other: CodeIndex, names: Sequence[str]) -> None:
    for name in names:
        if name not in other.books or not np.array_equal(
            index.books[name].table, other.books[name].table
        ):
            raise ArgumentError(
                f"the test index has no codebook at {name}, or another one; build both with the "
                "same model: CodeIndex.build(model, train, test=test)"
            )
    if (index.n_pos, index.n_channels) != (other.n_pos, other.n_channels):
        raise ArgumentError(
            f"expected a test index with {index.n_pos} positions, got {other.n_pos}"
        )


def _held(
    index: CodeIndex,
    mask: Any,
    predicate: Callable[[Any], Any] | None,
    label: int | str | None,
    min_samples: int,
) -> tuple[Bool[np.ndarray, " slot"], bool]:
    """Where the predicate holds, and whether it was asked about all windows at once."""
    shape = len(index.data), index.n_channels, index.n_pos
    if label is not None:
        if index.data.labels is None:
            raise LabelError("label= was given, but the series of the index have no labels")
        wanted = class_index(label, index.data.class_names)
        held = index.data.labels.numpy() == wanted
        return np.broadcast_to(held[:, None, None], shape).ravel(), True
    if mask is not None:
        array = mask.cpu().numpy() if hasattr(mask, "cpu") else np.asarray(mask)
        if array.dtype != bool or array.shape not in (shape, (shape[0], shape[2])):
            raise SeriesShapeError(
                f"expected mask as bool [series={shape[0]}, pos={shape[2]}] (or with "
                f"channel={shape[1]} in the middle), got {array.dtype} {list(array.shape)}"
            )
        array = array if array.ndim == 3 else array[:, None]
        return np.broadcast_to(array, shape).ravel(), True
    if not callable(predicate):
        raise ArgumentError(f"expected a function of window, got {predicate!r}")
    windows = SearchWindows(index.data, index.spans, index.n_channels, index.columns, min_samples)
    return evaluated(predicate, windows)


def _halves(index: CodeIndex, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two halves of the series, each class shared out evenly."""
    n = len(index.data)
    if n < 4:
        raise ArgumentError(
            f"expected at least 4 series to pick codes on one half and report on the other, got "
            f"{n}; or build the index with test="
        )
    order = generator.permutation(n)
    if index.data.labels is not None:
        order = order[np.argsort(index.data.labels.numpy()[order], kind="stable")]
    return np.sort(order[::2]), np.sort(order[1::2])


def _said(index: CodeIndex, predicate: Callable[[Any], Any] | None, label: Any) -> str:
    if label is not None:
        names = index.data.class_names
        wanted = class_index(label, names)
        plain = names[wanted] == str(wanted)
        return f"class {names[wanted]}" + ("" if plain else f" (label {wanted})")
    if predicate is None:
        return "the mask"
    name = getattr(predicate, "__name__", "predicate")
    return "the predicate" if name == "<lambda>" else name


def _ranked(side: _Side, min_recall: float, min_support: int) -> list[tuple[float, str, int]]:
    """(precision, hook, unit), best first."""
    found = []
    for hook, counts in side.counts.items():
        right, active, there = counts
        with np.errstate(divide="ignore", invalid="ignore"):
            precision, recall = right / active, right / there
        good = np.flatnonzero((active >= min_support) & (recall >= min_recall) & (right > 0))
        found += [(float(precision[u]), float(recall[u]), hook, int(u)) for u in good]
    order = list(side.counts)
    found.sort(key=lambda one: (-one[0], -one[1], order.index(one[2]), one[3]))
    return [(precision, hook, unit) for precision, _, hook, unit in found]


@dataclass
class _Side:
    """One split: where the predicate holds and codes are active, counted."""

    index: CodeIndex
    books: dict[str, IndexedBook]
    holds: np.ndarray  # bool [slot]
    series: np.ndarray
    unit: str

    def __post_init__(self) -> None:
        index = self.index
        self.shape = len(index.data), index.n_channels * index.n_pos
        member = np.zeros(len(index.data), dtype=bool)
        member[self.series] = True
        self.member = np.repeat(member, self.shape[1])
        books = self.books.values()
        self.observed = np.logical_or.reduce([book.observed for book in books])
        self.matrices = {hook: self._matrix(book) for hook, book in self.books.items()}
        self.inside = {hook: self._units(book.observed) for hook, book in self.books.items()}
        self.counts: dict[str, tuple[np.ndarray, np.ndarray, int]] = {}
        for hook in self.books:
            hits = self._hits(self.holds[:, None], hook)
            right = np.asarray(self.matrices[hook].T @ hits)[:, 0]
            inside = self.inside[hook].astype(np.float32)
            active = np.asarray(self.matrices[hook].T @ inside)
            self.counts[hook] = right, active, int(hits.sum())
        places = self.places()
        there, all_places = int(places.hits[places.inside].sum()), int(places.inside.sum())
        self.base_rate = there / all_places if all_places else float("nan")
        if there in (0, all_places):
            which = "nothing" if there == 0 else "everything"
            raise ArgumentError(
                f"{which} among {all_places} observed {self._word()} fits what was asked for, so "
                "no code can mark it; ask for something else"
            )

    def _word(self) -> str:
        return "positions" if self.unit == "position" else "series"

    def _matrix(self, book: IndexedBook) -> Any:
        matrix = book.matrix()
        if self.unit == "position":
            return matrix
        from scipy.sparse import csc_matrix

        code = np.repeat(np.arange(book.n_units), book.support)
        pairs = np.unique(code * np.int64(self.shape[0]) + book.slot // self.shape[1])
        column, row = np.divmod(pairs, self.shape[0])
        ones = np.ones(len(pairs), dtype=np.float32)
        return csc_matrix((ones, (row, column)), shape=(self.shape[0], book.n_units))

    def _units(self, slots: np.ndarray) -> np.ndarray:
        """bool [unit], slots of this split that count, or series that have one."""
        kept = slots & self.member
        return kept if self.unit == "position" else kept.reshape(self.shape).any(1)

    def _hits(self, holds: np.ndarray, hook: str) -> np.ndarray:
        """float [unit, permutation], 1 where the predicate holds and it counts."""
        kept = holds & (self.books[hook].observed & self.member)[:, None]
        if self.unit == "series":
            kept = kept.reshape(*self.shape, -1).any(1)
        return kept.astype(np.float32)

    def places(self) -> Places:
        """The units that rivals are compared on."""
        inside = self._units(self.observed)
        if self.unit == "position":
            return Places(self.holds & inside, inside, None, self.shape[0])
        held = (self.holds & self.observed).reshape(self.shape).any(1)
        return Places(held & inside, inside, self.observed, self.shape[0])

    def number(self, hook: str, unit: int) -> int:
        """A code among all of them."""
        names = list(self.books)
        return sum(self.books[one].n_units for one in names[: names.index(hook)]) + unit

    def score(self, hook: str, unit: int) -> Score:
        right, active, there = self.counts[hook]
        return score_of(int(right[unit]), int(active[unit]), there)

    def shuffled(self, n_permutations: int, generator: np.random.Generator) -> _Shuffled:
        """Counts of all codes with the predicate's places dealt out to the series at random."""
        deal = _Dealer(self.index, self.holds, self.observed, self.series)
        block = max(1, BLOCK // len(self.holds))
        right: list[np.ndarray] = []
        there: list[np.ndarray] = []
        for first in range(0, n_permutations, block):
            size = min(block, n_permutations - first)
            dealt = np.stack([deal.one(generator) for _ in range(size)], axis=1)
            by_hook = [self._hits(dealt, hook) for hook in self.books]
            counts = zip(self.matrices.values(), by_hook, strict=True)
            right.append(np.concatenate([np.asarray(m.T @ hits) for m, hits in counts]))
            sizes = [book.n_units for book in self.books.values()]
            totals = [hits.sum(0)[None].repeat(n, 0) for hits, n in zip(by_hook, sizes, strict=True)]
            there.append(np.concatenate(totals))
        return _Shuffled(np.concatenate(right, 1), np.concatenate(there, 1))


@dataclass
class _Shuffled:
    """Counts under shuffling, of every code."""

    right: np.ndarray  # [unit, permutation]
    there: np.ndarray  # [unit, permutation]

    def against(
        self, active: np.ndarray, right: np.ndarray, min_support: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Precision and recall [unit, permutation], and p [unit] after the maximum of all codes.

        Precisions are standardised by each code's own mean and spread under shuffling before the
        maximum is taken, since a code of few places, or of few series, is precise by luck more
        easily than one of many.
        """
        many = active >= min_support
        precision = np.where(many[:, None], self.right / np.maximum(active, 1)[:, None], 0)
        recall = self.right / np.maximum(self.there, 1)
        mean, spread = precision.mean(1), precision.std(1)
        usable = many & (spread > 1e-9)
        scale = np.where(usable, spread, 1)
        found = np.where(usable, (right / np.maximum(active, 1) - mean) / scale, 0)
        highest = np.where(usable[:, None], (precision - mean[:, None]) / scale[:, None], -np.inf)
        highest = highest.max(0)
        at_least = (highest[None] >= found[:, None] - 1e-9).sum(1)
        p = np.where(usable, (1 + at_least) / (1 + len(highest)), 1.0)
        return precision, recall, p


class _Dealer:
    """What holds at a series' positions, given to another series, whole and in order.

    Positions of one series are alike, so they go together. Where the receiving series is longer,
    they start over; where it is shorter, the rest is left out.
    """

    def __init__(
        self, index: CodeIndex, holds: np.ndarray, observed: np.ndarray, series: np.ndarray
    ) -> None:
        shape = len(index.data), index.n_channels, index.n_pos
        self.series = series
        held, seen = holds.reshape(shape)[series], observed.reshape(shape)[series].any(1)
        order = np.argsort(~seen, axis=1, kind="stable")  # observed positions first, in order
        self.packed = np.take_along_axis(held, order[:, None], axis=2)
        self.count = np.maximum(seen.sum(1), 1)
        self.turn = np.argsort(order, axis=1)  # position -> its number among the observed
        self.shape = shape

    def one(self, generator: np.random.Generator) -> np.ndarray:
        """bool [slot]."""
        giver = generator.permutation(len(self.series))
        at = self.turn % self.count[giver][:, None]
        found = np.zeros(self.shape, dtype=bool)
        found[self.series] = np.take_along_axis(self.packed[giver], at[:, None], axis=2)
        return found.ravel()
