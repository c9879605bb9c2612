"""Figures of scores, of recovered features and of feature graphs: that they show the numbers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from tstlens.errors import ArgumentError

pytestmark = pytest.mark.saes


@pytest.fixture
def scores():
    from tstlens.saes import DictionaryScore, Scores

    def row(name, variance, accuracy, density):
        return DictionaryScore(
            name, 4, variance, 0.1, 2.0, np.array(density), {"accuracy": accuracy}
        )

    return Scores(
        rows=(
            row("trained", 0.9, 0.8, [0.5, 0.01, 0.2, 0.0]),
            row("random, topk", -3.0, 0.3, [0.1, 0.1, 0.1, 0.1]),
            row("neurons", 0.5, 0.6, [1.0, 1.0, 0.5, 0.5]),
        ),
        task={"original": {"accuracy": 0.85}, "mean": {"accuracy": 0.7}, "zero": {"accuracy": 0.2}},
        hook="blocks.0.hook_mlp_out",
        n_activations=1000,
        data="toy test",
    )


def test_scores_are_drawn_as_they_are(scores):
    figure = scores.figure()
    variance, accuracy = (trace for trace in figure.data if trace.type == "bar")
    assert list(variance.customdata) == [0.9, -3.0, 0.5]
    assert min(variance.x) >= -0.1  # cut off, with the number written on it
    assert variance.text[1] == "−3.00"
    assert list(accuracy.x) == [0.8, 0.3, 0.6]
    lines = sorted(shape.x0 for shape in figure.layout.shapes)
    assert lines == [0.2, 0.7, 0.85]
    densities = {trace.name: trace for trace in figure.data if trace.type == "scatter"}
    assert {name: sum(trace.y) for name, trace in densities.items()} == {
        "trained": 3, "random, topk": 4, "neurons": 4,
    }  # fmt: skip
    assert "1 never" in figure.layout.title.text
    assert scores.figure(title="mine").layout.title.text.startswith("mine")


def test_recovery_leaves_out_what_was_not_measured():
    from tstlens.truth.sae_recovery import Recovery

    found = Recovery(0.9, 0.3, 1.0, float("nan"), 8, 8)
    assert list(found.figure().data[0].x) == [0.9, 0.3, 1.0]
    assert len(dataclasses.replace(found, f1=0.5).figure().data[0].x) == 4


@pytest.fixture
def graph():
    from tstlens.saes.graph import FeatureGraph, FeatureNode

    nodes = (
        FeatureNode(0, "blocks.0.hook_mlp_out", 3),
        FeatureNode(0, "blocks.0.hook_mlp_out", 4),
        FeatureNode(0, "blocks.0.hook_mlp_out", 5, control=True),
        FeatureNode(1, "blocks.1.hook_resid_post", 1),
        FeatureNode(1, "blocks.1.hook_resid_post", 2),
        FeatureNode(1, "blocks.1.hook_resid_post", None),
    )
    edges = torch.full((2, 6, 6), torch.nan)
    edges[:, :3, 3:] = 0.01
    edges[:, 0, 4], edges[:, 1, 3], edges[:, 1, 5] = 2.0, -0.5, 0.3
    kept = edges[0].nan_to_num().abs() > 0.1
    exact = torch.full((2, 6, 6), torch.nan)
    exact[:, 0, 4], exact[:, 1, 3] = 1.5, -0.4
    return FeatureGraph(
        nodes=nodes,
        node_effects=torch.tensor([[1.0, -2.0, 0.0, 0.5, 3.0, -1.0]]).repeat(2, 1),
        edge_effects=edges,
        kept=kept,
        exact_nodes=torch.full((2, 6), torch.nan),
        exact_edges=exact,
        latent_effects=(torch.zeros(2, 6), torch.zeros(2, 3)),
        value=torch.zeros(2),
        metric="logit of the target class",
        unit="logit",
        baseline="zero",
    )


def test_a_feature_graph_shows_kept_edges_and_no_controls(graph):
    from tstlens.figures import style

    figure = graph.figure()
    lines = [trace for trace in figure.data if trace.mode == "lines"]
    between = [line for line in lines if max(line.y) == 1.0]
    assert len(between) == 3 and len(lines) == 3 + 3  # and three from the last row to the metric
    by_text = {line.text: line for line in between}
    strong = next(line for text, line in by_text.items() if "latent 3 of" in text)
    assert "measured +1.50 logit" in strong.text and strong.line.color == style.BLUE
    weak = next(line for text, line in by_text.items() if "latent 1 of" in text)
    assert weak.line.color == style.RED
    assert strong.line.width / weak.line.width == pytest.approx(2)  # the root of the effect
    labels = next(trace for trace in figure.data if trace.mode == "markers+text")
    assert list(labels.text) == ["3", "4", "1", "2", "error"]
    assert list(labels.marker.symbol)[-1] == "square"
    assert list(labels.marker.color) == [1.0, -2.0, 0.5, 3.0, -1.0]
    # Sorted to cross less: latent 3 acts through 2, latent 4 through 1 and the error.
    x = dict(zip(labels.text, labels.x, strict=True))
    assert (x["3"] < x["4"]) == (x["2"] < x["1"])
    assert "Pearson 1.00" in figure.layout.title.text


def test_a_graph_without_latents_is_refused(graph):
    empty = dataclasses.replace(
        graph, nodes=tuple(dataclasses.replace(node, control=True) for node in graph.nodes)
    )
    with pytest.raises(ArgumentError, match="got one without: nothing had an effect"):
        empty.figure()
