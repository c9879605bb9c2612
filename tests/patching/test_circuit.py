"""Circuits: choosing edges, what is claimed of them, tables and files."""

from __future__ import annotations

import json

import networkx as nx
import pytest
import torch

from tests.patching.conftest import make_case
from tests.patching.planted import CIRCUIT_EDGES, planted_model, planted_pairs
from tstlens import patching
from tstlens.data import Pairs
from tstlens.errors import (
    ArgumentError,
    ConfigVersionError,
    CorruptFileError,
    SeriesShapeError,
    StorageError,
    UnknownSiteError,
)
from tstlens.patching.circuits import Circuit, edge_sweep
from tstlens.patching.circuits.judging import FRACTIONS, keep_edges, sites_of


def pairs_of(case):
    return Pairs(case.clean, case.corrupted, case.target)


def circuit_of(case, **options):
    return Circuit.from_edge_attribution(
        case.model, pairs_of(case), steps=2, progress=False, **options
    )


@pytest.fixture(scope="module")
def planted():
    model, pairs = planted_model(), planted_pairs()
    metric = patching.logit(pairs.target)
    effects = edge_sweep(model, pairs.clean, pairs.corrupted, metric, progress=False)
    return model, pairs, Circuit.from_effects(effects, edges=CIRCUIT_EDGES, output="class 1")


def test_the_strongest_edges_are_kept_in_each_way_of_choosing(pre_norm):
    circuit = circuit_of(pre_norm, budget=0.1)
    scores, n_edges = circuit.scores, len(circuit.kept)
    assert len(circuit) == round(0.1 * n_edges)
    weakest = circuit.weights.abs().min()
    assert (scores[~circuit.kept].abs() <= weakest).all()
    assert circuit.choose(top_k=7).kept.sum() == 7
    by_threshold = circuit.choose(threshold=float(weakest))
    assert torch.equal(by_threshold.kept, scores.abs() >= weakest)
    named = circuit.choose(edges=["pos1->L0H0.v", "L1H0->output"])
    assert [edge.name for edge in named.edges] == ["pos1->L0H0.v", "L1H0->output"]
    assert circuit_of(pre_norm).made["chosen"] == "5 % of edges"


def test_all_edges_are_faithful_and_none_is_not(case):
    circuit, pairs = circuit_of(case), pairs_of(case)
    found = circuit.faithfulness(case.model, pairs, n_random=2, progress=False)
    metric = patching.log_prob(case.target)
    with torch.no_grad():
        torch.testing.assert_close(found.full, metric(case.model(case.clean)))
        torch.testing.assert_close(found.values[:, -1], found.full, atol=1e-4, rtol=0)
        torch.testing.assert_close(found.empty, metric(case.model(case.corrupted)))
    assert found.n_edges[0] == int(0.001 * len(circuit.kept)) == 0
    torch.testing.assert_close(found.values[:, 0], found.empty, atol=1e-4, rtol=0)
    assert found.curve[0] == pytest.approx(0, abs=1e-4)
    assert found.curve[-1] == pytest.approx(1, abs=1e-4)


def test_cpr_and_cmd_are_the_areas_that_mib_adds_up(pre_norm):
    found = circuit_of(pre_norm).faithfulness(
        pre_norm.model, pairs_of(pre_norm), n_random=2, progress=False
    )
    assert found.fractions == FRACTIONS
    cpr = cmd = 0.0
    curve = found.curve.tolist()
    for i in range(len(FRACTIONS) - 1):
        width = FRACTIONS[i + 1] - FRACTIONS[i]
        cpr += width * (curve[i] + curve[i + 1]) / 2
        cmd += width * (abs(1 - curve[i]) + abs(1 - curve[i + 1])) / 2
    assert found.cpr == pytest.approx(cpr, abs=1e-5)
    assert found.cmd == pytest.approx(cmd, abs=1e-5)
    assert found.random_cpr == pytest.approx(
        torch.trapezoid(found.random_curves, torch.tensor(FRACTIONS)).mean().item(), abs=1e-5
    )
    frame = found.to_dataframe()
    assert list(frame["n_edges"]) == [int(len(circuit_of(pre_norm).kept) * f) for f in FRACTIONS]
    assert frame["faithfulness"].iloc[-1] == pytest.approx(1, abs=1e-4)


def test_the_planted_circuit_is_more_faithful_than_random_edges(planted):
    model, pairs, circuit = planted
    found = circuit.faithfulness(model, pairs, n_random=5, seed=3, progress=False)
    assert found.of_circuit > 0.99
    assert found.cmd < 0.05 < 0.5 < found.random_cmd
    again = circuit.faithfulness(model, pairs, n_random=5, seed=3, progress=False)
    assert torch.equal(found.random, again.random)
    assert "random edges" in repr(found)


