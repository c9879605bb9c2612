"""Parts of a converted model's streams sum to them: every kind of block that sources bring."""

from __future__ import annotations

import importlib

import pytest

import tstlens

FAMILIES = {
    "Chronos-2, channel attention": ("chronos_2", {"num_output_patches": 2}),
    "Bolt, encoder and decoder": ("chronos_bolt", {}),
    "TimesFM 2.5, norms before and after": ("timesfm_25", {}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_sum_to_the_streams_of_a_converted_model(family):
    name, options = FAMILIES[family]
    # Imported here: without the family's package that module skips, and so does this test.
    source = importlib.import_module(f"tests.zoo.test_{name}")
    if not hasattr(source, "make"):
        pytest.skip(f"{name}'s package is not installed")
    made = source.make().double()
    model = tstlens.convert(made, n_channels=2, **options)
    _, cache = model.run_with_cache(source.series().double())
    for layer in range(1, model.cfg.n_layers + 1):
        last = layer == model.cfg.n_layers
        stream = cache["resid_post", layer - 1] if last else cache["resid_pre", layer]
        for parts in (
            cache.decompose_resid(layer),
            cache.get_full_resid_decomposition(layer),
            cache.stack_head_results(layer, incl_remainder=True),
        ):
            gap = (parts.sum(0) - stream).abs().max()
            assert gap <= 1e-10 * parts.abs().sum(0).max()
