"""Everything that a report prints, as plain numbers and sentences: the JSON beside it.

The strongest sites of a sweep as numbers and as sentences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tstlens.figures.words import site_label, time_label
from tstlens.patching import Interval, SweepResult, over_pairs
from tstlens.report.circuits import CircuitFound, of_circuit
from tstlens.report.study import Study, Swept, costs, of_estimates, ranked
from tstlens.report.wording import as_probability, by_part, chance, nats, percent
from tstlens.stats import FEWEST
from tstlens.training import Evaluation


@dataclass(frozen=True)
class Finding:
    """What restoring one site does, over the pairs of a set.

    Args:
        label: "L0H6", "sample 12", "MLP L1".
        place: axis -> entry.
        mean: mean change of log p of the target class, in nats.
        low: lower end of its 95 % interval; None where there are too few series for one, or too
            few with an effect.
        high: upper end.
        share: mean change over the mean clean-corrupted gap.
        n_pairs: pairs averaged over.
        n_raised: pairs in which log p went up.
        p_corrupted: mean probability of the target class in the corrupted run.
        p_patched: the same with this site restored.
        strongest: fraction of bootstrap resamples in which no site is stronger; None with
            too few series.
        control: mean change at this site in the control, in nats; None where there is none.
        n_first: pairs in which no site changes log p more.
    """

    label: str
    place: dict[str, Any]
    mean: float
    low: float | None
    high: float | None
    share: float | None
    n_pairs: int
    n_raised: int
    p_corrupted: float
    p_patched: float
    strongest: float | None
    control: float | None
    n_first: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @property
    def interval(self) -> str:
        """The interval with its pairs, in words."""
        pairs = f"{self.n_pairs} pair{'s' if self.n_pairs != 1 else ''}"
        if self.low is None or self.high is None:
            of = "for" if self.strongest is None else "that are not 0 for"
            return f"{pairs}, too few {of} an interval; up in {self.n_raised} of {self.n_pairs}"
        ends = f"{nats(self.low, True)} to {nats(self.high, True)}"
        return f"95 % CI {ends}; {pairs}"

    def sentence(self, what: str) -> str:
        """What restoring ``what`` does, one sentence with units."""
        gap = f"{_gap(self.share)}; " if self.share is not None else ""
        return (
            f"Restoring {what} moves log p of the target class by {nats(self.mean, True)} nats "
            f"({self.interval}): it {gap}the mean probability goes from "
            f"{chance(self.p_corrupted)} to {chance(self.p_patched)}."
        )


def _gap(share: float) -> str:
    if share < 0:
        return f"widens the gap to the clean run by {percent(-share)}"
    return f"closes {percent(share)} of the gap to the clean run"


def intervals(result: SweepResult, clusters: Sequence[int], seed: int) -> tuple[Interval, Interval]:
    """Effect in nats and share of the gap, both over pairs."""
    return (
        over_pairs(result, clusters=clusters, seed=seed),
        over_pairs(result, "normalized", clusters=clusters, seed=seed),
    )


def strongest(
    result: SweepResult,
    clusters: Sequence[int],
    seed: int,
    control: SweepResult | None = None,
    n: int = 5,
) -> list[Finding]:
    """The n sites with the largest mean change in size, strongest first.

    Args:
        result: a sweep of log-probabilities with its pair axis.
        clusters: one per pair.
        seed: of the bootstrap.
        control: the same grid over control pairs.
        n: how many.
    """
    effect, share = intervals(result, clusters, seed)
    probability = as_probability(result)
    axes = [axis for axis in result.axes if axis != "pair"]
    order = np.argsort(-np.abs(effect.mean), axis=None, kind="stable")[:n]
    first = result.effect().flatten(1).abs().argmax(1)
    found = []
    for flat in order:
        at = np.unravel_index(int(flat), effect.mean.shape)
        place = {axis: result.coords[axis][int(i)] for axis, i in zip(axes, at, strict=True)}
        everywhere = (slice(None), *(int(i) for i in at))
        label = str(place["part"]) if "part" in place else site_label(place, result.time_cells)
        found.append(
            Finding(
                label=label,
                place=place,
                mean=float(effect.mean[at]),
                low=_known(effect.low[at]),
                high=_known(effect.high[at]),
                share=_known(share.mean[at]),
                n_pairs=effect.n_pairs,
                n_raised=int((result.effect()[everywhere] > 0).sum()),
                p_corrupted=float(probability.baseline.mean()),
                p_patched=float(probability.values[everywhere].mean()),
                strongest=_known(effect.strongest[at]),
                control=None if control is None else float(control.effect()[everywhere].mean()),
                n_first=int((first == int(flat)).sum()),
            )
        )
    return found


def noise(control: SweepResult | None) -> float | None:
    """The mean change, largest in size, of any site in the control, in nats."""
    if control is None:
        return None
    means = control.mean("pair").effect().flatten()
    return float(means[means.abs().argmax()])


def _known(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


WHAT = {  # sweep -> how a sentence names one of its sites
    "parts": "{}",
    "heads": "head {}",
    "inputs": "the embedding of {}",
    "positions": "the residual stream after block {}",
    "head_positions": "head {}",
    "channels": "{} of the input",
}
MOST_BY_PAIR = 40  # up to this many sites the JSON lists every pair's effect


def account(found: Study, name: str, made: dict[str, Any]) -> dict[str, Any]:
    """The report's numbers and sentences.

    Args:
        found: what was measured.
        name: of the model.
        made: versions, seeds and timing.

    Returns:
        A nested dict: model, data, evaluation, parity, one entry per pair set, headline, made.
    """
    cfg = found.model.cfg
    sets = {entry.pairs.key: _of_set(entry, found) for entry in found.sets}
    parity = found.model.parity
    return {
        "name": name,
        "model": {
            "layers": cfg.n_layers,
            "heads": cfg.n_heads,
            "d_model": cfg.d_model,
            "d_head": cfg.d_head,
            "d_mlp": cfg.d_mlp,
            "channels": found.data.series.shape[1],
            "samples": found.data.series.shape[2],
            "positions": found.model.n_pos(found.data.series.shape[2]),
            "norm": f"{cfg.norm_position}-norm",
            "parameters": sum(tensor.numel() for tensor in found.model.parameters()),
        },
        "data": {
            "name": found.data.name,
            "split": found.data.split,
            "series": len(found.data),
            "scaling": None if found.data.scaling is None else found.data.scaling.to_dict(),
        },
        "card": {
            key: found.model.info[key]
            for key in ("accuracy", "seed", "command", "recipe")
            if key in found.model.info
        },
        "evaluation": found.evaluation.to_dict(),
        "confusions": confusions(found.evaluation),
        "parity": None if parity is None else {**parity.to_dict(), "passed": parity.passed},
        "sets": sets,
        "cost": {
            entry.pairs.key: costs(entry.estimates)
            for entry in found.sets
            if entry.estimates is not None
        },
        "missing": list(found.missing),
        "headline": _headline(found, sets),
        "made": made,
    }


def confusions(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Which classes are taken for which, most series first."""
    counts = evaluation.confusion
    names = evaluation.class_names
    rows = [
        {"true": names[a], "predicted": names[b], "series": int(counts[a, b])}
        for a in range(len(names))
        for b in range(len(names))
        if a != b and int(counts[a, b])
    ]
    return sorted(rows, key=lambda row: -row["series"])