def test_pruned_edges_do_nothing(case):
    circuit, pairs = circuit_of(case, budget=0.08), pairs_of(case)
    pruned = circuit.prune()
    sets = torch.stack([circuit.kept, pruned.kept])
    values, _, _ = keep_edges(circuit, case.model, pairs, sets, None, progress=False)
    torch.testing.assert_close(values[:, 0], values[:, 1], atol=1e-5, rtol=1e-5)
    for node in pruned.nodes:
        if node.kind not in ("pos", "output"):
            assert any(edge.receiver == node for edge in pruned.edges)
            assert any(edge.sender == node for edge in pruned.edges)


def test_pruning_removes_edges_from_nowhere_and_to_nowhere(planted):
    _, _, circuit = planted
    more = circuit.choose(edges=[*CIRCUIT_EDGES, "L0MLP->output", "pos0->L1H0.q", "L0H1->L1MLP"])
    assert {edge.name for edge in more.prune().edges} == set(CIRCUIT_EDGES)


def test_patching_together_is_patching_the_nodes_sites_and_the_edges(planted):
    model, pairs, circuit = planted
    found = circuit.patch_together(model, pairs, progress=False)
    # All nodes clean: the mover writes what it wrote in the clean run, 4.53.
    nodes = 4.53 + 0.03 - 0.1 + 0.05
    # All edges clean: the output hears the same.
    assert found.nodes[0].item() == pytest.approx(nodes, abs=1e-5)
    assert found.edges[0].item() == pytest.approx(nodes, abs=1e-5)
    # One by one they seem to do more than the whole gap.
    assert found.one_by_one == pytest.approx(float(circuit.weights.sum()))
    frame = found.to_dataframe().set_index("run")
    assert frame.loc["clean", "normalized"] == pytest.approx(1)
    assert frame.loc["corrupted", "effect"] == 0
    assert [repr(site) for site in sites_of(circuit)] == [
        "Site('embed', pos=[2, 3])",
        "Site('z', layer=0, head=0)",
        "Site('z', layer=1, head=1)",
    ]


def test_an_incomplete_circuit_breaks_where_the_model_does_not(planted):
    model, pairs, circuit = planted
    whole = circuit.completeness(model, pairs, n_samples=8, seed=1, progress=False)
    assert whole.incompleteness.max() < 0.1
    part = circuit.choose(edges=[e for e in CIRCUIT_EDGES if e != "pos2->L0H0.v"])
    broken = part.completeness(model, pairs, n_samples=8, seed=1, progress=False)
    assert broken.incompleteness.max() > 0.3
    assert len(broken.to_dataframe()) == 8


def test_minimality_of_nodes_takes_out_all_their_edges(planted):
    model, pairs, circuit = planted
    more = circuit.choose(edges=[*CIRCUIT_EDGES, "L0MLP->L1MLP", "L1MLP->output"])
    found = more.minimality(model, pairs, of="node", progress=False)
    loss = dict(zip(found.parts, found.loss.tolist(), strict=True))
    assert loss["L0MLP"] == pytest.approx(0, abs=1e-5)
    assert loss["L1H1"] == pytest.approx(loss["L0H0"], abs=0.02)
    assert found.to_dataframe()["part"].iloc[0] in ("L0H0", "L1H1")


def test_the_graph_carries_types_signs_and_parts(planted):
    _, _, circuit = planted
    graph = circuit.choose(edges=[*CIRCUIT_EDGES, "pos5->output"]).graph
    assert isinstance(graph, nx.DiGraph)
    kinds = {name: facts["kind"] for name, facts in graph.nodes(data=True)}
    assert kinds == {
        "pos2": "time",
        "pos3": "time",
        "pos5": "time",
        "L0H0": "head",
        "L1H1": "head",
        "output": "class",
    }
    assert graph.nodes["output"]["label"] == "class 1"
    assert graph.nodes["pos2"]["label"] == "sample 2"
    assert graph.nodes["L1H1"]["layer"] == 1 and graph.nodes["L1H1"]["head"] == 1
    joint = graph.edges["L0H0", "L1H1"]
    assert joint["k"] + joint["v"] == pytest.approx(joint["weight"])
    assert "q" not in joint
    assert graph.edges["pos5", "output"]["weight"] < 0
    assert nx.is_directed_acyclic_graph(graph)


def test_tables_add_up(planted):
    _, _, circuit = planted
    nodes, edges = circuit.node_table().set_index("node"), circuit.edge_table()
    assert list(edges["weight"].abs()) == sorted(edges["weight"].abs(), reverse=True)
    assert nodes.loc["L0H0", "edges_in"] == 2 and nodes.loc["L0H0", "edges_out"] == 2
    into = edges[edges["receiver"] == "L1H1"]["weight"].sum()
    assert nodes.loc["L1H1", "weight_in"] == pytest.approx(into)
    assert nodes["edges_in"].sum() == nodes["edges_out"].sum() == len(circuit)


