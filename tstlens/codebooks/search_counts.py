"""Counting codes against what is searched for: on one split, and with it dealt out at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tstlens.codebooks.index_book import IndexedBook
from tstlens.codebooks.search_result import Score
from tstlens.codebooks.search_rivals import Places, score_of
from tstlens.errors import ArgumentError

if TYPE_CHECKING:
    from tstlens.codebooks.index import CodeIndex

BLOCK = 2_000_000  # entries of a block of permutations


@dataclass
class Side:
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
        return kept if self.unit == "position" else np.asarray(kept.reshape(self.shape).any(1))

    def _hits(self, holds: np.ndarray, hook: str) -> np.ndarray:
        """float [unit, permutation], 1 where the predicate holds and it counts."""
        kept = holds & (self.books[hook].observed & self.member)[:, None]
        if self.unit == "series":
            kept = kept.reshape(*self.shape, -1).any(1)
        return np.asarray(kept, dtype=np.float32)

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

    def shuffled(self, n_permutations: int, generator: np.random.Generator) -> Shuffled:
        """Counts of all codes with the predicate's places dealt out to the series at random."""
        deal = Dealer(self.index, self.holds, self.observed, self.series)
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
            totals = [
                hits.sum(0)[None].repeat(n, 0) for hits, n in zip(by_hook, sizes, strict=True)
            ]
            there.append(np.concatenate(totals))
        return Shuffled(np.concatenate(right, 1), np.concatenate(there, 1))


@dataclass
class Shuffled:
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