def _of_set(entry: Swept, found: Study) -> dict[str, Any]:
    clusters, pairs = entry.pairs.clusters, entry.pairs.pairs
    sweeps = dict(entry.sweeps)
    stream = sweeps.pop("stream")
    sweeps = {"parts": by_part(sweeps.pop("attention"), sweeps.pop("mlp")), **sweeps}
    control = dict(entry.control)
    if control:
        control["parts"] = by_part(control["attention"], control["mlp"])
    listed = {
        key: strongest(result, clusters, found.seed, control.get(key))
        for key, result in sweeps.items()
    }
    heads = entry.sweeps["heads"]
    return {
        "title": entry.pairs.title,
        "question": entry.pairs.question,
        "notes": list(entry.pairs.notes),
        "n_pairs": len(pairs),
        "n_clusters": len(set(clusters)),
        "few": len(set(clusters)) < FEWEST,
        "pairs": _pair_rows(entry, found),
        "gap": float((heads.clean - heads.baseline).mean()),
        "log_p": {"clean": float(heads.clean.mean()), "corrupted": float(heads.baseline.mean())},
        "p": {
            "clean": float(heads.clean.exp().mean()),
            "corrupted": float(heads.baseline.exp().mean()),
        },
        "whole_stream_deviation": float((stream.values - stream.clean[:, None]).abs().max()),
        "strongest": {key: [one.to_dict() for one in some] for key, some in listed.items()},
        "sentences": {
            key: some[0].sentence(WHAT[key].format(some[0].label.replace(", ", " at ")))
            for key, some in listed.items()
        },
        "ranking": ranked(heads, clusters, found.seed),
        "together": list(entry.together),
        "estimates": None if entry.estimates is None else of_estimates(entry.estimates),
        "circuit": None
        if not isinstance(entry.circuit, CircuitFound)
        else of_circuit(entry.circuit),
        "no_circuit": entry.circuit if isinstance(entry.circuit, str) else None,
        "control": {
            "n_pairs": len(entry.pairs.control) if entry.pairs.control is not None else 0,
            "largest": {key: noise(result) for key, result in control.items() if key in listed},
        },
        "sweeps": {key: _numbers(result, clusters, found.seed) for key, result in sweeps.items()},
        "control_sweeps": {
            key: _numbers(result, list(range(len(result.values))), found.seed)
            for key, result in control.items()
            if key in listed
        },
    }


