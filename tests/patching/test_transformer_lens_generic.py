"""generic_activation_patch and the patch setters against transformer_lens.patching's own."""

from __future__ import annotations

import inspect

import pandas as pd
import pytest
import torch
import transformer_lens.patching as theirs

from tstlens import patching
from tstlens.errors import ArgumentError, HookError, UnknownAxisError, UnknownHookError

from .conftest import Case, make_case

SETTERS = {  # setter: an activation it is for, and its axes
    "layer_pos_patch_setter": ("mlp_out", ("layer", "pos")),
    "layer_pos_head_vector_patch_setter": ("z", ("layer", "pos", "head_index")),
    "layer_head_vector_patch_setter": ("v", ("layer", "head")),
    "layer_head_pattern_patch_setter": ("pattern", ("layer", "head_index")),
    "layer_head_pos_pattern_patch_setter": ("attn_scores", ("layer", "head_index", "dest_pos")),
    "layer_head_dest_src_pos_pattern_patch_setter": (
        "pattern",
        ("layer", "head", "dest_pos", "src_pos"),
    ),
}


def metric(output: torch.Tensor) -> torch.Tensor:
    return output.log_softmax(-1)[:, 1].mean()


def call_of(case: Case) -> tuple:
    _, cache = case.model.run_with_cache(case.clean)
    return case.model, case.corrupted, cache, metric


def halfway(corrupted, index, clean):
    """A setter of one's own: a head's entries in the middle between the two runs."""
    _, head = index
    corrupted[:, :, head] = (corrupted[:, :, head] + clean[:, :, head]) / 2
    return corrupted


