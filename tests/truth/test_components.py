"""Models with a known circuit: the circuit holds, and a wrong one is told from a right one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tstlens.data import Pairs
from tstlens.errors import ArgumentError, UnknownNameError
from tstlens.patching import logit_diff
from tstlens.patching.circuits import Circuit, component_graph
from tstlens.truth.components import (
    BOTH,
    both_model,
    component_names,
    component_task,
    draw_both,
    fit_interchange,
    verify,
)
from tstlens.truth.programs import Program, Variable, interchange, splice_positions

BY_HAND = ["compare-windows", "same-trend", "marked-sample"]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", BY_HAND)
def test_circuits_written_by_hand_hold_under_interchange_interventions(name, seed):
    verified = component_task(name, seed).verify(n=300, seed=5)
    assert verified.holds, verified
    assert {"none", "all outside"} <= set(verified.accuracy)


@pytest.mark.parametrize("name", BY_HAND)
def test_both_kinds_of_block_and_both_classes_occur(name):
    task = component_task(name)
    assert 0.4 < task.sample(1000, seed=3).labels.float().mean() < 0.6
    kinds = {component_task(other).model.cfg.norm_position for other in BY_HAND}
    assert kinds == {"pre", "post"}


def test_a_variable_at_the_wrong_head_is_found_out():
    task = component_task("compare-windows")
    first, second, both = task.program.variables
    moved = replace(first, node="L0H2")  # this head does something else
    last = replace(both, value=lambda v: v["L0H2"] > v["L0H1"])
    wrong = replace(task, program=Program((moved, second, last), task.program.factors))
    verified = wrong.verify(n=300)
    assert verified.accuracy["none"] > 0.99  # behaviour does not show it
    assert verified.accuracy["L0H2"] < 0.9
    assert verified.accuracy["L0H0"] < 0.9  # called outside, and yet it matters
    assert not verified.holds


def test_an_untrained_model_does_not_hold():
    task = component_task("same-trend")
    task.model.init_weights(seed=3)
    assert task.verify(n=200).worst < 0.8


def test_the_program_with_replaced_values_worked_out_by_hand():
    program = Program(
        (
            Variable("L0H0", lambda v: v["a"] + v["b"], "sum"),
            Variable("L1MLP", lambda v: v["L0H0"] * v["b"], "times b"),
        ),
        {"a": (0,), "b": (1,)},
    )
    base = {"a": torch.tensor([1, 1, 1]), "b": torch.tensor([2, 2, 2])}
    source = {"a": torch.tensor([10, 10, 10]), "b": torch.tensor([3, 3, 3])}
    assert program.run(base).tolist() == [6, 6, 6]
    by_node = {"L0H0": torch.tensor([True, False, True]), "b": torch.tensor([False, True, True])}
    # 13 * 2; (1 + 3) * 3; 13 * 3
    assert program.run(base, source, by_node).tolist() == [26, 12, 39]


def test_interchange_equals_one_run_per_series_with_the_activation_written_in():
    task = component_task("same-trend")
    base, source = task.sample(4, seed=1), task.sample(4, seed=2)
    swaps = {"L0H1": torch.tensor([True, False, True, False])}
    swaps["L0MLP"] = torch.tensor([False, False, True, True])
    found = interchange(task.model, base.series, source.series, swaps)
    z, mlp = "blocks.0.attn.hook_z", "blocks.0.hook_mlp_out"
    for row in range(4):
        _, cache = task.model.run_with_cache(source.series[row : row + 1])
        hooks = []
        if swaps["L0H1"][row]:

            def head(activation, hook, cache=cache):
                activation = activation.clone()
                activation[:, :, 1] = cache[z][:, :, 1]
                return activation

            hooks.append((z, head))
        if swaps["L0MLP"][row]:
            hooks.append((mlp, lambda activation, hook, cache=cache: cache[mlp]))
        alone = task.model.run_with_hooks(base.series[row : row + 1], fwd_hooks=hooks)
        torch.testing.assert_close(found[row : row + 1], alone, rtol=1e-5, atol=1e-5)


def test_positions_are_pieces_of_the_series():
    task = component_task("same-trend")
    base, source = torch.zeros(2, 1, 24), torch.ones(2, 1, 24)
    swapped = torch.zeros(2, 6, dtype=torch.bool)
    swapped[1, 4] = True
    spliced = splice_positions(task.model, base, source, swapped)
    assert spliced[0].sum() == 0
    assert spliced[1, 0].nonzero()[:, 0].tolist() == [16, 17, 18, 19]


@pytest.mark.parametrize("name", BY_HAND)
def test_the_graphs_edges_alone_keep_what_the_model_does(name):
    task = component_task(name)
    graph = component_graph(task.model, task.model.cfg.n_time)
    assert set(task.graph.nodes) <= {node.name for node in graph.senders}
    kept = torch.zeros(len(graph.edges), dtype=torch.bool)
    kept[graph.edge_numbers(task.graph.edges)] = True
    pairs = task.pairs(40, seed=11)
    assert pairs.predicted is not None
    metric = logit_diff(pairs.target, pairs.predicted)
    circuit = Circuit(graph, kept.double(), kept, metric.name, metric.unit)
    found = circuit.faithfulness(task.model, pairs, metric=metric, progress=False)
    assert found.of_circuit == pytest.approx(1, abs=0.15)


def test_pairs_differ_in_class_and_repeat_with_the_seed():
    task = component_task("marked-sample")
    pairs, again = task.pairs(30, seed=4), task.pairs(30, seed=4)
    assert isinstance(pairs, Pairs)
    assert (pairs.target != pairs.predicted).all()
    torch.testing.assert_close(pairs.corrupted, again.corrupted, rtol=0, atol=0)
    assert task.model(pairs.clean).argmax(1).tolist() == pairs.target.tolist()
    assert task.model(pairs.corrupted).argmax(1).tolist() == again.predicted.tolist()


def test_another_seed_is_another_model_and_the_same_seed_the_same():
    one, same, other = (component_task("compare-windows", seed).model for seed in (0, 0, 1))
    for a, b in zip(one.parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert not torch.equal(one.W_Q, other.W_Q)


def test_interchange_training_moves_the_variables_where_they_belong():
    def verified(model):
        generator = torch.Generator().manual_seed(3)
        pair = draw_both(400, generator), draw_both(400, generator)
        return verify(model, BOTH, *pair, seed=0)

    untrained = both_model(0, steps=1, progress=False)
    trained = both_model(0, steps=1, progress=False)
    fit_interchange(trained, BOTH, draw_both, steps=110, progress=False)
    before, after = verified(untrained), verified(trained)
    for name in ("none", "L0H0", "L0H2", "L1MLP", "all outside"):
        assert after.accuracy[name] > max(0.78, before.accuracy[name] + 0.1), (before, after)
    again = both_model(0, steps=1, progress=False)
    for a, b in zip(again.parameters(), untrained.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_errors_say_what_there_is():
    with pytest.raises(UnknownNameError, match="did you mean 'same-trend'"):
        component_task("same-trends")
    with pytest.raises(ArgumentError, match="expected seed as an integer of at least 0"):
        component_task("same-trend", -1)
    with pytest.raises(ArgumentError, match="expected n as an integer of at least 1"):
        component_task("same-trend").sample(0)
    model = component_task("same-trend").model
    with pytest.raises(ArgumentError, match="expected steps as an integer of at least 1"):
        fit_interchange(model, BOTH, draw_both, steps=0)
    assert len(component_names()) >= 4
