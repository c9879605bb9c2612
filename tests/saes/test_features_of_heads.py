"""Dictionaries that read heads one by one, and outputs with quantiles: against loops by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.saes import hand_made as made
from tstlens import saes
from tstlens.errors import ArgumentError, SeriesShapeError
from tstlens.saes.reading import activity_of, output_effects
from tstlens.saes.reading.activity import ByHead, by_head, central

Z = "blocks.0.attn.hook_z"
D_SAE = 6


@pytest.fixture
def model():
    return made.per_step(n_layers=2)


@pytest.fixture
def each():
    return made.random_dictionary(4, D_SAE, Z, seed=3)


@torch.no_grad()
def test_every_head_has_latents_of_its_own(model, each):
    data = made.labelled(n=5, padded=True)
    _, cache = model.run_with_cache(data.series, mask=data.mask)
    found = activity_of(model, each, data)
    assert found.n_latents == 2 * D_SAE
    for head in range(2):
        expected = each.encode(cache[Z][:, :, head])
        for latent in range(D_SAE):
            values = found.of(head * D_SAE + latent)[:, 0]
            observed = data.mask.numpy()
            np.testing.assert_allclose(
                values[observed], expected[..., latent].numpy()[observed], atol=1e-6
            )


@torch.no_grad()
def test_what_it_decodes_is_what_is_spliced_in(model, each):
    series = made.labelled(n=5).series
    with model.saes(each, use_error_term=False):
        expected = model(series)
    joined = by_head(model, each)

    def replace(z, hook):
        return joined.decode(joined.encode(z)).view_as(z)

    torch.testing.assert_close(model.run_with_hooks(series, fwd_hooks=[(Z, replace)]), expected)
    latents = torch.rand(3, 2 * D_SAE)
    torch.testing.assert_close(joined.decode(latents), latents @ joined.W_dec)
    assert by_head(model, joined) is joined
    one = made.random_dictionary(4, D_SAE, Z, hook_head_index=1)
    assert by_head(model, one) is one


@torch.no_grad()
def test_removing_a_latent_removes_it_at_its_head_alone(model, each):
    data = made.labelled(n=5)
    effects = output_effects(model, each, data, n_series=5)
    size = np.nan_to_num(effects.size).reshape(2, D_SAE)
    for head, latent in enumerate(size.argmax(1).tolist()):

        def remove(z, hook, head=head, latent=latent):
            z = z.clone()
            amount = each.encode(z[:, :, head])[..., latent]
            z[:, :, head] -= amount[..., None] * each.W_dec[latent]
            return z

        changed = model.run_with_hooks(data.series, fwd_hooks=[(Z, remove)]) - model(data.series)
        active = int(effects.n_series[head * D_SAE + latent])
        np.testing.assert_allclose(
            effects.change[head * D_SAE + latent] * active, changed.sum(0), atol=1e-5
        )
        ablated = saes.ablate_latent(
            model, each, data, head * D_SAE + latent, doses=(1.0,), n_controls=2
        )
        moved = changed[ablated.series]
        torch.testing.assert_close(ablated.change("logit")[0].float(), moved, atol=1e-5, rtol=1e-4)


def test_the_table_and_the_page_say_which_head(model, each, tmp_path):
    data = made.labelled(n=12)
    found = saes.features(model, each, data, n_permutations=100, progress=False)
    table = found.table()
    assert table["head"].tolist() == [0] * D_SAE + [1] * D_SAE
    assert table["of_head"].tolist() == list(range(D_SAE)) * 2
    text = found.to_html(tmp_path / "heads.html").read_text(encoding="utf-8")
    assert '"head"' in text and '"of_head"' in text
    whole = made.random_dictionary(8, D_SAE, "hook_embed")
    assert (
        "head" not in saes.features(model, whole, data, n_permutations=100, progress=False).table()
    )


def test_a_dictionary_that_normalises_by_row_cannot_be_joined(each):
    each.cfg.normalize_activations = "layer_norm"
    with pytest.raises(ArgumentError, match="normalize_activations='layer_norm'; set its cfg"):
        ByHead(each, 2)


def quantile_forecaster():
    from tstlens.model import HookedTST, HookedTSTConfig, LinearPatchesConfig
    from tstlens.zoo.parts import FlatHeadConfig

    return HookedTST(
        HookedTSTConfig(
            n_layers=2, d_model=8, n_heads=2, d_mlp=16, n_channels=3, n_time=32, n_ctx=4,
            embed=LinearPatchesConfig(patch_len=8, stride=8, channel_independent=True),
            head=FlatHeadConfig(horizon=4, n_quantiles=3), positions="learned",
        )
    )  # fmt: skip


@torch.no_grad()
def test_of_quantiles_the_median_is_read():
    model, data = quantile_forecaster(), made.labelled(n=6, n_channels=3, n_time=32)
    assert model(data.series).shape == (6, 3, 4, 3)
    dictionary = made.random_dictionary(8, 10, "blocks.0.hook_mlp_out")
    effects = output_effects(model, dictionary, data, n_series=6)
    assert effects.task == "forecast" and effects.change.shape == (10, 4)
    latent = int(np.nanargmax(effects.size))

    def remove(activation, hook):
        amount = dictionary.encode(activation)[..., latent]
        return activation - amount[..., None] * dictionary.W_dec[latent]

    edited = model.run_with_hooks(data.series, fwd_hooks=[("blocks.0.hook_mlp_out", remove)])
    changed = (edited - model(data.series))[..., 1]  # the middle one of three
    expected = changed.mean(1).sum(0) / effects.n_series[latent]
    np.testing.assert_allclose(effects.change[latent], expected, atol=1e-6)
    steered = saes.steer_latent(model, dictionary, data, latent, doses=(1,), n_controls=1)
    assert steered.task == "forecast" and steered.output.shape == (1, 6, 3, 4)


def test_the_middle_of_outputs_by_hand(no_shape_checks):
    model = made.per_channel()
    values = torch.arange(24.0).view(1, 2, 3, 4)
    torch.testing.assert_close(central(model, values), values[..., 1:3].mean(-1))
    torch.testing.assert_close(central(model, values[..., :3]), values[..., 1])
    torch.testing.assert_close(central(model, values[..., 0]), values[..., 0])
    with pytest.raises(SeriesShapeError, match=r"got \[1, 1, 2, 3, 4\]"):
        central(model, values[None])
