"""The drawing of a circuit shows its edges, and the slider hides the weak ones."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.patching.planted import CIRCUIT_EDGES, planted_model, planted_pairs
from tstlens import figures, patching
from tstlens.errors import ArgumentError
from tstlens.figures import style
from tstlens.patching import Circuit, ComponentGraph


@pytest.fixture(scope="module")
def planted():
    model, pairs = planted_model(), planted_pairs()[:1]
    metric = patching.logit(pairs.target)
    effects = patching.edge_sweep(model, pairs.clean, pairs.corrupted, metric, progress=False)
    edges = [*CIRCUIT_EDGES, "pos5->output"]
    return model, pairs, effects, Circuit.from_effects(effects, edges=edges, output="class 1")


def texts(figure):
    return [
        text for trace in figure.data if trace.hovertext is not None for text in trace.hovertext
    ]


def test_every_edge_is_drawn_with_its_sign_and_answers_to_hovering(planted):
    _, _, _, circuit = planted
    figure = circuit.figure()
    hover = "\n".join(texts(figure))
    assert "<b>sample 2 → L0H0</b>" in hover
    assert "into its keys: +0.960 logit" in hover and "into its values: +1.0" in hover
    colours = [trace.line.color for trace in figure.data if trace.mode == "lines"]
    strands = [list(trace.x).count(None) for trace in figure.data if trace.mode == "lines"]
    drawn = dict.fromkeys(colours, 0)
    for colour, count in zip(colours, strands, strict=True):
        drawn[colour] += count
    # Five lines for six edges: keys and values of the mover share one.
    assert drawn == {style.BLUE: 4, style.RED: 1}


def test_wider_lines_are_larger_weights(planted):
    _, _, _, circuit = planted
    lines = [trace for trace in circuit.figure().data if trace.mode == "lines"]
    widths = sorted(trace.line.width for trace in lines)
    assert widths[-1] > 3 * widths[0]  # 7.3 pixels for 3.93, 1.1 for 0.05


def test_the_slider_hides_weak_edges_and_nodes_without_any(planted):
    _, _, _, circuit = planted
    figure = circuit.figure()
    steps = figure.layout.sliders[0].steps
    shown = [step.label.split(": ")[1] for step in steps]
    assert shown == ["5 lines", "4 lines", "2 lines", "1 line"]
    for number, step in enumerate(steps):
        visible = step.args[0]["visible"]
        assert len(visible) == len(figure.data)
        shown = [trace for trace, seen in zip(figure.data, visible, strict=True) if seen]
        strands = sum(list(trace.x).count(None) for trace in shown if trace.mode == "lines")
        assert strands == [5, 4, 2, 1][number]
    last = [t for t, seen in zip(figure.data, steps[-1].args[0]["visible"], strict=True) if seen]
    nodes = [text for trace in last if trace.mode == "markers+text" for text in trace.hovertext]
    assert {text.split("</b>")[0] for text in nodes} == {"<b>L1H1", "<b>class 1"}


def test_time_runs_along_the_bottom_and_the_class_is_on_top(planted):
    _, _, _, circuit = planted
    figure = circuit.figure()
    assert figure.layout.xaxis.title.text == "time (sample)"
    assert list(figure.layout.yaxis.ticktext) == ["time", "layer 0", "layer 1"]
    of = {}
    for trace in figure.data:
        if trace.mode == "markers+text":
            for text, x, y in zip(trace.hovertext, trace.x, trace.y, strict=True):
                of[text.split("</b>")[0][3:]] = (x, y)
    assert of["sample 2"][1] < of["L0H0"][1] < of["L1H1"][1] < of["class 1"][1]
    assert of["sample 2"][0] < of["sample 3"][0] < of["sample 5"][0]


def test_long_names_many_positions_and_channels_stay_readable():
    graph = ComponentGraph(n_layers=2, n_heads=4, n_pos=200, n_channels=30)
    scores = torch.randn(len(graph.edges), dtype=torch.float64)
    name = "class " + "an extremely long name of a class " * 3
    circuit = Circuit(graph, scores, torch.zeros(len(scores)).bool(), "logit", "logit", name)
    figure = circuit.choose(budget=0.01).figure()
    assert max(len(line) for line in figure.layout.title.text.split("<br>")[:1]) <= 41
    assert len(figure.layout.xaxis.tickvals) <= 12
    labels = [t for trace in figure.data if trace.mode == "markers+text" for t in trace.text]
    assert max(map(len, labels)) <= 30
    assert any(name in text for text in texts(figure))


def test_nothing_to_draw_is_said(planted):
    _, _, _, circuit = planted
    with pytest.raises(ArgumentError, match="choose a larger budget"):
        circuit.choose(threshold=1e9).figure()
    with pytest.raises(ArgumentError, match="levels as an integer of at least 1"):
        circuit.figure(levels=0)


def test_faithfulness_is_drawn_over_the_share_of_edges(planted):
    model, pairs, _, circuit = planted
    result = circuit.faithfulness(model, pairs, n_random=2, progress=False)
    figure = result.figure()
    by_name = {trace.name: trace for trace in figure.data if trace.name}
    assert list(by_name["strongest edges"].x) == pytest.approx(
        [100 * share for share in result.fractions]
    )
    assert list(by_name["strongest edges"].y) == pytest.approx(result.curve.tolist())
    assert by_name["the circuit (6 edges)"].y[0] == pytest.approx(result.of_circuit)
    assert "random edges (2 orders)" in by_name
    assert f"CPR {result.cpr:.2f}" in figure.layout.title.text


def test_edge_effects_are_ranked(planted):
    _, _, effects, _ = planted
    figure = figures.draw(effects, n=3)
    assert "L1H1->output" in figure.layout.yaxis.ticktext[0]
    assert len(figure.data[-1].x) == 3
    replaced = dataclasses.replace(effects, unit="logit")
    assert replaced.edges[0].name == effects.coords["edge"][0]
