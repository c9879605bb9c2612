"""Watched or not: with use_fused=False the same numbers, bit for bit, and every point fires."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.model.conftest import EMBEDS, build
from tstlens.errors import ArgumentError, TstlensError
from tstlens.model import HeadConfig, HookedTST
from tstlens.zoo.chronos_2 import Chronos2HeadConfig, Chronos2PatchesConfig
from tstlens.zoo.chronos_bolt import BoltHeadConfig, BoltPatchesConfig
from tstlens.zoo.chronos_t5 import BinnedTokensConfig, TokenLogitsConfig
from tstlens.zoo.itransformer import InvertedConfig, PositionHeadConfig
from tstlens.zoo.moment import MomentHeadConfig, MomentPatchesConfig
from tstlens.zoo.parts import ConvStepsConfig, FlatHeadConfig, RevINPatchesConfig, ScaledStepsConfig
from tstlens.zoo.patchtst import PatchTSTEmbedConfig
from tstlens.zoo.timesfm import TimesFMHeadConfig, TimesFMPatchesConfig
from tstlens.zoo.timesfm_25 import TimesFM25HeadConfig, TimesFM25PatchesConfig

BLOCKS: dict[str, list[Any]] = {
    "norm_position": ["pre", "post"],
    "normalization_type": ["LN", "RMS", "BN"],
    "mlp_normalization_type": [None, "LN"],
    "final_norm": [False, True],
    "norm_embed": [False, True],
    "last_norm": [False, True],
    "use_normalization_before_and_after": [False, True],
    "causal": [False, True],
    "gated_mlp": [False, True],
    "position_buckets": [None, 6],
    "rotary_base": [None, 100.0],
    "qk_norm": ["none", "before_rotary", "after_rotary"],
    "query_scale": [False, True],
    "residual_attention": [False, True],
    "second_attention": ["none", "channel"],
    "use_attn_result": [False, True],
    "use_split_qkv_input": [False, True],
    "use_hook_mlp_in": [False, True],
    "use_attn_mlp_sum": [False, True],
}
LEVELS = (0.1, 0.5, 0.9)
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "Chronos-T5": (
        BinnedTokensConfig(12, 2, -2.0, 2.0, 30, decoder_steps=3),
        TokenLogitsConfig(12, horizon=4),
        {"n_layers": 3, "n_decoder_layers": 1, "position_buckets": 8, "normalization_type": "RMS"},
    ),
    "Chronos-Bolt": (
        BoltPatchesConfig(4, 4, 24, 6),
        BoltHeadConfig(4, LEVELS, 6),
        {"n_layers": 3, "n_decoder_layers": 1, "position_buckets": 8, "n_time": None},
    ),
    "Chronos-2": (
        Chronos2PatchesConfig(4, 4, 24, 6),
        Chronos2HeadConfig(4, 4, LEVELS, 6),
        {"second_attention": "channel", "rotary_base": 100.0, "n_time": None},
    ),
    "MOMENT": (
        MomentPatchesConfig(4, "forecasting"),
        MomentHeadConfig("forecasting", 4, horizon=3),
        {"position_buckets": 8},
    ),
    "TimesFM": (TimesFMPatchesConfig(4, 24, 6), TimesFMHeadConfig(4, LEVELS, 6), {"causal": True}),
    "TimesFM 2.5": (
        TimesFM25PatchesConfig(4, 24, 6),
        TimesFM25HeadConfig(4, LEVELS, 6, point=1),
        {"causal": True, "qk_norm": "after_rotary", "rotary_base": 100.0, "query_scale": True},
    ),
    "PatchTST": (
        PatchTSTEmbedConfig(4, 2, cls_token=True, mask_value=0.0),
        HeadConfig("first", n_classes=3),
        {"norm_position": "post", "normalization_type": "BN", "second_attention": "channel"},
    ),
    "the original PatchTST": (
        RevINPatchesConfig(4, 2, pad_end=2, affine=True),
        FlatHeadConfig(horizon=3),
        {"norm_position": "post", "normalization_type": "BN", "residual_attention": True},
    ),
    "steps": (ScaledStepsConfig(0.5), HeadConfig("mean", n_classes=3), {"positions": "learned"}),
    "convolved steps": (ConvStepsConfig(3, pad_end=2), HeadConfig("max", n_classes=3), {}),
    "iTransformer": (InvertedConfig(3), PositionHeadConfig(horizon=3), {"norm_position": "post"}),
}


def watched_and_not(model: HookedTST, series: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        alone = model(series)
        watched, cache = model.run_with_cache(series)
    assert set(cache) == {name for name in model.hook_dict if model.why_silent(name) is None}
    return alone, watched


def some_series(seed: int = 1) -> torch.Tensor:
    return torch.randn(4, 3, 12, generator=torch.Generator().manual_seed(seed))


def test_without_the_flag_watched_and_unwatched_runs_do_differ():
    """Or the tests below would hold of anything."""
    alone, watched = watched_and_not(build(normalization_type="BN"), some_series())
    assert not torch.equal(alone, watched)


@settings(max_examples=80, deadline=None)
@given(
    st.fixed_dictionaries({name: st.sampled_from(values) for name, values in BLOCKS.items()}),
    st.sampled_from([name for name in EMBEDS if name != "custom"]),
    st.booleans(),
)
def test_every_option_gives_the_same_bits_watched_or_not(options, embed, after_it_was_made):
    if options["second_attention"] == "channel":
        embed = "patches-ci"
    try:
        model = build(embed, use_fused=after_it_was_made, **options)
    except TstlensError:
        return  # options that do not go together
    if after_it_was_made:
        model.set_use_fused(False)
    assert torch.equal(*watched_and_not(model, some_series()))


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_gives_the_same_bits_watched_or_not(family):
    embed, head, options = FAMILIES[family]
    model = build(embed, head=head, **options)
    model.cfg.use_fused = False
    assert torch.equal(*watched_and_not(model, some_series()))
    for name in list(model.hook_dict)[::7]:  # and watched at one place
        if model.why_silent(name) is None:
            one = model.run_with_hooks(some_series(), fwd_hooks=[(name, lambda x, hook: None)])
            assert torch.equal(one, model(some_series())), name


def test_each_block_option_by_itself_gives_the_same_bits():
    for name, values in BLOCKS.items():
        for value, norm in itertools.product(values[1:], ("pre", "post")):
            try:
                model = build("patches-ci", **{"norm_position": norm, name: value}, use_fused=False)
            except ArgumentError:
                continue
            assert torch.equal(*watched_and_not(model, some_series())), (name, value, norm)


def test_a_masked_run_and_a_snapped_off_dictionary_give_the_same_bits(mask):
    class Rounding(torch.nn.Module):
        def encode(self, x):
            return x.round()

        def decode(self, x):
            return x

    model, series = build("per-step", use_fused=False), some_series()
    expected = model(series, mask=mask)
    assert torch.equal(model.run_with_cache(series, mask=mask)[0], expected)
    model.splice(Rounding(), "blocks.0.ln1.hook_normalized")
    with model.snapping(False):
        assert torch.equal(model(series, mask=mask), expected)
    model.reset_saes()
    assert torch.equal(model(series, mask=mask), expected)


@pytest.mark.parametrize("point", ["attn.hook_pattern", "attn.hook_attn_scores", "ln1.hook_scale"])
@pytest.mark.parametrize("kind", ["forward", "pre", "every module", "replaced", "backward"])
def test_hooks_put_on_by_other_means_fire_and_count(point, kind):
    model, series, seen = build(), some_series(), []
    module = model.blocks[0].get_submodule(point)
    clean = model(series)

    def see(hooked: Any, *_: Any) -> None:
        if hooked is module:
            seen.append(hooked)

    if kind == "replaced":  # as some libraries wrap a module
        own = module.forward
        module.forward = lambda x: own(see(module) or x)
    else:
        on = {
            "forward": module.register_forward_hook,
            "pre": module.register_forward_pre_hook,
            "backward": module.register_full_backward_hook,
            "every module": torch.nn.modules.module.register_module_forward_hook,
        }[kind]
        handle = on(see)
    out = model(series)
    out.sum().backward()
    if kind == "replaced":
        del module.forward
    else:
        handle.remove()
    assert seen
    torch.testing.assert_close(out, clean)
    count = len(seen)
    model(series)
    assert len(seen) == count


def test_a_copy_a_cast_and_a_saved_model_keep_the_flag(tmp_path):
    model = build(normalization_type="BN")
    copied = copy.deepcopy(model)
    copied.set_use_fused(False)
    assert torch.equal(*watched_and_not(copied, some_series()))
    assert not torch.equal(*watched_and_not(model, some_series()))  # its own flag
    model.set_use_fused(False)
    model.save_pretrained(tmp_path / "m")
    loaded = HookedTST.from_pretrained(tmp_path / "m")
    assert loaded.cfg.use_fused is False
    assert torch.equal(*watched_and_not(loaded, some_series()))
    assert torch.equal(*watched_and_not(copied.double(), some_series().double()))


def test_the_flag_is_true_or_false(no_shape_checks):
    with pytest.raises(ArgumentError, match="use_fused as True or False, got 'no'"):
        build().set_use_fused("no")
    with pytest.raises(ArgumentError, match="use_fused as True or False, got 1"):
        build(use_fused=1)