def _numbers(result: SweepResult, clusters: list[int], seed: int) -> dict[str, Any]:
    """A sweep's mean effects with intervals, in the order of its axes."""
    effect, share = intervals(result, clusters, seed)
    numbers: dict[str, Any] = {
        "site": result.site,
        "time_cells": result.time_cells,
        "axes": [axis for axis in result.axes if axis != "pair"],
        "coords": {axis: entries for axis, entries in result.coords.items() if axis != "pair"},
        "metric": result.metric,
        "unit": result.unit,
        "effect": effect.mean,
        "low": effect.low,
        "high": effect.high,
        "share": share.mean,
    }
    if effect.mean.size <= MOST_BY_PAIR:
        numbers["effect_by_pair"] = result.effect()
    return numbers


def _pair_rows(entry: Swept, found: Study) -> list[dict[str, Any]]:
    pairs, names = entry.pairs.pairs, found.evaluation.class_names
    heads = entry.sweeps["heads"]
    rows = []
    for number in range(len(pairs)):
        row: dict[str, Any] = {"pair": number, "target": names[int(pairs.target[number])]}
        for key in ("clean_index", "corrupted_index"):
            index = getattr(pairs, key)
            row[key] = None if index is None else int(index[number])
        if pairs.predicted is not None:
            row["seen_as"] = names[int(pairs.predicted[number])]
        row["log_p_clean"] = float(heads.clean[number])
        row["log_p_corrupted"] = float(heads.baseline[number])
        rows.append(row)
    return rows


def _headline(found: Study, sets: dict[str, Any]) -> list[dict[str, str]]:
    """What a reader takes away in two minutes: short claims with their evidence."""
    claims = []
    for key, part in sets.items():
        of = "between classes" if key == "classes" else "in its errors"
        claims.append({"topic": f"Heads, {of}", **_heads_claim(part)})
        claims.append({"topic": f"Time steps, {of}", **_times_claim(part)})
    return claims


