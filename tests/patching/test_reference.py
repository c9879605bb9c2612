"""The published sweep of arXiv 2511.21514, reproduced through the public functions.

Its "heads" are slices of the attention output after the output projection; the last test shows
that they are not heads.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import tstlens
from tstlens import patching
from tstlens.model import HookedTST

TOLERANCE = 1e-5
FILES = ("denoise_pair_144_114", "denoise_pair_58_46", "denoise_pair_5_1", "noise_pair_46_58")


@pytest.fixture(scope="module")
def reference(reference_folder: Path) -> HookedTST:
    state = torch.load(reference_folder / "TST_japanesevowels.pth", weights_only=True)
    return tstlens.convert(state, family="conv-tst", n_heads=8)


@pytest.fixture(scope="module")
def data() -> tstlens.TimeSeriesData:
    return tstlens.load_dataset("JapaneseVowels", split="test")


@pytest.mark.parametrize("name", FILES)
def test_the_published_arrays_are_slices_of_the_attention_output(
    reference: HookedTST, data, reference_folder: Path, name: str
) -> None:
    a, b = map(int, re.findall(r"\d+", name))
    published = np.load(reference_folder / f"{name}.npz")
    clean, corrupted = data.series[a : a + 1], data.series[b : b + 1]

    def probabilities(site: str, axes: tuple[str, ...], **options) -> torch.Tensor:
        """The patched run's probability of each of the ten classes, [*axes, class]."""
        per_class = [
            patching.sweep(
                reference, clean, corrupted, site, axes, patching.prob(torch.tensor([c])),
                progress=False, **options,
            ).values[0]
            for c in range(10)
        ]  # fmt: skip
        return torch.stack(per_class, -1)

    slices = ("layer", "slice")
    found = {
        "baseline": reference(corrupted).softmax(-1)[0].detach(),
        "layer_patch": probabilities("attn_out", ("layer",)),
        "head_patch": probabilities("attn_out", slices, n_slices=8),
        "head_pos_patch": probabilities("attn_out", (*slices, "pos"), n_slices=8),
        "mlp_patch": probabilities("mlp_out", ("layer",)),
        "mlp_pos_patch": probabilities("mlp_out", ("layer", "pos"))[:, :12],
        "delta_h2c": patching.sweep(
            reference, clean, corrupted, "attn_out", slices,
            patching.prob(data.labels[a : a + 1] + 1), n_slices=8, progress=False,
        ).effect()[0],
    }  # fmt: skip
    for array, values in found.items():
        np.testing.assert_allclose(
            values.numpy(), published[array], atol=TOLERANCE, rtol=0, err_msg=array
        )


def test_the_reference_classifier_gets_361_of_370_right(reference: HookedTST, data) -> None:
    with torch.no_grad():
        assert int((reference(data.series).argmax(-1) == data.labels + 1).sum()) == 361


def test_slices_of_the_attention_output_are_not_heads(reference: HookedTST, data) -> None:
    wrong = tstlens.data.misclassified_pairs(lambda x: reference(x)[:, 1:], data)
    metric = patching.prob(wrong.target + 1)
    heads = patching.sweep(
        reference, wrong.clean, wrong.corrupted, "z", ("layer", "head"), metric, progress=False
    )
    slices = patching.sweep(
        reference, wrong.clean, wrong.corrupted, "attn_out", ("layer", "slice"), metric,
        n_slices=8, progress=False,
    )  # fmt: skip
    rho = [
        spearmanr(h.flatten(), s.flatten()).statistic
        for h, s in zip(heads.effect(), slices.effect(), strict=True)
    ]
    assert len(rho) == 9
    assert abs(np.mean(rho)) < 0.5, "the maps would agree if slices were heads"
