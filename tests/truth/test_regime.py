"""The regime machine: closed forms, an oracle by enumeration, and that aliasing is real."""

from __future__ import annotations

import doctest
import importlib
import itertools
from math import gcd

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError, SeriesShapeError
from tstlens.truth.regime import RegimeMachine, RegimeSeries

SIZES = [
    {},
    {"seed": 3},
    {"n_states": 40, "n_edges": 2, "n_prototypes": 7, "patch_len": 8, "seed": 1},
    {"n_states": 50, "n_edges": 4, "n_prototypes": 10, "edge_probabilities": (0.4, 0.3, 0.2, 0.1)},
]
by_sizes = pytest.mark.parametrize("sizes", SIZES)


@by_sizes
def test_every_state_reaches_every_other_in_no_rhythm(sizes):
    machine = RegimeMachine(**sizes)
    graph = nx.DiGraph([(a, int(b)) for a, row in enumerate(machine.successors) for b in row])
    assert len(graph) == machine.n_states
    assert nx.is_strongly_connected(graph) and nx.is_aperiodic(graph)
    assert not any(graph.has_edge(state, state) for state in graph)
    assert {degree for _, degree in graph.in_degree()} == {machine.n_edges}
    assert {degree for _, degree in graph.out_degree()} == {machine.n_edges}
    valid = torch.tensor(nx.to_numpy_array(graph, nodelist=range(machine.n_states))) > 0
    assert torch.equal(machine.valid_transitions, valid)


@by_sizes
def test_the_stationary_distribution_is_the_limit_of_many_steps_and_uniform(sizes):
    machine = RegimeMachine(**sizes)
    limit = torch.linalg.matrix_power(machine.transition, 500)[0]
    torch.testing.assert_close(machine.stationary, limit)
    torch.testing.assert_close(limit, torch.full_like(limit, 1 / machine.n_states))
    torch.testing.assert_close(machine.transition.sum(1), torch.ones_like(limit))


@by_sizes
def test_states_share_prototypes_but_the_successors_of_a_state_do_not(sizes):
    machine = RegimeMachine(**sizes)
    per_prototype = machine.prototype_of.bincount(minlength=machine.n_prototypes)
    assert per_prototype.min() >= 2 and per_prototype.max() - per_prototype.min() <= 1
    shown = machine.prototype_of[machine.successors]
    assert all(len(set(row.tolist())) == machine.n_edges for row in shown)
    assert torch.equal(machine.valid_next.sum(1), torch.full((machine.n_states,), machine.n_edges))
    state, edge = 5, 1
    following = int(machine.successors[state, edge])
    assert machine.successor(state, int(machine.prototype_of[following])) == following
    never = int((~machine.valid_next[state]).nonzero()[0, 0])
    with pytest.raises(ArgumentError, match=f"prototype {never} cannot follow state 5"):
        machine.successor(state, never)


def test_prototypes_are_orthogonal_of_equal_size():
    machine = RegimeMachine(seed=2)
    products = machine.prototypes @ machine.prototypes.T / machine.patch_len
    torch.testing.assert_close(products, torch.eye(machine.n_prototypes).double())


def test_a_sample_walks_along_valid_edges_with_the_right_frequencies():
    machine = RegimeMachine(edge_probabilities=(0.6, 0.3, 0.1))
    data = machine.sample(2000, 20, seed=1)
    now, after = data.states[:, :-1].flatten(), data.states[:, 1:].flatten()
    assert machine.valid_transitions[now, after].all()
    counts = torch.zeros(36, 36).double().index_put_((now, after), torch.ones(()).double(), True)
    observed = counts / counts.sum(1, keepdim=True)
    # About 1050 steps leave each state: a standard error of at most 0.016.
    assert (observed - machine.transition).abs().max() < 5 * 0.016
    first = data.states[:, 0].bincount(minlength=36) / 2000
    assert (first - 1 / 36).abs().max() < 5 * (1 / 36 / 2000) ** 0.5


def test_patches_are_prototypes_with_the_noise_that_was_asked_for():
    machine = RegimeMachine(noise=0.3)
    data = machine.sample(300, 10, seed=0)
    rest = data.patches - machine.prototypes[machine.prototype_of[data.states]]
    assert rest.std().item() == pytest.approx(0.3, rel=0.02)
    assert abs(rest.mean().item()) < 0.01
    assert torch.equal(data.next_patches, data.patches[:, 1:])
    assert torch.equal(data.series[:, 0, 24:36], data.patches[:, 2])


