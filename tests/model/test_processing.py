"""Rewritten weights give the outputs that they gave before, or the rewriting is refused."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformer_lens.weight_processing import ProcessWeights

from tests.model.conftest import build
from tests.model.test_cache_sums import BITS, inputs, made, options
from tstlens.errors import ArgumentError, HookError, NonlinearResidualError
from tstlens.model import CustomConfig, HeadConfig, HookedTST

HEADS = [
    *(HeadConfig(pooling, n_classes=4) for pooling in ("mean", "max", "first", "last", "flatten")),
    HeadConfig("mean", horizon=5, bias=False),
    HeadConfig("flatten", horizon=5),
    HeadConfig("last", n_classes=3, bias=False),
]
STEPS = ("fold_layer_norm", "center_writing_weights", "fold_value_biases")


def closely(found, expected, rounding=0.0):
    """1e-5 of the largest entry in float32 (or a few roundings), 1e-10 in float64."""
    bound = {torch.float32: 1e-5, torch.float64: 1e-10}[expected.dtype]
    assert found.shape == expected.shape
    bound = max(bound * (1 + float(expected.abs().max())), 4 * rounding)
    assert (found - expected).abs().max() <= bound


def rounding_of(model, series, mask):
    """How far the model itself is from what it is in float64."""
    exact = copy.deepcopy(model).double()(series.double(), mask=mask)
    return float((model(series, mask=mask) - exact).abs().max())


def hidden(model):
    """Some samples of every series but the first unseen, where the model takes masks."""
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[1, 8:], mask[2, 4:] = False, False
    takes_masks = not model.cfg.n_decoder_layers and not getattr(model.cfg.embed, "padding", 0)
    return mask if takes_masks else None


def refused(cfg, step):
    """What the rules say about a step, stated once more."""
    if step == "fold_layer_norm":
        return cfg.norm_position == "post"
    if step == "fold_value_biases":
        return False
    kinds = {cfg.normalization_type, cfg.mlp_normalization_type, cfg.final_normalization_type}
    return (
        cfg.norm_position == "post"
        or not kinds <= {"LN", None}
        or not cfg.final_norm
        or cfg.norm_embed
        or cfg.use_normalization_before_and_after
        or cfg.embed.kind not in ("per-step", "linear-patches")
    )


@st.composite
def models(draw):
    """Options of a model, and its number format."""
    chosen = draw(options())
    if draw(BITS):  # where centring is possible
        chosen.update(dict.fromkeys(("mlp_normalization_type", "final_normalization_type")))
        chosen.update(normalization_type="LN", final_norm=True)
    if not chosen.get("n_decoder_layers"):
        chosen["head"] = draw(st.sampled_from(HEADS))
        if chosen["head"].pooling == "flatten" or chosen["positions"] != "none":
            chosen["n_time"] = 12
    return chosen, draw(st.sampled_from([torch.float32, torch.float64]))


@settings(max_examples=60)
@given(models(), st.sampled_from(STEPS), BITS)
def test_outputs_stay_on_every_option_or_the_step_is_refused(drawn, step, masked):
    model = made(drawn[0]).to(drawn[1])
    mask = hidden(model) if masked else None
    series = inputs().to(model.cfg.dtype)
    rewrite = getattr(model, step)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if refused(model.cfg, step):
        with pytest.raises(NonlinearResidualError, match=f"{step}: .*=False leaves"):
            rewrite(model.state_dict())
        return
    expected, rounding = model(series, mask=mask), rounding_of(model, series, mask)
    state = rewrite(model.state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.load_state_dict(state)
    closely(model(series, mask=mask), expected, rounding)


@settings(max_examples=40)
@given(models(), BITS, BITS, BITS, BITS)
def test_steps_together_stay_true_and_what_is_refused_changes_nothing(
    drawn, fold, centre, values, masked
):
    model = made(drawn[0]).to(drawn[1])
    series, mask = inputs().to(model.cfg.dtype), hidden(model) if masked else None
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    chosen = {"fold_ln": fold, "center_writing_weights": centre, "fold_value_biases": values}
    expected, rounding = model(series, mask=mask), rounding_of(model, series, mask)
    wanted = [name for name, asked in chosen.items() if asked]
    if (fold and refused(model.cfg, STEPS[0])) or (centre and refused(model.cfg, STEPS[1])):
        with pytest.raises(NonlinearResidualError):
            model.process_weights_(**chosen)
        assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
        assert model.processing == ()
        return
    model.process_weights_(**chosen)
    assert sorted(model.processing) == sorted(wanted)
    closely(model(series, mask=mask), expected, rounding)
    model.process_weights_(**chosen)  # twice is as good as once
    closely(model(series, mask=mask), expected, rounding)


@settings(max_examples=25)
@given(models())
def test_what_folding_and_centring_promise_of_weights_and_activations(drawn):
    model = made(drawn[0]).double()
    assume(not refused(model.cfg, "fold_layer_norm"))
    series = inputs().to(model.cfg.dtype)
    _, before = model.run_with_cache(series)
    centres = not refused(model.cfg, "center_writing_weights")
    model.process_weights_(center_writing_weights=centres)
    _, after = model.run_with_cache(series)
    for layer, block in enumerate(model.layers):
        name = model.layer_name(layer)
        norms = [block.ln1] if block.mlp.gated else [block.ln1, block.mlp_norm]
        for norm in norms:
            assert (norm.w == 1).all() and not getattr(norm, "b", torch.zeros(1)).any()
        if type(block.ln1).__name__ == "LayerNorm":
            closely(block.attn.W_K.mean(1), torch.zeros_like(block.attn.W_K.mean(1)))
        assert not block.attn.b_V.any()
        for point in ("attn.hook_q", "attn.hook_k", "attn.hook_pattern", "mlp.hook_pre"):
            closely(after[f"{name}.{point}"], before[f"{name}.{point}"])
        for point in ("hook_attn_out", "hook_mlp_out", "hook_resid_pre", "hook_resid_post"):
            whole = before[f"{name}.{point}"]
            whole = whole - whole.mean(-1, keepdim=True) if centres else whole
            closely(after[f"{name}.{point}"], whole)


def test_the_weights_are_those_of_transformer_lens(series):
    model = build(positions="learned", n_time=12, final_norm=True)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = {"ln_final": "ln_final", "head.W_U": "unembed.W_U", "head.b_U": "unembed.b_U"}

    def renamed(tensors):
        return {names.get(name, name): tensor for name, tensor in tensors.items()}

    cfg = SimpleNamespace(n_layers=2, n_heads=2, d_head=4, d_model=8, final_rms=False,
                          n_key_value_heads=None, attn_only=False, act_fn="relu", gated_mlp=False,
                          positional_embedding_type="standard")  # fmt: skip
    theirs = ProcessWeights.fold_layer_norm(renamed(state), cfg)
    theirs = ProcessWeights.center_writing_weights(theirs, cfg)
    theirs = ProcessWeights.fold_value_biases(ProcessWeights.center_unembed(theirs), cfg)
    model.process_weights_(center_unembed=True)
    ours = renamed(model.state_dict())
    rest = {name for name in theirs if not name.split(".")[-2].startswith("ln")}
    assert len(rest) > 20 and "unembed.W_U" in rest
    for name in sorted(rest - {"embed.b_E"}):  # a front end's bias is ours alone
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=1e-5)


def test_centred_logits_have_the_probabilities_that_they_had(series):
    for position, pooling in (("pre", "mean"), ("post", "max")):
        model = build(norm_position=position, head=HeadConfig(pooling, n_classes=4))
        before = model(series)
        model.load_state_dict(model.center_unembed(model.state_dict()))
        after = model(series)
        closely(after, before - before.mean(1, keepdim=True))
        closely(after.softmax(1), before.softmax(1))
    heads = {
        "a forecast": HeadConfig("mean", horizon=5),
        "made by a head of its own": CustomConfig("tests.Head"),
    }
    for what, head in heads.items():
        model = build(head=head)
        with pytest.raises(ArgumentError, match=f"this model's output is {what}"):
            model.process_weights_(center_unembed=True, center_writing_weights=False)
        assert model.processing == ()


def test_a_bias_without_a_reader_for_it_stays_with_its_norm(series):
    model = build(gated_mlp=True)
    expected, bias = model(series), model.blocks[0].ln2.b / model.blocks[0].ln2.w
    model.process_weights_(center_writing_weights=False)
    closely(model(series), expected)
    torch.testing.assert_close(model.blocks[0].ln2.b.detach(), bias.detach())
    model = build(gated_mlp=True)
    with torch.no_grad():
        model.blocks[1].ln2.w[3] = 0
    with pytest.raises(ArgumentError, match=r"bias of blocks\.1\.ln2 would have to stay"):
        model.process_weights_(center_writing_weights=False)
    model = build()
    state = model.fold_layer_norm(model.state_dict(), fold_biases=False, center_weights=False)
    expected = model(series)
    model.load_state_dict(state)
    assert model.blocks[0].ln1.b.any() and (model.blocks[0].ln1.w == 1).all()
    closely(model(series), expected)


def test_a_largest_over_positions_needs_gains_that_are_not_negative(series):
    for negative in (False, True):
        model = build(final_norm=True, head=HeadConfig("max", n_classes=4))
        with torch.no_grad():
            model.ln_final.w[2] *= -1 if negative else 1
        expected = model(series)
        model.process_weights_()
        closely(model(series), expected)
        assert bool((model.ln_final.w == 1).all()) is not negative


def test_processed_models_are_saved_and_loaded_as_they_are(series, tmp_path):
    model = build("patches", final_norm=True)
    model.save_pretrained(tmp_path / "plain")
    plain = HookedTST.from_pretrained(tmp_path / "plain")
    words = {"fold_ln": True, "center_writing_weights": True, "fold_value_biases": True}
    on_loading = HookedTST.from_pretrained(tmp_path / "plain", **words)
    model.process_weights_()
    model.save_pretrained(tmp_path / "processed")
    again = HookedTST.from_pretrained(tmp_path / "processed")
    assert plain.processing == ()
    assert model.processing == again.processing == on_loading.processing == tuple(words)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
        assert torch.equal(on_loading.state_dict()[name], tensor)
    assert torch.equal(again(series), model(series))
    closely(plain(series), model(series))
    assert again.parity is None
    further = HookedTST.from_pretrained(tmp_path / "processed", center_unembed=True)
    assert set(further.processing) == {*words, "center_unembed"}
    build("patches", norm_position="post").save_pretrained(tmp_path / "post")
    with pytest.raises(NonlinearResidualError, match="post-norm"):
        HookedTST.from_pretrained(tmp_path / "post", fold_ln=True)


@pytest.mark.parametrize(("changes", "reason"), [
    ({"norm_position": "post"}, "post-norm"),
    ({"normalization_type": "RMS"}, "an RMS norm reads the stream's mean"),
    ({"mlp_normalization_type": "BN"}, "a batch norm reads"),
    ({"final_norm": False}, "without a final norm the head reads"),
    ({"norm_embed": True}, "ln_embed writes a mean"),
    ({"use_normalization_before_and_after": True}, "ln1_post and ln2_post write"),
    ({"embed": "conv"}, "the front end is not one linear map"),
    ({"embed": "custom"}, "the front end is not one linear map"),
])  # fmt: skip
def test_why_the_stream_cannot_be_centred(changes, reason):
    model = build(**{"final_norm": True, **changes})
    with pytest.raises(NonlinearResidualError, match=reason):
        model.process_weights_(fold_ln=False)


def test_what_is_no_state_dict_of_the_model_or_not_offered_is_said():
    model = build()
    for step in (*STEPS[::2], "center_unembed"):
        with pytest.raises(ArgumentError, match=r"expected this model's state_dict\(\)"):
            getattr(model, step)({})
    with pytest.raises(ArgumentError, match="refactor_factored_attn_matrices is not offered"):
        model.process_weights_(refactor_factored_attn_matrices=True)


class Doubling(torch.nn.Module):
    """A dictionary that says what its weights were trained on."""

    def __init__(self, **metadata):
        super().__init__()
        metadata = SimpleNamespace(hook_name="blocks.0.hook_mlp_out", **metadata)
        self.cfg = SimpleNamespace(d_in=8, metadata=metadata)

    def encode(self, x):
        return 2 * x

    def decode(self, latents):
        return latents / 2


def test_dictionaries_say_where_weights_were_processed_otherwise(series, recwarn):
    plain = build()
    folded = copy.deepcopy(plain)
    folded.process_weights_(center_writing_weights=False)
    done = ["fold_ln", "fold_value_biases"]
    for model, metadata in (
        (plain, {"processing": []}),
        (folded, {"processing": done}),
        (plain, {"tstlens_version": "1"}),  # from before weights could be processed
        (folded, {}),  # somebody else's: nothing is known
    ):
        model.add_sae(Doubling(**metadata))
        model.reset_saes()
    assert not recwarn.list
    for model, metadata, said in (
        (folded, {"processing": []}, "weights as they were, and this model's are fold_ln, fold"),
        (plain, {"processing": done}, "weights fold_ln, fold_value_biases, and this model's are"),
        (folded, {"tstlens_version": "1"}, "weights as they were"),
    ):
        with pytest.warns(UserWarning, match=said), model.saes(Doubling(**metadata)):
            assert model.acts_to_saes
    folded.add_sae(Doubling())
    with pytest.raises(HookError, match="read activations as they are"):
        folded.process_weights_(fold_ln=False, center_writing_weights=False)
