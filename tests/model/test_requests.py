"""Hooks, caches and runs asked for in ways that cannot be meant: refused, and nothing is left."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.model.conftest import build
from tests.model.test_hook_errors import assert_clean
from tstlens.errors import ArgumentError, HookError, TstlensError, UnknownHookError

HOOK = "blocks.0.attn.hook_z"
SERIES = torch.randn(4, 3, 12, generator=torch.Generator().manual_seed(1))
ASK: dict[str, Any] = {
    "add_hook": lambda m, p, **run: m.add_hook(p, lambda x, hook: x),
    "add_perma_hook": lambda m, p, **run: m.add_perma_hook(p, lambda x, hook: x),
    "hooks": lambda m, p, **run: m.hooks(fwd_hooks=[(p, lambda x, hook: x)]).__enter__(),
    "bwd hooks": lambda m, p, **run: m.hooks(bwd_hooks=[(p, lambda x, hook: x)]).__enter__(),
    "run_with_hooks": lambda m, p, **run: m.run_with_hooks(
        SERIES, fwd_hooks=[(HOOK, lambda x, hook: x), (p, lambda x, hook: x)], **run
    ),
    "run_with_cache": lambda m, p, **run: m.run_with_cache(SERIES, names_filter=p, **run),
    "a list": lambda m, p, **run: m.run_with_cache(SERIES, names_filter=[HOOK, p], **run),
    "add_caching_hooks": lambda m, p, **run: m.add_caching_hooks(p),
    "get_caching_hooks": lambda m, p, **run: m.get_caching_hooks(p),
    "saes": lambda m, p, **run: m.run_with_cache_with_saes(SERIES, names_filter=p, **run),
    "hooks with saes": lambda m, p, **run: m.run_with_hooks_with_saes(
        SERIES, fwd_hooks=[(p, lambda x, hook: x)], **run
    ),
}
RUNS = [name for name in ASK if name.startswith(("run", "a list", "saes", "hooks with"))]


@pytest.mark.parametrize("how", list(ASK))
def test_a_predicate_that_accepts_no_live_point_is_refused_as_a_name_is(how):
    model = build()
    for predicate in (lambda name: name.endswith("hook_patern"), lambda name: None):
        with pytest.raises(UnknownHookError, match="accepts none of the .* hook points"):
            ASK[how](model, predicate)
    for name in ("attn.hook_result", "hook_q_input", "hook_mlp_in", "hook_attn_mlp_sum"):
        with pytest.raises(HookError, match=rf"{name} only fires with model.set_use_"):
            ASK[how](model, lambda point, name=name: point.endswith(name))
    assert_clean(model)


@pytest.mark.parametrize("how", RUNS)
@pytest.mark.parametrize(
    ("point", "run"),
    [
        ("blocks.1.", {"stop_at_layer": 1}),
        ("head", {"stop_at_layer": -1}),
        ("head", {"stop_at_layer": 2}),
    ],
)
def test_a_predicate_that_only_accepts_what_does_not_run_is_refused(how, point, run):
    model = build()
    with pytest.raises(HookError, match="would never fire"):
        ASK[how](model, lambda name: name.startswith(point), **run)
    assert_clean(model)


def test_a_predicate_sees_live_points_and_fires_where_it_accepts(series):
    model, fired = build(), []
    everywhere = [name for name in model.hook_dict if model.why_silent(name) is None]
    model.run_with_hooks(
        series, fwd_hooks=[(lambda name: True, lambda x, hook: fired.append(hook.name))]
    )
    assert sorted(fired) == sorted(everywhere)
    _, cache = model.run_with_cache(series, names_filter=lambda name: True, stop_at_layer=1)
    assert set(cache) < set(everywhere) and HOOK in cache.cache_dict


@pytest.mark.parametrize(
    "given",
    [
        lambda names: (name for name in names),
        lambda names: iter(names),
        lambda names: map(str, names),
        lambda names: dict.fromkeys(names).keys(),
        lambda names: set(names),
        lambda names: np.array(names),
        lambda names: [names[0], lambda name: name == names[1]],
    ],
)
def test_names_may_come_as_anything_that_gives_names_once(given, series):
    model, names = build(), [HOOK, "head.hook_pooled"]
    _, expected = model.run_with_cache(series, names_filter=names)
    _, cache = model.run_with_cache(series, names_filter=given(names))
    assert set(cache) == set(names)
    assert all(torch.equal(cache[name], expected[name]) for name in names)
    cached = model.add_caching_hooks(given(names))
    model(series)
    assert set(cached) == set(names)


BAD_RUNS: list[tuple[dict[str, Any], str]] = [
    *(
        ({"pos_slice": bad}, "pos_slice as a position")
        for bad in (
            1.0,
            1.5,
            True,
            False,
            "1",
            (0.0, 3.0),
            slice(0.5, 2),
            slice(True, 3),
            (0, 4, 1, 1),
            (),
            [],
            [0.0, 1.0],
            [True, False],
            np.array([0.5]),
            torch.tensor([1.0]),
            torch.tensor(True),
            torch.tensor([[1]]),
            slice(0, 3, -1),
            slice(0, 4, 0),
            {0, 1},
            [None],
        )
    ),
    ({"pos_slice": slice(5, 3)}, "selects nothing"),
    ({"pos_slice": (20, 30)}, "pos_slice within 0..12"),
    ({"pos_slice": 12}, "outside the 12 positions"),
    ({"device": "gpu"}, "device as one that this machine has"),
    *(
        ({name: bad}, f"{name} as True or False")
        for name in (
            "incl_bwd",
            "remove_batch_dim",
            "reset_hooks_end",
            "clear_contexts",
            "return_cache_object",
        )
        for bad in ("no", 1, None)
    ),
]
BAD_FORWARDS: list[tuple[dict[str, Any], str]] = [
    *(({name: bad}, f"{name} must lie in -2..2") for name in ("start_at_layer", "stop_at_layer")
      for bad in (True, False, 1.0, "1", np.bool_(True), torch.tensor(True), torch.tensor([0, 1]),
                  torch.tensor(1.5), 3, -3, [1])),
    *(({"return_type": bad}, "return_type must be 'logits'") for bad in ("losses", True, 3)),
    ({"return_type": "los", "stop_at_layer": 1}, "return_type must be 'logits'"),
    *(({"return_type": bad, "stop_at_layer": 1, "target": torch.zeros(4).long()}, "has no loss")
      for bad in ("loss", "both")),
    ({"attention_mask": torch.ones(4, 12)}, "takes no attention_mask=; padding is told by mask="),
    ({"labels": torch.zeros(4)}, "takes no labels=; targets are target="),
    ({"masks": None}, "takes no masks=; it takes series, return_type, mask"),
    ({"covariates": [1]}, "covariates as a dict"),
    ({"mask": torch.ones(4, 12)}, "bool mask"),
    ({"mask": [True]}, "bool mask"),
    ({"state": {}}, "state= is what embed_series returned"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "words", "forward"),
    [(*bad, False) for bad in BAD_RUNS] + [(*bad, True) for bad in BAD_FORWARDS],
)
def test_a_run_that_cannot_be_meant_is_refused_in_words(options, words, forward, no_shape_checks):
    model = build()
    with pytest.raises(TstlensError, match=words):
        model.run_with_cache(SERIES, **options)
    if forward:
        with pytest.raises(TstlensError, match=words):
            model(SERIES, **options)
    if forward or set(options) <= {"reset_hooks_end", "clear_contexts"}:
        with pytest.raises(TstlensError, match=words):
            model.run_with_hooks(SERIES, fwd_hooks=[(HOOK, lambda x, hook: x)], **options)
    assert_clean(model)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (3, [3]), (-1, [11]), (np.int64(3), [3]), (torch.tensor(3), [3]), ([1, 4], [1, 4]),
        ((2, 5), [2, 3, 4]), ((None, 2), [0, 1]), (slice(-2, None), [10, 11]),
        (np.array([0, 11]), [0, 11]), (torch.tensor([5]), [5]), (slice(0, 6, 3), [0, 3]),
        ((1,), [0]), (None, list(range(12))),
    ],
)  # fmt: skip
def test_pos_slice_selects_what_it_says(given, expected, series):
    model = build()
    _, whole = model.run_with_cache(series, names_filter=[HOOK])
    _, cut = model.run_with_cache(series, names_filter=[HOOK], pos_slice=given)
    assert torch.equal(cut[HOOK], whole[HOOK][:, expected])


@pytest.mark.parametrize("layer", [np.int64(1), torch.tensor(1), -1])
def test_whole_numbers_of_any_kind_are_layers(layer, series, no_shape_checks):
    model = build()
    assert torch.equal(model(series, stop_at_layer=layer), model(series, stop_at_layer=1))


def test_a_hook_goes_forward_or_backward(no_shape_checks):
    with pytest.raises(
        ArgumentError, match="dir as 'fwd' or 'bwd', got 'forward'; did you mean 'fwd'"
    ):
        build().add_hook(HOOK, lambda x, hook: x, dir="forward")


def test_errors_are_what_users_of_transformer_lens_catch(series):
    model = build()
    with pytest.raises(KeyError, match="did you mean 'blocks.0.attn.hook_z'"):
        model.run_with_hooks(series, fwd_hooks=[("blocks.0.attn.hook_zz", lambda x, hook: x)])
    with pytest.raises(AssertionError, match="only fires with"):
        model.add_hook("blocks.0.attn.hook_result", lambda x, hook: x)


def test_config_and_device_are_where_other_libraries_look(series):
    model = build()
    assert model.config is model.cfg
    assert model.device == torch.device("cpu") == model.W_Q.device


def test_gradients_that_cannot_be_are_told(series):
    model, target = build(), torch.tensor([0, 3, 1, 2])
    ask: dict[str, Any] = {"return_type": "loss", "target": target, "incl_bwd": True}
    with torch.inference_mode(), pytest.raises(ArgumentError, match="inference_mode"):
        model.run_with_cache(series, **ask)
    with torch.no_grad(), pytest.raises(ArgumentError, match="leave torch.no_grad"):
        model.run_with_cache(series, **ask)
    assert_clean(model)
