"""Our patching functions against transformer_lens.patching's own, called with our model."""

from __future__ import annotations

import inspect

import pandas as pd
import pytest
import torch
import transformer_lens.patching as theirs

from tstlens import patching
from tstlens.errors import ArgumentError, UnknownAxisError

from .conftest import Case

NAMES = sorted(
    name for name in dir(theirs) if name.startswith("get_act_patch_") and "direct_path" not in name
)
SINGLE = [name for name in NAMES if not name.endswith("_every")]


def metric(output: torch.Tensor) -> torch.Tensor:
    return output.log_softmax(-1)[:, 1].mean()


def test_every_function_of_transformer_lens_is_offered() -> None:
    assert len(NAMES) >= 18
    for name in NAMES:
        assert name in patching.__all__


@pytest.mark.parametrize("name", ["hook_z", "attn.hook_z"])
def test_a_site_may_be_named_as_its_hook_is(pre_norm: Case, name: str) -> None:
    case = pre_norm
    target = torch.zeros(len(case.clean), dtype=torch.int64)
    call = (case.model, case.clean, case.corrupted)
    for axes in (("layer", "head"), ("layer", "pos")):
        options = {"axes": axes, "metric": patching.log_prob(target), "progress": False}
        ours = patching.sweep(*call, site=name, **options)
        short = patching.sweep(*call, site="z", **options)
        assert ours.site == "z" and ours.values.equal(short.values)
    assert patching.Site("mlp.hook_post", layer=0) == patching.Site("mlp_post", layer=0)


@pytest.mark.parametrize("name", SINGLE)
def test_a_function_gives_what_transformer_lens_gives(case: Case, name: str) -> None:
    _, cache = case.model.run_with_cache(case.clean)
    ours = getattr(patching, name)
    values, rows = ours(case.model, case.corrupted, cache, metric, return_index_df=True)
    some = rows.iloc[:: max(1, len(rows) // 40)]
    original = getattr(theirs, name)
    expected = original(
        case.model, case.corrupted, cache, metric, index_df=some, index_axis_names=None
    )
    assert expected.std() > 1e-4, "a map without contrast compares nothing"
    torch.testing.assert_close(values.flatten()[some.index.tolist()], expected, atol=1e-5, rtol=0)
    of_rows = ours(case.model, case.corrupted, cache, metric, index_df=some)
    torch.testing.assert_close(of_rows, expected, atol=1e-5, rtol=0)


def test_a_cache_may_be_a_dict_and_of_one_series_for_all(pre_norm: Case) -> None:
    case = pre_norm
    one = case.clean[:1]
    cache = case.model.run_with_cache(one, return_cache_object=False)[1]
    assert type(cache) is dict
    repeated = case.model.run_with_cache(one.expand_as(case.clean).contiguous())[1]
    call = (case.model, case.corrupted)
    for function in (patching.get_act_patch_resid_pre, patching.get_act_patch_attn_head_v_all_pos):
        ours = function(*call, cache, lambda out: metric(out)[None, None])  # .item() takes it too
        torch.testing.assert_close(ours, function(*call, repeated, metric), atol=1e-6, rtol=0)


def test_the_every_functions_stack_what_their_parts_give(pre_norm: Case) -> None:
    case = pre_norm
    _, cache = case.model.run_with_cache(case.clean)
    call = (case.model, case.corrupted, cache, metric)
    by_pos = patching.get_act_patch_attn_head_by_pos_every(*call)
    assert by_pos.shape == (5, 2, 10, 3)
    pattern = patching.get_act_patch_attn_head_pattern_by_pos(*call)
    torch.testing.assert_close(by_pos[4], pattern.transpose(1, 2))
    # on a per-step model positions are time steps, so TransformerLens' own loop works unchanged
    torch.testing.assert_close(
        by_pos, theirs.get_act_patch_attn_head_by_pos_every(*call), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        patching.get_act_patch_attn_head_all_pos_every(*call),
        theirs.get_act_patch_attn_head_all_pos_every(*call), atol=1e-5, rtol=0,
    )  # fmt: skip
    torch.testing.assert_close(
        patching.get_act_patch_block_every(*call),
        theirs.get_act_patch_block_every(*call), atol=1e-5, rtol=0,
    )  # fmt: skip


def test_signatures_start_as_transformer_lens_do() -> None:
    expected = ["model", "corrupted_tokens", "clean_cache", "patching_metric"]
    for name in SINGLE:
        ours = list(inspect.signature(getattr(patching, name)).parameters)
        assert ours[:4] == expected
        assert {"index_df", "return_index_df"} <= set(ours)


def test_rows_that_do_not_fit_are_refused(pre_norm: Case) -> None:
    case = pre_norm
    _, cache = case.model.run_with_cache(case.clean)
    call = (case.model, case.corrupted, cache, metric)
    with pytest.raises(ArgumentError, match="first column must be 'layer'"):
        patching.get_act_patch_attn_out(*call, index_df=pd.DataFrame({"pos": [0]}))
    with pytest.raises(UnknownAxisError, match="unknown axis 'head'"):
        rows = pd.DataFrame({"layer": [0], "head": [0]})
        patching.get_act_patch_attn_out(*call, index_df=rows)
    with pytest.raises(ArgumentError, match=r"expected pos in 0\.\.9"):
        patching.get_act_patch_attn_out(*call, index_df=pd.DataFrame({"layer": [0], "pos": [10]}))
    for rows, words in (
        ({"layer": [-1], "pos": [0]}, r"expected layer in 0\.\.1, got -1"),
        ({"layer": [2], "pos": [0]}, r"expected layer in 0\.\.1, got 2"),
        ({"layer": [0.5], "pos": [0]}, "expected integers in column 'layer', got float64"),
        ({"layer": [0], "pos": ["a"]}, "expected integers in column 'pos', got"),
    ):
        with pytest.raises(ArgumentError, match=words):
            patching.get_act_patch_attn_out(*call, index_df=pd.DataFrame(rows))
