"""Scores of codebooks against the same numbers computed by hand."""

from __future__ import annotations

import math

import pytest

from tests.codebooks.test_fitting import MLP, Z, make_data, make_model
from tstlens import codebooks
from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError, HookError


@pytest.fixture
def fitted():
    model, data = make_model(), make_data(30, lengths=True)
    original = make_model()
    codebooks.fit(model, data, [MLP, Z], n_codes=6, k=2, train_model=True, epochs=5, progress=False)
    return model, original, data


def test_rows_are_what_they_say(fitted):
    model, original, data = fitted
    found = codebooks.score(model, data, original=original, train=data, sae_steps=20)
    assert list(found.task) == [
        "codebooks",
        "without codebooks",
        "original",
        "original, codebooks untuned",
        "random tables",
        "SAEs",
    ]

    def accuracy(model):
        right = model(data.series, mask=data.mask).argmax(-1) == data.labels
        return float(right.double().mean())

    assert found.task["codebooks"]["accuracy"] == accuracy(model)
    assert found.task["original"]["accuracy"] == accuracy(original)
    with model.snapping(False):
        assert found.task["without codebooks"]["accuracy"] == accuracy(model)
    frame = found.to_dataframe()
    assert len(frame) == 2 + 4 * 2
    assert frame[frame.row == "original"].hook.tolist() == [""]
    random = frame[(frame.row == "random tables") & (frame.hook == MLP)].explained_variance.item()
    own = frame[(frame.row == "codebooks") & (frame.hook == MLP)].explained_variance.item()
    assert random < own


def test_numbers_of_one_codebook(fitted):
    model, _, data = fitted
    found = codebooks.score(model, data).books["codebooks"][0]
    names = [f"{MLP}.hook_sae_{name}" for name in ("input", "acts_post", "output")]
    _, cache = model.run_with_cache(data.series, mask=data.mask)
    given, acts, output = (cache[name][data.mask] for name in names)
    squared = (given - output).square().sum() / (given - given.mean(0)).square().sum()
    assert found.explained_variance == pytest.approx(1 - float(squared), abs=1e-5)
    counts = (acts != 0).sum(0)
    assert counts.sum() == 2 * data.mask.sum()
    assert found.dead == int((counts == 0).sum()) and found.n_codes == 6
    share = counts[counts > 0] / counts.sum()
    entropy = float(-(share * share.log2()).sum())
    assert found.perplexity == pytest.approx(2**entropy)
    assert found.bits == pytest.approx(math.log2(15))  # 2 of 6
    assert found.entropy_bits == pytest.approx(2 * entropy)


def test_heads_have_their_own_bits(fitted):
    model, _, data = fitted
    found = codebooks.score(model, data).books["codebooks"][1]
    assert found.hook == Z and found.n_codes == 12
    assert found.bits == pytest.approx(2 * math.log2(15))


def test_what_cannot_be_scored_is_refused(fitted):
    model, original, data = fitted
    with pytest.raises(HookError, match="no codebook is on the model"):
        codebooks.score(original, data)
    with pytest.raises(ArgumentError, match="expected data with labels, or target="):
        codebooks.score(model, TimeSeriesData(data.series, mask=data.mask))
