"""Which codes are active where something holds: picked on one split, reported on another.

Codes are counted against what is searched for on one split, and with it dealt out at random; beside
each stand the best neuron and the best SAE latent at its recall.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Le
from jaxtyping import Bool, Float, Int

from tstlens.arguments import Count, Draws, Seed, checked
from tstlens.codebooks.book import IndexedBook
from tstlens.codebooks.search_windows import SearchWindows, evaluated
from tstlens.data.labels import class_index
from tstlens.errors import ArgumentError, LabelError, SeriesShapeError
from tstlens.results import TableResult

if TYPE_CHECKING:
    from tstlens.codebooks.index import CodeIndex


@dataclass(frozen=True)
class Score:
    """How well something marks what was searched for.

    Args:
        precision: share of the places where it is active at which the predicate holds; NaN where
            it is never active.
        recall: share of the places where the predicate holds at which it is active.
        support: places at which it is active.
    """

    precision: float
    recall: float
    support: int


@dataclass(frozen=True)
class Rival:
    """The best neuron or SAE latent at (at least) a code's recall on the training split.

    Args:
        place: hook point.
        index: which one.
        sign: 1 where it has to be above the threshold, -1 below.
        threshold: in the activation's units.
        train: its score on the split that it was picked on.
        test: on the other.
    """

    place: str
    index: int
    sign: int
    threshold: float
    train: Score
    test: Score


@dataclass(frozen=True)
class FoundCode:
    """One code that a search found.

    Args:
        hook: hook point.
        code: its number; ``group`` and ``head`` say of which table.
        group: its group.
        head: its head, or None.
        train: score on the split that it was picked on, which flatters it.
        test: score on the other, which does not.
        p: how often the best of all codes stands out as far on the training split when what is
            searched for is dealt out to the series at random; allows for having looked at all.
        null: precision that the best of all codes reaches then at this code's recall, 95th
            percentile; 0 where none has the recall.
        neuron: the best neuron at its recall, or None.
        latent: the best SAE latent at its recall, or None.
        several_groups: whether its codebook has more than one group.
        shared: whether heads share its table.
    """

    hook: str
    code: int
    group: int
    head: int | None
    train: Score
    test: Score
    p: float
    null: float
    neuron: Rival | None
    latent: Rival | None
    several_groups: bool = False
    shared: bool = False

    def where(self) -> dict[str, Any]:
        """Arguments that name the code to ``model.force_codes(**...)`` and ``effects``."""
        code: Any = {self.group: self.code} if self.several_groups else self.code
        named = {"codes": {self.hook: code}}
        return {**named, "head": self.head} if self.shared else named

    @property
    def name(self) -> str:
        """The code in words, such as "code 17 at blocks.0.hook_mlp_out"."""
        group = f" of group {self.group}" if self.several_groups else ""
        where = group if self.head is None else f" of head {self.head}"
        return f"code {self.code}{where} at {self.hook}"


@dataclass(frozen=True, eq=False, repr=False)
class CodeSearch(TableResult):
    """Codes by precision on the training split, with their scores on the other.

    ``to_dataframe()`` has one row per code, in order. ``precision``, ``recall`` and ``support`` are
    of the test split, ``train_precision`` … of the other; ``p`` and ``null`` are of shuffled data.
    ``neuron`` and ``latent`` name the best rivals at the code's recall on the training split, with
    their precision and recall on the test split.

    Args:
        codes: found codes, most precise (on the training split) first.
        asked: what was searched for, in words.
        unit: whether places are positions or series.
        base_rate: share of the test split's places at which the predicate holds: the precision of
            a random code.
        train_base_rate: the same of the training split.
        null: [code, permutation] precision, on the training split, of the best of all codes that
            have this code's recall, with what is searched for dealt out to the series at random.
        n_candidates: codes that had the recall and support to be ranked.
        made: data, splits, seeds, limits.
    """

    codes: tuple[FoundCode, ...]
    asked: str
    unit: str
    base_rate: float
    train_base_rate: float
    null: Float[np.ndarray, "code permutation"]
    n_candidates: int
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> FoundCode:
        """The first code.

        Raises:
            ArgumentError: no code had the recall and support asked for.
        """
        if not self.codes:
            raise ArgumentError(
                f"no code is active at enough places with {self.asked} (min_recall="
                f"{self.made.get('min_recall')}, min_support={self.made.get('min_support')}); "
                "ask for less"
            )
        return self.codes[0]

    def _rows(self) -> list[dict[str, Any]]:
        rows = []
        for one in self.codes:
            row: dict[str, Any] = {
                "hook": one.hook,
                "group": one.group,
                "head": one.head,
                "code": one.code,
                **vars(one.test),
                **{f"train_{name}": value for name, value in vars(one.train).items()},
                "p": one.p,
                "null": one.null,
            }
            for kind, rival in (("neuron", one.neuron), ("latent", one.latent)):
                test = Score(np.nan, np.nan, 0) if rival is None else rival.test
                row[kind] = None if rival is None else f"{rival.place}[{rival.index}]"
                row[f"{kind}_precision"], row[f"{kind}_recall"] = test.precision, test.recall
            rows.append(row)
        return rows

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: int) -> FoundCode:
        return self.codes[index]

    def __repr__(self) -> str:
        head = f"CodeSearch({self.asked}: base rate {self.base_rate:.1%}"
        if not self.codes:
            return f"{head}, no code has the recall and support asked for)"
        lines = [
            f"{one.name}: precision {one.test.precision:.1%}, recall {one.test.recall:.1%}, "
            f"p {one.p:.3f}"
            for one in self.codes[:3]
        ]
        more = f"; and {len(self.codes) - 3} more" if len(self.codes) > 3 else ""
        return f"{head}; {'; '.join(lines)}{more})"


CHUNK = 64  # columns at a time


@dataclass(frozen=True)
class Places:
    """The units of one split that count.

    Args:
        hits: bool [unit], where the predicate holds.
        inside: bool [unit], observed and of this split.
        observed: bool [slot], for the largest activation of a series; None where units are slots.
        n_series: series.
    """

    hits: Bool[np.ndarray, " unit"]
    inside: Bool[np.ndarray, " unit"]
    observed: Bool[np.ndarray, " slot"] | None
    n_series: int

    def of_units(self, columns: np.ndarray) -> np.ndarray:
        """Activations [unit, column] of the units that count."""
        if self.observed is not None:  # the largest of a series
            columns = np.where(self.observed[:, None], columns, -np.inf)
            columns = columns.reshape(self.n_series, -1, columns.shape[1]).max(1)
        return columns[self.inside]

    def score(self, active: np.ndarray) -> Score:
        """Of something that is active at some of the units that count."""
        hits = self.hits[self.inside]
        return score_of(int((active & hits).sum()), int(active.sum()), int(hits.sum()))


def score_of(right: int, active: int, there: int) -> Score:
    """Precision, recall and support from counts."""
    nan = float("nan")
    return Score(right / active if active else nan, right / there if there else nan, active)


def best_rivals(
    values: dict[str, Any],
    signs: Sequence[int],
    train: Places,
    recalls: Sequence[float],
    test_values: dict[str, Any],
    test: Places,
) -> list[Rival | None]:
    """For every recall the column of highest precision on the training split at that recall.

    A column is active where it reaches a threshold, which is set as high as the recall allows.

    Args:
        values: place -> [slot, column] on the training split, dense or sparse.
        signs: 1 for activations above a threshold, -1 for below.
        train: units to pick on.
        recalls: of the codes.
        test_values: the same places on the other split.
        test: units to report on.
    """
    hits = train.hits[train.inside]
    there = int(hits.sum())
    if not recalls or not there or not values or set(values) - set(test_values):
        return [None] * len(recalls)
    needed = np.clip(np.ceil(np.array(recalls) * there - 1e-9).astype(int), 1, there)
    best: list[tuple[float, float, str, int, int, float] | None] = [None] * len(recalls)
    for place, first, columns in _chunks(values):
        for sign in signs:
            signed = train.of_units(sign * columns)
            right = -np.sort(-signed[hits], axis=0)
            wrong = np.sort(signed[~hits], axis=0)
            thresholds = right[needed - 1]  # [recall, column]
            for column in range(signed.shape[1]):
                limits = thresholds[:, column]
                above = len(wrong) - np.searchsorted(wrong[:, column], limits, side="left")
                reached = np.searchsorted(-right[:, column], -limits, side="right")
                precision = reached / (reached + above)
                for at, value in enumerate(precision):
                    known = best[at]
                    key = (float(value), reached[at] / there)
                    if known is None or key > known[:2]:
                        limit = float(limits[at])
                        best[at] = (*key, place, first + column, sign, limit)
    return [None if one is None else _rival(one, values, train, test_values, test) for one in best]


def _chunks(values: dict[str, Any]) -> Iterator[tuple[str, int, np.ndarray]]:
    for place, matrix in values.items():
        for first in range(0, matrix.shape[1], CHUNK):
            yield place, first, _dense(matrix, slice(first, first + CHUNK))


def _dense(matrix: Any, columns: slice) -> np.ndarray:
    part = matrix[:, columns]
    return part.toarray() if hasattr(part, "toarray") else np.asarray(part)


def _rival(
    found: tuple[float, float, str, int, int, float],
    values: dict[str, Any],
    train: Places,
    test_values: dict[str, Any],
    test: Places,
) -> Rival:
    _, _, place, index, sign, threshold = found
    scores = []
    for matrix, places in ((values[place], train), (test_values[place], test)):
        column = places.of_units(sign * _dense(matrix, slice(index, index + 1)))[:, 0]
        scores.append(places.score(column >= threshold))
    return Rival(place, index, sign, sign * threshold, *scores)


BLOCK = 2_000_000  # entries of a block of permutations


@dataclass
class Side:
    """One split: where the predicate holds and codes are active, counted; codes of all hooks."""

    index: CodeIndex
    books: dict[str, IndexedBook]
    holds: Bool[np.ndarray, " slot"]
    series: np.ndarray
    unit: str

    def __post_init__(self) -> None:
        index, books = self.index, self.books.values()
        self.shape = len(index.data), index.n_channels * index.n_pos
        member = np.zeros(len(index.data), dtype=bool)
        member[self.series] = True
        self.member = np.repeat(member, self.shape[1])
        self.observed = np.logical_or.reduce([book.observed for book in books])
        by_series = self.unit == "series"
        self.matrices = [book.in_series() if by_series else book.matrix() for book in books]
        inside = [self._units(book.observed).astype(np.float32) for book in books]
        active = [m.T @ kept for m, kept in zip(self.matrices, inside, strict=True)]
        self.active = np.concatenate(active)  # [code]
        self.right, self.there = (one[:, 0] for one in self.counted(self.holds[:, None]))
        places = self.places()
        there, all_places = int(places.hits[places.inside].sum()), int(places.inside.sum())
        self.base_rate = there / all_places if all_places else float("nan")
        if there in (0, all_places):
            which = "nothing" if there == 0 else "everything"
            what = "series" if by_series else "positions"
            raise ArgumentError(
                f"{which} among {all_places} observed {what} fits what was asked for, so "
                "no code can mark it; ask for something else"
            )

    def counted(
        self, holds: Bool[np.ndarray, "slot permutation"]
    ) -> tuple[Float[np.ndarray, "code permutation"], Float[np.ndarray, "code permutation"]]:
        """Where each code is active and the predicate holds, and where it holds at all."""
        right, there = [], []
        for matrix, book in zip(self.matrices, self.books.values(), strict=True):
            hits = self._units(holds & book.observed[:, None]).astype(np.float32)
            right.append(matrix.T @ hits)
            there.append(np.broadcast_to(hits.sum(0), right[-1].shape))
        return np.concatenate(right), np.concatenate(there)

    def _units(self, slots: Bool[np.ndarray, "slot ..."]) -> Bool[np.ndarray, "unit ..."]:
        """Slots of this split, or series that have one."""
        kept = (slots.T & self.member).T
        if self.unit == "position":
            return kept
        return np.asarray(kept.reshape(*self.shape, *slots.shape[1:]).any(1))

    def places(self) -> Places:
        """The units that rivals are compared on."""
        observed = None if self.unit == "position" else self.observed
        hits = self._units(self.holds & self.observed)
        return Places(hits, self._units(self.observed), observed, self.shape[0])

    def ranked(self, min_recall: float, min_support: int) -> Int[np.ndarray, " code"]:
        """Codes of enough support and recall, most precise first."""
        with np.errstate(divide="ignore", invalid="ignore"):
            precision, recall = self.right / self.active, self.right / self.there
        good = (self.active >= min_support) & (recall >= min_recall) & (self.right > 0)
        kept = np.flatnonzero(good)
        return kept[np.lexsort((kept, -recall[kept], -precision[kept]))]

    def score(self, code: int) -> Score:
        """Of one code, by its number among those of all hooks."""
        return score_of(*(int(one[code]) for one in (self.right, self.active, self.there)))

    def shuffled(
        self, n_permutations: int, min_support: int, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """With the predicate's places dealt out to the series at random.

        Precisions are standardised by each code's own mean and spread under shuffling before the
        maximum is taken, since a code of few places, or of few series, is precise by luck more
        easily than one of many.

        Returns:
            Precision and recall [code, permutation], and p [code] after the maximum of all codes.
        """
        deal = Dealer(self.index, self.holds, self.observed, self.series)
        size, parts = max(1, BLOCK // len(self.holds)), []
        for first in range(0, n_permutations, size):
            block = range(first, min(first + size, n_permutations))
            parts.append(self.counted(np.stack([deal.one(generator) for _ in block], axis=1)))
        right, there = (np.concatenate(one, axis=1) for one in zip(*parts, strict=True))
        many, places = self.active >= min_support, np.maximum(self.active, 1)
        precision = np.where(many[:, None], right / places[:, None], 0)
        mean, spread = precision.mean(1), precision.std(1)
        usable = many & (spread > 1e-9)
        scale = np.where(usable, spread, 1)
        found = np.where(usable, (self.right / places - mean) / scale, 0)
        highest = np.where(usable[:, None], (precision - mean[:, None]) / scale[:, None], -np.inf)
        highest = highest.max(0)
        at_least = (highest[None] >= found[:, None] - 1e-9).sum(1)
        p = np.where(usable, (1 + at_least) / (1 + len(highest)), 1.0)
        return precision, right / np.maximum(there, 1), p


class Dealer:
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


@checked
def search_codes(
    index: CodeIndex,
    predicate: Callable[[Any], Any] | None = None,
    *,
    label: int | str | None = None,
    mask: Any = None,
    test: CodeIndex | Literal["split"] | None = None,
    test_mask: Any = None,
    hooks: str | Sequence[str] | None = None,
    unit: Literal["position", "series"] = "position",
    min_recall: Annotated[float, Ge(0), Le(1)] = 0.02,
    min_support: Count = 10,
    n: Count = 10,
    n_permutations: Draws = 200,
    min_samples: Count = 8,
    seed: Seed = 0,
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
    names = list(index.books) if hooks is None else [hooks] if isinstance(hooks, str) else hooks
    books = {name: index.book(name) for name in names}
    other = index.test if test is None else None if isinstance(test, str) else test
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
    train = Side(index, books, holds, train_series, unit)
    report_books = {name: report.book(name) for name in names}
    tested = Side(report, report_books, report_holds, test_series, unit)
    found = train.ranked(min_recall, min_support)
    chosen = [int(code) for code in found[:n]]
    recalls = [train.score(code).recall for code in chosen]
    precision, recall, p = train.shuffled(n_permutations, min_support, generator)
    null = [np.where(recall >= one - 1e-9, precision, 0).max(0) for one in recalls]
    neurons, latents = (
        best_rivals(values, signs, train.places(), recalls, others, tested.places())
        for values, others, signs in (
            (index.neurons, report.neurons, (1, -1)),
            (index.saes, report.saes, (1,)),
        )
    )
    named = [name for book in books.values() for name in book.names()]
    codes = []
    for at, code in enumerate(chosen):
        hook, group, head, number = named[code]
        codes.append(
            FoundCode(
                hook=hook,
                code=number,
                group=group,
                head=head,
                train=train.score(code),
                test=tested.score(code),
                p=float(p[code]),
                null=float(np.quantile(null[at], 0.95)),
                neuron=neurons[at],
                latent=latents[at],
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
    predicate: Any,
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
