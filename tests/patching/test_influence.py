"""Influence against a serial loop over heads, and the published matrix of slices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tstlens
from tstlens import patching
from tstlens.errors import ArgumentError

NAMES = [f"blocks.{layer}.attn.hook_z" for layer in range(2)]


def written(model, layer, z):
    """What heads add to the stream, [row, pos, head, d_model]."""
    return torch.einsum("rphd,hdm->rphm", z, model.blocks[layer].attn.W_O)


def test_influence_is_the_serial_loop_over_heads(case):
    found = patching.head_influence(case.model, case.clean, case.corrupted, progress=False)
    assert found.values.shape == (3, 2, 3, 2, 3)
    _, clean = case.model.run_with_cache(case.clean)
    _, corrupted = case.model.run_with_cache(case.corrupted)
    gap = written(case.model, 1, clean[NAMES[1]] - corrupted[NAMES[1]])
    for head in range(3):

        def put(z, hook, head=head):
            z = z.clone()
            z[:, :, head] = clean[hook.name][:, :, head]
            return z

        kept = {}

        def keep(z, hook, kept=kept):
            kept["z"] = z

        case.model.run_with_hooks(
            case.corrupted,
            fwd_hooks=[(NAMES[0], put), (NAMES[1], keep)],
        )
        change = written(case.model, 1, kept["z"] - corrupted[NAMES[1]])
        by_pair = change.unflatten(0, (3, -1))  # channels of one series side by side
        gaps = gap.unflatten(0, (3, -1))
        square = by_pair.pow(2).mean((1, 2, 4))
        share = square.div(gaps.pow(2).mean((1, 2, 4))).sqrt()
        closed = (by_pair * gaps).sum((1, 2, 4)) / gaps.pow(2).sum((1, 2, 4))
        assert torch.allclose(found.values[:, 0, head, 1], square, atol=1e-6)
        assert torch.allclose(found.normalized()[:, 0, head, 1], share, atol=1e-4)
        assert torch.allclose(found.signed()[:, 0, head, 1], closed, atol=1e-4)


def test_heads_influence_later_layers_only(pre_norm):
    found = patching.head_influence(
        pre_norm.model, pre_norm.clean, pre_norm.corrupted, progress=False
    )
    assert found.values[:, 0, :, 0].abs().max() == 0
    assert found.values[:, 1].abs().max() == 0
    assert found.values[:, 0, :, 1].min() > 0
    rows = found.to_dataframe()
    assert len(rows) == 3 * 3 * 3
    assert (rows["from_layer"] == 0).all() and (rows["to_layer"] == 1).all()
    first = rows[(rows["pair"] == 1) & (rows["from_head"] == 2) & (rows["to_head"] == 0)]
    assert first["signed"].item() == pytest.approx(float(found.signed()[1, 0, 2, 1, 0]))


def test_patching_a_series_into_itself_changes_nothing_and_has_no_ratio(pre_norm):
    found = patching.head_influence(pre_norm.model, pre_norm.clean, pre_norm.clean, progress=False)
    assert found.values.abs().max() < 1e-10
    assert found.normalized().isnan().all() and found.signed().isnan().all()


def test_the_mean_divides_mean_changes_by_mean_gaps(pre_norm):
    found = patching.head_influence(
        pre_norm.model, pre_norm.clean, pre_norm.corrupted, progress=False
    )
    mean = found.mean()
    expected = found.projection[:, 0, 1, 1, 2].mean() / found.gap[:, 1, 2].mean()
    assert torch.allclose(mean.signed()[0, 1, 1, 2], expected)
    assert mean.axes == ("layer", "head", "layer", "head")


def test_padding_does_not_count(pre_norm):
    mask = torch.ones(3, 10, dtype=torch.bool)
    mask[:, 6:] = False
    clean, corrupted = pre_norm.clean, pre_norm.corrupted
    options = {"clean_mask": mask, "corrupted_mask": mask, "progress": False}
    masked = patching.head_influence(pre_norm.model, clean, corrupted, **options)
    dirty = torch.where(mask[:, None], corrupted, 50.0)
    again = patching.head_influence(pre_norm.model, clean, dirty, **options)
    assert torch.allclose(masked.values, again.values, atol=1e-6)


def test_chunks_do_not_change_the_numbers(case):
    given = (case.model, case.clean, case.corrupted)
    whole = patching.head_influence(*given, progress=False)
    small = patching.head_influence(*given, memory_mb=0.01, progress=False)
    assert torch.allclose(whole.values, small.values, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "clean", "corrupted"),
    [
        ("denoise_pair_5_1", 5, 1),
        ("denoise_pair_58_46", 58, 46),
        ("denoise_pair_144_114", 144, 114),
        ("noise_pair_46_58", 46, 58),
    ],
)
def test_the_published_matrix_of_slices_is_reproduced(reference_folder, name, clean, corrupted):
    weights = torch.load(reference_folder / "TST_japanesevowels.pth", weights_only=True)
    model = tstlens.convert(weights, family="conv-tst", n_heads=8)
    data = tstlens.load_dataset("JapaneseVowels", split="test")
    found = patching.head_influence(
        model,
        data.series[clean],
        data.series[corrupted],
        site="attn_out",
        n_slices=8,
        progress=False,
    )
    published = np.load(reference_folder / f"{name}.npz")["inf_h2h"]
    assert np.abs(found.values[0].numpy() - published).max() < 1e-5


def test_slices_that_are_no_slices_are_refused(pre_norm):
    given = (pre_norm.model, pre_norm.clean, pre_norm.corrupted)
    with pytest.raises(ArgumentError, match="expected site='z' for heads, or n_slices"):
        patching.head_influence(*given, site="attn_out")
    with pytest.raises(ArgumentError, match="axis 'slice' needs n_slices that divides"):
        patching.head_influence(*given, site="attn_out", n_slices=5)
