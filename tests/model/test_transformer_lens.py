"""TransformerLens 3's own blocks, with our weights, give our activations at every shared name."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from transformer_lens import HookedRootModule

if importlib.util.find_spec("transformer_lens.components") is None:
    pytest.skip("TransformerLens 4 has no components to compare with", allow_module_level=True)


class Trunk(HookedRootModule):
    """Blocks of TransformerLens, one after the other, filled with the weights of a model."""

    def __init__(self, model):
        super().__init__()
        from transformer_lens import HookedTransformerConfig
        from transformer_lens.components import BertBlock, TransformerBlock

        ours = model.cfg
        cfg = HookedTransformerConfig(
            n_layers=ours.n_layers,
            d_model=ours.d_model,
            n_heads=ours.n_heads,
            d_head=ours.d_head,
            d_mlp=ours.d_mlp,
            n_ctx=12,
            d_vocab=2,
            act_fn=ours.act_fn,
            eps=ours.eps,
            normalization_type="LN",
            attention_dir="causal" if ours.causal else "bidirectional",
            use_attn_result=True,
            use_split_qkv_input=ours.use_split_qkv_input,
            use_hook_mlp_in=ours.use_hook_mlp_in,
        )
        if ours.norm_position == "post":
            blocks = [BertBlock(cfg) for _ in range(ours.n_layers)]
        else:
            blocks = [TransformerBlock(cfg, layer) for layer in range(ours.n_layers)]
        self.blocks = torch.nn.ModuleList(blocks)
        self.setup()
        for theirs, block in zip(self.blocks, model.blocks, strict=True):
            problems = theirs.load_state_dict(block.state_dict(), strict=False)
            buffers = {"attn.mask", "attn.IGNORE"}
            assert not problems.unexpected_keys and set(problems.missing_keys) <= buffers

    def forward(self, residual, **kwargs):
        for block in self.blocks:
            residual = block(residual, **kwargs)
        return residual


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("act_fn", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("split", [False, True])
def test_transformer_lens_blocks_give_the_same_activations(
    make_model, norm_position, causal, act_fn, split
):
    flags = {"use_split_qkv_input": split, "use_hook_mlp_in": split}
    model = make_model(
        norm_position=norm_position,
        causal=causal,
        act_fn=act_fn,
        d_head=3,
        use_attn_result=True,
        **flags,
    )
    trunk, residual = Trunk(model), torch.randn(3, 12, 8)
    expected, theirs = trunk.run_with_cache(residual)
    ours_out, ours = model.run_with_cache(residual, start_at_layer=0, stop_at_layer=2)
    torch.testing.assert_close(ours_out, expected, rtol=1e-5, atol=1e-5)
    assert {name for name in ours if name.startswith("blocks.")} == set(theirs)
    for name, activation in theirs.items():
        torch.testing.assert_close(ours[name], activation, rtol=1e-5, atol=1e-5, msg=name)


def test_edits_have_transformer_lens_effects(make_model, norm_position):
    model = make_model(
        norm_position=norm_position,
        use_attn_result=True,
        use_split_qkv_input=True,
        use_hook_mlp_in=True,
    )
    trunk, residual = Trunk(model), torch.randn(3, 12, 8)
    names = [name for name in model.hook_dict if name in trunk.hook_dict]
    own = [name for name in model.hook_dict if name not in trunk.hook_dict]
    ends = ("hook_attn_mlp_sum",) if norm_position == "pre" else ()
    assert all(name.endswith(ends) for name in own if name.startswith("blocks."))

    def edit(activation, hook):
        generator = torch.Generator().manual_seed(0)
        return activation * (0.5 + torch.rand(activation.shape, generator=generator))

    for name in names:
        theirs = trunk.run_with_hooks(residual, fwd_hooks=[(name, edit)])
        ours = model.run_with_hooks(
            residual, start_at_layer=0, stop_at_layer=2, fwd_hooks=[(name, edit)]
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, msg=name)


def test_padding_masks_agree_with_bert_blocks(make_model):
    from tstlens.model import TrunkState

    model = make_model(norm_position="post")
    trunk, residual = Trunk(model), torch.randn(3, 12, 8)
    mask = torch.arange(12)[None] < torch.tensor([12, 5, 8])[:, None]
    additive = torch.zeros(3, 1, 1, 12).masked_fill(~mask[:, None, None], -1e9)
    theirs = trunk(residual, additive_attention_mask=additive)
    ours = model(residual, start_at_layer=0, stop_at_layer=2, state=TrunkState(mask))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
