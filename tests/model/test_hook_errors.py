"""A hook that cannot fire is refused when asked for, and an exception leaves no hook behind."""

from __future__ import annotations

import pytest
import torch

from tstlens.errors import ArgumentError, HookError, UnknownActivationError, UnknownHookError


def assert_clean(model):
    for name, point in model.hook_dict.items():
        assert not point.fwd_hooks and not point.bwd_hooks, name
        assert not point._forward_hooks and not point._backward_hooks, name
    assert model.context_level == 0 and not model.is_caching


def same(x, hook):
    return x


def explode(x, hook):
    raise RuntimeError("inside a hook")


def explode_unless_caching(x, hook):
    raise KeyboardInterrupt


def test_an_unknown_hook_names_the_closest(make_model, series):
    model = make_model()
    message = r"unknown hook 'blocks.0.attn.hook_patern'; did you mean 'blocks.0.attn.hook_pattern'"
    for ask in (
        lambda name: model.run_with_hooks(series, fwd_hooks=[(name, same)]),
        lambda name: model.run_with_hooks(series, bwd_hooks=[(name, same)]),
        lambda name: model.run_with_cache(series, names_filter=name),
        lambda name: model.run_with_cache(series, names_filter=["hook_embed", name]),
        lambda name: model.add_hook(name, same),
        lambda name: model.add_caching_hooks(name),
        lambda name: model.hooks(fwd_hooks=[(name, same)]).__enter__(),
    ):
        with pytest.raises(UnknownHookError, match=message):
            ask("blocks.0.attn.hook_patern")
        assert_clean(model)


@pytest.mark.parametrize(
    ("name", "options", "advice"),
    [
        ("hook_pos_embed", {}, "adds no positions"),
        ("ln_final.hook_scale", {}, "no final norm"),
        ("blocks.0.hook_normalized_resid_post", {}, "Only post-norm"),
        ("blocks.2.hook_resid_pre", {}, "known:|did you mean"),
        ("blocks.0.attn", {}, "did you mean 'blocks.0.attn"),
    ],
)
def test_a_hook_that_this_model_lacks_says_why(make_model, series, name, options, advice):
    model = make_model(**options)
    with pytest.raises(UnknownHookError, match=advice):
        model.run_with_cache(series, names_filter=name)
    assert_clean(model)


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("blocks.1.attn.hook_result", "use_attn_result"),
        ("blocks.0.hook_q_input", "use_split_qkv_input"),
        ("blocks.0.hook_k_input", "use_split_qkv_input"),
        ("blocks.0.hook_v_input", "use_split_qkv_input"),
        ("blocks.1.hook_mlp_in", "use_hook_mlp_in"),
        ("blocks.1.hook_attn_mlp_sum", "use_attn_mlp_sum"),
    ],
)
def test_a_hook_that_waits_for_a_flag_names_the_flag(make_model, series, name, flag):
    model = make_model()
    for ask in (
        lambda: model.run_with_hooks(series, fwd_hooks=[(name, same)]),
        lambda: model.run_with_cache(series, names_filter=[name]),
        lambda: model.add_hook(name, same),
        lambda: model.add_caching_hooks([name]),
    ):
        with pytest.raises(HookError, match=rf"{name} only fires with model.set_{flag}\(True\)"):
            ask()
    assert_clean(model)
    getattr(model, f"set_{flag}")(True)
    fired = []
    model.run_with_hooks(series, fwd_hooks=[(name, lambda x, hook: fired.append(hook.name))])
    assert fired == [name]


@pytest.mark.parametrize("second", [("no such hook", same), ("blocks.0.hook_mlp_in", same)])
def test_a_bad_second_name_leaves_the_first_unhooked(make_model, series, second):
    model = make_model()
    with pytest.raises((UnknownHookError, HookError)):
        model.run_with_hooks(series, fwd_hooks=[("hook_embed", same), second])
    with (
        pytest.raises((UnknownHookError, HookError)),
        model.hooks(fwd_hooks=[("hook_embed", same)], bwd_hooks=[second]),
    ):
        pass
    assert_clean(model)