def by_enumeration(machine: RegimeMachine, n_patches: int) -> tuple[float, float, float]:
    """Every path of states, one after the other, into one table per word of prototypes."""
    words: dict[tuple[int, ...], np.ndarray] = {}
    transition, shown = machine.transition.numpy(), machine.prototype_of.numpy()
    for path in itertools.product(range(machine.n_states), repeat=n_patches):
        weight = machine.stationary[path[0]].item()
        for a, b in itertools.pairwise(path):
            weight *= transition[a, b]
        if weight:
            word = tuple(int(shown[state]) for state in path)
            table = words.setdefault(word, np.zeros(machine.n_states))
            table[path[-1]] += weight
    accuracy = mass = known = 0.0
    for table in words.values():
        following = np.zeros(machine.n_prototypes)
        for state, weight in enumerate(table):
            for after in range(machine.n_states):
                following[shown[after]] += weight * transition[state, after]
        accuracy += following.max()
        known += table.max()
        for state, weight in enumerate(table):
            may = {shown[after] for after in range(machine.n_states) if transition[state, after]}
            mass += weight * sum(following[one] for one in may) / table.sum()
    return accuracy, mass, known


@pytest.mark.parametrize("n_patches", [1, 2, 3])
def test_bounds_are_what_enumeration_gives(n_patches):
    machine = RegimeMachine(
        n_states=12, n_edges=2, n_prototypes=4, patch_len=4, edge_probabilities=(0.7, 0.3)
    )
    expected = by_enumeration(machine, n_patches)
    assert tuple(machine.bounds(n_patches)) == pytest.approx(expected)


@by_sizes
def test_aliasing_is_real_a_patch_alone_does_not_tell_and_history_does(sizes):
    machine = RegimeMachine(**sizes)
    one, many = machine.bounds(1), machine.bounds(6)
    assert one.state_accuracy == pytest.approx(machine.n_prototypes / machine.n_states)
    assert one.valid_mass < 0.62 and many.valid_mass > 0.99
    assert many.state_accuracy > 0.98
    best = max(machine.edge_probabilities or (1 / machine.n_edges,))
    assert one.accuracy < many.accuracy <= best + 1e-12
    assert many.accuracy == pytest.approx(best, abs=0.01)


def test_the_best_reader_reaches_the_bounds_on_series():
    machine = RegimeMachine(noise=0.1, seed=4)
    data = machine.sample(3000, 6, seed=9)
    known = machine.state_probabilities(data)
    mass = machine.valid_transition_mass(machine.forecast(data), data.states)
    right = (known.argmax(-1) == data.states).double()
    alone = machine.valid_transition_mass(machine.forecast(data, history=False), data.states)
    for pos in range(6):
        bounds = machine.bounds(pos + 1)
        assert mass[:, pos].mean().item() == pytest.approx(bounds.valid_mass, abs=0.015)
        assert right[:, pos].mean().item() == pytest.approx(bounds.state_accuracy, abs=0.035)
        assert alone[:, pos].mean().item() == pytest.approx(machine.bounds(1).valid_mass, abs=0.015)


def test_the_best_reader_is_bayes_rule_over_every_path():
    machine = RegimeMachine(n_states=6, n_edges=2, n_prototypes=3, patch_len=3, noise=0.8)
    data = machine.sample(3, 4, seed=2)
    for row in range(3):
        posterior = torch.zeros(6).double()
        for path in itertools.product(range(6), repeat=4):
            weight = machine.stationary[path[0]].clone()
            for a, b in itertools.pairwise(path):
                weight *= machine.transition[a, b]
            written = machine.prototypes[machine.prototype_of[list(path)]]
            off = ((data.patches[row].double() - written) ** 2).sum()
            posterior[path[-1]] += weight * torch.exp(-off / (2 * 0.8**2))
        torch.testing.assert_close(
            machine.state_probabilities(data)[row, -1], posterior / posterior.sum()
        )


@settings(max_examples=30)
@given(st.lists(st.floats(0, 1), min_size=9, max_size=9).filter(lambda w: sum(w) > 0.1))
def test_a_mean_of_prototypes_gives_back_its_shares(weights):
    machine = RegimeMachine()
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    mean = shares @ machine.prototypes
    torch.testing.assert_close(machine.prototype_shares(mean), shares, atol=1e-9, rtol=0)