def _heads_claim(part: dict[str, Any]) -> dict[str, str]:
    top = [Finding(**one) for one in part["strongest"]["heads"]]
    share = top[0].share or 0.0
    few = [one for one in part["together"] if one.n == min(5, part["together"][-1].n)]
    everything = part["together"][-1]
    tied = _level(top)
    if part["few"]:
        heads = f"heads {_listed(tied)} restore" if len(tied) > 1 else f"head {tied[0]} restores"
        claim = f"In these {part['n_pairs']} cases {heads} the most."
    elif unclear(top[0]):
        claim = "No head stands out from the noise."
    elif len(tied) > 1:
        claim = f"No single head decides; {_listed(tied)} are level at the top."
    elif share >= 0.4:
        claim = f"Head {top[0].label} carries much of the decision."
    elif share >= 0.15:
        claim = f"Head {top[0].label} carries the most, but not alone."
    else:
        claim = f"No single head decides; {top[0].label} carries the most."
    text = part["sentences"]["heads"]
    if top[0].control is not None:
        text += f" In the control the same head moves it by {nats(top[0].control, True)} nats."
    text += (
        f" The {few[0].n} strongest heads together close {percent(few[0].share)}, all "
        f"{everything.n} close {percent(everything.share)}."
    )
    return {"claim": claim, "evidence": text}


def _times_claim(part: dict[str, Any]) -> dict[str, str]:
    top = [Finding(**one) for one in part["strongest"]["inputs"]]
    near = [one for one in top if one.mean * top[0].mean >= 0.9 * top[0].mean ** 2]
    times = _times(part["sweeps"]["inputs"], [one.place["pos"] for one in near])
    agreed = 2 * sum(one.n_first for one in near) >= part["n_pairs"]
    if part["few"]:
        claim = f"In these {part['n_pairs']} cases restoring {times} helps most on average."
    elif unclear(top[0]):
        claim = "No single time step stands out from the noise."
    elif not agreed:
        claim = f"Where the evidence enters depends on the pair; on average most at {times}."
    elif (top[0].share or 0.0) < 0.1:
        carry = "carry" if len(near) > 1 else "carries"
        claim = f"No single time step decides; {times} {carry} the most."
    else:
        claim = f"The evidence enters most strongly at {times}."
    text = part["sentences"]["inputs"]
    if top[0].control is not None:
        text += f" In the control: {nats(top[0].control, True)} nats."
    first, n_pairs = top[0].n_first, part["n_pairs"]
    if first:
        text += f" It is the strongest in {first} of {n_pairs} pairs."
    else:
        text += " In no single pair is it the strongest."
    return {"claim": claim, "evidence": text}


def _level(top: list[Finding]) -> list[str]:
    """Labels of the strongest sites that these pairs cannot tell apart.

    Sites whose mean lies within the strongest one's interval, unless that one comes first in four
    of five resamples; with too few pairs for an interval, those within a tenth of it.
    """
    if top[0].strongest is not None and top[0].strongest >= 0.8:
        return [top[0].label]
    least = 0.9 * top[0].mean if top[0].low is None else top[0].low
    return [one.label for one in top if one.mean >= least or one is top[0]]


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def unclear(finding: Finding) -> bool:
    """Whether the interval of the change reaches zero."""
    return finding.low is not None and finding.high is not None and finding.low * finding.high <= 0


def _times(sweep: dict[str, Any], positions: list[int]) -> str:
    """Positions in the order of time, neighbours as one stretch: "samples 16–19 and 24"."""
    cells = sweep["time_cells"]
    spans: list[list[int]] = []
    for pos in sorted(positions):
        start, stop = cells[pos] if cells else (pos, pos + 1)
        if spans and spans[-1][1] == start:
            spans[-1][1] = stop
        else:
            spans.append([start, stop])
    names = [time_label((start, stop)) for start, stop in spans]
    many = "s" if len(spans) > 1 or spans[0][1] - spans[0][0] > 1 else ""
    return f"{'sample' if cells else 'position'}{many} {_listed(names)}"
