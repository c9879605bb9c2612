"""What a report measures: evaluation, pairs and their sweeps, in one go with one progress bar."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

from tqdm.auto import tqdm

from tstlens.data import Pairs, TimeSeriesData
from tstlens.errors import ArgumentError, LabelError
from tstlens.model import HookedTST
from tstlens.patching import Site, SweepResult, log_prob, patch, sweep
from tstlens.report.circuits import CircuitFound, find
from tstlens.report.estimates import Estimates, estimate, timed
from tstlens.report.pairs import PairSet, choose
from tstlens.stats import FEWEST
from tstlens.training import Evaluation, evaluate

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
    alone = heads.mean("pair").effect()
    order = [divmod(int(flat), alone.shape[1]) for flat in alone.flatten().argsort(descending=True)]
    metric = log_prob(pairs.target)
    gap = float((heads.clean - heads.baseline).mean())
    found = []
    for size in sorted({*(size for size in sizes if size < len(order)), len(order)}):
        output = patch(
            model,
            pairs.clean,
            pairs.corrupted,
            [Site("z", layer=layer, head=head) for layer, head in order[:size]],
            clean_mask=pairs.clean_mask,
            corrupted_mask=pairs.corrupted_mask,
        )
        patched = metric(output)
        effect = float((patched - heads.baseline).mean())
        share = effect / gap if gap else float("nan")
        found.append(
            Together(size, tuple(order[:size]), effect, share, float(patched.exp().mean()))
        )
    return tuple(found)
