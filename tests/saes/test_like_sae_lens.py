"""The same scenario on sae-lens' ``HookedSAETransformer`` and on a HookedTST."""

from __future__ import annotations

import inspect

import pytest
import torch
from sae_lens import (
    HookedSAETransformer,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
    Transcoder,
    TranscoderConfig,
)
from sae_lens.saes.sae import SAEMetadata
from transformer_lens import HookedTransformerConfig

from tstlens import patching
from tstlens.model import HookedTST

MLP_OUT, Z, MID = "blocks.0.hook_mlp_out", "blocks.1.attn.hook_z", "blocks.1.hook_resid_mid"


def randomised(sae):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return sae


def make_saes():
    """At an MLP's output, at z with the heads joined, and a transcoder."""
    at = {"d_in": 8, "d_sae": 20}
    return [
        randomised(StandardSAE(StandardSAEConfig(**at, metadata=SAEMetadata(hook_name=MLP_OUT)))),
        randomised(
            TopKSAE(
                TopKSAEConfig(
                    **at, k=5, reshape_activations="hook_z", metadata=SAEMetadata(hook_name=Z)
                )
            )
        ),
        randomised(
            Transcoder(
                TranscoderConfig(
                    **at,
                    d_out=8,
                    apply_b_dec_to_input=False,
                    metadata=SAEMetadata(hook_name=MID, hook_name_out="blocks.1.hook_mlp_out"),
                )
            )
        ),
    ]


@pytest.fixture(scope="module")
def language_model():
    torch.manual_seed(0)
    return HookedSAETransformer(
        HookedTransformerConfig(
            n_layers=2,
            d_model=8,
            n_ctx=10,
            n_heads=2,
            d_head=4,
            d_mlp=12,
            d_vocab=11,
            act_fn="relu",
        )
    )


def run(model, given, name):
    """What a user of sae-lens does, and what they find: names, shapes and how outputs compare."""
    saes, bare = make_saes(), model(given)
    found = {"points": sorted(model.hook_dict)}
    out, cache = model.run_with_cache_with_saes(given, saes=saes, use_error_term=True)
    found["unchanged"] = bool((out - bare).abs().max() < 1e-5)
    found["cache"] = {n: tuple(v.shape[1:]) for n, v in cache.items() if "hook_sae" in n}
    found["gone from the cache"] = sorted(set(found["points"]) - set(cache))
    for sae in saes:
        model.add_sae(sae)
    found["attached"] = sorted(model.acts_to_saes)
    found["spliced points"] = sorted(set(model.hook_dict) - set(found["points"]))
    found["changed"] = bool((model(given) - bare).abs().max() > 1e-3)
    with model.saes([saes[0]], use_error_term=True):
        found["inside"] = sorted(model.acts_to_saes)
    found["after"] = sorted(model.acts_to_saes)

    def ablate(acts, hook):
        return torch.zeros_like(acts)

    model.reset_saes([Z, MID])
    edited = model.run_with_hooks(given, fwd_hooks=[(f"{MLP_OUT}.hook_sae_acts_post", ablate)])
    model.reset_saes()
    bias = saes[0].b_dec.detach()
    found["ablated to the bias"] = torch.allclose(
        edited,
        model.run_with_hooks(given, fwd_hooks=[(MLP_OUT, lambda x, hook: bias.expand_as(x))]),
        atol=1e-5,
    )
    found["restored"] = torch.equal(model(given), bare)
    found["points restored"] = sorted(model.hook_dict) == found.pop("points")
    return found


def test_the_same_scenario_finds_the_same(language_model, make_model):
    model = make_model(norm_position="pre", n_time=10)
    theirs = run(language_model, torch.randint(0, 11, (3, 10)), "sae-lens")
    ours = run(model, torch.randn(3, 3, 10), "tstlens")
    theirs["gone from the cache"] = [  # sae-lens' own addition to MLPs
        name for name in theirs["gone from the cache"] if not name.endswith("mlp.hook_in")
    ]
    flags = ("hook_result", "_input", "hook_mlp_in", "hook_attn_in", "hook_attn_mlp_sum")  # silent
    for found in (theirs, ours):
        found["gone from the cache"] = [
            name for name in found["gone from the cache"] if not name.endswith(flags)
        ]
    assert ours == theirs
    assert ours["unchanged"] and ours["changed"] and ours["restored"]


METHODS = [
    "add_sae",
    "reset_saes",
    "saes",
    "run_with_saes",
    "run_with_cache_with_saes",
    "run_with_hooks_with_saes",
]


