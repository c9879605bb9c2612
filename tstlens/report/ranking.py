"""The ranking of heads, with how sure one can be of each and of their order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tstlens.figures.words import site_label
from tstlens.patching import SplitHalf, SweepResult, split_half, summary
from tstlens.report.wording import odds
from tstlens.stats import FEWEST, mean_known

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
    stable = split_half(heads, TOP, cluster=clusters, seed=seed)
    return {
        "rows": rows,
        "n_heads": len(rows),
        "n_clusters": found.n_clusters[0],
        "n_shown": sum(row["q"] <= LEVEL for row in rows),
        "level": LEVEL,
        "stability": _stability(stable),
        "sentences": {"chance": _chance(rows, found.n_clusters[0]), "order": _order(stable)},
    }


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


def _chance(rows: list[dict[str, Any]], n_clusters: int) -> str:
    n_shown = sum(row["q"] <= LEVEL for row in rows)
    text = (
        "p is how often chance alone gives a mean this large: the sign of every series' effect is "
        "turned over at random, as if up and down were equally likely. "
        f"Among {len(rows)} heads some get a small p by luck; q is p corrected for that: of heads "
        f"with q up to {LEVEL:g}, about one in twenty is expected to be such luck. Here "
        f"{n_shown} of {len(rows)} heads stay below it. A small q says that a head does "
        "something, not that it does much."
    )
    if n_clusters < 10:
        text += f" With {n_clusters} series no p can fall below {odds(2 / 2**n_clusters)}."
    return text


def _order(stable: SplitHalf) -> str:
    part = _stability(stable)
    if part["spearman"] is None:
        return "The order of the heads could not be compared between halves of the series."
    same = ""
    if part["top_k_overlap"] is not None:
        found = part["k"] * part["top_k_overlap"]
        same = f", and {found:.1f} of the {part['k']} strongest are the same"
    sure = (
        "so other series would give nearly the same order"
        if part["reliability"] >= 0.9
        else "so the order is roughly right, and heads of similar size may change places"
        if part["reliability"] >= 0.7
        else "so take the order as a hint only"
    )
    return (
        f"Would other series rank the heads alike? Ranked on two random halves of the series, "
        f"{part['n_splits']} times over, the two orders have a rank correlation of "
        f"{part['spearman']:.2f} on average (1 is the same order, 0 is unrelated; 95 % of the "
        f"splits lie between {part['low']:.2f} and {part['high']:.2f}){same}. All series "
        f"together are twice as many, for which that makes {part['reliability']:.2f} expected: "
        f"{sure}."
    ).replace("-", "−")