def test_json_reads_back_the_same_circuit(tmp_path, planted):
    _, _, circuit = planted
    again = Circuit.from_json(circuit.to_json(tmp_path / "circuit.json"))
    assert again.edges == circuit.edges
    assert torch.equal(again.scores, circuit.scores)
    for name in ("components", "metric", "unit", "output", "time_cells", "made"):
        assert getattr(again, name) == getattr(circuit, name), name
    assert [path.name for path in tmp_path.iterdir()] == ["circuit.json"]


def test_graphml_holds_the_graph(tmp_path, planted):
    _, _, circuit = planted
    again = nx.read_graphml(circuit.to_graphml(tmp_path / "circuit.graphml"))
    assert set(again.nodes) == set(circuit.graph.nodes)
    for start, end, facts in circuit.graph.edges(data=True):
        assert again.edges[start, end] == pytest.approx(facts)


def test_broken_files_are_told_apart(tmp_path, planted):
    _, _, circuit = planted
    path = circuit.to_json(tmp_path / "circuit.json")
    record = json.loads(path.read_text())
    with pytest.raises(StorageError, match="found no file"):
        Circuit.from_json(tmp_path / "none.json")
    for text, message in (
        (path.read_text()[:200], "is no JSON"),
        ("{}", "is not a circuit"),
        (json.dumps(record | {"scores": [1.0]}), "1 scores, its graph has"),
        (json.dumps(record | {"edges": [{"edge": "L9H9->output"}]}), "does not hold a whole"),
    ):
        path.write_text(text)
        with pytest.raises(CorruptFileError, match=message):
            Circuit.from_json(path)
    path.write_text(json.dumps(record | {"format_version": 99}))
    with pytest.raises(ConfigVersionError, match="update tstlens"):
        Circuit.from_json(path)
    with pytest.raises(StorageError, match="what was there is as it was"):
        circuit.to_json(path / "circuit.json")


def test_an_interrupted_write_leaves_the_old_file(tmp_path, planted, monkeypatch):
    _, _, circuit = planted
    path = circuit.to_json(tmp_path / "circuit.json")
    before = path.read_text()

    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(KeyboardInterrupt):
        circuit.choose(top_k=3).to_json(path)
    assert path.read_text() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["circuit.json"]


def test_the_metric_is_remembered_and_made_anew_for_other_pairs(planted):
    model, pairs, circuit = planted
    assert circuit.metric == "logit of the target class"
    other = Pairs(pairs.clean[:1], pairs.corrupted[:1], torch.tensor([2]))
    found = circuit.faithfulness(model, other, progress=False)
    with torch.no_grad():
        assert found.full[0] == pytest.approx(model(other.clean)[0, 2].item(), abs=1e-5)


def test_errors_say_what_to_do(planted):
    model, pairs, circuit = planted
    with pytest.raises(ArgumentError, match="in one way, got budget and top_k"):
        circuit.choose(budget=0.1, top_k=3)
    with pytest.raises(ArgumentError, match=r"budget in \(0, 1\]"):
        circuit.choose(budget=5.0)
    with pytest.raises(ArgumentError, match="top_k in 1.."):
        circuit.choose(top_k=0)
    with pytest.raises(ArgumentError, match="threshold above 0"):
        circuit.choose(threshold=0.0)
    with pytest.raises(UnknownSiteError, match="go from what writes to what reads later"):
        circuit.choose(edges=["L1H1->L0H0.v"])
    with pytest.raises(ArgumentError, match="fractions that grow"):
        circuit.faithfulness(model, pairs, fractions=(0.5, 0.1))
    with pytest.raises(ArgumentError, match="shares of edges"):
        circuit.faithfulness(model, pairs, fractions=(0.5, 2.0))
    with pytest.raises(ArgumentError, match="of as 'edge' or 'node'"):
        circuit.minimality(model, pairs, of="layer")
    none = circuit.choose(threshold=1e9)
    with pytest.raises(ArgumentError, match="expected a circuit with edges"):
        none.minimality(model, pairs)
    stranger = make_case("pre-norm per step, max")
    with pytest.raises(ArgumentError, match="the circuit is of another model"):
        circuit.faithfulness(stranger.model, pairs_of(stranger), progress=False)
    with pytest.raises(SeriesShapeError, match="scores for every edge"):
        Circuit(circuit.components, circuit.scores[:3], circuit.kept[:3], "logit", "logit")
    named = Circuit(circuit.components, circuit.scores, circuit.kept, "mine", "volts")
    with pytest.raises(ArgumentError, match="pass metric=, for these pairs"):
        named.faithfulness(model, pairs, progress=False)