def same(ours: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.std() > 1e-4, "a map without contrast compares nothing"
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_names_and_signatures_are_transformer_lens_own() -> None:
    offered = {"generic_activation_patch", "make_df_from_ranges"}
    offered |= {name for name in dir(theirs) if name.endswith("_patch_setter")}
    assert len(offered) == 2 + len(SETTERS) and offered <= set(patching.__all__)
    for name in offered:
        expected = list(inspect.signature(getattr(theirs, name)).parameters)
        ours = list(inspect.signature(getattr(patching, name)).parameters)
        assert ours == expected[: len(ours)] and len(ours) >= 2  # TransformerLens 4 has more


@pytest.mark.parametrize("name", SETTERS)
def test_a_whole_grid_is_what_transformer_lens_gives(pre_norm: Case, name: str) -> None:
    activation, axes = SETTERS[name]
    call = call_of(pre_norm)  # positions are time steps, so its own loop works unchanged
    values, rows = patching.generic_activation_patch(
        *call, getattr(patching, name), activation, axes, return_index_df=True
    )
    expected, their_rows = theirs.generic_activation_patch(
        *call, getattr(theirs, name), activation, axes, None, True
    )
    same(values, expected)
    pd.testing.assert_frame_equal(rows, their_rows)


@pytest.mark.parametrize("name", SETTERS)
def test_some_rows_are_what_transformer_lens_gives_on_every_kind_of_model(case, name) -> None:
    activation, axes = SETTERS[name]
    call = call_of(case)
    whole = patching.generic_activation_patch(*call, getattr(patching, name), activation, axes)
    ranges = whole.shape
    rows = patching.make_df_from_ranges(tuple(ranges), axes).iloc[:: max(1, whole.numel() // 20)]
    expected = theirs.generic_activation_patch(
        *call, getattr(theirs, name), activation, index_df=rows
    )
    ours = patching.generic_activation_patch(
        *call, getattr(patching, name), activation, index_df=rows
    )
    same(ours, expected)
    same(whole.flatten()[rows.index.tolist()], expected)


@pytest.mark.parametrize("setter", [halfway, theirs.layer_head_vector_patch_setter])
def test_a_setter_of_ones_own_runs_as_transformer_lens_runs_it(case: Case, setter) -> None:
    call = call_of(case)
    for name in ("z", "hook_z"):
        values = patching.generic_activation_patch(*call, setter, name, ("layer", "head"))
        expected = theirs.generic_activation_patch(*call, setter, "z", ("layer", "head"))
        assert values.shape == (2, 3)
        same(values, expected)


def test_an_activation_that_the_engine_does_not_know_is_patched_all_the_same(
    pre_norm: Case,
) -> None:
    call, setter = call_of(pre_norm), patching.layer_pos_patch_setter
    values = patching.generic_activation_patch(*call, setter, "scale0ln2", ("layer", "pos"))
    expected = theirs.generic_activation_patch(
        *call, theirs.layer_pos_patch_setter, "scale0ln2", ("layer", "pos")
    )
    same(values, expected)


def test_pos_counts_positions_and_not_samples() -> None:
    case = make_case("pre-norm RMS causal patches, last")
    values = patching.generic_activation_patch(
        *call_of(case), patching.layer_pos_patch_setter, "resid_pre", ("layer", "pos")
    )
    assert case.corrupted.shape[-1] == 10 and values.shape == (2, 5)
    by_name = patching.get_act_patch_resid_pre(*call_of(case))
    torch.testing.assert_close(values, by_name)


@pytest.mark.parametrize("name", SETTERS)
def test_a_setter_by_itself_does_what_transformer_lens_one_does(name: str) -> None:
    corrupted, clean = torch.randn(2, 4, 3, 6, 6)
    index = [0, 2, 1, 3][: len(SETTERS[name][1])]
    ours = getattr(patching, name)(corrupted.clone(), index, clean)
    expected = getattr(theirs, name)(corrupted.clone(), index, clean)
    assert torch.equal(ours, expected) and not torch.equal(ours, corrupted)
    with pytest.raises(ArgumentError, match=f"{name} takes an index .layer"):
        getattr(patching, name)(corrupted, [0], clean)


def test_rows_from_ranges_are_transformer_lens_rows() -> None:
    ranges, names = (2, 3, 2), ("layer", "pos", "head")
    pd.testing.assert_frame_equal(
        patching.make_df_from_ranges(ranges, names), theirs.make_df_from_ranges(ranges, names)
    )
    with pytest.raises(ArgumentError, match="got 2 ranges and 3 names"):
        patching.make_df_from_ranges((2, 3), names)


def test_activations_of_the_caller_stay_as_they_are(pre_norm: Case) -> None:
    model, corrupted, cache, _ = call_of(pre_norm)
    before = {name: value.clone() for name, value in cache.items()}
    series = corrupted.clone()
    patching.generic_activation_patch(
        model, corrupted, cache, metric, halfway, "z", ("layer", "head")
    )
    assert torch.equal(series, corrupted)
    assert all(torch.equal(before[name], value) for name, value in cache.items())
    assert not any(point.fwd_hooks for point in model.hook_points())


def test_what_does_not_fit_is_refused_with_what_to_do(pre_norm: Case, no_shape_checks) -> None:
    call = call_of(pre_norm)
    rows = pd.DataFrame({"layer": [0], "pos": [1]})
    pos, vector = patching.layer_pos_patch_setter, patching.layer_head_vector_patch_setter
    ask = patching.generic_activation_patch
    with pytest.raises(ArgumentError, match="index_df for some rows, got neither"):
        ask(*call, pos, "z")
    with pytest.raises(ArgumentError, match="index_df for some rows, got both"):
        ask(*call, pos, "z", ("layer", "pos"), rows)
    with pytest.raises(UnknownAxisError, match="unknown axis 'token'; known: layer, pos"):
        ask(*call, pos, "z", ("layer", "token"))
    with pytest.raises(ArgumentError, match=r"takes \(layer, head_index\) in this order"):
        ask(*call, vector, "z", ("layer", "pos"))
    with pytest.raises(ArgumentError, match=r"\[row, pos, ...\], and 'pattern' is \[row, head"):
        ask(*call, pos, "pattern", index_df=rows)
    with pytest.raises(ArgumentError, match="expected 'layer' as the first axis, got .head"):
        ask(*call, halfway, "z", ("head", "layer"))
    with pytest.raises(ArgumentError, match="expected layer in 0..1, got 2"):
        ask(*call, pos, "z", index_df=rows + 2)
    with pytest.raises(ArgumentError, match="expected integers in column 'pos', got float"):
        ask(*call, pos, "z", index_df=rows.astype({"pos": float}))
    with pytest.raises(ArgumentError, match="patch_setter to return the patched.*got None"):
        ask(*call, lambda corrupted, index, clean: None, "z", index_df=rows)
    with pytest.raises(UnknownHookError, match="unknown hook 'blocks.0.hook_zz'"):
        ask(*call, halfway, "zz", ("layer", "head"))
    with pytest.raises(HookError, match="set_use_attn_result"):
        ask(*call, vector, "result", ("layer", "head"))
    with pytest.raises(ArgumentError, match="one finite number"):
        ask(*call[:3], lambda output: output, halfway, "z", ("layer", "head"))
