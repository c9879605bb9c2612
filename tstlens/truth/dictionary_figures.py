"""Codes against the states of regime machines: every measure as a share, beside its controls."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import plotly.graph_objects as go

from tstlens.figures import marks, style
from tstlens.figures.drawing import draw
from tstlens.truth.regime_codebooks import RegimeExperiment, RegimeScore
from tstlens.truth.sae_recovery import Recovery

_KINDS = {  # later ones lie on top -> colour, symbol, size, name in the legend
    "control": (style.MUTED, "line-ns-open", 13, "control"),
    "tuned": (style.ORANGE, "triangle-up-open", 9, "same, tuned"),
    "neuron": (style.ORANGE, "diamond-open", 9, "best neuron"),
    "original": (style.INK, "circle-open", 9, "original model"),
    "codes": (style.BLUE, "circle", 9, "codes"),
}
_Point = tuple[str, str, float, str]  # row, kind, value, what is said on hover


@draw.register
def draw_regime_experiment(result: RegimeExperiment, *, title: str | None = "") -> go.Figure:
    """Mass, mutual information, precision and swaps, one mark per seed, controls beside them.

    Args:
        result: of :func:`tstlens.truth.regime_experiment`.
        title: "" for one made from the result, None for none.
    """
    return _drawn(result.scores, result.seeds, title)


@draw.register
def draw_regime_score(result: RegimeScore, *, title: str | None = "") -> go.Figure:
    """The same for one model; see :func:`draw_regime_experiment`.

    Args:
        result: of :func:`tstlens.truth.score_regime`.
        title: "" for one made from the result, None for none.
    """
    return _drawn((result,), (int(result.made.get("machine_seed", 0)),), title)


def _drawn(scores: tuple[RegimeScore, ...], seeds: tuple[int, ...], title: str | None) -> go.Figure:
    points = [
        (seed, *one) for seed, score in zip(seeds, scores, strict=True) for one in _points(score)
    ]
    figure = go.Figure()
    for kind, (color, symbol, size, name) in _KINDS.items():
        own = [one for one in points if one[2] == kind]
        if not own:
            continue
        line = {"width": 1, "color": style.PAPER} if kind == "codes" else {"width": 1.8}
        said = [
            f"<b>{row}</b>, seed {seed}<br>{of}: {value:.3f}" for seed, row, _, value, of in own
        ]
        x, y = [one[3] for one in own], [one[1] for one in own]
        look = {"symbol": symbol, "line": line}
        marks.dots(figure, x, y, color, size, look=look, name=name, said=said, opacity=0.9)
    order = list(dict.fromkeys(row for _, row, *_ in points))
    figure.update_yaxes(
        categoryorder="array",
        categoryarray=order[::-1],
        range=[-0.6, len(order) - 0.4],
        zeroline=False,
    )
    figure.update_xaxes(range=[-0.02, 1.04], zeroline=False, title={"text": "share, or NMI"})
    marks.legend_below(figure).update_layout(legend={"traceorder": "reversed"})
    hook = scores[0].best_hook
    best = max(score.states[hook]["all"].nmi for score in scores)
    low = min(max(one["all"].nmi for one in score.states.values()) for score in scores)
    shown = f"{low:.2f}" if len(scores) == 1 else f"{low:.2f} to {max(low, best):.2f}"
    heading = f"Codes and hidden states: NMI {shown}" if title == "" else title
    several = f"{len(seeds)} machines and models" if len(seeds) > 1 else f"machine {min(seeds)}"
    subtitle = f"{several}; control: the patch alone (mass, NMI, purity), random codes (swaps)"
    return style.finish(
        figure,
        heading,
        subtitle,
        plot_height=24 * len(order) + 10,
        above=8,
        below=118,
        left=style.room_for(order),
    )


def _points(score: RegimeScore) -> Iterator[_Point]:
    mass = score.mass
    row = "valid mass"
    yield (row, "control", mass["patch alone"], "patch alone")
    if "original" in mass:
        yield (row, "original", mass["original"], "original model")
    yield (row, "codes", mass["codebooks"], "through codes")
    patch = score.references["patch alone"]["all"]
    for hook, by_positions in score.states.items():
        row = f"NMI {_short(hook)}"
        yield (row, "control", patch.nmi, "the patch alone as code")
        yield (row, "codes", by_positions["all"].nmi, "codes and states")
    for hook, by_positions in score.states.items():
        row = f"purity {_short(hook)}"
        yield (row, "control", patch.purity, "the patch alone as code")
        yield (row, "codes", by_positions["all"].purity, "codes")
    for hook in score.states:
        for together, what in ((True, "state"), (False, "code")):
            row = f"precision by {what} {_short(hook)}"
            for name, value in score.precision(hook, together=together).items():
                kind = {"original": "neuron"}.get(name, name)
                said = "codes" if kind == "codes" else f"best neuron of the {name} model"
                yield (row, kind, value, said)
    for swap in score.swaps:
        names = [_short(hook) for hook in swap.hooks]
        row = f"swap {names[0] if len(names) == 1 else 'all'}"
        yield (row, "control", swap.random, "random codes")
        note = ", which leaves nothing else" if swap.by_construction else ""
        yield (row, "codes", swap.success, f"codes of the other state{note}")


def _short(hook: str) -> str:
    """``blocks.1.hook_resid_post`` as ``L1 resid_post``."""
    return hook.replace("blocks.", "L", 1).replace(".hook_", " ").replace(".attn", " attn")


@draw.register
def draw_recovery(result: Recovery, *, title: str | None = "") -> go.Figure:
    """How well planted features were found, from 0 to 1, beside random directions.

    Args:
        result: what :func:`tstlens.truth.recovery` returned.
        title: "" for one made from the result, None for none.
    """
    rows = [
        ("mean cosine with the features (MCC)", result.mcc),
        ("the same of random directions", result.random_mcc),
        ("latents with a feature of their own", result.uniqueness),
        ("F1 as detectors", result.f1),
    ]
    rows = [(name, value) for name, value in rows if not np.isnan(value)]
    names = [name for name, _ in rows]
    figure = go.Figure(
        go.Bar(
            y=names,
            x=[value for _, value in rows],
            orientation="h",
            marker={"color": [style.MUTED if "random" in n else style.BLUE for n in names]},
            text=[f"{value:.3f}" for _, value in rows],
            textposition="auto",
            hovertemplate="%{y}: %{x:.4f}<extra></extra>",
        )
    )
    figure.update_yaxes(autorange="reversed")
    figure.update_xaxes(range=[0, 1.02])
    heading = "Planted features found" if title == "" else title
    subtitle = f"{result.n_latents} latents, {result.n_features} planted features"
    left = style.room_for(names) + 4
    return style.finish(figure, heading, subtitle, plot_height=38 * len(rows) + 20, left=left)
