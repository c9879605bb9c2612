"""What a report measures: evaluation, pairs and their sweeps, in one go with one progress bar.

Which pairs a report patches: the model's errors, classes it could confuse, and a control.

The control replaces by series of the class that the model sees already: the same corrupted runs
are disturbed in the same places by real activations that hold nothing new about the target. What
moves there is what any replacement moves.

The ranking of heads, with how sure one can be of each and of their order.

Attribution beside the exact sweeps: what the cheap estimate gets right, and where it fails.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from tstlens.data import Pairs, TimeSeriesData, class_pairs, misclassified_pairs
from tstlens.errors import ArgumentError, LabelError
from tstlens.figures.words import number, site_label
from tstlens.model import HookedTST
from tstlens.patching import (
    Agreement,
    Site,
    SplitHalf,
    SweepResult,
    agreement,
    attribution,
    log_prob,
    split_half,
    summary,
    sweep,
)
from tstlens.report.circuits import CircuitFound, find
from tstlens.report.wording import sentences, share
from tstlens.stats import FEWEST, mean_known
from tstlens.training import Evaluation, evaluate

STEPS = {"gradient": 0, "integrated": 5}  # estimate -> steps along the path
GRIDS = {  # which sweep it is an estimate of -> site, axes
    "heads": ("z", ("layer", "head")),
    "head_positions": ("z", ("layer", "head", "pos")),
}
_TRUSTED = 0.9  # mean rank correlation from which an estimate may stand in for the sweep

Result = TypeVar("Result")


@dataclass(frozen=True)
class Estimates:
    """Estimates of two sweeps and how well they agree.

    Args:
        agreements: (grid, estimate) -> agreement with the exact sweep, pair by pair.
        seconds: (grid, estimate or "exact") -> processor seconds (wall clock off the CPU).
    """

    agreements: dict[tuple[str, str], Agreement]
    seconds: dict[tuple[str, str], float]


def timed(model: HookedTST, run: Callable[[], Result]) -> tuple[Result, float]:
    """A result and the seconds that it took: of the processor, which other programs do not blur."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    started = clock()
    return run(), clock() - started


def estimate(
    model: HookedTST, pairs: Pairs, sweeps: dict[str, SweepResult], seconds: dict[str, float]
) -> Estimates:
    """Estimate the exact sweeps of heads from gradients.

    Args:
        model: the model.
        pairs: the pairs that were swept.
        sweeps: the exact sweeps, by the names of ``GRIDS``.
        seconds: what each of them took.
    """
    agreements, took = {}, {}
    for grid, (site, axes) in GRIDS.items():
        took[grid, "exact"] = seconds[grid]
        for name, steps in STEPS.items():
            run = partial(_attributed, model, pairs, site, axes, steps)
            guess, took[grid, name] = timed(model, run)
            agreements[grid, name] = agreement(sweeps[grid], guess)
    return Estimates(agreements, took)


def _attributed(
    model: HookedTST, pairs: Pairs, site: str, axes: tuple[str, ...], steps: int
) -> SweepResult:
    return attribution(
        model,
        pairs.clean,
        pairs.corrupted,
        site,
        axes,
        log_prob(pairs.target),
        steps=steps,
        clean_mask=pairs.clean_mask,
        corrupted_mask=pairs.corrupted_mask,
        progress=False,
    )


def of_estimates(found: Estimates) -> dict[str, Any]:
    """Agreement by grid and estimate as plain values, with a sentence; no timing in it."""
    numbers: dict[str, Any] = {}
    for (grid, name), each in found.agreements.items():
        numbers.setdefault(grid, {})[name] = _numbers(each, STEPS[name])
    heads, fine = (numbers[grid]["integrated"] for grid in GRIDS)
    said = sentences(
        "estimates.j2",
        heads=heads,
        fine=fine,
        plain=numbers["heads"]["gradient"],
        steps=STEPS["integrated"],
        trusted=_TRUSTED,
    )
    return {**numbers, **said}


