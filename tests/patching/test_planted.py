"""What the exact and the approximate methods say of a model whose circuit is known."""

from __future__ import annotations

import math

import pytest
from sklearn.metrics import roc_auc_score

from tests.patching.planted import (
    CIRCUIT_EDGES,
    CIRCUIT_NODES,
    CLEAN_LOGIT,
    CORRUPTED_LOGIT,
    EDGE_EFFECTS,
    HALF_MOTIF,
    NODE_EFFECTS,
    planted_model,
    planted_pairs,
)
from tstlens import patching
from tstlens.patching.circuits import (
    Circuit,
    edge_attribution,
    edge_sweep,
    follow_paths,
    path_patch,
)


@pytest.fixture(params=["pre", "post"])
def model(request):
    return planted_model(request.param)


@pytest.fixture
def pairs():
    return planted_pairs()


def runs(pairs):
    return pairs.clean, pairs.corrupted


def test_the_model_gives_the_logits_worked_out_by_hand(model, pairs):
    assert model(pairs.clean)[0, 1].item() == pytest.approx(CLEAN_LOGIT, abs=1e-5)
    assert model(pairs.corrupted)[0, 1].item() == pytest.approx(CORRUPTED_LOGIT, abs=1e-5)


def test_every_component_outside_the_circuit_does_something(model, pairs):
    names = ["blocks.0.attn.hook_z", "blocks.1.attn.hook_z"]
    names += ["blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"]
    _, clean = model.run_with_cache(pairs.clean[:1], names_filter=names)
    _, corrupted = model.run_with_cache(pairs.corrupted[:1], names_filter=names)
    for name in names:
        changed = (clean[name] - corrupted[name]).abs().amax((0, 1))
        per_component = changed.amax(-1) if "hook_z" in name else changed.max()[None]
        assert (per_component > 0.01).all(), name


def test_node_patching_ranks_the_circuit_above_everything_else(model, pairs):
    metric = patching.logit(pairs.target)
    found = {}
    for site, axes, name in (
        ("embed", ("pos",), "pos{}"),
        ("z", ("layer", "head"), "L{}H{}"),
        ("mlp_out", ("layer",), "L{}MLP"),
    ):
        frame = patching.sweep(model, *runs(pairs), site, axes, metric, progress=False)
        for row in frame.to_dataframe().itertuples():
            if row.pair == 0:
                found[name.format(*(getattr(row, axis) for axis in axes))] = row.effect
            else:
                assert row.effect == pytest.approx(0, abs=1e-5)
    assert found == pytest.approx(NODE_EFFECTS, abs=1e-5)
    truth = [name in CIRCUIT_NODES for name in found]
    assert roc_auc_score(truth, [abs(effect) for effect in found.values()]) == 1.0


def test_edge_patching_finds_exactly_the_circuits_edges_with_the_values_worked_out(model, pairs):
    effects = edge_sweep(model, *runs(pairs), patching.logit(pairs.target), progress=False)
    found = dict(zip(effects.coords["edge"], effects.effect()[0].tolist(), strict=True))
    assert found == pytest.approx(dict.fromkeys(found, 0.0) | EDGE_EFFECTS, abs=1e-5)
    assert effects.effect()[1].abs().max() < 1e-5
    strongest = sorted(found, key=lambda name: -abs(found[name]))[: len(CIRCUIT_EDGES)]
    assert set(strongest) == set(CIRCUIT_EDGES)
    truth = [name in CIRCUIT_EDGES for name in found]
    assert roc_auc_score(truth, [abs(effect) for effect in found.values()]) == 1.0


@pytest.mark.parametrize("receiver", ["L0H0.v", "L1H1.k", "L1H1.v", "output", "L1H0.v", "L1MLP"])
def test_path_patching_finds_who_tells_a_receiver_something(model, pairs, receiver):
    result = path_patch(model, *runs(pairs), receiver, patching.logit(pairs.target), progress=False)
    found = dict(zip(result.coords["sender"], result.effect()[0].tolist(), strict=True))
    expected = {
        edge.split("->")[0]: effect
        for edge, effect in EDGE_EFFECTS.items()
        if edge.endswith(f"->{receiver}")
    }
    assert found == pytest.approx(dict.fromkeys(found, 0.0) | expected, abs=1e-5)


