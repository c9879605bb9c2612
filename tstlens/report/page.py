"""The report as one HTML page: figures, captions and the template that lays them out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from tstlens import figures
from tstlens.figures.intervals import FEWEST
from tstlens.figures.words import when
from tstlens.report.findings import Finding
from tstlens.report.study import Study, Swept, as_probability, by_part
from tstlens.report.wording import chance, nats, percent

CONFIG = {
    "responsive": True,
    "displaylogo": False,
    "modeBarButtons": [["toImage"]],
    "displayModeBar": "hover",
    "showSendToCloud": False,
}
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
    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"nats": nats, "chance": chance, "percent": percent}
    sections = [_section(entry, numbers["sets"][entry.pairs.key], found) for entry in found.sets]
    return environment.get_template("page.html.j2").render(
        n=numbers,
        style=Markup((folder / "page.css").read_text(encoding="utf-8")),
        plotlyjs=Markup(get_plotlyjs()),
        confusion=_html(figures.confusion(found.evaluation, title=None), "confusion"),
        sections=sections,
    )


def _html(figure: go.Figure, name: str) -> Markup:
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


def _section(entry: Swept, part: dict[str, Any], found: Study) -> dict[str, Any]:
    """Figures, captions and tables of one pair set."""
    key, clusters, sweeps = entry.pairs.key, entry.pairs.clusters, entry.sweeps
    top = {name: [Finding(**one) for one in listed] for name, listed in part["strongest"].items()}
    blocks = [
        _layers_block(entry, part),
        _heads_block(entry, part, top["heads"], found.seed),
        _times_block(entry, part),
    ]
    if "channels" in sweeps:
        drawn = figures.draw(sweeps["channels"], title=None, clusters=clusters)
        blocks.append(
            {
                "heading": "Input channels",
                "figures": [
                    {
                        "html": _html(drawn, f"{key}-channels"),
                        "caption": f"One whole channel of the series replaced at a time. "
                        f"{part['sentences']['channels']}",
                        "wide": True,
                    }
                ],
            }
        )
    blocks.append(_series_block(entry, part, found))
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
            f"model. {part['sentences']['parts']} {_marks(part)}",
        ),
        (
            figures.draw(as_probability(parts), title=None, clusters=entry.pairs.clusters),
            "parts-p",
            "The same in probabilities, which saturate: near 0 or 1 they hide what the logits do.",
        ),
    ]
    return _block("Layers: attention and MLPs", drawn, entry)


def _marks(part: dict[str, Any], each: str = "dot") -> str:
    """What whiskers and dots stand for."""
    if part["n_clusters"] < FEWEST:
        return f"Too few series for an interval; a {each} for every pair."
    return f"Lines: 95 % interval of the mean; a {each} for every pair."


def _heads_block(
    entry: Swept, part: dict[str, Any], top: list[Finding], seed: int
) -> dict[str, Any]:
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
        (
            figures.draw(as_probability(heads), title=None, clusters=clusters),
            "heads-p",
            f"The same in probabilities: from {chance(top[0].p_corrupted)} to "
            f"{chance(top[0].p_patched)} for {top[0].label}.",
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
    stable = ""
    if top[0].strongest is not None:
        stable = (
            f" In {100 * top[0].strongest:.0f} % of the resamples {top[0].label} comes out first."
        )
    drawn.append(
        (
            figures.ranking(heads, 8, clusters=clusters, seed=seed, title=None),
            "heads-ranking",
            f"The strongest heads. {_marks(part, 'tick')}{stable}",
        )
    )
    return _block("Heads", drawn, entry)


def _times_block(entry: Swept, part: dict[str, Any]) -> dict[str, Any]:
    sweeps, clusters = entry.sweeps, entry.pairs.clusters
    drawn = [
        (
            figures.draw(sweeps["inputs"], title=None, clusters=clusters),
            "inputs",
            f"What enters the trunk at one position replaced: the front end's view of these "
            f"samples alone. {part['sentences']['inputs']}",
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
    block = _block("Time steps", drawn, entry)
    block["figures"][-1]["wide"] = True
    return block


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
    return _block("The series behind it", drawn, entry)


def _block(heading: str, drawn: list[tuple[go.Figure, str, str]], entry: Swept) -> dict[str, Any]:
    return {
        "heading": heading,
        "figures": [
            {
                "html": _html(figure, f"{entry.pairs.key}-{name}"),
                "caption": caption,
                "wide": False,
            }
            for figure, name, caption in drawn
        ],
    }
