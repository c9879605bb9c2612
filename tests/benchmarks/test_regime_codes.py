"""Whether codebooks find the states of regime machines, and keep real models' accuracy.

``pytest tests/benchmarks/test_regime_codes.py -s`` prints what was measured: three machines with a
model and codebooks each take about four minutes on one core, the classifiers about six.
"""

from __future__ import annotations

import pytest
import torch

import tstlens
from tstlens import truth

codebooks = pytest.importorskip("tstlens.codebooks")

LEAST_NMI = 0.8
LEAST_GAIN = 0.3  # of precision, all codes of a state beside the best neuron at their recall
MOST_LOST = 0.03  # of the valid-transition mass


@pytest.fixture(autouse=True)
def one_core():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def experiment():
    torch.set_num_threads(1)
    return truth.regime_experiment(seeds=(0, 1, 2), progress=False)


def test_codes_are_hidden_states(experiment):
    print("\n" + experiment.summary().round(3).to_string())
    for score in experiment.scores:
        best = score.states[score.best_hook]["all"]
        assert best.nmi >= LEAST_NMI
        assert best.nmi > score.references["patch alone"]["all"].nmi + 0.04
        assert score.mass["codebooks"] >= score.mass["original"] - MOST_LOST


def test_all_codes_of_a_state_are_more_precise_than_any_neuron_of_the_original(experiment):
    """Beside neurons of the tuned model the gain is smaller, and single codes have none."""
    for score in experiment.scores:
        precision = score.precision(score.best_hook)
        single = score.precision(score.best_hook, together=False)
        print(f"\nby state {precision}, by code {single}")
        assert precision["codes"] >= precision["original"] + LEAST_GAIN
        assert precision["codes"] >= precision["tuned"] + 0.2


def test_swapped_codes_carry_the_state_along(experiment):
    for score in experiment.scores:
        for swap in score.swaps:
            print(f"\n{swap}")
            assert swap.success >= swap.random + 0.4
            assert swap.aliased_success >= swap.aliased_random + 0.4
            assert swap.after < 0.2 * swap.before
        for within, between in score.divergence.values():
            assert within < 0.2 * between


@pytest.mark.parametrize("name", ["japanese-vowels", "basic-motions"])
@pytest.mark.parametrize("place", ["hook_mlp_out", "attn.hook_z"])
@pytest.mark.parametrize("k", [1, 4])
def test_end_to_end_tuned_accuracy_stays_within_two_points(name, place, k):
    dataset = {"japanese-vowels": "JapaneseVowels", "basic-motions": "BasicMotions"}[name]
    train, test = (tstlens.load_dataset(dataset, split=split) for split in ("train", "test"))
    model = tstlens.HookedTST.from_pretrained(name)

    def right() -> int:
        with torch.no_grad():
            return int((model(test.series, mask=test.mask).argmax(-1) == test.labels).sum())

    before = right()
    hooks = [f"blocks.{layer}.{place}" for layer in range(model.cfg.n_layers)]
    codebooks.fit(model, train, hooks, n_codes=64, k=k, train_model=True, epochs=20, progress=False)
    after = right()
    print(f"\n{name}, {place}, k={k}: {after} of {len(test)}, original {before}")
    assert all(book.n_groups == (1 if "mlp" in place else model.cfg.n_heads)
               for book in model.acts_to_codebooks.values())  # fmt: skip
    assert (before - after) / len(test) <= 0.02