def test_joint_receivers_do_what_neither_does_alone(model, pairs):
    result = path_patch(
        model,
        *runs(pairs),
        "L1H1.kv",
        patching.logit(pairs.target),
        senders="L0H0",
        progress=False,
    )
    # Looks at position 3 and sees the motif there: more than 0.96 + 1.0.
    assert result.effect()[0, 0].item() == pytest.approx((5 * 9 + 0.6) / 10 - 0.6, abs=1e-5)


def test_effects_along_whole_paths_are_those_worked_out(model, pairs):
    root = math.sqrt(5)
    expected = {
        "pos2->L0H0.v->L1H1.v->output": 0.5 * 6 / 6,
        "pos2->L0H0.v->L1H1.k->output": (root * 3 + 0.6) / (root + 5) - 0.6,
        "pos2->L0H0.v->L1H1->output": HALF_MOTIF,
        "pos2->L0H0.v->L1H1": HALF_MOTIF,
        "pos2->L0H0.v": HALF_MOTIF,
        "pos2->L0H0.v->output": 0.0,
        "pos2->L0H0.v->L1H0.v->output": 0.0,
        "pos5->L0MLP->L1MLP->output": 0.1,
        "pos5->L0H1.v->L1H0.v->output": -0.005,
    }
    metric = patching.logit(pairs.target)
    result = follow_paths(model, *runs(pairs), list(expected), metric, progress=False)
    found = dict(zip(result.coords["path"], result.effect()[0].tolist(), strict=True))
    assert found == pytest.approx(expected, abs=1e-5)


def test_edge_attribution_is_the_derivative_worked_out(model, pairs):
    effects = edge_attribution(model, *runs(pairs), patching.logit(pairs.target), progress=False)
    found = dict(zip(effects.coords["edge"], effects.effect()[0].tolist(), strict=True))
    # A sixth of the weight moves per unit of score, from a mean of 0.6 to the tag of 3.
    by_key = math.log(5) * (3 - 0.6) / 6
    nonlinear = {
        "L0H0->L1H1.k": by_key,
        "pos2->L0H0.v": 0.5 * (1 + by_key),
        "pos3->L0H0.v": 0.5 * (1 + by_key),
    }
    expected = dict.fromkeys(found, 0.0) | EDGE_EFFECTS | nonlinear
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("steps", [0, 5])
@pytest.mark.parametrize("along", ["inputs", "edges"])
def test_a_circuit_from_attribution_is_the_planted_one(model, pairs, steps, along):
    circuit = Circuit.from_edge_attribution(
        model,
        pairs,
        metric=patching.logit(pairs.target),
        top_k=5,
        steps=steps,
        along=along,
        progress=False,
    )
    assert {edge.name for edge in circuit.edges} == set(CIRCUIT_EDGES)
    assert circuit.output == "class 1"


def test_the_planted_circuit_is_as_faithful_as_worked_out(model, pairs):
    effects = edge_sweep(model, *runs(pairs), patching.logit(pairs.target), progress=False)
    circuit = Circuit.from_effects(effects, top_k=5)
    found = circuit.faithfulness(model, pairs, progress=False)
    # The mover sees the motif through clean edges, everything else is as in the corrupted run.
    kept = 0.5 * 9 + 0.1 * 0.6 + 0.03 - 0.1 + 0.05
    assert found.circuit[0].item() == pytest.approx(kept, abs=1e-5)
    share = (kept - CORRUPTED_LOGIT) / (CLEAN_LOGIT - CORRUPTED_LOGIT)
    assert found.of_circuit == pytest.approx(share, abs=1e-5)
    assert circuit.prune().edges == circuit.edges


def test_without_any_one_of_its_edges_the_planted_circuit_loses_what_was_worked_out(model, pairs):
    effects = edge_sweep(model, *runs(pairs), patching.logit(pairs.target), progress=False)
    circuit = Circuit.from_effects(effects, edges=CIRCUIT_EDGES)
    found = circuit.minimality(model, pairs, progress=False)
    gap, whole = CLEAN_LOGIT - CORRUPTED_LOGIT, 4.56
    root = math.sqrt(5)
    half = (root * 6 + 0.6) / (root + 5)
    expected = {
        "pos2->L0H0.v": whole - half,
        "pos3->L0H0.v": whole - half,
        "L0H0->L1H1.k": whole - 1.6,
        "L0H0->L1H1.v": whole - 1.56,
        "L1H1->output": whole - 0.6,
    }
    losses = dict(zip(found.parts, (found.loss * gap).tolist(), strict=True))
    assert losses == pytest.approx(expected, abs=1e-5)
