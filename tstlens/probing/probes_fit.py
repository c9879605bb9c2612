"""One cell of a probe's map: scikit-learn fits, held-out predictions, controls beside them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from tstlens.errors import ArgumentError
from tstlens.randomness import seeded
from tstlens.stats import by_cluster, mean_interval

Kind = Literal["logistic", "ridge"]
MOST_STEPS = 1000  # of the logistic solver


@dataclass(frozen=True, eq=False)
class Rows:
    """What is probed: vectors, targets, and which series each row comes from.

    Args:
        x: [row, width].
        y: [row] codes or numbers.
        series: [row] index of the series.
        place: [row] which position (and channel) of the series, as one number.
    """

    x: Float[np.ndarray, "row width"]
    y: np.ndarray
    series: Int[np.ndarray, " row"]
    place: Int[np.ndarray, " row"]

    def at(self, index: np.ndarray) -> Rows:
        """Some of the rows."""
        return Rows(self.x[index], self.y[index], self.series[index], self.place[index])


@dataclass(frozen=True)
class Cell:
    """The numbers of one cell; NaN where there was nothing to fit."""

    score: float = np.nan
    low: float = np.nan
    high: float = np.nan
    baseline: float = np.nan
    shuffled: tuple[float, ...] = ()
    p: float = np.nan
    n_train: int = 0
    n_test: int = 0
    n_series: int = 0
    unconverged: int = 0


@dataclass(frozen=True)
class Settings:
    """How every cell is fitted."""

    kind: Kind
    strength: float
    n_folds: int
    n_shuffles: int
    level: float
    n_boot: int
    seed: int
    is_class: bool


def fit_cell(train: Rows, test: Rows | None, how: Settings) -> Cell:
    """Fit on the training rows, score on the others, and again with shuffled targets."""
    folds = _folds(train, how) if test is None else None
    splits = _splits(train, test, folds)
    n_test = sum(len(held.y) for _, held in splits)
    sizes: dict[str, Any] = {"n_train": len(train.y), "n_test": n_test}
    if not splits or not n_test or any(_too_few(kept, how) for kept, _ in splits):
        return Cell(**sizes)
    found, plain, unconverged = _held_out(splits, how)
    truth = np.concatenate([held.y for _, held in splits])
    series = np.concatenate([held.series for _, held in splits])
    loss, plain_loss = _loss(truth, found, how), _loss(truth, plain, how)
    shuffled = []
    for number in range(how.n_shuffles):
        drawn = _splits(*_shuffled(train, test, how.seed + 1 + number), folds)
        if any(_too_few(kept, how) for kept, _ in drawn):
            shuffled.append(np.nan)
            continue
        predicted, _, failed = _held_out(drawn, how)
        unconverged += failed
        expected = np.concatenate([held.y for _, held in drawn])
        shuffled.append(_score(_loss(expected, predicted, how), expected, how))
    low, high = _interval(loss, truth, series, how)
    return Cell(
        score=_score(loss, truth, how),
        low=low,
        high=high,
        baseline=_score(plain_loss, truth, how),
        shuffled=tuple(shuffled),
        p=_better(plain_loss - loss, series, how),
        n_series=len(np.unique(series)),
        unconverged=unconverged,
        **sizes,
    )


@seeded(0)
def pipeline(kind: Kind, strength: float, is_class: bool) -> Any:
    """Standardisation and the linear model of scikit-learn, to be fitted together.

    Args:
        kind: ``"logistic"`` or ``"ridge"``.
        strength: of the penalty: 1 / C of the logistic regression, alpha of the ridge.
        is_class: classes, or numbers.

    Raises:
        ArgumentError: another kind, a strength that is not positive, or logistic for numbers.
    """
    from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if kind not in ("logistic", "ridge"):
        raise ArgumentError(f"expected kind to be 'logistic' or 'ridge', got {kind!r}")
    if not strength > 0:
        raise ArgumentError(f"expected a strength above 0, got {strength}")
    if kind == "logistic":
        if not is_class:
            raise ArgumentError(
                "kind='logistic' reads off classes, and the target holds floating point numbers; "
                "take kind='ridge', or make it integers"
            )
        linear: Any = LogisticRegression(C=1 / strength, max_iter=MOST_STEPS)
    else:
        linear = RidgeClassifier(alpha=strength) if is_class else Ridge(alpha=strength)
    return make_pipeline(StandardScaler(), linear)


Fold = tuple[np.ndarray, np.ndarray]


@seeded(0)
def _folds(rows: Rows, how: Settings) -> list[Fold]:
    """Rows kept and held out, fold by fold; the rows of a series stay together."""
    from sklearn.model_selection import KFold, StratifiedGroupKFold, StratifiedKFold

    found, number = np.unique(rows.series, return_inverse=True)
    if len(found) < how.n_folds:
        return []
    options: Any = {"n_splits": how.n_folds, "shuffle": True, "random_state": how.seed}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # classes with fewer series than folds
        if not how.is_class:
            by_series = KFold(**options).split(found)
            return [
                (np.flatnonzero(np.isin(number, kept)), np.flatnonzero(np.isin(number, held)))
                for kept, held in by_series
            ]
        if len(found) == len(rows.y) and np.bincount(rows.y).max() >= how.n_folds:
            return list(StratifiedKFold(**options).split(rows.x, rows.y))
        return list(StratifiedGroupKFold(**options).split(rows.x, rows.y, rows.series))


def _splits(train: Rows, test: Rows | None, folds: list[Fold] | None) -> list[tuple[Rows, Rows]]:
    if test is not None:
        return [(train, test)]
    return [(train.at(kept), train.at(held)) for kept, held in folds or []]


def _too_few(kept: Rows, how: Settings) -> bool:
    return len(np.unique(kept.y)) < 2 if how.is_class else len(kept.y) < 2


@seeded(0)
def _held_out(splits: list[tuple[Rows, Rows]], how: Settings) -> tuple[np.ndarray, np.ndarray, int]:
    """Predictions of the probe and of the majority class (or the mean), fitted without them."""
    from sklearn.exceptions import ConvergenceWarning

    found, plain, unconverged = [], [], 0
    for kept, held in splits:
        model = pipeline(how.kind, how.strength, how.is_class)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # counted instead
            model.fit(kept.x, kept.y)
        if not np.isfinite(model[-1].coef_).all():
            raise ArgumentError(
                "expected activations and a strength that a probe can be fitted with, got weights "
                f"that are not finite (strength={how.strength:g}, largest activation "
                f"{np.abs(kept.x).max():.3g}); scale the series, or take a larger strength"
            )
        if how.kind == "logistic":
            unconverged += int(np.max(model[-1].n_iter_) >= MOST_STEPS)
        found.append(model.predict(held.x) if len(held.y) else held.y)
        usual = np.bincount(kept.y).argmax() if how.is_class else kept.y.mean()
        plain.append(np.full(len(held.y), usual))
    return np.concatenate(found), np.concatenate(plain), unconverged


def _shuffled(train: Rows, test: Rows | None, seed: int) -> tuple[Rows, Rows | None]:
    generator = np.random.default_rng(seed)
    return _exchanged(train, generator), None if test is None else _exchanged(test, generator)


def _exchanged(rows: Rows, generator: np.random.Generator) -> Rows:
    """Every series gets the targets of another: the next one in a random circle.

    Position by position, among the series that observed it; so how targets go together within a
    series, and what can be told from the position alone, stays.
    """
    rank = generator.permutation(int(rows.series.max(initial=0)) + 1)[rows.series]
    order = np.lexsort((rank, rows.place))
    y = rows.y.copy()
    place = rows.place[order]
    for first, last in _runs(place):
        members = order[first:last]
        y[members] = rows.y[np.roll(members, 1)]
    return Rows(rows.x, y, rows.series, rows.place)


def _runs(sorted_values: np.ndarray) -> Iterator[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(sorted_values)) + 1
    yield from zip([0, *edges], [*edges, len(sorted_values)], strict=True)


def _loss(truth: np.ndarray, found: np.ndarray, how: Settings) -> np.ndarray:
    return (truth != found).astype(float) if how.is_class else (truth - found) ** 2


def _score(loss: np.ndarray, truth: np.ndarray, how: Settings) -> float:
    """Accuracy, or R² about the mean of the scored targets."""
    if how.is_class:
        return float(1 - loss.mean())
    spread = truth.var()
    return float(1 - loss.mean() / spread) if spread > 0 else float("nan")


def _interval(
    loss: np.ndarray, truth: np.ndarray, series: np.ndarray, how: Settings
) -> tuple[float, float]:
    """Wilson's where every series has one row, or all of its rows fare alike; else over series."""
    from scipy.stats import binomtest

    spread = np.ones_like(loss) if how.is_class else (truth - truth.mean()) ** 2
    sums, _ = by_cluster(np.column_stack([loss, spread]), series.tolist())
    whole = not np.ptp(loss) > 0  # all right or all wrong: no spread to take an interval from
    if how.is_class and (whole or len(sums) == len(loss)):
        right = int((sums[:, 0] == 0).sum())
        found = binomtest(right, len(sums)).proportion_ci(how.level, method="wilson")
        return float(found.low), float(found.high)
    low, high = mean_interval(
        sums[:, :1],
        sums[:, 1],
        level=how.level,
        n_boot=how.n_boot,
        seed=how.seed,
        limits=(0, 1 if how.is_class else np.inf),
    )
    return 1 - float(high[0]), 1 - float(low[0])


def _better(gain: np.ndarray, series: np.ndarray, how: Settings) -> float:
    """One-sided p that the probe beats the majority class (or the mean), with series as the unit.

    McNemar's exact test where every series has one row of a class, else a t test over series.
    """
    from scipy.stats import binomtest, ttest_1samp

    _, number = np.unique(series, return_inverse=True)
    sums = np.bincount(number, gain)
    if how.is_class and len(sums) == len(gain):
        wins, losses = int((gain > 0).sum()), int((gain < 0).sum())
        if wins + losses == 0:
            return 1.0
        return float(binomtest(wins, wins + losses, alternative="greater").pvalue)
    if len(sums) < 2:
        return float("nan")
    if sums.std() == 0:
        return 0.0 if sums[0] > 0 else 1.0
    found: Any = ttest_1samp(sums, 0, alternative="greater")
    return float(found.pvalue)
