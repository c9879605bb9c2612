"""Scores against planted answers: closed forms, the library called directly, random controls."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import average_precision_score, normalized_mutual_info_score

from tstlens.errors import ArgumentError, SeriesShapeError, UnknownNameError
from tstlens.truth.scores import _random_order, score_features, score_states, score_where
from tstlens.truth.tasks import planted

TASK = planted("seq-comb-multivariate", n_train=30)


def test_the_mask_itself_scores_one_and_its_opposite_the_least():
    assert score_where(TASK.mask.double(), TASK.mask).mean == 1.0
    worst = score_where(-TASK.mask.double(), TASK.mask, sign="given")
    assert (worst.auprc <= worst.density + 1e-12).all()
    assert (worst.precision == 0).all()


def test_auprc_is_sklearns():
    scores = torch.randn(30, 4, 96)
    expected = [
        average_precision_score(mask.flatten(), score.abs().flatten())
        for mask, score in zip(TASK.mask, scores, strict=True)
    ]
    found = score_where(scores, TASK.mask)
    np.testing.assert_allclose(found.auprc, expected)
    assert found.mean == pytest.approx(np.mean(expected))
    assert found.low < found.mean < found.high
    assert found.unit == "channel x time" and found.n_scored == 30


@pytest.mark.parametrize("n_true", [1, 2, 4])
def test_random_order_is_the_mean_over_all_orders(n_true):
    n = 6
    every = [
        average_precision_score([i in chosen for i in range(n)], np.arange(n)[::-1])
        for chosen in itertools.combinations(range(n), n_true)
    ]
    assert _random_order(n_true, n) == pytest.approx(np.mean(every))


def test_random_scores_reach_what_random_order_promises():
    task = planted("low-var", n_train=200)
    found = score_where(torch.rand(200, 2, 96), task.mask)
    assert found.low < found.random.mean() < found.high
    assert 0 < found.random.mean() - found.density.mean() < 0.03
    assert found.precision.mean() == pytest.approx(found.density.mean(), abs=0.02)


def test_signs_are_used_as_asked():
    scores = -TASK.mask.double()
    assert score_where(scores, TASK.mask, sign="absolute").mean == 1.0
    constant = score_where(scores, TASK.mask, sign="positive")
    np.testing.assert_allclose(constant.auprc, constant.density)  # all tied
    np.testing.assert_allclose(constant.precision, constant.density)


def test_precision_and_recall_at_the_top_by_hand():
    mask = torch.tensor([[[True, True, False, False, False, True, False, False]]])
    scores = torch.tensor([[[0.9, 0.1, 0.8, 0.0, 0.0, 0.7, 0.0, 0.2]]])
    found = score_where(scores, mask)  # the top 3 are samples 0, 2, 5
    assert found.precision[0] == found.recall[0] == pytest.approx(2 / 3)
    half = score_where(scores, mask, top=0.25)  # the top 2 are samples 0, 2
    assert (half.precision[0], half.recall[0]) == (pytest.approx(1 / 2), pytest.approx(1 / 3))
    assert np.isnan([found.low, found.high]).all()  # one series has no interval


def test_positions_are_spread_over_their_samples():
    cells = tuple((start, start + 8) for start in range(0, 96, 8))
    by_pos = torch.rand(30, 4, 12)
    over_time = score_where(by_pos.repeat_interleave(8, 2), TASK.mask)
    np.testing.assert_allclose(score_where(by_pos, TASK.mask, cells=cells).auprc, over_time.auprc)


def test_a_map_without_channels_is_scored_on_when():
    when = score_where(TASK.mask.any(1).double(), TASK.mask)
    assert when.mean == 1.0 and when.unit == "time"
    assert when.density == pytest.approx(TASK.mask.any(1).double().mean(1).numpy())


def test_series_without_an_answer_do_not_count():
    mask = TASK.mask.clone()
    mask[3] = False
    mask[5] = True
    found = score_where(torch.rand(30, 4, 96), mask)
    assert np.isnan(found.auprc[[3, 5]]).all() and found.n_scored == 28
    assert found.to_dataframe()["auprc"].notna().sum() == 28
    assert found.mean == pytest.approx(np.nanmean(found.auprc))


def test_bad_attributions_are_refused(no_shape_checks):
    with pytest.raises(SeriesShapeError, match=r"expected an attribution \[series=30, channel=4"):
        score_where(torch.rand(30, 4, 12), TASK.mask)
    with pytest.raises(SeriesShapeError, match="a map over positions needs cells="):
        score_where(torch.rand(30, 12), TASK.mask)
    with pytest.raises(ArgumentError, match="samples that tile 0..96"):
        score_where(torch.rand(30, 2), TASK.mask, cells=[(0, 40), (48, 96)])
    with pytest.raises(ArgumentError, match="expected finite scores"):
        score_where(torch.full((30, 4, 96), torch.nan), TASK.mask)
    with pytest.raises(UnknownNameError, match="did you mean 'absolute'"):
        score_where(torch.rand(30, 4, 96), TASK.mask, sign="absolut")
    with pytest.raises(
        ArgumentError, match="expected top as a number between 0 and 1 or None, got 5"
    ):
        score_where(torch.rand(30, 4, 96), TASK.mask, top=5)
    with pytest.raises(ArgumentError, match="some samples decide and some do not, got none"):
        score_where(torch.rand(30, 4, 96), torch.zeros(30, 4, 96, dtype=torch.bool))
    with pytest.raises(SeriesShapeError, match="expected a bool mask"):
        score_where(torch.rand(30, 4, 96), TASK.mask.double())


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=4, max_size=60))
def test_codes_score_as_a_count_by_hand(places):
    ids, states = (torch.tensor(column) for column in zip(*places, strict=True))
    found = score_states(ids, states, n_shuffles=2)
    assert found.nmi == pytest.approx(normalized_mutual_info_score(states, ids))
    hits = 0
    for code, precision, support in zip(found.codes, found.precision, found.support, strict=True):
        inside = [state for used, state in places if used == code]
        most = max(inside.count(state) for state in set(inside))
        assert support == len(inside) and precision == pytest.approx(most / len(inside))
        hits += most
    assert found.purity == pytest.approx(hits / len(places))


def test_splitting_a_state_over_codes_keeps_it_pure_and_lowers_the_information():
    states = torch.arange(4).repeat(100)
    split = states * 2 + torch.arange(400) // 4 % 2
    found = score_states(split, states)
    assert found.purity == 1.0
    # H(state) = 2 bits, H(code) = 3 bits, I = 2 bits.
    assert found.nmi == pytest.approx(2 * 2 / (2 + 3))
    np.testing.assert_allclose(found.recall, 0.5)
    assert found.shuffled_nmi < 0.05 and found.shuffled_purity < 0.4


def test_the_state_of_a_code_is_chosen_on_other_series_where_asked():
    states = torch.tensor([0, 0, 1, 1])
    chosen = (torch.tensor([7, 7, 8]), torch.tensor([1, 1, 1]))
    found = score_states(torch.tensor([7, 7, 8, 9]), states, chosen_on=chosen, n_shuffles=1)
    table = found.to_dataframe().set_index("code")
    assert table["state"].tolist() == [1, 1, -1]  # code 9 never came up
    assert table["precision"].tolist() == [0.0, 1.0, 0.0]
    assert table["recall"].tolist() == [0.0, 0.5, 0.0]
    assert found.purity == 0.25


def test_padded_positions_do_not_count():
    ids, states = torch.randint(0, 4, (5, 10)), torch.randint(0, 3, (5, 10))
    observed = torch.arange(10) < torch.tensor([[10], [7], [3], [9], [1]])
    whole = score_states(ids[observed], states[observed], seed=1)
    junk = torch.where(observed, ids, 99)
    padded = score_states(junk, states, observed=observed, seed=1)
    assert (padded.nmi, padded.purity, padded.n) == (whole.nmi, whole.purity, 30)
    assert padded.shuffled_nmi == whole.shuffled_nmi


def test_many_codes_look_informative_until_shuffled():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 256, (600,), generator=generator)
    states = torch.randint(0, 36, (600,), generator=generator)
    found = score_states(ids, states)
    assert found.nmi > 0.5  # nothing but chance
    assert found.nmi == pytest.approx(found.shuffled_nmi, abs=0.02)
    assert found.purity == pytest.approx(found.shuffled_purity, abs=0.05)


def test_bad_codes_are_refused(no_shape_checks):
    with pytest.raises(SeriesShapeError, match="score one of the k at a time"):
        score_states(torch.zeros(4, 3, 2).long(), torch.zeros(4, 3).long())
    with pytest.raises(ArgumentError, match="at least one observed position"):
        score_states(torch.zeros(2).long(), torch.zeros(2).long(), observed=torch.zeros(2).bool())
    with pytest.raises(ArgumentError, match="got a negative one"):
        score_states(torch.tensor([-1, 0]), torch.tensor([0, 0]))


def test_features_are_matched_as_an_independent_correlation_says():
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(300, 5, generator=generator)
    mixing = torch.randn(5, 8, generator=generator)
    latents = truth @ mixing + 0.1 * torch.randn(300, 8, generator=generator)
    table = np.corrcoef(truth.T.numpy(), latents.T.numpy())[:5, 5:]
    rows, columns = linear_sum_assignment(-np.abs(table))
    found = score_features(latents, truth)
    assert found.latent.tolist() == columns.tolist()
    np.testing.assert_allclose(found.correlation, table[rows, columns], atol=1e-6)
    assert found.mcc == pytest.approx(np.abs(table[rows, columns]).mean(), abs=1e-6)
    assert 0 < found.shuffled_mcc < 0.2 < found.mcc


def test_features_without_a_latent_and_latents_that_never_fire_count_nothing():
    truth = torch.rand(40, 3)
    latents = torch.stack([truth[:, 1] * 2, torch.full((40,), 0.3)], 1)
    found = score_features(latents, truth, n_shuffles=1)
    assert found.latent[1] == 0 and found.correlation[1] == pytest.approx(1)
    assert found.mcc == pytest.approx(1 / 3)
    assert found.to_dataframe()["latent"].tolist().count(-1) == 1
