"""Stacked weights, factored circuits, copies and folding are what their names say."""

from __future__ import annotations

import copy

import pytest
import torch
from transformer_lens import FactoredMatrix

from tstlens.errors import ArgumentError
from tstlens.model import HookedTST

LAYOUTS = {
    "W_Q": ("attn", (2, 2, 8, 4)),
    "W_K": ("attn", (2, 2, 8, 4)),
    "W_V": ("attn", (2, 2, 8, 4)),
    "W_O": ("attn", (2, 2, 4, 8)),
    "b_Q": ("attn", (2, 2, 4)),
    "b_K": ("attn", (2, 2, 4)),
    "b_V": ("attn", (2, 2, 4)),
    "b_O": ("attn", (2, 8)),
    "W_in": ("mlp", (2, 8, 10)),
    "b_in": ("mlp", (2, 10)),
    "W_out": ("mlp", (2, 10, 8)),
    "b_out": ("mlp", (2, 8)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_stacked_weights_have_transformer_lens_layouts(make_model, name):
    model, (part, shape) = make_model(), LAYOUTS[name]
    stacked = getattr(model, name)
    assert stacked.shape == shape
    for layer in range(2):
        own = model.get_parameter(f"blocks.{layer}.{part}.{name}")
        assert torch.equal(stacked[layer], own)


def test_qk_gives_the_scores_and_ov_the_writes(make_model, series):
    model = make_model(attn_bias=False).double()
    _, cache = model.run_with_cache(series.double())
    qk, ov = model.QK, model.OV
    assert isinstance(qk, FactoredMatrix) and qk.shape == ov.shape == (2, 2, 8, 8)
    x = cache["normalized", 1, "ln1"] * model.blocks[1].ln1.w + model.blocks[1].ln1.b
    for head in range(2):
        scores = x @ qk.AB[1, head] @ x.transpose(1, 2) / 2  # sqrt(d_head)
        torch.testing.assert_close(scores, cache["attn_scores", 1][:, head])
        written = cache["pattern", 1][:, head] @ x @ ov.AB[1, head]
        result = cache["z", 1][:, :, head] @ model.W_O[1, head]
        torch.testing.assert_close(written, result)


def test_head_labels_run_layer_by_layer(make_model):
    assert make_model(n_layers=3).all_head_labels() == [
        "L0H0", "L0H1", "L1H0", "L1H1", "L2H0", "L2H1",
    ]  # fmt: skip


def test_weights_that_a_model_lacks_are_refused_with_the_reason(make_model, own_modules):
    from tstlens.model import CustomConfig

    model = make_model("conv", head=CustomConfig("Head"))
    with pytest.raises(ArgumentError, match="not one linear map, so it has no W_E"):
        _ = model.W_E
    with pytest.raises(ArgumentError, match="adds no positions, so it has no W_pos"):
        _ = model.W_pos
    with pytest.raises(ArgumentError, match="head is a module of your own, so it has no W_U"):
        _ = model.W_U


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_folding_batch_norm_gives_the_same_function(make_model, series, activation):
    import dataclasses

    model = make_model("conv")
    embed = dataclasses.replace(model.cfg.embed, activation=activation)
    model = make_model(embed, positions="learned").double()
    state = copy.deepcopy(model.state_dict())
    folded = model.fold_batch_norm()
    out = model(series.double())
    torch.testing.assert_close(folded(series.double()), out, rtol=1e-12, atol=1e-12)
    assert folded.cfg.embed.batch_norm == "folded" and model.cfg.embed.batch_norm == "live"
    assert not any(isinstance(m, torch.nn.BatchNorm1d) for m in folded.modules())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    with pytest.raises(ArgumentError, match="no live batch norm to fold"):
        folded.fold_batch_norm()


def test_a_folded_copy_leaves_the_originals_hooks_alone(make_model, series):
    model, fired = make_model("conv"), []
    model.add_hook("embed.stages.0.hook_post", lambda x, hook: fired.append(1))
    folded = model.fold_batch_norm()
    folded(series)
    assert not fired
    model(series)
    assert fired == [1]
    folded.run_with_hooks(
        series, fwd_hooks=[("embed.stages.0.hook_post", lambda x, hook: fired.append(2))]
    )
    assert fired == [1, 2]


def _is_head_major(weight):
    """Whether [d_model, head * d_head] is a view: one matrix product then projects all heads."""
    return weight.permute(1, 0, 2).is_contiguous()


@pytest.mark.parametrize(
    "change",
    [
        copy.deepcopy,
        lambda model: model.double().float(),
        lambda model: model.to("cpu", torch.float64).to(torch.float32),
        lambda model: (model.load_state_dict(copy.deepcopy(model.state_dict())), model)[1],
        lambda model: (
            model.load_state_dict({k: v.contiguous() for k, v in model.state_dict().items()}),
            model,
        )[1],
    ],
    ids=["deepcopy", "casts", "to", "state_dict", "contiguous state_dict"],
)
def test_copies_compute_the_same_and_keep_projections_as_one_matrix(make_model, series, change):
    model = make_model("patches")
    before = model(series)
    assert all(_is_head_major(w) for b in model.blocks for w in (b.attn.W_Q, b.attn.W_V))
    changed = change(model)
    assert torch.equal(changed(series), before)
    assert all(_is_head_major(w) for b in changed.blocks for w in (b.attn.W_Q, b.attn.W_V))


def test_a_deep_copy_shares_nothing(make_model, series):
    model = make_model()
    before, copied = model(series), copy.deepcopy(model)
    with torch.no_grad():
        copied.blocks[0].attn.W_O.zero_()
    copied.set_use_attn_result(True)
    copied.add_hook("hook_embed", lambda x, hook: x * 0)
    assert torch.equal(model(series), before)
    assert not model.cfg.use_attn_result
    assert not torch.allclose(copied(series), before)


def test_biases_that_a_model_lacks_are_zero_and_not_trained(make_model, series):
    model = make_model(attn_bias=False, mlp_bias=False)
    for name in ("b_Q", "b_K", "b_V", "b_O", "b_in", "b_out"):
        assert float(getattr(model, name).abs().max()) == 0
    model(series).sum().backward()
    assert model.blocks[0].attn.b_O.grad is None and model.blocks[0].mlp.b_in.grad is None
    assert model.blocks[0].attn.W_O.grad is not None


def test_weights_by_the_names_that_users_of_transformer_lens_look_for(make_model):
    model = make_model("patches", positions="learned", gated_mlp=True)
    layer = model.blocks[1]
    assert torch.equal(model.W_gate[1], layer.mlp.W_gate)
    assert torch.equal(model.W_E_pos, torch.cat([model.W_E, model.W_pos]))
    assert model.unembed.W_U is model.head.W_U and model.unembed.b_U is model.head.b_U
    torch.testing.assert_close(layer.attn.OV.AB, layer.attn.W_V @ layer.attn.W_O)
    torch.testing.assert_close(layer.attn.QK.AB, model.QK.AB[1])
    hidden = ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_gate", "W_out")
    assert model.cfg.n_params == sum(getattr(model, name).numel() for name in hidden)
    with pytest.raises(ArgumentError, match="no gate"):
        _ = make_model().W_gate


def test_dtypes_by_name_and_moves_that_print_nothing(make_model, tmp_path, capsys):
    make_model().save_pretrained(tmp_path / "model")
    for given in ({"dtype": "float64"}, {"torch_dtype": torch.float64}, {"torch_dtype": "float64"}):
        assert HookedTST.from_pretrained(tmp_path / "model", **given).cfg.dtype == torch.float64
    with pytest.raises(ArgumentError, match="floating point dtype"):
        HookedTST.from_pretrained(tmp_path / "model", dtype="int32")
    assert make_model().to("cpu", print_details=True).cfg.dtype == torch.float32
    assert capsys.readouterr().out == ""
