"""Scores against a planted answer: which samples, which states, which features; tables of them.

Every score comes with what a method would get that knows nothing, on the same series.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tstlens.arguments import Count, Seed, Share, checked
from tstlens.effects import Labelled
from tstlens.errors import ArgumentError, SeriesShapeError, UnknownNameError
from tstlens.randomness import seeded
from tstlens.results import TableResult
from tstlens.stats import mean_interval, percentile_interval

if TYPE_CHECKING:
    import pandas as pd


SIGNS = ("given", "absolute", "positive")
_OF_SERIES = ("auprc", "random", "density", "precision", "recall")


@dataclass(frozen=True, eq=False)
class WhereScore(Labelled):
    """How well an attribution finds the samples that decide, beside random order.

    Args:
        auprc: [series] area under the precision-recall curve (average precision), 0 to 1; NaN
            for series in which no sample decides, or every one.
        random: [series] the same for entries in random order: the exact mean over all orders.
        density: [series] share of the entries that decide: what ``random`` tends to in long
            series.
        precision: [series] share of deciding entries among the ``top`` ones.
        recall: [series] share of the deciding entries that are among the ``top`` ones.
        mean: of ``auprc`` over the scored series.
        low: lower end of its interval over series; NaN for fewer than 5.
        high: upper end.
        level: coverage of the interval.
        n_scored: series that count.
        unit: what an entry is: "channel x time" or "time".
        made: how.
    """

    auprc: Float[np.ndarray, " series"]
    random: Float[np.ndarray, " series"]
    density: Float[np.ndarray, " series"]
    precision: Float[np.ndarray, " series"]
    recall: Float[np.ndarray, " series"]
    mean: float
    low: float
    high: float
    level: float
    n_scored: int
    unit: str
    made: dict[str, Any] = field(default_factory=dict)

    def entries(self) -> dict[str, Sequence[int]]:
        """The series."""
        return {"series": range(len(self.auprc))}

    def columns(self) -> dict[str, np.ndarray]:
        """Auprc, random, density, precision, recall."""
        return {name: getattr(self, name) for name in _OF_SERIES}

    def __repr__(self) -> str:
        return (
            f"WhereScore(AUPRC {self.mean:.3f} [{self.low:.3f}, {self.high:.3f}], random "
            f"{np.nanmean(self.random):.3f}, {self.n_scored} of {len(self.auprc)} series)"
        )


@checked
def score_where(
    attribution: Float[Tensor, "n *channel place"],
    mask: Bool[Tensor, "n channel time"],
    *,
    cells: Sequence[tuple[int, int]] | None = None,
    sign: str = "absolute",
    top: Share | None = None,
    level: Share = 0.95,
    seed: Seed = 0,
) -> WhereScore:
    """Whether an attribution ranks the samples that decide above the others.

    The area under the precision-recall curve asks about the whole ranking, and needs no threshold.
    What can mislead: a map over positions gives all samples of a patch the same score and so
    cannot reach 1; one without channels is scored on *when* alone, which is an easier question
    (``unit`` tells); the samples that decide are those that *any* classifier needs, not those
    that yours uses.

    Args:
        attribution: one score per place, larger where it matters more: ``[series, channel, time]``
            or ``[series, time]``; with ``cells``, ``[series, channel, pos]`` or ``[series, pos]``.
        mask: ``[series, channel, time]`` bool, True where a sample decides.
        cells: the samples ``(start, stop)`` of each position, as results keep them in
            ``time_cells``; they must tile time.
        sign: ``"absolute"`` ranks by size, ``"positive"`` counts negative scores as zero,
            ``"given"`` ranks as given.
        top: share of the entries, 0 to 1, that ``precision`` and ``recall`` look at; None for as
            many as decide, where the two are equal.
        level: coverage of the interval.
        seed: of the interval's resamples.

    Returns:
        A WhereScore; its interval is over series, not over models
        (:func:`tstlens.stats.mean_interval`).

    Raises:
        SeriesShapeError: shapes that do not belong together.
        ArgumentError: NaN in the attribution, or no series to score.
        UnknownNameError: a sign that does not exist.

    Source: the explanation scores of Queen et al. 2023, arXiv 2306.02109;
    :func:`sklearn.metrics.average_precision_score`.

    Example:
        >>> from tstlens.truth import planted
        >>> task = planted("low-var", n_train=6)
        >>> score_where(task.mask.float(), task.mask).mean
        1.0
    """
    if sign not in SIGNS:
        raise UnknownNameError(sign, SIGNS, "this names what score_where does with signs")
    scores, truth, unit = _laid_out(attribution, mask, cells)
    if not bool(scores.isfinite().all()):
        raise ArgumentError("attribution: expected finite scores, got NaN or infinity")
    if sign != "given":
        scores = scores.abs() if sign == "absolute" else scores.clamp(min=0)
    values = _per_series(scores.numpy(), truth.numpy(), top)
    scored = ~np.isnan(values["auprc"])
    if not scored.any():
        raise ArgumentError(
            "mask: expected series in which some samples decide and some do not, got none"
        )
    ends = mean_interval(values["auprc"][scored][:, None], level=level, seed=seed, limits=(0, 1))
    low, high = (float(end[0]) for end in ends)
    made = {"sign": sign, "top": top, "seed": seed, "over_positions": cells is not None}
    return WhereScore(
        **values,
        mean=float(values["auprc"][scored].mean()),
        low=low,
        high=high,
        level=level,
        n_scored=int(scored.sum()),
        unit=unit,
        made=made,
    )


def _laid_out(
    attribution: Tensor, mask: Tensor, cells: Sequence[tuple[int, int]] | None
) -> tuple[Tensor, Tensor, str]:
    """Scores and truth as [series, entry] on the CPU, and what an entry is."""
    if mask.ndim != 3 or mask.dtype != torch.bool:
        raise SeriesShapeError(
            f"expected a bool mask [series, channel, time], got {mask.dtype} {list(mask.shape)}"
        )
    scores, truth = attribution.detach().cpu().double(), mask.cpu()
    n, n_channels, n_time = truth.shape
    width = n_time if cells is None else len(cells)
    last = "time" if cells is None else "pos"
    if scores.shape not in ((n, n_channels, width), (n, width)):
        advice = "" if cells is not None else "; a map over positions needs cells="
        raise SeriesShapeError(
            f"expected an attribution [series={n}, channel={n_channels}, {last}={width}] or "
            f"[series={n}, {last}={width}], got {list(scores.shape)}{advice}"
        )
    if cells is not None:
        starts, stops = zip(*cells, strict=True)
        if (0, *stops) != (*starts, n_time):
            raise ArgumentError(
                f"cells: expected samples that tile 0..{n_time} one after the other, "
                f"got {list(cells)[:3]}..{cells[-1]}"
            )
        lengths = torch.tensor(stops) - torch.tensor(starts)
        scores = scores.repeat_interleave(lengths, dim=-1)
    if scores.ndim == 3:
        return scores.flatten(1), truth.flatten(1), "channel x time"
    return scores, truth.any(1), "time"


@seeded(0)
def _per_series(scores: np.ndarray, truth: np.ndarray, top: float | None) -> dict[str, np.ndarray]:
    from sklearn.metrics import average_precision_score

    values = {name: np.full(len(scores), np.nan) for name in _OF_SERIES}
    values["density"] = truth.mean(1)
    for row, (score, decides) in enumerate(zip(scores, truth, strict=True)):
        n_true = int(decides.sum())
        if n_true in (0, len(decides)):
            continue
        values["auprc"][row] = average_precision_score(decides, score)
        values["random"][row] = _random_order(n_true, len(decides))
        k = n_true if top is None else max(1, round(top * len(decides)))
        found = _found(score, decides, k)
        values["precision"][row], values["recall"][row] = found / k, found / n_true
    return values


def _random_order(n_true: int, n: int) -> float:
    """The mean average precision over all orders of n entries of which n_true decide.

    Source: Bestgen 2015, "Exact expected average precision of the random baseline".
    """
    harmonic = (1 / np.arange(1, n + 1)).sum()
    return float((harmonic + (n_true - 1) / (n - 1) * (n - harmonic)) / n)


def _found(score: np.ndarray, decides: np.ndarray, k: int) -> float:
    """Deciding entries among the k with the highest scores; ties at the edge count in parts."""
    edge = np.partition(score, len(score) - k)[len(score) - k]
    above, at = score > edge, score == edge
    room = (k - above.sum()) / at.sum()
    return float(decides[above].sum() + room * decides[at].sum())


@dataclass(frozen=True, eq=False)
class StateScore(Labelled):
    """How well codes tell states apart, beside shuffled codes.

    Args:
        nmi: normalised mutual information of codes and states (arithmetic mean of the entropies),
            0 to 1.
        purity: share of positions whose state is the one that their code stands for.
        shuffled_nmi: the same with the codes shuffled over positions, a mean over shuffles: with
            many codes and few positions it is far from 0.
        shuffled_purity: likewise.
        codes: [used] the codes that occur.
        stands_for: [used] the most frequent state of each, on the positions it was chosen on; -1
            where the code did not occur there.
        precision: [used] share of a code's positions that are in that state.
        recall: [used] share of that state's positions that have the code.
        support: [used] positions of each code.
        n: positions that count.
        made: how.
    """

    nmi: float
    purity: float
    shuffled_nmi: float
    shuffled_purity: float
    codes: Int[np.ndarray, " used"]
    stands_for: Int[np.ndarray, " used"]
    precision: Float[np.ndarray, " used"]
    recall: Float[np.ndarray, " used"]
    support: Int[np.ndarray, " used"]
    n: int
    made: dict[str, Any] = field(default_factory=dict)

    def entries(self) -> dict[str, Any]:
        """The codes that occur."""
        return {"code": self.codes}

    def columns(self) -> dict[str, np.ndarray]:
        """State, precision, recall, support."""
        names = ("precision", "recall", "support")
        return {"state": self.stands_for} | {name: getattr(self, name) for name in names}

    def __repr__(self) -> str:
        return (
            f"StateScore(nmi={self.nmi:.3f} (shuffled {self.shuffled_nmi:.3f}), purity="
            f"{self.purity:.3f} (shuffled {self.shuffled_purity:.3f}), {len(self.codes)} codes, "
            f"{self.n} positions)"
        )


@checked
@seeded(0)
def score_states(
    ids: Int[Tensor, "*place"],
    states: Int[Tensor, "*place"],
    *,
    chosen_on: tuple[Tensor, Tensor] | None = None,
    observed: Bool[Tensor, "*place"] | None = None,
    n_shuffles: Count = 10,
    seed: Seed = 0,
) -> StateScore:
    """Whether discrete codes (or clusters) are the states of the machine behind the series.

    What can mislead: purity rises with the number of codes and is 1 when every position has a
    code of its own; choose the codes' states on other series (``chosen_on``) and compare with
    the shuffled rows.

    Args:
        ids: ``[...]`` the code of every position.
        states: ``[...]`` the true states of the same positions.
        chosen_on: (ids, states) of the training series, on which the state of each code is
            chosen; None chooses and scores on the same positions.
        observed: ``[...]`` bool, False at padded positions, which do not count.
        n_shuffles: random assignments of the codes to positions.
        seed: of the shuffles.

    Returns:
        A StateScore.

    Raises:
        SeriesShapeError: shapes that differ.
        ArgumentError: nothing observed, or negative ids.

    Source: :func:`sklearn.metrics.normalized_mutual_info_score`; code precision as in
    arXiv 2310.17230.

    Example:
        >>> import torch
        >>> states = torch.tensor([[0, 1, 2, 0, 1, 2]])
        >>> score = score_states(states + 5, states)
        >>> score.nmi, score.purity
        (1.0, 1.0)
    """
    from sklearn.metrics import normalized_mutual_info_score

    code, state = _flat(ids, states, observed)
    pair = (code, state) if chosen_on is None else _flat(*chosen_on, None)
    n_states = int(max(state.max(), pair[1].max())) + 1
    n_codes = int(max(code.max(), pair[0].max())) + 1
    chosen = _counts(*pair, n_codes, n_states)
    stands_for = np.where(chosen.any(1), chosen.argmax(1), -1)
    scored = _counts(code, state, n_codes, n_states)
    used = np.flatnonzero(scored.sum(1))
    stands = stands_for[used]
    hits = np.where(stands < 0, 0, scored[used, stands])
    support = scored[used].sum(1)
    per_state = scored.sum(0)[stands]
    generator = np.random.default_rng(seed)
    nmi, purity = [], []
    for _ in range(n_shuffles):
        shuffled = generator.permutation(code)
        nmi.append(normalized_mutual_info_score(state, shuffled))
        # A state for each code is chosen anew, with the same freedom.
        mixed = generator.permutation(pair[0])
        choice = _counts(mixed, pair[1], n_codes, n_states).argmax(1)
        purity.append((choice[shuffled if chosen_on is not None else mixed] == state).mean())
    return StateScore(
        nmi=float(normalized_mutual_info_score(state, code)),
        purity=float(hits.sum() / len(code)),
        shuffled_nmi=float(np.mean(nmi)),
        shuffled_purity=float(np.mean(purity)),
        codes=used,
        stands_for=stands,
        precision=hits / support,
        recall=np.where(stands < 0, 0.0, hits / np.maximum(per_state, 1)),
        support=support,
        n=len(code),
        made={"chosen_on_other_series": chosen_on is not None, "n_shuffles": n_shuffles},
    )


def _flat(ids: Tensor, states: Tensor, observed: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    if ids.shape != states.shape or (observed is not None and observed.shape != ids.shape):
        seen = "" if observed is None else f" and observed {list(observed.shape)}"
        raise SeriesShapeError(
            f"expected ids and states of the same positions, got {list(ids.shape)} and "
            f"{list(states.shape)}{seen}; with k codes per position score one of the k at a time"
        )
    if observed is not None:
        ids, states = ids[observed], states[observed]
    if ids.numel() == 0:
        raise ArgumentError("ids: expected at least one observed position, got none")
    if int(ids.min()) < 0 or int(states.min()) < 0:
        raise ArgumentError("ids and states: expected indices of 0 or more, got a negative one")
    return ids.flatten().cpu().numpy(), states.flatten().cpu().numpy()


def _counts(code: np.ndarray, state: np.ndarray, n_codes: int, n_states: int) -> np.ndarray:
    flat = np.bincount(code.astype(np.int64) * n_states + state, minlength=n_codes * n_states)
    return flat.reshape(n_codes, n_states)


@dataclass(frozen=True, eq=False, repr=False)
class FeatureScore(Labelled):
    """How well activations match true features one to one, beside shuffled rows.

    Args:
        mcc: mean over features of the absolute Pearson correlation with the latent that each is
            matched with, 0 to 1; a feature without a latent counts 0.
        shuffled_mcc: the same with the rows of the activations shuffled, a mean over shuffles.
        correlation: [feature] with its latent, with its sign; 0 where there is none.
        latent: [feature] which one; -1 where there is none.
        n_latents: that could be matched.
        made: how.
    """

    mcc: float
    shuffled_mcc: float
    correlation: Float[np.ndarray, " feature"]
    latent: Int[np.ndarray, " feature"]
    n_latents: int
    made: dict[str, Any] = field(default_factory=dict)

    def entries(self) -> dict[str, Sequence[int]]:
        """The planted features."""
        return {"feature": range(len(self.latent))}

    def columns(self) -> dict[str, np.ndarray]:
        """Latent and correlation."""
        return {"latent": self.latent, "correlation": self.correlation}


@checked
def score_features(
    activations: Float[Tensor, "row latent"],
    truth: Float[Tensor, "row feature"],
    *,
    n_shuffles: Count = 10,
    seed: Seed = 0,
) -> FeatureScore:
    """Whether single latents follow the features that were planted.

    The mean correlation coefficient: correlate, match one to one for the largest sum, take the
    mean. What can mislead: with many latents chance is well above 0 (look at
    ``shuffled_mcc``); a feature that is split over two latents is matched with one of them.

    Args:
        activations: ``[row, latent]``, one row per position.
        truth: ``[row, feature]``, how active each planted feature was there.
        n_shuffles: random orders of the rows.
        seed: of the shuffles.

    Returns:
        A FeatureScore; latents and features that never change correlate 0 with everything.

    Raises:
        SeriesShapeError: shapes that do not belong together.

    Source: Hyvarinen and Morioka 2016 (mean correlation coefficient).

    Example:
        >>> import torch
        >>> truth = torch.rand(50, 3)
        >>> score_features(-truth[:, [2, 0, 1]], truth, n_shuffles=2).latent
        array([1, 2, 0])
    """
    if activations.ndim != 2 or truth.ndim != 2 or len(activations) != len(truth):
        raise SeriesShapeError(
            "expected activations [row, latent] and truth [row, feature] with the same rows, "
            f"got {list(activations.shape)} and {list(truth.shape)}"
        )
    if len(truth) < 2:
        raise ArgumentError(f"expected at least 2 rows, got {len(truth)}")
    latents = _standard(activations.detach().cpu().double().numpy())
    features = _standard(truth.detach().cpu().double().numpy())
    correlation, latent = _matched(latents, features)
    generator = np.random.default_rng(seed)
    shuffled = [
        np.abs(_matched(generator.permutation(latents), features)[0]).mean()
        for _ in range(n_shuffles)
    ]
    return FeatureScore(
        mcc=float(np.abs(correlation).mean()),
        shuffled_mcc=float(np.mean(shuffled)),
        correlation=correlation,
        latent=latent,
        n_latents=latents.shape[1],
        made={"n_shuffles": n_shuffles, "seed": seed},
    )


def _standard(values: np.ndarray) -> np.ndarray:
    """Columns of mean 0 and length 1, so that products are correlations; constant ones are 0."""
    centred = values - values.mean(0)
    length = np.linalg.norm(centred, axis=0)
    still = length <= 1e-12 * np.maximum(np.abs(values).max(0), 1e-300) * len(values) ** 0.5
    return np.where(still, 0.0, centred / np.where(still, 1.0, length))


def _matched(latents: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from scipy.optimize import linear_sum_assignment

    table = features.T @ latents  # [feature, latent]
    rows, columns = linear_sum_assignment(np.abs(table), maximize=True)
    correlation, latent = np.zeros(len(table)), np.full(len(table), -1)
    correlation[rows], latent[rows] = table[rows, columns], columns
    return correlation, latent


KINDS = ("method", "trivial", "random", "answer")
TITLES = {  # question -> in words
    "where": "Which samples decide?",
    "component": "Which component does it?",
    "feature": "Which feature is there?",
    "state": "Which state is it in?",
    "coverage": "Do intervals cover?",
}


class Score(NamedTuple):
    """One number: a method on a task, of one seed.

    Args:
        task: what was planted.
        method: what looked for it.
        measure: what is counted: ``"AUPRC"``, ``"edge AUROC"`` …
        seed: of task and model.
        value: the number.
        kind: ``"method"``; ``"trivial"`` for what needs no model; ``"random"``; ``"answer"`` for
            the planted answer itself, put in as if a method had given it.
    """

    task: str
    method: str
    measure: str
    seed: int
    value: float
    kind: str = "method"


@dataclass(frozen=True)
class TruthTable(TableResult):
    """How near each method comes to a planted answer, task by task and over all tasks.

    Args:
        question: ``"where"``, ``"component"``, ``"feature"``, ``"state"`` or ``"coverage"``.
        scores: every number that was measured, the rows of the frame.
        notes: what to know when reading it: where each method misleads.
        checks: what was checked before any method was scored (a model's accuracy, a graph under
            interchange interventions) -> the lowest value over tasks and seeds.
        level: coverage of the intervals.
        made: how: sizes, seeds, CPU seconds.
    """

    question: str
    scores: tuple[Score, ...]
    notes: tuple[str, ...] = ()
    checks: dict[str, float] = field(default_factory=dict)
    level: float = 0.95
    made: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.scores:
            raise ArgumentError("expected at least one score, got none")
        strange = sorted({score.kind for score in self.scores} - set(KINDS))
        if strange:
            raise UnknownNameError(strange[0], KINDS, "this names a kind of row")

    @property
    def measures(self) -> tuple[str, ...]:
        """What is counted, in the order in which it came."""
        return tuple(dict.fromkeys(score.measure for score in self.scores))

    @property
    def tasks(self) -> tuple[str, ...]:
        """What was planted, in the order in which it came."""
        return tuple(dict.fromkeys(score.task for score in self.scores))

    @property
    def methods(self) -> tuple[str, ...]:
        """Methods in the order in which they came; trivial, random and answer rows last."""
        kinds = {score.method: KINDS.index(score.kind) for score in self.scores}
        return tuple(sorted(kinds, key=kinds.__getitem__))

    def kind_of(self, method: str) -> str:
        """The kind of a row.

        Raises:
            UnknownNameError: no such method in this table.
        """
        for score in self.scores:
            if score.method == method:
                return score.kind
        raise UnknownNameError(method, self.methods, "this names a row of the table")

    def values(self, method: str, measure: str, task: str | None = None) -> np.ndarray:
        """One value per seed, a mean over tasks where no task is named; NaN where not measured."""
        by_seed: dict[int, list[float]] = {}
        for score in self.scores:
            named = score.method == method and score.measure == measure
            if named and task in (None, score.task):
                by_seed.setdefault(score.seed, []).append(score.value)
        return np.array([np.mean(found) for _, found in sorted(by_seed.items())])

    def summary(self, task: str | None = None) -> pd.DataFrame:
        """One row per method and measure: mean, low, high over seeds, and how many seeds.

        The interval is the percentile bootstrap over seeds, each with its mean over tasks, so it
        says what another seed would give, not another task. It is NaN for a single seed, and with
        fewer than five it is no wider than the seeds themselves lie apart: too narrow.

        Args:
            task: one of them; None for the mean over all.
        """
        import pandas as pd

        rows = []
        for method in self.methods:
            for measure in self.measures:
                values = self.values(method, measure, task)
                if not len(values):
                    continue
                low, high = interval(values, self.level)
                row = {"method": method, "kind": self.kind_of(method), "measure": measure}
                row |= {"mean": values.mean(), "low": low, "high": high, "n_seeds": len(values)}
                rows.append(row)
        return pd.DataFrame(rows)

    def _rows(self) -> list[dict[str, Any]]:
        return [{"question": self.question, **score._asdict()} for score in self.scores]

    def to_markdown(self, task: str | None = None) -> str:
        """A Markdown table, one row per method and one column per measure.

        Args:
            task: one of them; None for the mean over all.
        """
        found = self.summary(task)
        lines = ["| method | " + " | ".join(self.measures) + " |"]
        lines.append("|---" * (1 + len(self.measures)) + "|")
        for method in self.methods:
            rows = found[found["method"] == method].set_index("measure")
            cells = [
                _cell(rows.loc[measure]) if measure in rows.index else "–"
                for measure in self.measures
            ]
            lines.append(f"| {_named(method, self.kind_of(method))} | {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"

    def __repr__(self) -> str:
        seeds = {score.seed for score in self.scores}
        return (
            f"TruthTable({self.question!r}, {len(self.methods)} rows, {len(self.tasks)} tasks, "
            f"{len(seeds)} seeds)"
        )


def interval(values: Sequence[float] | np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap of the mean; NaN for fewer than two values."""
    values = np.asarray(values, dtype=float)
    low, high = percentile_interval(values[:, None], level, 5000)
    return float(low[0]), float(high[0])


def _named(method: str, kind: str) -> str:
    return method if kind == "method" else f"*{method}* ({kind})"


def _cell(row: Any) -> str:
    text = f"{row['mean']:.2f}"
    if np.isfinite(row["low"]):
        text += f" [{row['low']:.2f}, {row['high']:.2f}]"
    return text
