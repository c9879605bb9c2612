"""Latents over a data set, beside the dictionary called by hand, and probes that read them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tstlens import codebooks, probing, saes
from tstlens.errors import ArgumentError, UnknownHookError

MLP_OUT, MID, Z = "blocks.0.hook_mlp_out", "blocks.0.hook_resid_mid", "blocks.1.attn.hook_z"
QUICK = {"d_sae": 16, "steps": 20, "batch_size": 64, "progress": False}


def by_hand(model, sae, data, hook):
    """[row, pos, latent] from the cache."""
    _, cache = model.run_with_cache(data.series, mask=data.mask, names_filter=[hook])
    found = sae.encode(cache[hook]).detach()
    return found.to_dense() if found.is_sparse else found


@pytest.mark.parametrize("architecture", ["standard", "topk", "batchtopk", "gated", "jumprelu"])
def test_latents_are_what_the_dictionary_encodes_and_padding_is_zero(model, data, architecture):
    sae = saes.train(model, data, MLP_OUT, architecture, **QUICK)
    found = saes.latents(model, sae, data, batch_size=7)
    assert found.values.shape == (40, 1, 10, 16) and found.values.dtype == np.float32
    np.testing.assert_array_equal(found.observed[:, 0], data.mask)
    expected = by_hand(model, sae, data, MLP_OUT) * data.mask[..., None]
    np.testing.assert_allclose(found.values[:, 0], expected, atol=1e-6)
    rows, places = found.rows()
    assert len(rows) == int(data.mask.sum()) and (places[:, 1] == 0).all()


def test_the_model_is_as_it_was(model, data):
    sae = saes.train(model, data, MLP_OUT, **QUICK)
    other = saes.train(model, data, Z, **QUICK)
    model.add_sae(other)
    model.train()
    points, spliced = list(model.hook_dict), model.acts_to_saes
    saes.latents(model, sae, data)
    assert list(model.hook_dict) == points and model.acts_to_saes == spliced and model.training
    assert not any(point.fwd_hooks or point.bwd_hooks for point in model.hook_dict.values())
    sae.cfg.metadata.hook_name = "blocks.7.hook_mlp_out"
    with pytest.raises(UnknownHookError):
        saes.latents(model, sae, data)
    sae.cfg.metadata.hook_name = None
    with pytest.raises(ArgumentError, match="knows its hook point"):
        saes.latents(model, sae, data)
    assert list(model.hook_dict) == points and model.acts_to_saes == spliced


def test_heads_channels_and_transcoders(model, per_channel_model, full):
    joined, each, second = (
        saes.train(model, full, Z, head=head, **QUICK) for head in ("joined", "each", 1)
    )
    _, cache = model.run_with_cache(full.series, names_filter=[Z])
    np.testing.assert_allclose(
        saes.latents(model, joined, full).values[:, 0], joined.encode(cache[Z]).detach(), atol=1e-6
    )
    by_head = saes.latents(model, each, full)
    assert by_head.n_heads == 2 and by_head.values.shape == (40, 1, 10, 32)
    for head, dictionary in ((0, each), (1, each), (1, second)):
        expected = dictionary.encode(cache[Z][:, :, head]).detach()
        found = saes.latents(model, dictionary, full)
        found = found.head(head) if found.n_heads > 1 else found
        np.testing.assert_allclose(found.values[:, 0], expected, atol=1e-6)
    sae = saes.train(per_channel_model, full, MLP_OUT, **QUICK)
    found = saes.latents(per_channel_model, sae, full)
    expected = by_hand(per_channel_model, sae, full, MLP_OUT).unflatten(0, (40, 3))
    np.testing.assert_allclose(found.values, expected, atol=1e-6)
    transcoder = saes.train(model, full, MID, "transcoder", hook_out=MLP_OUT, **QUICK)
    np.testing.assert_allclose(
        saes.latents(model, transcoder, full).values[:, 0],
        by_hand(model, transcoder, full, MID),
        atol=1e-6,
    )


def test_a_codebook_says_which_codes_were_active(model, data):
    sizes = {"n_codes": 6, "k": 2, "epochs": 1, "batch_size": 20, "progress": False}
    (book,) = codebooks.fit(model, data, [MLP_OUT], **sizes).values()
    model.reset_saes()
    found = saes.latents(model, book, data)
    assert ((found.values != 0).sum(-1) == 2 * found.observed).all()


@pytest.mark.parametrize("pool", ["mean", "last", "max"])
def test_a_probe_of_a_dictionary_is_one_of_its_latents(model, data, pool):
    sae = saes.train(model, data, MLP_OUT, **QUICK)
    train, test = data[:28], data[28:]
    options = {"progress": False, "n_shuffles": 2, "pool": pool, "by": "layer"}
    found = probing.probe(model, train, test, sae=sae, **options)
    latents = [saes.latents(model, sae, half) for half in (train, test)]
    x, held = (one.pooled(pool)[:, 0] for one in latents)
    direct = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    direct.fit(x, train.labels)
    assert found.values[0] == pytest.approx(direct.score(held, test.labels), abs=1e-12)
    assert found.coords["hook"] == (latents[0].hook,) == (f"{MLP_OUT}.hook_sae_acts_post",)
    # The same as with the dictionary spliced in by hand and its point named.
    with model.saes([sae], use_error_term=True):
        spliced = probing.probe(model, train, test, hooks=latents[0].hook, **options)
    for name in ("values", "low", "high", "shuffled", "p", "q", "n_train"):
        np.testing.assert_array_equal(getattr(found, name), getattr(spliced, name))
    assert not model.acts_to_saes


def test_a_probe_of_a_dictionary_by_position_and_head(model, full):
    each = saes.train(model, full, Z, head="each", **QUICK)
    quiet = {"progress": False, "n_shuffles": 1, "kind": "ridge"}
    found = probing.probe(model, full, sae=each, by=("position", "head"), **quiet)
    assert found.axes == ("hook", "head", "pos") and found.values.shape == (1, 2, 10)
    with pytest.raises(ArgumentError, match="read at its own hook point; leave out hooks='z'"):
        probing.probe(model, full, sae=each, hooks="z", **quiet)
    with pytest.raises(ArgumentError, match="encode and decode|knows its hook point"):
        probing.probe(model, full, sae=torch.nn.Linear(8, 8), **quiet)
