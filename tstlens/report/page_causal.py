"""Blocks of the page on how sure the ranking is, on the circuit, and on the cheap estimate."""

from __future__ import annotations

from typing import Any

from tstlens import figures
from tstlens.report.circuits import CircuitFound
from tstlens.report.estimates import STEPS, cost_sentence
from tstlens.report.findings import Finding
from tstlens.report.layout import block, figure_of, lines_of, table_of
from tstlens.report.study import Swept
from tstlens.report.wording import nats, odds, percent
from tstlens.stats import FEWEST

RANKED = 8  # heads in the figure and the table beside it
_NAMES = {"gradient": "plain gradient", "integrated": f"{STEPS['integrated']} gradients"}
_GRIDS = {"heads": "whole heads", "head_positions": "heads by position"}


def marks(part: dict[str, Any], each: str = "dot") -> str:
    """What whiskers and dots stand for."""
    if part["n_clusters"] < FEWEST:
        return f"Too few series for an interval; a {each} for every pair."
    return f"Lines: 95 % interval of the mean; a {each} for every pair."


def ranking_block(entry: Swept, part: dict[str, Any], best: Finding, seed: int) -> dict[str, Any]:
    """The strongest heads with interval, p and q, and whether other series would rank them so."""
    heads, ranking = entry.sweeps["heads"], part["ranking"]
    drawn = figures.ranking(heads, RANKED, clusters=entry.pairs.clusters, seed=seed, title=None)
    stable = ""
    if best.strongest is not None:
        stable = f" In {100 * best.strongest:.0f} % of the resamples {best.label} comes out first."
    caption = f"The strongest heads: change of log p in nats. {marks(part, 'tick')}{stable}"
    made = block("Head ranking", [(drawn, "heads-ranking", caption)], entry.pairs.key)
    if ranking is None:
        return made
    rows = [
        [
            row["label"],
            nats(row["effect"], True),
            "–"
            if row["low"] != row["low"]
            else " to ".join(nats(row[end], True) for end in ("low", "high")),
            odds(row["p"]),
            odds(row["q"]),
        ]
        for row in ranking["rows"]
    ]
    columns = ("head", "nats", "95 % interval", "p", "q")
    made["items"].append(table_of(columns, rows[:RANKED], ranking["sentences"]["chance"]))
    made["lines"] = [ranking["sentences"]["order"]]
    if len(rows) > RANKED:
        made["details"] = {"summary": f"All {len(rows)} heads", "item": table_of(columns, rows)}
    return made


def circuit_block(entry: Swept, part: dict[str, Any]) -> dict[str, Any]:
    """The circuit in layers, its faithfulness beside random edges, and what it is worth."""
    key, found, numbers = entry.pairs.key, entry.circuit, part["circuit"]
    made = block("The circuit", [], key)
    made["id"] = "circuit"
    if not isinstance(found, CircuitFound):
        made["lines"] = [part["no_circuit"]]
        return made
    says = numbers["sentences"]
    made["lines"] = [
        "A circuit is the part of the model that is claimed to do the work: which time steps are "
        "read by which heads and MLPs, which of those read each other, and what reaches the class. "
        f"{says['verdict']}"
    ]
    circuit = figures.draw(found.circuit, title=None)
    curve = figures.draw(found.faithfulness, title=None)
    made["items"] = [
        figure_of(
            circuit,
            f"{key}-circuit",
            f"{says['circuit']} Time at the bottom, the class at the top. Blue edges raise log p "
            "of the target class, red ones lower it; wider is stronger, each by itself. The slider "
            "hides the weaker ones. It is a mean over all pairs of classes; one may need less.",
            wide=True,
        ),
        figure_of(
            curve,
            f"{key}-faithfulness",
            f"Faithfulness: the share of the gap that the strongest edges close alone, all others "
            f"left corrupted; 1 does what the model does. {says['cpr']} {says['cmd']}",
        ),
        lines_of([says["halves"] + " " + says["own"], says["completeness"], says["minimality"]]),
    ]
    edges = sorted(numbers["edges"], key=lambda edge: -abs(edge["weight"]))
    rows = [
        [
            edge["from"],
            edge["to"] + (f", {_PARTS[edge['part']]}" if edge["part"] else ""),
            nats(edge["weight"], True),
        ]
        for edge in edges[:_LISTED]
    ]
    made["details"] = {
        "summary": f"The {len(rows)} strongest edges",
        "item": table_of(("from", "into", "estimated change (nats)"), rows, texts=2),
    }
    return made


_PARTS = {"q": "queries", "k": "keys", "v": "values"}
_LISTED = 20


def estimates_block(entry: Swept, part: dict[str, Any], cost: dict[str, Any]) -> dict[str, Any]:
    """Attribution against the exact sweep of heads, its cost, and where it fails."""
    found, says = entry.estimates, part["estimates"]
    if found is None:
        raise ValueError("a block of estimates needs estimates")
    captions = {
        "integrated": f"Each dot is a head in one pair: the exact change across, the estimate from "
        f"{STEPS['integrated']} gradients upward. On the line both are the same.",
        "gradient": "The same with the plain gradient at the corrupted run.",
    }
    drawn = [
        (figures.draw(found.agreements["heads", name], title=None), f"estimate-{name}", caption)
        for name, caption in captions.items()
    ]
    made = block("A cheap estimate against the exact sweep", drawn, entry.pairs.key)
    made["id"] = "estimate"
    made["lines"] = [
        "Attribution estimates every site's effect at once from gradients instead of running the "
        f"model once for each. {says['sentence']}",
        cost_sentence(cost),
    ]
    columns = (
        "estimate", "Pearson", "Spearman", "strongest found", "same sign", "seconds", "of the sweep"
    )  # fmt: skip
    rows = []
    for grid, name in ((grid, name) for grid in _GRIDS for name in _NAMES):
        one, spent = says[grid][name], cost[grid][name]
        of_exact = spent["of_exact"]
        rows.append(
            [
                f"{_GRIDS[grid]}, {_NAMES[name]}",
                _two(one["pearson"]),
                _two(one["spearman"]),
                "–"
                if one["top_k_overlap"] is None
                else f"{one['k'] * one['top_k_overlap']:.1f} of {one['k']}",
                "–" if one["sign_agreement"] is None else percent(one["sign_agreement"]),
                f"{spent['seconds']:.2f}",
                "–" if of_exact is None else percent(of_exact),
            ]
        )
    table = table_of(columns, rows, f"Means over {part['n_pairs']} pairs. {says['failure']}")
    made["items"].append({**table, "wide": True})
    return made


def _two(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}".replace("-", "−")
