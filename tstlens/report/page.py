"""The report as one HTML page: figures, captions and the template that lays them out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from tstlens import figures
from tstlens.figures.words import when
from tstlens.report.findings import Finding
from tstlens.report.layout import block, html_of
from tstlens.report.page_causal import circuit_block, estimates_block, marks, ranking_block
from tstlens.report.study import Study, Swept
from tstlens.report.views import as_probability, by_part
from tstlens.report.wording import chance, nats, percent
from tstlens.stats import FEWEST

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
    sections = [_section(entry, numbers, found) for entry in found.sets]
    return environment.get_template("page.html.j2").render(
        n=numbers,
        style=Markup((folder / "page.css").read_text(encoding="utf-8")),
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