@pytest.mark.parametrize("method", METHODS)
def test_signatures_are_those_of_sae_lens(method):
    def names(model):
        return list(inspect.signature(getattr(model, method)).parameters)

    assert names(HookedTST) == names(HookedSAETransformer)


def test_saes_follow_a_cast_of_the_model(make_model):
    """sae-lens keeps the dtype beside the weights; a spliced SAE's must follow the model's."""
    model, series = make_model(norm_position="pre"), torch.randn(2, 3, 10)
    for sae in make_saes():
        model.add_sae(sae)
    expected = model(series)
    doubled = model.double()(series.double())
    torch.testing.assert_close(doubled, expected.double(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("error_term", [False, True])
@pytest.mark.parametrize("position", ["pre", "post"])
def test_sweeps_over_latents_equal_the_serial_loop(make_model, position, error_term):
    model = make_model(norm_position=position)
    clean, corrupted = torch.randn(2, 2, 3, 10, generator=torch.Generator().manual_seed(4))
    site = f"{MLP_OUT}.hook_sae_acts_post"
    metric = patching.prob(torch.tensor([0, 3]))
    with model.saes(make_saes()[:1], use_error_term=error_term):
        swept = patching.sweep(
            model, clean, corrupted, site, ("pos", "latent"), metric, progress=False
        )
        _, cache = model.run_with_cache(clean)
        for pos, latent in ((0, 0), (3, 7), (9, 19)):

            def patch(acts, hook, pos=pos, latent=latent):
                acts[:, pos, latent] = cache[site][:, pos, latent]
                return acts

            out = model.run_with_hooks(corrupted, fwd_hooks=[(site, patch)])
            expected = out.softmax(-1)[torch.arange(2), torch.tensor([0, 3])]
            torch.testing.assert_close(swept.values[:, pos, latent], expected.detach())
    assert swept.values.shape == (2, 10, 20)


def test_sweeps_elsewhere_pass_through_the_spliced_dictionary(make_model):
    """The engine's short cut past attention must not step over a dictionary."""
    model = make_model(norm_position="post")
    clean, corrupted = torch.randn(2, 2, 3, 10, generator=torch.Generator().manual_seed(4))
    metric = patching.prob(torch.tensor([0, 3]))
    with model.saes(make_saes()[:1]):
        swept = patching.sweep(
            model, clean, corrupted, "z", ("layer", "head"), metric, progress=False
        )
        _, cache = model.run_with_cache(clean)

        def patch(z, hook):
            z[:, :, 1] = cache["blocks.0.attn.hook_z"][:, :, 1]
            return z

        out = model.run_with_hooks(corrupted, fwd_hooks=[("blocks.0.attn.hook_z", patch)])
    expected = out.softmax(-1)[torch.arange(2), torch.tensor([0, 3])]
    torch.testing.assert_close(swept.values[:, 0, 1], expected.detach())


def test_latents_of_heads_joined_or_single_have_their_axes(make_model):
    model = make_model(norm_position="pre")
    z_sae = make_saes()[1]
    with model.saes(z_sae):
        place = patching.sites.locate(model, patching.Site(f"{Z}.hook_sae_acts_post"))
        assert place.axes == ("pos", "feature")
        place = patching.sites.locate(model, patching.Site(f"{Z}.hook_sae_output"))
        assert place.axes == ("pos", "head", "feature")
    single = randomised(
        StandardSAE(StandardSAEConfig(d_in=4, d_sae=6, metadata=SAEMetadata(hook_name=Z)))
    )
    with model.saes(single):
        place = patching.sites.locate(model, patching.Site(f"{Z}.hook_sae_acts_post"))
        assert place.axes == ("pos", "head", "feature")


def test_attribution_over_latents_agrees_with_the_sweep(make_model):
    model = make_model(norm_position="pre")
    clean = torch.randn(3, 3, 10, generator=torch.Generator().manual_seed(4))
    corrupted = clean + 0.01 * torch.randn(3, 3, 10)
    metric, site = patching.prob(torch.tensor([0, 3, 1])), f"{MLP_OUT}.hook_sae_acts_post"
    options = {"axes": ("latent",), "metric": metric, "progress": False}
    with model.saes(make_saes()[:1], use_error_term=True):
        exact = patching.sweep(model, clean, corrupted, site, **options)
        estimate = patching.attribution(model, clean, corrupted, site, **options)
    torch.testing.assert_close(estimate.effect(), exact.effect(), atol=1e-4, rtol=0.1)
