"""Linear probes: what can be read off an activation by a straight line, and where.

One cell of a probe's map: scikit-learn fits, held-out predictions, controls beside them.

What linear probes found, as plain data.

What a probe is to read off: a class or a number per series, or per position.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from annotated_types import Ge
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tstlens.arguments import (
    Count,
    Draws,
    Positive,
    Seed,
    Share,
    check_fields,
    checked,
    configured,
)
from tstlens.data import TimeSeriesData
from tstlens.effects import Labelled
from tstlens.errors import ArgumentError, LabelError
from tstlens.model import HookedTST
from tstlens.model.activations import Activations, Pool, activations, latents, layer_of
from tstlens.randomness import seeded
from tstlens.stats import adjusted, by_cluster, mean_interval

if TYPE_CHECKING:
    import pandas as pd


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


Values = np.ndarray | Tensor
Target = str | Values | tuple[Values, Values] | Callable[[TimeSeriesData], Values]


_HOOKS = ("resid_post",)


@dataclass(frozen=True)
class ProbeConfig:
    """How probes are fitted and scored; every field is also a keyword of :func:`probe`.

    Args:
        hooks: full hook names, or TransformerLens' short ones, which stand for all layers.
        sae: an SAE, transcoder or codebook whose latents are read, at its own hook point and in
            place of ``hooks``; what is fitted on is what ``saes.latents(model, sae, data)`` gives.
        by: ``"layer"`` for one probe per hook point, ``"position"`` for one per hook point and
            position, ``"head"`` for one per head (hooks with heads), or several of them.
        target: ``"labels"``, the model's classes where it names them; an array [series] or
            [series, pos] of classes (integers, strings) or of numbers (floats, read by
            ``kind="ridge"``), with a test split as a pair (train, test); or a function from data
            to such an array. [series, channel, pos] goes with ``channels="each"``.
        kind: ``"logistic"`` or ``"ridge"``.
        pool: of the positions of a series, where one vector per series is needed: ``"mean"``,
            ``"max"`` or ``"last"``.
        channels: for models that take each channel by itself: ``"joined"`` puts them side by side,
            ``"each"`` makes each a row of its own (with the series' target).
        strength: of the penalty: 1 / C of the logistic regression, alpha of the ridge.
        n_folds: of cross-validation.
        n_shuffles: fits with shuffled targets per cell.
        level: coverage of the intervals.
        n_boot: resamples of series, for intervals where series have several rows.
        seed: of folds, shuffles and resamples.
        batch_size: series per forward pass.
        n_jobs: processes that fit cells.
        progress: show progress bars.
    """

    hooks: str | Sequence[str] = _HOOKS
    sae: Any = None
    by: str | Sequence[str] = "position"
    target: Target = "labels"
    kind: Kind = "logistic"
    pool: Pool = "mean"
    channels: Literal["joined", "each"] = "joined"
    strength: Positive = 1.0
    n_folds: Annotated[int, Ge(2)] = 5
    n_shuffles: Count = 5
    level: Share = 0.95
    n_boot: Draws = 1000
    seed: Seed = 0
    batch_size: Count = 128
    n_jobs: int = 1
    progress: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.axes or self.axes - {"layer", "head", "position"}:
            raise ArgumentError(
                f"expected by to be one or several of layer, head, position, got {self.by!r}"
            )
        if self.sae is not None and self.hooks != _HOOKS:
            raise ArgumentError(
                f"sae= is read at its own hook point; leave out hooks={self.hooks!r}, or probe "
                "the two one after the other"
            )

    @property
    def axes(self) -> set[str]:
        """What there is a probe for, beside hook points."""
        return {self.by} if isinstance(self.by, str) else set(self.by)


def fit_cell(train: Rows, test: Rows | None, how: ProbeConfig) -> Cell:
    """Fit on the training rows, score on the others, and again with shuffled targets."""
    folds = _folds(train, how) if test is None else None
    splits = _splits(train, test, folds)
    n_test = sum(len(held.y) for _, held in splits)
    sizes: dict[str, Any] = {"n_train": len(train.y), "n_test": n_test}
    if not splits or not n_test or any(_too_few(kept.y) for kept, _ in splits):
        return Cell(**sizes)
    found, plain, unconverged = _held_out(splits, how)
    truth = np.concatenate([held.y for _, held in splits])
    series = np.concatenate([held.series for _, held in splits])
    loss, plain_loss = _loss(truth, found), _loss(truth, plain)
    shuffled = []
    for number in range(how.n_shuffles):
        drawn = _splits(*_shuffled(train, test, how.seed + 1 + number), folds)
        if any(_too_few(kept.y) for kept, _ in drawn):
            shuffled.append(np.nan)
            continue
        predicted, _, failed = _held_out(drawn, how)
        unconverged += failed
        expected = np.concatenate([held.y for _, held in drawn])
        shuffled.append(_score(_loss(expected, predicted), expected))
    low, high = _interval(loss, truth, series, how)
    return Cell(
        score=_score(loss, truth),
        low=low,
        high=high,
        baseline=_score(plain_loss, truth),
        shuffled=tuple(shuffled),
        p=_better(plain_loss - loss, series, _is_class(truth)),
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
        ArgumentError: logistic for numbers.
    """
    from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

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
def _folds(rows: Rows, how: ProbeConfig) -> list[Fold]:
    """Rows kept and held out, fold by fold; the rows of a series stay together."""
    from sklearn.model_selection import KFold, StratifiedGroupKFold, StratifiedKFold

    found, number = np.unique(rows.series, return_inverse=True)
    if len(found) < how.n_folds:
        return []
    options: Any = {"n_splits": how.n_folds, "shuffle": True, "random_state": how.seed}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # classes with fewer series than folds
        if not _is_class(rows.y):
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


def _is_class(y: np.ndarray) -> bool:
    """Codes of classes rather than numbers."""
    return y.dtype.kind == "i"


def _too_few(y: np.ndarray) -> bool:
    return len(np.unique(y) if _is_class(y) else y) < 2


@seeded(0)
def _held_out(
    splits: list[tuple[Rows, Rows]], how: ProbeConfig
) -> tuple[np.ndarray, np.ndarray, int]:
    """Predictions of the probe and of the majority class (or the mean), fitted without them."""
    from sklearn.exceptions import ConvergenceWarning

    found, plain, unconverged = [], [], 0
    for kept, held in splits:
        is_class = _is_class(kept.y)
        model = pipeline(how.kind, how.strength, is_class)
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
        usual = np.bincount(kept.y).argmax() if is_class else kept.y.mean()
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


def _loss(truth: np.ndarray, found: np.ndarray) -> np.ndarray:
    return (truth != found).astype(float) if _is_class(truth) else (truth - found) ** 2


def _score(loss: np.ndarray, truth: np.ndarray) -> float:
    """Accuracy, or R² about the mean of the scored targets."""
    if _is_class(truth):
        return float(1 - loss.mean())
    spread = truth.var()
    return float(1 - loss.mean() / spread) if spread > 0 else float("nan")


def _interval(
    loss: np.ndarray, truth: np.ndarray, series: np.ndarray, how: ProbeConfig
) -> tuple[float, float]:
    """Wilson's where every series has one row, or all of its rows fare alike; else over series."""
    from scipy.stats import binomtest

    is_class = _is_class(truth)
    spread = np.ones_like(loss) if is_class else (truth - truth.mean()) ** 2
    sums, _ = by_cluster(np.column_stack([loss, spread]), series.tolist())
    whole = not np.ptp(loss) > 0  # all right or all wrong: no spread to take an interval from
    if is_class and (whole or len(sums) == len(loss)):
        right = int((sums[:, 0] == 0).sum())
        found = binomtest(right, len(sums)).proportion_ci(how.level, method="wilson")
        return float(found.low), float(found.high)
    low, high = mean_interval(
        sums[:, :1],
        sums[:, 1],
        level=how.level,
        n_boot=how.n_boot,
        seed=how.seed,
        limits=(0, 1 if is_class else np.inf),
    )
    return 1 - float(high[0]), 1 - float(low[0])


def _better(gain: np.ndarray, series: np.ndarray, is_class: bool) -> float:
    """One-sided p that the probe beats the majority class (or the mean), with series as the unit.

    McNemar's exact test where every series has one row of a class, else a t test over series.
    """
    from scipy.stats import binomtest, ttest_1samp

    _, number = np.unique(series, return_inverse=True)
    sums = np.bincount(number, gain)
    if is_class and len(sums) == len(gain):
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


@dataclass(frozen=True, eq=False, repr=False)
class ProbeResult(Labelled):
    """Held-out scores of linear probes over hook points, positions and heads, with controls.

    Args:
        values: [*axes] accuracy on held-out series, or R² for targets that are numbers; NaN where
            there was nothing to fit (a position that fewer than two classes observe).
        low: [*axes] lower end of the interval over held-out series.
        high: [*axes] upper end.
        baseline: [*axes] score of always naming the training split's most frequent class (or its
            mean), on the same rows.
        shuffled: [shuffle, *axes] scores when series exchange their targets, fitted and scored so.
        p: [*axes] that the probe is no better than ``baseline`` (one-sided, series as the unit).
        q: [*axes] p after Benjamini and Hochberg over all cells.
        n_train: [*axes] training rows.
        n_test: [*axes] rows scored; with cross-validation each once.
        axes: names of the axes: ``"hook"``, then ``"head"`` and ``"pos"`` where asked for.
        coords: entries of every axis; hooks by their full names.
        score: ``"accuracy"`` or ``"R²"``.
        target: what was read off.
        class_names: of the target; () for numbers.
        level: coverage of the intervals.
        time_cells: first and one-past-last sample of every position, or None.
        made: how.
    """

    values: Float[np.ndarray, "*cell"]
    low: Float[np.ndarray, "*cell"]
    high: Float[np.ndarray, "*cell"]
    baseline: Float[np.ndarray, "*cell"]
    shuffled: Float[np.ndarray, "*shuffle_and_cell"]
    p: Float[np.ndarray, "*cell"]
    q: Float[np.ndarray, "*cell"]
    n_train: Int[np.ndarray, "*cell"]
    n_test: Int[np.ndarray, "*cell"]
    axes: tuple[str, ...]
    coords: dict[str, tuple[Any, ...]]
    score: str
    target: str
    class_names: tuple[str, ...] = ()
    level: float = 0.95
    time_cells: tuple[tuple[int, int], ...] | None = None
    made: dict[str, Any] = field(default_factory=dict)

    ALONG: ClassVar[Mapping[str, tuple[str, ...] | None]] = {
        "shuffled": ("*shuffle", "hook", "head", "pos"),
        **dict.fromkeys(("values", "low", "high", "baseline", "p", "q", "n_train", "n_test")),
    }

    @property
    def selectivity(self) -> Float[np.ndarray, "*cell"]:
        """[*axes] the score less its mean under shuffled targets (Hewitt and Liang 2019)."""
        return self.values - self.shuffled.mean(0)

    @property
    def best(self) -> dict[str, Any]:
        """The cell of the highest score, as a row of :meth:`to_dataframe`."""
        frame: Any = self.to_dataframe()
        return frame.loc[frame["score"].idxmax()].to_dict()

    def columns(self) -> dict[str, Any]:
        """The numbers of the frame."""
        spread = self.shuffled.std(0, ddof=1) if len(self.shuffled) > 1 else self.values * np.nan
        return {
            "score": self.values,
            "low": self.low,
            "high": self.high,
            "baseline": self.baseline,
            "shuffled": self.shuffled.mean(0),
            "shuffled_sd": spread,
            "selectivity": self.selectivity,
            "p": self.p,
            "q": self.q,
            "n_train": self.n_train,
            "n_test": self.n_test,
        }

    def to_dataframe(self) -> pd.DataFrame:
        """One row per cell.

        ``hook``, ``layer``, ``head`` and ``pos`` where asked for; ``score`` with ``low`` and
        ``high``; ``baseline``; ``shuffled`` (mean) with ``shuffled_sd``; ``selectivity``; ``p``
        and ``q``; ``n_train`` and ``n_test`` rows.
        """
        frame = super().to_dataframe()
        frame.insert(1, "layer", [layer_of(name) for name in frame["hook"]])
        return frame

    def __repr__(self) -> str:
        known = np.isfinite(self.values)
        best = f"{self.values[known].max():.3f}" if known.any() else "nothing"
        return (
            f"ProbeResult({self.target} [{self.shape_text()}], best {self.score} {best}, "
            f"shuffled {np.nanmean(self.shuffled):.3f})"
        )


@dataclass(frozen=True, eq=False)
class Targets:
    """Targets of one split, as codes of classes or as numbers.

    Args:
        values: [series] or [series, channel or 1, pos]; int codes, or floats.
        names: of the classes, by code; () for numbers.
    """

    values: np.ndarray
    names: tuple[str, ...]

    @property
    def by_position(self) -> bool:
        """Whether each position has a target of its own."""
        return self.values.ndim == 3

    @property
    def is_class(self) -> bool:
        """Classes rather than numbers."""
        return _is_class(self.values)


def targets_of(
    target: Target, train: TimeSeriesData, test: TimeSeriesData | None
) -> tuple[Targets, Targets | None, str]:
    """The targets of both splits, coded alike, and what to call them.

    Raises:
        LabelError: labels that are not there.
        ArgumentError: targets of another shape, kind, or number of splits.
    """
    splits = [train] if test is None else [train, test]
    if isinstance(target, str):
        if target != "labels":
            raise ArgumentError(
                f"expected target='labels', an array or a function of the data, got {target!r}"
            )
        if any(split.labels is None for split in splits):
            raise LabelError("expected labelled series for target='labels', got data without them")
        given: list[Any] = [split.labels for split in splits]
        names = train.class_names
        if test is not None and test.class_names != names:
            raise LabelError(
                f"expected the same classes in both splits, got {names} and {test.class_names}"
            )
        coded = [Targets(_array(one).astype(np.int64), names) for one in given]
        return coded[0], coded[1] if test is not None else None, "labels"
    name = "target"
    if callable(target):
        given, name = [target(split) for split in splits], getattr(target, "__name__", "target")
    elif isinstance(target, tuple):
        given = list(target)
    else:
        given = [target]
    if len(given) != len(splits):
        raise ArgumentError(
            f"expected one array of targets per split ({len(splits)}), got {len(given)}; with a "
            "test split give target=(train_target, test_target), or a function of the data"
        )
    arrays = [_shaped(_array(one), len(split)) for one, split in zip(given, splits, strict=True)]
    kinds = {array.dtype.kind == "f" for array in arrays}
    if len(kinds) > 1 or len({array.ndim for array in arrays}) > 1:
        raise ArgumentError("expected targets of one kind and shape in both splits")
    if kinds == {True}:
        if not all(np.isfinite(array).all() for array in arrays):
            raise ArgumentError("expected finite targets, got NaN or infinity")
        coded = [Targets(array.astype(np.float64), ()) for array in arrays]
    else:
        classes = np.unique(np.concatenate([array.ravel() for array in arrays]))
        names = tuple(str(one) for one in classes.tolist())
        coded = [Targets(np.searchsorted(classes, array), names) for array in arrays]
    return coded[0], coded[1] if test is not None else None, name


def check_varied(*splits: Targets) -> None:
    """Raise :class:`ArgumentError` where one class, or one number, is all that there is."""
    # A classifier needs two classes to fit; R² divides by the spread of what it is scored on.
    for split in splits[:1] if splits[0].is_class else splits:
        found = np.unique(split.values)
        if len(found) < 2:
            one = [split.names[int(found[0])] if split.is_class else found[0]] if len(found) else []
            raise ArgumentError(
                f"expected targets of at least two classes, or numbers that vary, got {one} for "
                "every series; there is nothing to tell apart"
            )


def _array(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _shaped(array: np.ndarray, n_series: int) -> np.ndarray:
    if array.dtype.kind not in "biufUO":
        raise ArgumentError(f"expected targets as classes or real numbers, got {array.dtype}")
    if not 1 <= array.ndim <= 3 or len(array) != n_series:
        raise ArgumentError(
            f"expected targets [series={n_series}], [series, pos] or [series, channel, pos], got "
            f"{list(array.shape)}"
        )
    return array[:, None] if array.ndim == 2 else array


@checked
@configured(ProbeConfig)
def probe(
    model: HookedTST,
    train: TimeSeriesData,
    test: TimeSeriesData | None = None,
    config: ProbeConfig | None = None,
    **settings: Any,
) -> ProbeResult:
    """Fit a linear probe at every hook point and position, and score it on held-out series.

    Answers "is this written here in a form that a straight line can read?". Activations are
    standardised and the probe is fitted by scikit-learn, both on training series only. Beside each
    score stand the majority class and *shuffled targets*: the same fit after series have exchanged
    their targets, whose score is what the probe gets for its width alone. With targets per position
    whole series exchange them, so that what the position alone gives away stays in the control.
    Padded positions are used nowhere.

    What can mislead: that a probe reads something does not say that the model uses it (patch or
    steer to see); on series that the model was trained on scores are higher than on others, so
    give a test split where there is one; an untrained model's activations can be read too; late
    positions of padded data hold only the long series, so compare with ``baseline`` there; cells of
    a map share their series and the best one was picked, so its interval is too kind. With
    cross-validation the folds share training series, and the interval covers only which series
    were scored.

    Args:
        model: the model.
        train: series to fit on.
        test: other series to score on; None cross-validates within ``train``, all rows of a series
            in the same fold.
        config: how; None for the defaults.
        **settings: fields of :class:`ProbeConfig`, which says what they mean: ``hooks`` or
            ``sae``, ``by``, ``target``, ``kind``, ``pool``, ``channels``, ``strength``,
            ``n_folds``, ``n_shuffles``, ``level``, ``n_boot``, ``seed``, ``batch_size``,
            ``n_jobs`` and ``progress``.

    Returns:
        Scores [hook, (head), (pos)] with controls; ``figure()`` draws the map.

    Raises:
        UnknownHookError, HookError: hooks that do not exist or cannot fire.
        LabelError: no labels, or a class whose name the model does not have.
        ArgumentError: targets that do not fit or are all the same, the same series to fit and to
            score on, or another option that is not possible.

    Source: Alain and Bengio 2016 (arXiv 1610.01644); Hewitt and Liang 2019 (arXiv 1909.03368) for
        selectivity.

    Example:
        >>> from tstlens import HookedTST, load_dataset, probing
        >>> model = HookedTST.from_pretrained("japanese-vowels")
        >>> train = load_dataset("JapaneseVowels", split="train")
        >>> found = probing.probe(model, train, hooks="pooled", by="layer", kind="ridge",
        ...     n_shuffles=1, progress=False)
        >>> bool(found.values[0] > 0.9)
        True
    """
    config = config or ProbeConfig()
    _check_apart(train, test)
    if isinstance(config.target, str):
        train, test = train.for_model(model), None if test is None else test.for_model(model)
    kept, held, name = targets_of(config.target, train, test)
    pipeline(config.kind, config.strength, kept.is_class)  # says what is wrong at once
    read = {"batch_size": config.batch_size, "progress": config.progress}

    def read_of(data: TimeSeriesData) -> dict[str, Activations]:
        if config.sae is None:
            return activations(model, data, config.hooks, **read)
        found = latents(model, config.sae, data, **read)
        return {found.hook: found}

    by_hook = read_of(train)
    by_hook_held = None if test is None else read_of(test)
    first = next(iter(by_hook.values()))
    sizes = {name: (one.n_heads, one.values.shape[2]) for name, one in by_hook.items()}
    if "head" in config.axes and min(n for n, _ in sizes.values()) < 2:
        lacking = [name for name, (n, _) in sizes.items() if n < 2]
        raise ArgumentError(f"by='head' needs hook points with heads, such as 'z'; got {lacking}")
    if config.axes != {"layer"} and len(set(sizes.values())) > 1:
        raise ArgumentError(
            f"expected hook points with the same heads and positions, got {sizes}; probe them one "
            "by one, or by='layer'"
        )
    coords: dict[str, tuple[Any, ...]] = {"hook": tuple(by_hook)}
    if "head" in config.axes:
        coords["head"] = tuple(range(first.n_heads))
    if "position" in config.axes:
        coords["pos"] = tuple(range(first.values.shape[2]))
    grid = list(product(*coords.values()))

    def rows_of(entry: tuple, of: dict[str, Activations], targets: Targets) -> Rows:
        at = dict(zip(coords, entry, strict=True))
        found = of[at["hook"]]
        found = found.head(at["head"]) if "head" in at else found
        found = found.joined() if config.channels == "joined" else found
        return _rows(found, targets, at.get("pos"), config.pool)

    rows_of(grid[0], by_hook, kept)  # says what does not fit
    check_varied(kept, *([] if held is None else [held]))
    jobs = (
        (
            rows_of(entry, by_hook, kept),
            None if by_hook_held is None or held is None else rows_of(entry, by_hook_held, held),
            config,
        )
        for entry in grid
    )
    bar: Any = {"total": len(grid), "desc": "probes", "unit": "fit", "disable": not config.progress}
    if config.n_jobs == 1:
        cells: list[Cell] = [fit_cell(*job) for job in tqdm(jobs, **bar)]
    else:
        from joblib import Parallel, delayed

        pool_of = Parallel(n_jobs=config.n_jobs, return_as="generator")
        made: Any = pool_of(delayed(fit_cell)(*job) for job in jobs)
        cells = list(tqdm(made, **bar))
    shape = tuple(len(some) for some in coords.values())

    def numbers(name: str) -> np.ndarray:
        return np.array([getattr(cell, name) for cell in cells]).reshape(shape)

    blank = (np.nan,) * config.n_shuffles
    shuffled = np.array([cell.shuffled or blank for cell in cells], dtype=float)
    return ProbeResult(
        values=numbers("score"),
        low=numbers("low"),
        high=numbers("high"),
        baseline=numbers("baseline"),
        shuffled=shuffled.T.reshape(config.n_shuffles, *shape),
        p=numbers("p"),
        q=adjusted(numbers("p")),
        n_train=numbers("n_train"),
        n_test=numbers("n_test"),
        axes=tuple(coords),
        coords=coords,
        score="accuracy" if kept.is_class else "R²",
        target=name,
        class_names=kept.names,
        level=config.level,
        time_cells=first.time_cells if "pos" in coords else None,
        made={
            "model": model.cfg.model_name,
            "kind": config.kind,
            "strength": config.strength,
            "pool": None if "pos" in coords or kept.by_position else config.pool,
            "channels": config.channels,
            "folds": config.n_folds if test is None else None,
            "n_series": (len(train), 0 if test is None else len(test)),
            "not_converged": sum(cell.unconverged for cell in cells),
            "seed": config.seed,
        },
    )


def _check_apart(train: TimeSeriesData, test: TimeSeriesData | None) -> None:
    if test is None:
        return
    if train.series.shape == test.series.shape and torch.equal(train.series, test.series):
        raise ArgumentError(
            "train and test hold the same series, so the score would not be held out; leave test "
            "out to cross-validate"
        )


def _rows(found: Activations, targets: Targets, pos: int | None, pool: Pool) -> Rows:
    values, observed = found.values, found.observed
    n_series, n_channels, n_pos, _ = values.shape
    y = targets.values
    if targets.by_position and (y.shape[2] != n_pos or y.shape[1] not in (1, n_channels)):
        expected = f"[series, pos={n_pos}]"
        if n_channels > 1:
            expected += f" or [series, channel={n_channels}, pos]"
        raise ArgumentError(
            f"expected targets {expected} at {found.hook}, got {list(y.shape)}; targets per sample "
            "have to be brought to positions first, see model.time_span"
        )
    if pos is None and not targets.by_position:
        width = found.pooled(pool).reshape(n_series * n_channels, -1)
        place = np.tile(np.arange(n_channels), n_series)
        series = np.repeat(np.arange(n_series), n_channels)
        return Rows(width, y[series], series, place)
    if pos is not None:
        values, observed = values[:, :, pos : pos + 1], observed[:, :, pos : pos + 1]
        y = y[:, :, pos : pos + 1] if targets.by_position else y
    at = np.argwhere(observed)  # [row, (series, channel, pos)]
    series, channel, where = at.T
    place = channel * n_pos + where
    if not targets.by_position:
        return Rows(values[observed], y[series], series, place)
    own = y[series, channel if y.shape[1] > 1 else 0, where]
    return Rows(values[observed], own, series, place)
