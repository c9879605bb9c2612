"""Clusters beside classes, their medoids on the raw series, and what their latents do."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tstlens.arguments import checked
from tstlens.errors import ArgumentError
from tstlens.figures import marks, style
from tstlens.figures.drawing import draw
from tstlens.figures.maps import Panel, Scale, Ticks, heat_maps
from tstlens.figures.words import hook_label, number
from tstlens.probing.clustering import ClusterEffect, Clusters

MARK = "#f9dcc0"  # behind the samples of a window
MOST_COLOURED = 6  # channels in colours of their own; more are grey, their mean in blue
MOST_PANELS = 16


@draw.register
@checked
def draw_clusters(
    result: Clusters,
    *,
    kind: Literal["classes", "windows", "pca"] | None = None,
    normalise: bool = True,
    title: str | None = "",
) -> go.Figure:
    """Which classes every cluster holds, its medoid on the raw series, or a map of all samples.

    Args:
        kind: ``"classes"`` (for latents: how active they are in the series of each class) or
            ``"windows"``; by default classes where there are labels. ``"pca"`` draws what was
            clustered on its first two principal components, coloured by class (by cluster without
            labels), numbers at the middle of clusters; clusters that overlap there may be apart in
            other directions.
        normalise: colours show shares of the cluster; numbers stay counts on hover.

    Raises:
        ArgumentError: classes without labels, or windows of latents.
    """
    if kind is None:
        labelled = result.labels is not None or result.profile is not None
        kind = "classes" if labelled else "windows"
    if kind == "windows":
        return _windows(result, title)
    if kind == "pca":
        return _pca(result, title)
    return _profile(result, title) if result.what == "latents" else _classes(result, title)


def _classes(result: Clusters, title: str | None) -> go.Figure:
    table = result.contingency()
    counts = table.to_numpy()
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    # Clusters in the order of the class that they hold most of, so that agreement is a diagonal.
    order = np.lexsort((-counts.max(1), counts.argmax(1)))
    sizes = zip(table.index, counts.sum(1), strict=True)
    names = [f"noise ({size})" if at < 0 else f"{at} ({size})" for at, size in sizes]

    def said(at: int, column: int) -> str:
        row = order[at]
        return (
            f"<b>cluster {names[row].split(' ')[0]}, class {result.class_names[column]}</b><br>"
            f"{counts[row, column]} {result.what}, {share[row, column]:.0%} of the cluster"
        )

    hover = marks.each_cell(counts.shape, said)
    figure = heat_maps(
        [Panel("", share[order], hover)],
        Ticks("cluster (size)", tuple(names[row] for row in order)),
        Ticks("class", tuple(style.shortened(name, 10) for name in result.class_names)),
        Scale("share of the cluster", 0.0, 1.0, diverging=False),
        title=_heading(result) if title == "" else title,
        subtitle=_agreement(result),
    )
    return marks.title_at_edge(figure)


def _pca(result: Clusters, title: str | None) -> go.Figure:
    points = np.asarray(result.points, dtype=float)
    centred = points - points.mean(0)
    left, size, directions = np.linalg.svd(centred, full_matrices=False)
    # The sign of a component is arbitrary: its largest entry points up.
    largest = np.abs(directions).argmax(1)
    sign = np.sign(directions[np.arange(len(directions)), largest])
    place = np.zeros((len(points), 2))
    place[:, : len(size)] = (left * size * sign)[:, :2]
    share = np.append(size**2 / max(float((size**2).sum()), 1e-300), 0.0)[:2]
    by_class = result.labels is not None
    groups = np.asarray(result.labels if by_class else result.assigned)
    figure = go.Figure()
    for at, group in enumerate(np.unique(groups)):
        rows = np.flatnonzero(groups == group)
        name = result.class_names[group] if by_class else "noise" if group < 0 else str(group)
        color = style.FAINT if group < 0 else style.LINES[at % len(style.LINES)]
        x, y = place[rows].T
        marks.dots(
            figure,
            x,
            y,
            color,
            6 if len(points) <= 400 else 4,
            look={"opacity": 0.75, "line": {"color": style.PAPER, "width": 0.5}},
            name=f"{'class' if by_class else 'cluster'} {style.shortened(name, 12)}",
            said=[_member(result, row) for row in rows.tolist()],
        )
    for cluster in range(result.n_clusters):
        middle = place[result.assigned == cluster].mean(0)
        figure.add_annotation(
            text=f"<b>{cluster}</b>",
            showarrow=False,
            font={"size": 12, "color": style.INK},
            bgcolor="rgba(255,255,255,0.7)",
            borderpad=1,
            **{"x": middle[0], "y": middle[1]},
        )
    for number_, axis in enumerate((figure.update_xaxes, figure.update_yaxes)):
        name = f"component {number_ + 1} ({share[number_]:.0%} of variance)"
        axis(title={"text": name}, zeroline=False, nticks=6)
    n_groups = len(np.unique(groups))
    rows_below = -(-n_groups // 5)
    heading = _heading(result) if title == "" else title
    said = f"numbers: middle of each cluster; {_agreement(result)}"
    size_of = {"plot_height": 380, "below": 60 + 20 * rows_below, "left": 62}
    style.finish(figure, heading, said, **size_of)
    return marks.legend_below(figure, 52, 380)


def _member(result: Clusters, row: int) -> str:
    """What hovering over a sample says."""
    first, channel, pos = (int(one) for one in result.places[row])
    what = "latent" if result.what == "latents" else "series"
    said = f"<b>{what} {first}</b>"
    said += "" if channel < 0 else f", channel {channel}"
    said += "" if pos < 0 else f", position {pos}"
    if result.labels is not None:
        said += f"<br>class {result.class_names[result.labels[row]]}"
    cluster = int(result.assigned[row])
    return said + ("<br>noise" if cluster < 0 else f"<br>cluster {cluster}")


def _heading(result: Clusters) -> str:
    where = hook_label(result.hook)
    return f"{result.n_clusters} clusters of {len(result.assigned)} {result.what}, {where}"


def _agreement(result: Clusters) -> str:
    found = result.agreement
    if found is None:
        return f"silhouette {number(result.silhouette)}"
    null = found.null["ari"]
    said = (
        f"ARI {number(found.ari)} (labels shuffled: {number(null[0])}, 95 % below "
        f"{number(null[1])}; p {number(found.p['ari'])}), AMI {number(found.ami)}"
    )
    if found.input_ari is not None:
        said += f"; raw input ARI {number(found.input_ari)}"
    return said


def _profile(result: Clusters, title: str | None) -> go.Figure:
    if result.profile is None:
        raise ArgumentError("these clusters of latents have no labels to be compared with")
    values = result.profile
    names = tuple(f"{at} ({size})" for at, size in enumerate(result.sizes))

    def said(row: int, column: int) -> str:
        name = result.class_names[column]
        share = number(values[row, column])
        return f"<b>cluster {row}, class {name}</b><br>{share} of the latents' largest activation"

    hover = marks.each_cell(values.shape, said)
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    end = style.symmetric_limit(max(abs(low), abs(high)))
    scale = Scale(
        "mean activation, share of each latent's largest", -end if low < 0 else 0.0, end, low < 0
    )
    figure = heat_maps(
        [Panel("", values, hover)],
        Ticks("cluster (latents)", names),
        Ticks("class", tuple(style.shortened(name, 10) for name in result.class_names)),
        scale,
        title=_heading(result) if title == "" else title,
        subtitle=_agreement(result),
    )
    return marks.title_at_edge(figure)


def _windows(result: Clusters, title: str | None) -> go.Figure:
    if result.what == "latents":
        raise ArgumentError("latents have no series of their own; see kind='classes'")
    medoids: Any = result.medoids(1).head(MOST_PANELS)
    if not len(medoids):
        raise ArgumentError("there is no cluster to draw: everything is noise")
    across = 3 if len(medoids) > 4 else 2
    down = -(-len(medoids) // across)
    rows = medoids.to_dict(orient="records")
    headings = [
        f"cluster {row['cluster']} ({result.sizes[row['cluster']]})<br>series {row['series']}"
        + ("" if row["label"] is None else f", class {style.shortened(row['label'], 8)}")
        for row in rows
    ]
    height, gap = 110 * down + 48 * (down - 1), 48
    figure = make_subplots(
        rows=down,
        cols=across,
        shared_xaxes=True,
        shared_yaxes=True,
        subplot_titles=headings,
        vertical_spacing=gap / height if down > 1 else 0,
        horizontal_spacing=0.03,
    )
    for at, row in enumerate(rows):
        place: dict[str, Any] = {"row": at // across + 1, "col": at % across + 1}
        _medoid(figure, result, row, place)
    figure.update_annotations(font={"size": 10, "color": style.INK})
    figure.update_xaxes(showgrid=False, zeroline=False, nticks=4)
    figure.update_yaxes(zeroline=False, nticks=4)
    figure.update_xaxes(title={"text": "time (sample)"}, row=down)
    many = result.data.n_channels > MOST_COLOURED
    lines = "grey: channels, blue: their mean" if many else "a line per channel"
    marked = "; shaded: the samples of the position" if result.what == "positions" else ""
    heading = (
        f"Medoids of {result.n_clusters} clusters, {hook_label(result.hook)}"
        if title == ""
        else title
    )
    style.finish(figure, heading, lines + marked, plot_height=height, above=34, left=40)
    return marks.title_at_edge(figure)


def _medoid(
    figure: go.Figure, result: Clusters, row: dict[str, Any], place: dict[str, Any]
) -> None:
    values = result.data.series[row["series"]].double().cpu().numpy()
    if result.data.mask is not None:
        seen = result.data.mask[row["series"]].cpu().numpy()
        values = np.where(seen[None], values, np.nan)
    if row["channel"] >= 0:
        values = values[row["channel"]][None]
    many = len(values) > MOST_COLOURED
    lines = [*values, np.nanmean(values, 0)] if many else list(values)
    for index, line in enumerate(lines):
        mean = many and index == len(values)
        color = style.FAINT if many else style.LINES[index % len(style.LINES)]
        said = f"{'mean' if mean else f'channel {index}'}<br>sample %{{x}}: %{{y:.3g}}"
        look = {"color": style.BLUE if mean else color, "width": 2 if mean else 1.2}
        marks.curve(figure, np.arange(len(line)), line, said=said, **look, **place)
    if result.what == "positions":  # plotly draws it on subplots that hold lines already
        ends = row["start"] - 0.5, row["stop"] - 0.5
        at: Any = place
        figure.add_vrect(*ends, fillcolor=MARK, line_width=0, layer="below", **at)


@draw.register
@checked
def draw_cluster_effect(result: ClusterEffect, *, title: str | None = "") -> go.Figure:
    """The metric without (or with only) each cluster's latents, beside random groups as large."""
    n = len(result.value)
    rows = np.arange(n)
    labels = [f"{at} ({size})" for at, size in enumerate(result.sizes)]
    figure = go.Figure()
    for value, name, color in (
        (result.full[0], "all latents", style.INK),
        (result.none[0], "none", style.FAINT),
    ):
        said = f"{name}: {number(value)}"
        ends = [-0.6, n - 0.4]
        marks.curve(figure, [value, value], ends, color, 1.6, dash="dot", name=name, said=said)
    among = (rows[:, None] + marks.spread(result.random_value.shape[1])[None]).ravel()
    random = {"name": "random latents", "said": "random: %{x:.3g}", "look": {"opacity": 0.55}}
    marks.dots(figure, result.random_value.ravel(), among, style.ORANGE, 5, **random)
    said = [
        f"<b>cluster {at}</b>, {result.sizes[at]} latents<br>{result.metric}: "
        f"{number(result.value[at])}<br>accuracy {number(result.accuracy[at])} (random "
        f"{number(float(result.random_accuracy[at].mean()))})<br>p {number(result.p[at])}"
        for at in rows
    ]
    marks.dots(figure, result.value, rows, style.BLUE, 11, name="cluster", said=said)
    axis = {"range": [n - 0.4, -0.6], "title": {"text": "cluster (latents)"}}
    marks.named_rows(figure, labels, **axis)
    figure.update_xaxes(title={"text": result.metric}, zeroline=False, nticks=6)
    done = "ablated" if result.mode == "ablate" else "kept alone"
    heading = f"Clusters of latents {done}, {hook_label(result.hook)}" if title == "" else title
    subtitle = (
        f"{result.made['n_series']} series; accuracy {number(result.full[1])} with all latents, "
        f"{number(result.none[1])} with none; {result.random_value.shape[1]} random groups each"
    )
    height = 28 * n + 12
    size = {"plot_height": height, "below": 98, "left": style.room_for(labels, "x")}
    style.finish(figure, heading, subtitle, **size)
    return marks.title_at_edge(marks.legend_below(figure, 52, height))
