"""Attribution beside the exact sweeps: what the cheap estimate gets right, and where it fails."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np

from tstlens.data import Pairs
from tstlens.figures.words import number, site_label
from tstlens.model import HookedTST
from tstlens.patching import Agreement, SweepResult, agreement, attribution, log_prob
from tstlens.report.wording import nats
from tstlens.stats import mean_known

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
    plain = numbers["heads"]["gradient"]
    return {
        **numbers,
        "sentence": (
            f"Over {heads['n_sites']} heads the estimate from {STEPS['integrated']} gradients "
            f"along the way agrees with the exact sweep to a Pearson correlation of "
            f"{_two(heads['pearson'])} and a rank correlation (Spearman) of "
            f"{_two(heads['spearman'])}, mean over {heads['n_pairs']} pairs; the plain gradient "
            f"reaches {_two(plain['pearson'])} and {_two(plain['spearman'])}. "
            f"{_verdict(heads, fine)}"
        ),
        "failure": _failure(heads, fine),
    }


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


def _verdict(heads: dict[str, Any], fine: dict[str, Any]) -> str:
    strong = (heads["spearman"] or 0.0) >= _TRUSTED
    text = "That is a first look at the heads, not a substitute for the sweep"
    if strong and heads["same_strongest"]:
        text = "For whole heads it may stand in for the sweep"
    elif strong:
        text = "It orders the heads alike but names another strongest one, so check that exactly"
    if (fine["spearman"] or 0.0) >= _TRUSTED:
        return f"{text}; head by position it agrees as well ({_two(fine['spearman'])})."
    text += "; head by position, where effects are small, the rank correlation is only "
    text += _two(fine["spearman"])
    if fine["top_k_overlap"] is None:
        return f"{text}."
    found = fine["k"] * fine["top_k_overlap"]
    return f"{text}, and {found:.1f} of a pair's {fine['k']} strongest places are found."


def _failure(heads: dict[str, Any], fine: dict[str, Any]) -> str:
    off, worst = heads["furthest_off"], heads["worst_pair"]
    return (
        f"Furthest off, on average over pairs: {off['label']}, estimated "
        f"{nats(off['estimate'], True)}, exactly {nats(off['exact'], True)} nats. "
        f"Least alike: pair {worst['pair']}, rank correlation {_two(worst['spearman'])}. "
        f"{_share(1 - (heads['sign_agreement'] or 0.0))} of the heads have the wrong sign, "
        f"{_share(1 - (fine['sign_agreement'] or 0.0))} of heads by position. A gradient sees "
        "small changes only: attention that switches, a ReLU that opens and a probability that "
        "saturates are what it misses. Check whatever looks strongest exactly."
    )


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
        f"({_share(fine['of_exact'])}; the plain gradient {_share(plain['of_exact'])}); for whole "
        f"heads it {less}. It pays on longer series and larger models."
    )


def _mean(values: np.ndarray) -> float | None:
    mean = mean_known(values)
    return mean if mean == mean else None


def _two(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}".replace("-", "−")


def _share(value: float) -> str:
    return f"{100 * value:.0f} %" if value >= 0.1 else f"{100 * value:.1f} %"
