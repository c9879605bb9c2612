"""Composition scores against TransformerLens' own, and against their formula for one pair."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from tstlens.errors import ArgumentError, NonlinearResidualError

pytestmark = pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated")
MODES = ("Q", "K", "V")


def hooked_transformer(model):
    """TransformerLens' model with our blocks' weights."""
    if importlib.util.find_spec("transformer_lens.HookedTransformer") is None:
        pytest.skip("TransformerLens 4 has no HookedTransformer to compare with")
    import transformer_lens

    ours = model.cfg
    cfg = transformer_lens.HookedTransformerConfig(
        n_layers=ours.n_layers,
        d_model=ours.d_model,
        n_heads=ours.n_heads,
        d_head=ours.d_head,
        d_mlp=ours.d_mlp,
        n_ctx=12,
        d_vocab=2,
        act_fn=ours.act_fn,
        eps=ours.eps,
        normalization_type=ours.normalization_type,
    )
    theirs = transformer_lens.HookedTransformer(cfg)
    for block, of_ours in zip(theirs.blocks, model.blocks, strict=True):
        block.load_state_dict(of_ours.state_dict(), strict=False)
    return theirs


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm", ["LN", "RMS"])
def test_scores_are_those_of_hooked_transformer(make_model, mode, norm):
    model = make_model(n_layers=3, normalization_type=norm)
    expected = hooked_transformer(model).all_composition_scores(mode)
    scores = model.all_composition_scores(mode)
    assert expected[0, :, 1:].min() > 0.05, "nothing is compared"
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm", ["LN", "RMS"])
def test_folding_the_norm_is_what_transformer_lens_does_on_loading(make_model, mode, norm):
    model = make_model(n_layers=3, normalization_type=norm)
    for block in model.blocks:
        torch.nn.init.uniform_(block.ln1.w, 0.2, 3.0)
    theirs = hooked_transformer(model)
    theirs.process_weights_(
        fold_ln=True,
        center_writing_weights=norm == "LN",
        center_unembed=False,
    )
    scores = model.all_composition_scores(mode, fold_ln=True)
    torch.testing.assert_close(scores, theirs.all_composition_scores(mode), atol=1e-6, rtol=1e-5)
    assert (scores - model.all_composition_scores(mode)).abs().max() > 0.01


def test_a_batch_norm_is_folded_with_its_statistics(make_model):
    model = make_model(n_layers=2, normalization_type="BN").double()
    gains = [
        torch.diag(block.ln1.w / (block.ln1.running_var + model.cfg.eps).sqrt())
        for block in model.blocks
    ]
    attn = model.blocks[1].attn
    first = gains[0] @ model.W_V[0, 1] @ model.W_O[0, 1]  # a head reads through its own norm
    later = gains[1] @ attn.W_Q[0] @ attn.W_K[0].T @ gains[1]
    expected = (first @ later).norm() / first.norm() / later.norm()
    scores = model.all_composition_scores("Q", fold_ln=True)
    torch.testing.assert_close(scores[0, 1, 1, 0], expected)


def test_scores_are_of_later_layers_only_and_at_most_one(make_model):
    scores = make_model(n_layers=3).all_composition_scores("K")
    assert scores.shape == (3, 2, 3, 2) and 0 < scores.max() <= 1
    for layer in range(3):
        assert not scores[layer, :, : layer + 1].any() and scores[layer, :, layer + 1 :].all()


def test_a_head_that_reads_one_direction_composes_with_who_writes_it(make_model):
    model = make_model(n_layers=2)
    with torch.no_grad():
        for weight in (model.blocks[0].attn.W_O, model.blocks[1].attn.W_V):
            weight.zero_()
        model.blocks[0].attn.W_O[0, :, 3] = 1.0  # head 0 writes dimension 3, head 1 dimension 5
        model.blocks[0].attn.W_O[1, :, 5] = 1.0
        model.blocks[1].attn.W_V[:, 3] = 1.0  # both later heads read dimension 3
    scores = model.all_composition_scores("V")[0, :, 1]
    torch.testing.assert_close(scores, torch.tensor([[1.0, 1.0], [0.0, 0.0]]))


def test_what_has_no_scores_is_refused_with_what_to_do(make_model):
    with pytest.raises(ArgumentError, match="expected mode as 'Q', 'K' or 'V', got 'q'"):
        make_model().all_composition_scores("q")
    for options, words in (
        ({"norm_position": "post"}, "after every sublayer .post-norm.*head_influence"),
        ({"use_normalization_before_and_after": True}, "normalises what attention writes"),
        ({"n_decoder_layers": 1}, "an encoder and a decoder"),
    ):
        with pytest.raises(NonlinearResidualError, match=words):
            make_model(**options).all_composition_scores("Q")