def test_shares_are_the_nearest_point_of_the_simplex():
    from scipy.optimize import minimize

    machine = RegimeMachine()
    forecast = torch.randn(3, 12, generator=torch.Generator().manual_seed(0)).double()
    for patch, found in zip(forecast, machine.prototype_shares(forecast), strict=True):
        by_search = minimize(
            lambda w, patch=patch: float(
                ((torch.from_numpy(w) @ machine.prototypes - patch) ** 2).sum()
            ),
            np.full(9, 1 / 9),
            bounds=[(0, 1)] * 9,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            options={"ftol": 1e-12, "maxiter": 500},
        )
        np.testing.assert_allclose(found.numpy(), by_search.x, atol=1e-4)
    assert torch.equal(machine.nearest_prototype(machine.prototypes), torch.arange(9))


def test_valid_mass_of_forecasts_that_are_known():
    machine = RegimeMachine()
    states = torch.arange(36)
    truth = machine.shown_next
    assert machine.valid_transition_mass(truth, states).tolist() == pytest.approx([1.0] * 36)
    wrong = (~machine.valid_next).double() / 6
    assert machine.valid_transition_mass(wrong, states).tolist() == pytest.approx([0.0] * 36)
    uniform = torch.full((36, 9), 1 / 9)
    assert machine.valid_transition_mass(uniform, states).tolist() == pytest.approx([1 / 3] * 36)


def test_the_same_seed_repeats_and_others_differ():
    machine = RegimeMachine(seed=5)
    assert torch.equal(machine.successors, RegimeMachine(seed=5).successors)
    assert not torch.equal(machine.successors, RegimeMachine(seed=6).successors)
    one, again, other = (machine.sample(3, 8, seed=s) for s in (1, 1, 2))
    assert torch.equal(one.series, again.series) and torch.equal(one.states, again.states)
    assert not torch.equal(one.series, other.series)


def test_its_series_are_data_like_any_other():
    data = RegimeMachine().sample(5, 7, split="test")
    assert isinstance(data, TimeSeriesData) and data.series.shape == (5, 1, 84)
    part = data[[4, 0]]
    assert isinstance(part, RegimeSeries) and torch.equal(part.states, data.states[[4, 0]])
    assert part.split == "test" and repr(part).startswith("RegimeSeries('regime-machine-0', n=2")
    assert torch.equal(data.to("cpu").states, data.states)
    with pytest.raises(SeriesShapeError, match=r"expected states \[n=5, pos=7\], got \[5, 6\]"):
        RegimeSeries(data.series, states=data.states[:, :6], patch_len=12)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"n_prototypes": 36}, "n_prototypes: expected 2 to 35"),
        ({"n_edges": 9}, "n_edges: expected 2 to 8"),
        ({"patch_len": 8}, "patch_len: expected at least n_prototypes=9"),
        ({"noise": -1.0}, "noise: expected 0 or more"),
        ({"seed": -1}, "RegimeMachine.seed as an integer of at least 0, got -1"),
        ({"edge_probabilities": (0.5, 0.5)}, "expected 3 positive numbers that add up to 1"),
    ],
)
def test_machines_that_cannot_be_are_refused(sizes, words):
    with pytest.raises(ArgumentError, match=words):
        RegimeMachine(**sizes)


def test_calls_that_cannot_be_are_refused(no_shape_checks):
    machine = RegimeMachine()
    with pytest.raises(ArgumentError, match="expected n as an integer of at least 1, got 0"):
        machine.sample(0, 4)
    with pytest.raises(SeriesShapeError, match=r"expected patches \[..., patch_len=12\]"):
        machine.nearest_prototype(torch.zeros(3, 9))
    with pytest.raises(SeriesShapeError, match="point forecasts become probabilities with"):
        machine.valid_transition_mass(torch.zeros(3, 12), torch.zeros(3).long())
    with pytest.raises(ArgumentError, match="logits become probabilities with softmax"):
        machine.valid_transition_mass(torch.ones(3, 9), torch.zeros(3).long())
    with pytest.raises(ArgumentError, match="expected states in 0..35, got 0..40"):
        machine.valid_transition_mass(torch.full((2, 9), 1 / 9), torch.tensor([0, 40]))
    with pytest.raises(ArgumentError, match="paths of states"):
        machine.bounds(30)


def test_no_rhythm_is_checked_by_the_numbers_theory():
    """The length of a closed walk through a state: their greatest common divisor is 1."""
    machine = RegimeMachine(n_states=12, n_edges=2, n_prototypes=4, patch_len=4)
    power, divisor = torch.eye(12).double(), 0
    for length in range(1, 60):
        power = power @ machine.transition
        if power[0, 0] > 0:
            divisor = gcd(divisor, length)
    assert divisor == 1


def test_the_examples_in_the_documentation_run():
    results = doctest.testmod(importlib.import_module("tstlens.truth.regime"))
    assert results.attempted and not results.failed