@pytest.mark.parametrize("failure", [explode, explode_unless_caching])
@pytest.mark.parametrize("name", ["hook_series", "blocks.1.attn.hook_pattern", "head.hook_pooled"])
def test_an_exception_inside_a_hook_leaves_no_hook(make_model, series, failure, name):
    model = make_model()
    logits = model(series)
    with pytest.raises((RuntimeError, KeyboardInterrupt)):
        model.run_with_hooks(series, fwd_hooks=[("hook_embed", same), (name, failure)])
    assert_clean(model)
    with pytest.raises((RuntimeError, KeyboardInterrupt)), model.hooks(fwd_hooks=[(name, failure)]):
        model.run_with_cache(series)
    assert_clean(model)
    assert torch.equal(model(series), logits)


def test_an_exception_inside_a_backward_hook_leaves_no_hook(make_model, series):
    model = make_model()
    target = torch.zeros(4, dtype=torch.long)
    with (
        pytest.raises(RuntimeError, match="inside a hook"),
        model.hooks(bwd_hooks=[("blocks.0.attn.hook_z", explode)]),
    ):
        model(series, return_type="loss", target=target).backward()
    assert_clean(model)


def test_a_failed_backward_of_incl_bwd_leaves_no_hook(make_model, series):
    model = make_model()
    with pytest.raises(ArgumentError, match="incl_bwd=True needs one number to differentiate"):
        model.run_with_cache(series, incl_bwd=True)
    assert_clean(model)


def test_bad_input_leaves_no_hook(make_model, series):
    model = make_model()
    with pytest.raises(ValueError, match="NaN"):
        model.run_with_cache(series * float("nan"))
    assert_clean(model)


def test_hooks_added_on_purpose_survive_and_reset(make_model, series):
    model = make_model()
    logits, fired = model(series), []
    model.add_hook("hook_embed", lambda x, hook: fired.append(hook.name))
    model.add_hook(lambda name: name.endswith("hook_z"), lambda x, hook: fired.append(hook.name))
    model.run_with_cache(series)
    assert fired == ["hook_embed", "blocks.0.attn.hook_z", "blocks.1.attn.hook_z"]
    model.reset_hooks()
    assert_clean(model)
    assert torch.equal(model(series), logits)


def test_of_many_hooks_only_the_closest_are_named_and_where_all_are(make_model, series):
    model = make_model()
    with pytest.raises(UnknownHookError) as found:
        model.run_with_cache(series, names_filter="blocks.0.hook_zz")
    words = str(found.value)
    named = [name for name in model.hook_dict if f" {name}," in words or f" {name} and" in words]
    assert len(named) == 5 and len(words) < 400
    assert words.endswith(f"and {len(model.hook_dict) - 5} more. model.hook_dict lists them all")
    _, cache = model.run_with_cache(series)
    with pytest.raises(UnknownActivationError, match=r"cache.keys\(\) lists them all") as found:
        cache["zz"]
    assert len(str(found.value)) < 400


def test_a_hooks_last_part_finds_the_hook(make_model, series):
    with pytest.raises(UnknownHookError, match="did you mean 'blocks.0.attn.hook_z'"):
        make_model().run_with_cache(series, names_filter="hook_z")


def test_switches_of_transformer_lens_that_have_no_use_here_say_what_has(make_model, series):
    model = make_model()
    with pytest.raises(ArgumentError, match=r"set_use_split_qkv_input\(True\) gives every head's"):
        model.set_use_attn_in(True)
    with pytest.raises(ArgumentError, match="every head has keys and values of its own"):
        model.set_ungroup_grouped_query_attention(True)
    model.set_use_attn_in(False)  # as it is
    model.set_ungroup_grouped_query_attention(False)
    with pytest.raises(UnknownHookError, match=r"set_use_split_qkv_input\(True\) gives hook_q_inp"):
        model.run_with_cache(series, names_filter="blocks.0.hook_attn_in")
