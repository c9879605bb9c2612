"""Codes beside SAEs that a search fits, against sae-lens and scikit-learn called directly."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from sklearn.metrics import precision_recall_curve, precision_score, recall_score

from tstlens import codebooks, saes
from tstlens.codebooks import CodeIndex
from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError

MLP_OUT, Z = "blocks.0.hook_mlp_out", "blocks.1.attn.hook_z"
STEPS = 60


def made(n, seed) -> TimeSeriesData:
    """Four classes by their level, some series padded."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 4
    series = torch.randn(n, 3, 10, generator=generator) + labels[:, None, None] * 0.7
    mask = torch.arange(10)[None] < torch.randint(5, 11, (n, 1), generator=generator)
    return TimeSeriesData(series, labels, ("a", "b", "c", "d"), mask=mask, name="toy", split="s")


@pytest.fixture(scope="module")
def train() -> TimeSeriesData:
    return made(40, 0)


@pytest.fixture(scope="module")
def test() -> TimeSeriesData:
    return made(28, 1)


@pytest.fixture(scope="module")
def fitted(make_model, train):
    model = make_model()
    hooks = [MLP_OUT, Z]
    codebooks.fit(model, train, hooks, n_codes=6, k=2, train_model=True, epochs=3, progress=False)
    return model


@pytest.fixture(scope="module")
def index(fitted, train, test) -> CodeIndex:
    return CodeIndex.build(fitted, train, test=test, saes="fit", sae_steps=STEPS, progress=False)


def read_by_hand(model, sae, data, hook):
    """Latents [row, pos, latent] of what the codebook at a hook point reads."""
    name = f"{hook}.hook_sae_input"
    _, cache = model.run_with_cache(data.series, mask=data.mask, names_filter=name)
    given = cache[name]
    if sae.cfg.reshape_activations == "hook_z":
        given = given.unflatten(-1, (model.cfg.n_heads, model.cfg.d_head))
    return sae.encode(given).detach().numpy()


@pytest.mark.parametrize(("hook", "latents", "active"), [(MLP_OUT, 6, 2), (Z, 12, 4)])
def test_latents_are_those_of_an_sae_trained_with_the_other_codebooks_in(
    fitted, index, train, test, hook, latents, active
):
    host = copy.deepcopy(fitted)
    host.reset_codebooks(hook)
    sae = saes.train(
        host, train, hook=hook, sae="topk", d_sae=latents, k=active, steps=STEPS, progress=False
    )
    for one, data in ((index, train), (index.test, test)):
        expected = read_by_hand(fitted, sae, data, hook)
        seen = data.mask.numpy()
        found = one.saes[hook].toarray().reshape(*seen.shape, -1)
        np.testing.assert_allclose(found[seen], expected[seen], rtol=1e-5, atol=1e-6)
        assert (found[seen] > 0).sum(1).max() <= active
    assert (expected[seen] > 0).any()


def best_by_hand(index, label, recall):
    """The highest precision of any latent, each at its highest threshold that has the recall."""
    best = -1.0
    for sparse in index.saes.values():
        seen = index.data.mask.numpy().ravel()
        hits = np.repeat(index.data.labels.numpy() == label, index.n_pos)[seen]
        for values in sparse.toarray()[seen].T:
            precisions, recalls, _ = precision_recall_curve(hits, values)  # by rising threshold
            best = max(best, precisions[np.flatnonzero(recalls >= recall - 1e-9).max()])
    return best


def test_the_latent_beside_a_code_is_the_most_precise_at_its_recall(index):
    found = index.search(label="b", min_recall=0.05, n=3, n_permutations=100)
    assert len(found) == 3
    for code in found.codes:
        rival = code.latent
        precision = best_by_hand(index, 1, code.train.recall)
        assert rival.train.precision == pytest.approx(precision)
        assert rival.train.recall >= code.train.recall - 1e-9
        for one, score in ((index, rival.train), (index.test, rival.test)):
            seen = one.data.mask.numpy().ravel()
            hits = np.repeat(one.data.labels.numpy() == 1, one.n_pos)[seen]
            on = one.saes[rival.place].toarray()[seen, rival.index] >= rival.threshold
            assert score.precision == pytest.approx(precision_score(hits, on))
            assert score.recall == pytest.approx(recall_score(hits, on))
            assert score.support == on.sum()


def test_the_same_search_after_saving_and_loading(index, tmp_path):
    index.save(tmp_path / "codes")
    again = CodeIndex.load(tmp_path / "codes")
    assert list(again.neurons) == list(index.neurons)
    asked = {"label": "b", "min_recall": 0.05, "n_permutations": 100}
    assert again.search(**asked).to_dataframe().equals(index.search(**asked).to_dataframe())


@pytest.mark.parametrize("kind", ["a table that heads share", "one head"])
def test_an_sae_has_as_many_latents_as_there_are_codes(make_model, make_book, train, kind):
    model = make_model()
    book = make_book(d_in=4, n_codes=5)
    model.add_codebook(book, Z, head=1 if kind == "one head" else None)
    index = CodeIndex.build(model, train, saes="fit", sae_steps=5, progress=False)
    n_units = 5 if kind == "one head" else 10
    assert index.book(Z).n_units == index.saes[Z].shape[1] == n_units
    seen = train.mask.numpy().ravel()
    per_place = index.saes[Z].getnnz(1)[seen].max()
    assert per_place <= (1 if kind == "one head" else 2)


def test_no_training_steps_are_refused(fitted, train):
    with pytest.raises(ArgumentError, match="sae_steps as an integer of at least 1, got 0"):
        CodeIndex.build(fitted, train, saes="fit", sae_steps=0)