def _numbers(each: Agreement, steps: int) -> dict[str, Any]:
    exact, guess = (part.mean(0).numpy() for part in (each.exact, each.approximate))
    off = int(np.abs(guess - exact).argmax())
    known = np.nan_to_num(each.spearman, nan=np.inf)
    return {
        "steps": steps,
        "n_pairs": len(each.pearson),
        "n_sites": len(each.sites),
        **{
            name: _mean(getattr(each, name))
            for name in ("pearson", "spearman", "top_k_overlap", "sign_agreement")
        },
        "k": each.k,
        "worst_pair": {
            "pair": int(known.argmin()),
            "spearman": float(each.spearman[known.argmin()]),
        },
        "furthest_off": {
            "label": site_label(each.sites[off]),
            "exact": float(exact[off]),
            "estimate": float(guess[off]),
        },
        "same_strongest": bool(np.abs(exact).argmax() == np.abs(guess).argmax()),
    }


def costs(found: Estimates) -> dict[str, Any]:
    """What exact sweeps and estimates cost here, in seconds and as a share of the sweep."""
    rows: dict[str, Any] = {}
    for (grid, name), seconds in found.seconds.items():
        exact = found.seconds[grid, "exact"]
        rows.setdefault(grid, {})[name] = {
            "seconds": seconds,
            "of_exact": seconds / exact if exact else None,
        }
    return rows


def cost_sentence(cost: dict[str, Any]) -> str:
    """What the estimate saves, and where it saves nothing."""
    heads, fine = (cost[grid]["integrated"] for grid in GRIDS)
    plain = cost["head_positions"]["gradient"]
    if fine["of_exact"] is None:
        return ""
    less = "saves little: such a sweep is cheap anyway"
    if heads["of_exact"] is not None and heads["of_exact"] > 1:
        less = "costs more than it saves: such a sweep is cheap anyway"
    elif heads["of_exact"] is not None and heads["of_exact"] < 0.5:
        less = "saves something too"
    exact = cost["head_positions"]["exact"]["seconds"]
    return (
        f"Its cost does not grow with the number of places. Head by position, measured here, it "
        f"took {number(fine['seconds'])} s against {number(exact)} s of exact sweep "
        f"({share(fine['of_exact'])}; the plain gradient {share(plain['of_exact'])}); for whole "
        f"heads it {less}. It pays on longer series and larger models."
    )


