"""The report as one HTML page: figures, captions and the template that lays them out.

Blocks of the page on how sure the ranking is, on the circuit, and on the cheap estimate.

Blocks of the page: a heading, paragraphs, figures and tables with their captions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from tstlens import figures
from tstlens.figures.words import when
from tstlens.report.account import Finding
from tstlens.report.circuits import CircuitFound
from tstlens.report.study import STEPS, Study, Swept, cost_sentence
from tstlens.report.wording import (
    FOLDER,
    as_probability,
    by_part,
    chance,
    nats,
    odds,
    percent,
    template,
)
from tstlens.stats import FEWEST

CONFIG = {
    "responsive": True,
    "displaylogo": False,
    "modeBarButtons": [["toImage"]],
    "displayModeBar": "hover",
    "showSendToCloud": False,
}


def html_of(figure: go.Figure, name: str) -> Markup:
    """A figure as a div of its own height and the page's width."""
    layout: Any = figure.layout
    div = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=f"fig-{name}",
        config=CONFIG,
        default_width="100%",
        default_height=f"{layout.height}px",
    )
    return Markup(div)


def block(heading: str, drawn: Sequence[tuple[go.Figure, str, str]], key: str) -> dict[str, Any]:
    """A block of figures, each with its name and caption."""
    return {
        "heading": heading,
        "id": None,
        "lines": [],
        "items": [figure_of(figure, f"{key}-{name}", caption) for figure, name, caption in drawn],
        "details": None,
    }


def figure_of(figure: go.Figure, name: str, caption: str, wide: bool = False) -> dict[str, Any]:
    """A figure with its caption, over the page's whole width where ``wide``."""
    return {"html": html_of(figure, name), "caption": caption, "wide": wide, "table": None}


def table_of(
    columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "", texts: int = 1
) -> dict[str, Any]:
    """A table; its first ``texts`` columns are text, the others numbers."""
    table = {"columns": list(columns), "rows": [list(row) for row in rows], "texts": texts}
    return {"html": None, "caption": caption, "wide": False, "table": table}


def lines_of(lines: Sequence[str]) -> dict[str, Any]:
    """Paragraphs beside a figure."""
    return {"html": None, "caption": "", "wide": False, "table": None, "lines": list(lines)}


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


SHOWN_PAIRS = 2
_IN_TABLE = ("parts", "heads", "inputs", "channels")
HIGHLIGHTED = 3  # channels drawn in colour


def render(found: Study, numbers: dict[str, Any]) -> str:
    """The whole page, self-contained.

    Args:
        found: what was measured; figures are drawn from its results.
        numbers: the account of it; sentences and tables are written from it.

    Returns:
        HTML with plotly.js inside once and nothing loaded from anywhere.
    """
    sections = [_section(entry, numbers, found) for entry in found.sets]
    return template("page.html.j2").render(
        n=numbers,
        style=Markup((FOLDER / "page.css").read_text(encoding="utf-8")),
        plotlyjs=Markup(get_plotlyjs()),
        confusion=html_of(figures.confusion(found.evaluation, title=None), "confusion"),
        sections=sections,
    )


def _section(entry: Swept, numbers: dict[str, Any], found: Study) -> dict[str, Any]:
    """Figures, captions and tables of one pair set."""
    part = numbers["sets"][entry.pairs.key]
    key, clusters, sweeps = entry.pairs.key, entry.pairs.clusters, entry.sweeps
    top = {name: [Finding(**one) for one in listed] for name, listed in part["strongest"].items()}
    blocks = [
        _layers_block(entry, part),
        _heads_block(entry, part, top["heads"]),
        ranking_block(entry, part, top["heads"][0], found.seed),
        _times_block(entry, part),
    ]
    if "channels" in sweeps:
        drawn = figures.draw(sweeps["channels"], title=None, clusters=clusters)
        caption = (
            f"One whole channel of the series replaced at a time. {part['sentences']['channels']} "
            f"{marks(part)}"
        )
        channels = block("Input channels", [(drawn, "channels", caption)], key)
        channels["items"][0]["wide"] = True
        blocks.append(channels)
    if part["circuit"] or part["no_circuit"]:
        blocks.append(circuit_block(entry, part))
    blocks.append(_series_block(entry, part, found))
    if part["estimates"]:
        blocks.append(estimates_block(entry, part, numbers["cost"][key]))
    return {
        "key": key,
        "part": part,
        "blocks": blocks,
        "table": [
            (name, top[name]) for name in ("parts", "heads", "inputs", "channels") if name in top
        ],
    }


