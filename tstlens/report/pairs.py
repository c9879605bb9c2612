"""Which pairs a report patches: the model's errors, classes it could confuse, and a control.

The control replaces by series of the class that the model sees already: the same corrupted runs
are disturbed in the same places by real activations that hold nothing new about the target. What
moves there is what any replacement moves.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from tstlens.data import Pairs, TimeSeriesData, class_pairs, misclassified_pairs
from tstlens.errors import ArgumentError
from tstlens.model import HookedTST
from tstlens.training import Evaluation

CLASS_PAIRS = 4  # pairs of classes compared, both ways round


@dataclass(frozen=True)
class PairSet:
    """Pairs with the question they answer and their control.

    Args:
        key: "errors" or "classes".
        title: heading.
        question: what patching these pairs answers, one sentence.
        pairs: what is patched.
        control: the same corrupted series with a clean series that holds nothing new; None where
            there is no such series. May have fewer pairs.
        notes: what a reader must know of the choice.
    """

    key: str
    title: str
    question: str
    pairs: Pairs
    control: Pairs | None
    notes: tuple[str, ...]

    @property
    def clusters(self) -> list[int]:
        """The corrupted series of every pair: pairs that share one are not independent."""
        return clusters_of(self.pairs)


def clusters_of(pairs: Pairs) -> list[int]:
    """One number per pair, the same for pairs with the same corrupted series."""
    index = pairs.corrupted_index
    return list(range(len(pairs))) if index is None else index.tolist()


def choose(
    model: HookedTST, data: TimeSeriesData, evaluation: Evaluation, max_pairs: int, seed: int
) -> tuple[list[PairSet], list[str]]:
    """The pair sets of a report, and why a set is missing.

    Args:
        model: a classifier.
        data: labelled series, those that ``evaluation`` is of.
        evaluation: of the model on the data.
        max_pairs: at most this many pairs per set.
        seed: of every choice.

    Raises:
        ArgumentError: max_pairs below 2, or not even two classes with a series classified right.
    """
    if max_pairs < 2:
        raise ArgumentError(f"expected max_pairs of at least 2, got {max_pairs}")
    sets, missing = [], []
    if evaluation.n_correct == evaluation.n:
        missing.append(
            f"All {evaluation.n} {data.split or 'given'} series are classified right, so there are "
            "no errors to explain; this report compares classes only."
        )
    else:
        try:
            sets.append(_errors(model, data, evaluation, max_pairs, seed))
        except ArgumentError as error:
            missing.append(f"The misclassified series could not be paired: {error}.")
    sets.append(_classes(data, evaluation, max_pairs, seed))
    return sets, missing


def _errors(
    model: HookedTST, data: TimeSeriesData, evaluation: Evaluation, max_pairs: int, seed: int
) -> PairSet:
    pairs = misclassified_pairs(model, data)
    found = len(pairs)
    if found > max_pairs:
        generator = torch.Generator().manual_seed(seed)
        pairs = pairs[torch.randperm(found, generator=generator)[:max_pairs].sort().values]
    n_clean = _distinct(pairs.clean_index)
    notes = [
        f"{len(pairs)} pairs: {'every' if len(pairs) == found else 'a random choice of the'} "
        f"misclassified series, each beside the series of its true class that the model is most "
        f"confident of ({n_clean} different series). Intervals cover the choice of misclassified "
        "series, not that of the clean ones."
    ]
    skipped = pairs.made.get("skipped_classes") or {}
    if skipped:
        notes.append(f"Without a single series classified right: {', '.join(skipped)}; left out.")
    seen = pairs.predicted if pairs.predicted is not None else pairs.target
    return PairSet(
        key="errors",
        title="The model's errors",
        question="What would have made the model see the true class of a series that it got wrong?",
        pairs=pairs,
        control=_control(data, evaluation, pairs, seen, seed),
        notes=tuple(notes),
    )


def _classes(data: TimeSeriesData, evaluation: Evaluation, max_pairs: int, seed: int) -> PairSet:
    right = (evaluation.predictions == evaluation.labels).nonzero()[:, 0]
    known = data[right]
    ranked = [
        (a, b)
        for a, b in confusable(evaluation)
        if bool((evaluation.labels[right] == a).any() and (evaluation.labels[right] == b).any())
    ]
    if not ranked:
        raise ArgumentError(
            "expected two classes with a series classified right in each, got fewer: the model "
            "tells nothing apart that could be compared; does the data set belong to it?"
        )
    ranked = ranked[: max(1, min(CLASS_PAIRS, max_pairs // 2))]
    ways = [way for a, b in ranked for way in ((a, b), (b, a))]
    parts = []
    for number, (a, b) in enumerate(ways):
        n = max_pairs // len(ways) + (number < max_pairs % len(ways))
        sizes = [int((evaluation.labels[right] == label).sum()) for label in (a, b)]
        parts.append(
            class_pairs(  # by name: an index may be the name of another class
                known,
                known.class_names[a],
                known.class_names[b],
                min(n, sizes[0] * sizes[1]),
                seed + number,
            )
        )
    pairs = _join(parts, right.to(data.series.device))
    listed = ", ".join(f"{data.class_names[a]} and {data.class_names[b]}" for a, b in ranked)
    seen = evaluation.labels[clusters_of(pairs)]
    pairs = dataclasses.replace(pairs, predicted=seen.to(data.series.device))
    return PairSet(
        key="classes",
        title="Between classes",
        question="What tells the model that a series is of one class and not of the other?",
        pairs=pairs,
        control=_control(data, evaluation, pairs, seen, seed),
        notes=(
            f"{len(pairs)} pairs of series that are both classified right, of the classes that the "
            f"model gives each other the most probability: {listed}; each both ways round, "
            f"chosen at random with seed {seed}.",
        ),
    )


def confusable(evaluation: Evaluation) -> list[tuple[int, int]]:
    """Unordered pairs of classes, those first whose series get the other's probability most.

    Probabilities rank classes also where no series is misclassified.
    """
    n_classes = len(evaluation.class_names)
    mean = torch.zeros(n_classes, n_classes, dtype=torch.float64)
    for label in range(n_classes):
        of_class = evaluation.labels == label
        if bool(of_class.any()):
            mean[label] = evaluation.probabilities[of_class].double().mean(0)
    both = mean + mean.T
    ways = [(a, b) for a in range(n_classes) for b in range(a + 1, n_classes)]
    return sorted(ways, key=lambda way: -float(both[way]))


def _control(
    data: TimeSeriesData, evaluation: Evaluation, pairs: Pairs, seen: Tensor, seed: int
) -> Pairs | None:
    """The same corrupted series beside others of the class that the model sees in them."""
    generator = torch.Generator().manual_seed(seed + 1)
    right = evaluation.predictions == evaluation.labels
    kept, donors = [], []
    corrupted = clusters_of(pairs)
    for number, (row, label) in enumerate(zip(corrupted, seen.tolist(), strict=True)):
        eligible = (right & (evaluation.labels == label)).nonzero()[:, 0]
        eligible = eligible[eligible != row]
        if len(eligible):
            at = int(torch.randint(len(eligible), (1,), generator=generator))
            kept.append(number)
            donors.append(int(eligible[at]))
    if not kept:
        return None
    index = torch.tensor(donors, device=data.series.device)
    return dataclasses.replace(
        pairs[kept],
        clean=data.series[index],
        clean_mask=None if data.mask is None else data.mask[index],
        clean_index=index,
        made={"how": "control", "seed": seed + 1},
    )


def _join(parts: list[Pairs], rows: Tensor) -> Pairs:
    """Pairs of a subset of the data as one, with indices into the whole."""

    def stacked(name: str) -> Tensor | None:
        tensors = [getattr(part, name) for part in parts]
        return None if tensors[0] is None else torch.cat(tensors)

    names = ("clean", "corrupted", "target", "clean_mask", "corrupted_mask")
    values = {name: stacked(name) for name in names}
    index = {name: rows[stacked(name)] for name in ("clean_index", "corrupted_index")}
    made = {"how": "class_pairs", "parts": [part.made for part in parts]}
    return Pairs(**values, **index, made=made)  # type: ignore[arg-type]


def _distinct(index: Tensor | None) -> int:
    return 0 if index is None else len(index.unique())