def _mean(values: np.ndarray) -> float | None:
    mean = mean_known(values)
    return mean if mean == mean else None


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
    for way, (a, b) in enumerate(ways):
        n = max_pairs // len(ways) + (way < max_pairs % len(ways))
        sizes = [int((evaluation.labels[right] == label).sum()) for label in (a, b)]
        parts.append(
            class_pairs(  # by name: an index may be the name of another class
                known,
                known.class_names[a],
                known.class_names[b],
                min(n, sizes[0] * sizes[1]),
                seed + way,
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
    for place, (row, label) in enumerate(zip(corrupted, seen.tolist(), strict=True)):
        eligible = (right & (evaluation.labels == label)).nonzero()[:, 0]
        eligible = eligible[eligible != row]
        if len(eligible):
            at = int(torch.randint(len(eligible), (1,), generator=generator))
            kept.append(place)
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


# What is swept: name -> site and axes. "inputs" is what enters the trunk at each position: the
# front end's view of those samples alone, before attention mixes them with others.
SWEEPS: dict[str, tuple[Site, tuple[str, ...]]] = {
    "attention": (Site("attn_out"), ("layer",)),
    "mlp": (Site("mlp_out"), ("layer",)),
    "stream": (Site("resid_post"), ("layer",)),
    "heads": (Site("z"), ("layer", "head")),
    "inputs": (Site("resid_pre", layer=0), ("pos",)),
    "positions": (Site("resid_post"), ("layer", "pos")),
    "head_positions": (Site("z"), ("layer", "head", "pos")),
    "channels": (Site("series"), ("channel",)),
}
CONTROLS = ("attention", "mlp", "heads", "inputs")
FOLLOWED = "classes"  # the pair set whose circuit is traced


@dataclass(frozen=True)
class Together:
    """Several heads restored at once.

    Args:
        n: how many heads, the strongest by themselves first.
        heads: (layer, head) of each.
        effect: mean change of log p of the target class, in nats.
        share: the same over the mean clean-corrupted gap.
        p_patched: mean probability of the target class.
    """

    n: int
    heads: tuple[tuple[int, int], ...]
    effect: float
    share: float
    p_patched: float


@dataclass(frozen=True)
class Swept:
    """A pair set with its sweeps.

    Args:
        pairs: the pairs.
        sweeps: by the names of ``SWEEPS``, log-probability of the target class, in nats.
        control: the same for the control pairs.
        together: what the strongest heads restored at once do; see :class:`Together`.
        estimates: attribution beside the sweeps of heads; None where it was not asked for.
        circuit: the circuit with its faithfulness, or why there is none; None as above.
    """

    pairs: PairSet
    sweeps: dict[str, SweepResult]
    control: dict[str, SweepResult]
    together: tuple[Together, ...]
    estimates: Estimates | None = None
    circuit: CircuitFound | str | None = None


@dataclass(frozen=True)
class Study:
    """Everything that a report says, as numbers.

    Args:
        model: the model; the report reads its config, info and parity.
        data: the evaluated split.
        evaluation: of the model on the split.
        sets: pair sets with their sweeps.
        missing: why a set is not there.
        max_pairs: of a set.
        seed: of every random choice.
        seconds: wall-clock time by stage.
    """

    model: HookedTST
    data: TimeSeriesData
    evaluation: Evaluation
    sets: tuple[Swept, ...]
    missing: tuple[str, ...]
    max_pairs: int
    seed: int
    seconds: dict[str, float]


def study(
    model: HookedTST, data: TimeSeriesData, max_pairs: int, seed: int, progress: bool
) -> Study:
    """Evaluate a classifier and sweep it over its errors and between its classes.

    Args:
        model: a classifier.
        data: labelled series.
        max_pairs: at most this many pairs per set.
        seed: of every random choice.
        progress: whether to show a bar.

    Raises:
        LabelError: data without labels.
        ArgumentError: a model that is no classifier, or other classes than the data's.
    """
    if model.cfg.n_classes is None:
        raise ArgumentError(
            "expected a classifier, got a model without classes; a report needs class logits"
        )
    if data.labels is None:
        raise LabelError(
            "expected labelled series, got data without labels: a report needs the true classes"
        )
    data = data.for_model(model)
    if data.n_classes != model.cfg.n_classes:
        raise ArgumentError(
            f"the model has {model.cfg.n_classes} classes, {data.name or 'the data'} has "
            f"{data.n_classes}; is it the data set that the model was trained on?"
        )
    wanted = {
        name: plan
        for name, plan in SWEEPS.items()
        if name != "channels" or data.series.shape[1] > 1
    }
    started = time.monotonic()
    with tqdm(total=1, unit="step", disable=not progress) as bar:
        bar.set_description("evaluating")
        evaluation = evaluate(model, data)
        chosen, missing = choose(model, data, evaluation, max_pairs, seed)
        seconds = {"evaluation": time.monotonic() - started}
        controlled = sum(entry.control is not None for entry in chosen)
        followed = sum(entry.key == FOLLOWED for entry in chosen)
        bar.total = 1 + len(chosen) * len(wanted) + controlled * len(CONTROLS) + 2 * followed
        bar.update(1)
        # What has enough series for an interval comes first.
        chosen = sorted(chosen, key=lambda entry: len(set(entry.clusters)) < FEWEST)
        sets = []
        for entry in chosen:
            at = time.monotonic()
            sweeps, took = _run(model, entry.pairs, wanted, bar, entry.key)
            few = {name: wanted[name] for name in CONTROLS}
            control: dict[str, SweepResult] = {}
            if entry.control is not None:
                control, _ = _run(model, entry.control, few, bar, "control")
            heads = together(model, entry.pairs, sweeps["heads"])
            estimates = circuit = None
            if entry.key == FOLLOWED:
                bar.set_description(f"{entry.key}: attribution")
                estimates = estimate(model, entry.pairs, sweeps, took)
                bar.update(1)
                bar.set_description(f"{entry.key}: circuit")
                circuit = find(model, entry.pairs, seed)
                bar.update(1)
            sets.append(Swept(entry, sweeps, control, heads, estimates, circuit))
            seconds[entry.key] = time.monotonic() - at
    return Study(model, data, evaluation, tuple(sets), tuple(missing), max_pairs, seed, seconds)


def _run(
    model: HookedTST,
    pairs: Pairs,
    plans: dict[str, tuple[Site, tuple[str, ...]]],
    bar: tqdm,
    what: str,
) -> tuple[dict[str, SweepResult], dict[str, float]]:
    """Sweeps and the processor seconds of each."""
    results, seconds = {}, {}

    def run(site: Site, axes: tuple[str, ...]) -> SweepResult:
        return sweep(
            model,
            pairs.clean,
            pairs.corrupted,
            site,
            axes,
            log_prob(pairs.target),
            clean_mask=pairs.clean_mask,
            corrupted_mask=pairs.corrupted_mask,
            progress=False,
        )

    for name, plan in plans.items():
        bar.set_description(f"{what}: {name.replace('_', ' × ')}")
        results[name], seconds[name] = timed(model, partial(run, *plan))
        bar.update(1)
    return results, seconds


def together(
    model: HookedTST, pairs: Pairs, heads: SweepResult, sizes: tuple[int, ...] = (1, 3, 5, 10)
) -> tuple[Together, ...]:
    """What the strongest heads do when they are restored at once, up to all of them.

    Every head is set to its activation in the clean run itself. Effects of heads alone do not add
    up to this: heads can stand in for each other, or matter only together.

    Args:
        model: the model.
        pairs: the pairs.
        heads: the sweep of single heads, axes ("pair", "layer", "head").
        sizes: how many heads at once.
    """
    n_heads = heads.values[0].numel()
    ks = sorted({*(size for size in sizes if size < n_heads), n_heads})
    joint = heads.together(model, pairs, ks, 0, progress=False)
    order = tuple((site["layer"], site["head"]) for site in joint.order)
    mean = joint.mean("pair")
    columns = (
        mean.effect().tolist(),
        mean.normalized().tolist(),
        joint.values.exp().mean(0).tolist(),
    )
    return tuple(
        Together(size, order[:size], effect, share, probability)
        for size, effect, share, probability in zip(ks, *columns, strict=True)
    )


LEVEL = 0.05  # q-value up to which a head counts as shown to matter
TOP = 5  # heads at the top whose stability is told


def ranked(heads: SweepResult, clusters: Sequence[int], seed: int) -> dict[str, Any] | None:
    """Every head's effect with interval, p and q, and whether other series would rank them alike.

    Args:
        heads: a sweep over heads, with its pair axis.
        clusters: the corrupted series of every pair.
        seed: of resamples, flips and splits.

    Returns:
        Plain values with the sentences that explain them; None with fewer than 5 independent
        series or fewer than 3 heads.
    """
    if len(set(clusters)) < FEWEST or heads.values[0].numel() < 3:
        return None
    found = summary(heads, cluster=clusters, seed=seed)
    axes = found.axes[1:]
    rows = []
    for flat in np.argsort(-np.abs(found.effect[0]), axis=None, kind="stable"):
        at = np.unravel_index(int(flat), found.effect.shape[1:])
        place = {axis: found.coords[axis][int(i)] for axis, i in zip(axes, at, strict=True)}
        parts = {name: getattr(found, name)[0] for name in ("effect", "low", "high", "p", "q")}
        rows.append(
            {
                "label": site_label(place),
                "place": place,
                **{name: float(part[at]) for name, part in parts.items()},
            }
        )
    stability = _stability(split_half(heads, TOP, cluster=clusters, seed=seed))
    numbers = {
        "n_heads": len(rows),
        "n_clusters": found.n_clusters[0],
        "n_shown": sum(row["q"] <= LEVEL for row in rows),
        "level": LEVEL,
    }
    said = sentences("ranking.j2", part=stability, **numbers)
    return {"rows": rows, **numbers, "stability": stability, "sentences": said}


def _stability(stable: SplitHalf) -> dict[str, Any]:
    low, high = stable.middle
    spearman, overlap = mean_known(stable.spearman), mean_known(stable.top_k_overlap)
    return {
        "n_splits": len(stable.spearman),
        "spearman": spearman if spearman == spearman else None,
        "low": low,
        "high": high,
        "reliability": float(stable.reliability),
        "k": stable.k,
        "top_k_overlap": overlap if overlap == overlap else None,
    }