def _layers_block(entry: Swept, part: dict[str, Any]) -> dict[str, Any]:
    parts = by_part(entry.sweeps["attention"], entry.sweeps["mlp"])
    drawn = [
        (
            figures.draw(parts, title=None, clusters=entry.pairs.clusters),
            "parts",
            f"The whole attention output or MLP output of a layer replaced, in the order of the "
            f"model. {part['sentences']['parts']} {marks(part)}",
        ),
        (
            figures.draw(as_probability(parts), title=None, clusters=entry.pairs.clusters),
            "parts-p",
            "The same in probabilities, which saturate: near 0 or 1 they hide what the logits do.",
        ),
    ]
    return block("Layers: attention and MLPs", drawn, entry.pairs.key)


def _heads_block(entry: Swept, part: dict[str, Any], top: list[Finding]) -> dict[str, Any]:
    heads, control = entry.sweeps["heads"], entry.control.get("heads")
    clusters = entry.pairs.clusters
    limit = max(
        float(abs(result.mean("pair").effect()).max())
        for result in (heads, control)
        if result is not None
    )
    limits = limit or None
    drawn = [
        (
            figures.draw(heads, title=None, limits=limits, clusters=clusters),
            "heads",
            f"Each head's output (z, before the output projection) replaced by itself. "
            f"{part['sentences']['heads']}",
        ),
    ]
    if control is not None:
        largest = part["control"]["largest"]["heads"]
        drawn.append(
            (
                figures.draw(control, title=None, limits=limits),
                "heads-control",
                "Control, on the same colours: the heads filled from another series of the class "
                "that the model sees already, which holds nothing new about the target. Largest "
                f"mean change: {nats(largest, True)} nats.",
            )
        )
    drawn.append(
        (
            figures.draw(as_probability(heads), title=None, clusters=clusters),
            "heads-p",
            f"The first map in probabilities: from {chance(top[0].p_corrupted)} to "
            f"{chance(top[0].p_patched)} for {top[0].label}.",
        )
    )
    return block("Heads", drawn, entry.pairs.key)


def _times_block(entry: Swept, part: dict[str, Any]) -> dict[str, Any]:
    sweeps, clusters = entry.sweeps, entry.pairs.clusters
    drawn = [
        (
            figures.draw(sweeps["inputs"], title=None, clusters=clusters),
            "inputs",
            f"What enters the trunk at one position replaced: the front end's view of these "
            f"samples alone. {part['sentences']['inputs']}"
            + ("" if part["n_clusters"] < FEWEST else " Lines: 95 % interval of the mean."),
        ),
        (
            figures.draw(sweeps["positions"], title=None, clusters=clusters),
            "positions",
            f"The residual stream after each block, one position at a time: later layers have "
            f"mixed positions, so this is where the model keeps the evidence. "
            f"{part['sentences']['positions']}",
        ),
        (
            figures.draw(sweeps["head_positions"], title=None, clusters=clusters),
            "head-positions",
            f"Each head's output at one position at a time. {part['sentences']['head_positions']}",
        ),
    ]
    times = block("Time steps", drawn, entry.pairs.key)
    times["items"][-1]["wide"] = True
    return times


def _series_block(entry: Swept, part: dict[str, Any], found: Study) -> dict[str, Any]:
    pairs, inputs = entry.pairs.pairs, entry.sweeps["inputs"]
    best = part["strongest"]["heads"][0]
    at = best["place"]
    heads = entry.sweeps["heads"]
    by_pair = heads.effect()[
        :, heads.coords["layer"].index(at["layer"]), heads.coords["head"].index(at["head"])
    ]
    order = by_pair.argsort(descending=True).tolist()
    shown, seen = [], set()
    for index in order:  # different classes where there are some
        kinds = int(pairs.target[index])
        if kinds not in seen and len(shown) < SHOWN_PAIRS:
            seen.add(kinds)
            shown.append(index)
    shown += [index for index in order if index not in shown][: SHOWN_PAIRS - len(shown)]
    highlight = None
    if "channels" in part["strongest"] and pairs.clean.shape[1] > HIGHLIGHTED:
        highlight = [one["place"]["channel"] for one in part["strongest"]["channels"]]
        highlight = sorted(highlight[:HIGHLIGHTED])
    names = found.evaluation.class_names
    drawn = []
    for index in shown:
        figure = figures.pair(pairs, index, inputs, class_names=names, highlight=highlight)
        effect = inputs.effect()[index]
        where = int(effect.abs().argmax())
        cell = inputs.time_cells[where] if inputs.time_cells else None
        place = when(cell) if cell else f"position {where}"
        drawn.append(
            (
                figure,
                f"pair-{index}",
                f"Pair {index}: restoring {best['label']} moves log p of class "
                f"{names[int(pairs.target[index])]} by {nats(float(by_pair[index]), True)} nats. "
                f"Shading: the change when the embedding of one position is restored, strongest at "
                f"{place} ({nats(float(effect[where]), True)} nats)."
                + (" In colour: the channels with the largest effect." if highlight else ""),
            )
        )
    return block("The series behind it", drawn, entry.pairs.key)
