"""The best neuron and the best SAE latent at the recall of a code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool

from tstlens.codebooks.search_result import Rival, Score

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
