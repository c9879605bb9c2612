"""Codes against hidden states: models that know them, models that do not, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon

pytest.importorskip("sae_lens", reason="codebooks need sae-lens")

from tstlens import truth
from tstlens.errors import ArgumentError, HookError
from tstlens.truth.regime import RegimeMachine
from tstlens.truth.regime_codebooks import (
    _pairs,
    _precisions,
    code_divergence,
    divergence,
    score_regime,
    swap_states,
)
from tstlens.truth.scores import score_states

FIRST, LAST = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"
SIZES = {"n_states": 12, "n_edges": 2, "n_prototypes": 4, "patch_len": 4, "noise": 0.1}


@pytest.fixture(scope="module")
def machine():
    return RegimeMachine(seed=1, **SIZES)


@pytest.fixture(scope="module")
def found():
    return truth.regime_experiment(
        seeds=[1],
        hooks=[FIRST, LAST],
        machine=SIZES,
        model={"n_layers": 2, "d_model": 8, "n_heads": 2, "d_mlp": 16, "n_pos": 6},
        steps=500,
        n_fit=400,
        n_score=80,
        min_support=5,
        n_codes=24,
        epochs=6,
        progress=False,
    )


@pytest.fixture
def spliced(machine):
    model = truth.regime_model(machine, n_pos=6, n_layers=2, d_model=8, n_heads=2, d_mlp=16)
    truth.fit_regime(
        model, machine, [FIRST, LAST], n_series=60, n_codes=16, epochs=1, progress=False
    )
    return model


def test_codes_of_a_trained_model_are_states(found):
    score = found.scores[0]
    patch = score.references["patch alone"]["all"].purity
    assert score.states[score.best_hook]["all"].purity > patch + 0.1
    assert score.references["best possible"]["known"].nmi == pytest.approx(1)
    assert score.mass["codebooks"] > score.mass["patch alone"] + 0.05
    assert abs(score.mass["codebooks"] - score.mass["original"]) < 0.06
    for swap in score.swaps:
        assert swap.success > swap.random + 0.2
        assert swap.after < 0.5 * swap.before
    for within, between in score.divergence.values():
        assert within < 0.5 * between


def test_what_must_be_so_behind_the_last_attention_is_so(found):
    score = found.scores[0]
    alone, last, both = score.swaps
    assert (alone.hooks, last.hooks, both.hooks) == ((FIRST,), (LAST,), (FIRST, LAST))
    assert [swap.by_construction for swap in score.swaps] == [False, True, True]
    assert last.after == pytest.approx(0, abs=1e-9) and last.success == last.source
    assert score.divergence[LAST][0] == pytest.approx(0, abs=1e-9)
    assert alone.n == last.n > alone.n_aliased > 0


def test_the_frame_has_every_number_with_its_control(found):
    frame = found.to_dataframe()
    assert set(frame["seed"]) == {1}
    row = frame[(frame["measure"] == "swap success") & (frame["where"] == FIRST)].iloc[0]
    swap = found.scores[0].swaps[0]
    assert (row["value"], row["control"], row["control_is"]) == (
        swap.success,
        swap.random,
        "random codes",
    )
    masses = frame[frame["measure"] == "valid-transition mass"].set_index("where")["value"]
    assert masses.to_dict() == found.scores[0].mass
    table = found.summary().set_index(["measure", "where"])
    assert (table["min"] <= table["mean"] + 1e-12).all()


def test_the_figure_shows_codes_beside_their_controls(found):
    for result in (found, found.scores[0]):
        figure = result.figure()
        shown = {trace.name: dict(zip(trace.y, trace.x, strict=True)) for trace in figure.data}
        swap = found.scores[0].swaps[0]
        assert shown["codes"]["swap L0 resid_post"] == swap.success
        assert shown["control"]["swap L0 resid_post"] == swap.random
        assert shown["original model"]["valid mass"] == found.scores[0].mass["original"]


def test_an_oracles_codes_are_perfectly_precise_and_random_ones_are_not(machine):
    samples = tuple(machine.sample(120, 6, seed=s) for s in (1, 2))
    states = tuple(data.states for data in samples)
    generator = np.random.default_rng(0)
    columns = tuple(generator.standard_normal((120 * 6, 5)) for _ in samples)
    hidden = tuple(
        {
            "original": {"noise": values},
            "tuned": {"flag": (held.numpy().ravel() == 3)[:, None] * 1.0},
        }
        for values, held in zip(columns, states, strict=True)
    )
    score = score_states(states[1], states[1], chosen_on=(states[0], states[0]))
    rows = _precisions("hook", states, samples, score, hidden, 5)
    assert len(rows) == 24  # twelve states, each by its one code and by all of them
    assert all(row.precision == row.recall == 1 for row in rows)
    share = [float((states[1] == row.state).double().mean()) for row in rows]
    noise = [row.neurons["original"] for row in rows]
    assert np.allclose(noise, share, atol=0.06)  # all positions are above its threshold
    flags = {row.state: row.neurons["tuned"] for row in rows}
    assert flags.pop(3) == 1 and max(flags.values()) < 0.5


def test_pairs_differ_in_state_and_both_can_be_known(machine):
    data = machine.sample(50, 6, seed=3)
    known = machine.state_probabilities(data).amax(-1) >= 0.99
    pairs = _pairs(data.states, known, np.random.default_rng(0))
    assert pairs
    for pos, (series, source, other) in pairs:
        here = data.states[:, pos]
        assert bool((here[series] != here[source]).all() & (here[other] != here[source]).all())
        assert bool((known[series, pos] & known[source, pos] & known[other, pos]).all())


def test_divergence_is_scipys_and_that_of_two_coins():
    drawn = torch.rand(2, 20, 5, generator=torch.Generator().manual_seed(0)).double()
    drawn = drawn.masked_fill(drawn < 0.2, 0)
    drawn = drawn / drawn.sum(-1, keepdim=True)
    expected = jensenshannon(*drawn.numpy(), base=2, axis=-1) ** 2
    assert np.allclose(divergence(*drawn), expected)
    one, other = torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([[0.5, 0.5], [0.0, 1.0]])
    assert torch.allclose(
        divergence(one, other), torch.tensor([0.0, 1.0]).to(divergence(one, other))
    )


def test_a_swap_is_a_run_with_the_sources_codes(machine, spliced):
    """One pair by hand: the k-hot vector of the source put in with a hook."""
    data = machine.sample(16, 6, seed=4)
    known = torch.ones(16, 6, dtype=torch.bool)
    swap = swap_states(spliced, machine, data, known, 0)[0]
    pairs = _pairs(data.states, known, np.random.default_rng(0))
    name = f"{FIRST}.hook_sae_acts_post"
    own = machine.prototype_shares(spliced(data.series).detach())
    _, cache = spliced.run_with_cache(data.series, names_filter=[name])
    right, runs = 0, 0
    for pos, (series, source, _) in pairs:
        for a, b in zip(series.tolist(), source.tolist(), strict=True):
            target = int(data.states[b, pos])
            if machine.valid_next[target, own[a, pos].argmax()]:
                continue

            def put(acts, hook, pos=pos, b=b):
                acts = acts.clone()
                acts[:, pos] = cache[name][b, pos]
                return acts

            output = spliced.run_with_hooks(data.series[a : a + 1], fwd_hooks=[(name, put)])
            after = machine.prototype_shares(output.detach())[0, pos]
            right += bool(machine.valid_next[target, after.argmax()])
            runs += 1
    assert runs == swap.n and swap.success == pytest.approx(right / runs)


def test_codes_that_say_nothing_are_as_divergent_as_random_pairs(machine, spliced):
    data = machine.sample(80, 6, seed=5)
    ids = torch.randint(0, 4, data.states.shape, generator=torch.Generator().manual_seed(0))
    within, between = code_divergence(spliced, machine, data, ids, 0)
    assert within == pytest.approx(between, rel=0.1)


def test_the_same_seed_gives_the_same_score(machine, spliced):
    one, again, other = (
        score_regime(spliced, machine, n_series=30, min_support=3, seed=seed) for seed in (0, 0, 1)
    )
    assert one.to_dataframe().equals(again.to_dataframe())
    assert one.mass != other.mass
    assert set(one.mass) == {
        "codebooks",
        "without codebooks",
        "best possible",
        "patch alone",
        "chance",
    }
    assert list(one.codes[0].neurons) == ["tuned"]
    assert len(spliced.acts_to_codebooks) == 2 and spliced(machine.sample(1, 6).series).ndim == 3


def test_what_cannot_be_scored_is_refused(machine, spliced):
    spliced.acts_to_codebooks[FIRST].set_k(2)
    with pytest.raises(ArgumentError, match=r"one code per position: expected k=1 .* got k=2"):
        score_regime(spliced, machine)
    spliced.reset_codebooks()
    with pytest.raises(HookError, match="no codebook is on the model"):
        score_regime(spliced, machine)
    with pytest.raises(ArgumentError, match="seeds: expected at least one"):
        truth.regime_experiment(seeds=[])
    other = RegimeMachine(**{**SIZES, "patch_len": 5})
    truth.fit_regime(spliced, machine, [FIRST], n_series=20, n_codes=4, epochs=1, progress=False)
    with pytest.raises(ArgumentError, match="several patches of 5 samples, .* got n_time=24"):
        score_regime(spliced, other)
