"""What captum's users do: attribute the input, the front end's output and any hook point."""

from __future__ import annotations

import pytest
import torch

captum = pytest.importorskip("captum.attr")


def test_integrated_gradients_add_up_to_the_difference(model, series):
    found, gap = captum.IntegratedGradients(model).attribute(
        series, target=2, n_steps=300, return_convergence_delta=True
    )
    difference = (model(series) - model(torch.zeros_like(series)))[:, 2]
    assert found.shape == series.shape and gap.abs().max() < 5e-2
    torch.testing.assert_close(found.sum((1, 2)), difference, atol=5e-2, rtol=1e-2)


@pytest.mark.parametrize("layer", ["hook_embed", "blocks.1.hook_resid_post", "blocks.0.mlp"])
def test_layers_are_attributed_as_gradients_of_hooks_say(model, series, layer):
    module = model.get_submodule(layer)
    name = "blocks.0.hook_mlp_out" if layer == "blocks.0.mlp" else layer
    found = captum.LayerGradientXActivation(model, module).attribute(series, target=1)
    kept = {}
    hooks = [(name, lambda value, hook: kept.update(value=value))]
    back = [(name, lambda grad, hook: kept.update(grad=grad.clone()))]
    with model.hooks(fwd_hooks=hooks, bwd_hooks=back):
        model(series)[:, 1].sum().backward()
    torch.testing.assert_close(found, kept["value"] * kept["grad"])


@pytest.mark.parametrize(
    "method",
    ["LayerActivation", "LayerGradientXActivation", "LayerIntegratedGradients", "LayerConductance",
     "LayerGradCam", "InternalInfluence"],
)  # fmt: skip
@pytest.mark.parametrize("padded", [False, True])
def test_the_front_end_is_attributed_as_its_hook_point(model, series, method, padded):
    options: dict = {} if method == "LayerActivation" else {"target": 1}
    if padded:
        options["additional_forward_args"] = (torch.arange(series.shape[2]) < 12).expand(
            len(series), -1
        )
    run = (lambda x, mask: model(x, mask=mask)) if padded else model
    found, expected = (
        getattr(captum, method)(run, module).attribute(series, **options)
        for module in (model.embed, model.hook_embed)
    )
    torch.testing.assert_close(found, expected)
    if method != "LayerGradCam":  # summed over the width, it may be below zero and cut
        assert found.abs().max() > 0


def test_a_hook_on_the_front_end_edits_what_enters_the_trunk(model, series):
    handle = model.embed.register_forward_hook(lambda module, args, output: output * 2)
    edited = model(series)
    handle.remove()
    twice = model.run_with_hooks(series, fwd_hooks=[("hook_embed", lambda x, hook: x * 2)])
    torch.testing.assert_close(edited, twice)
    embedding, state = model.embed(series, None)  # called by itself it gives both, as before
    assert embedding.ndim == 3 and hasattr(state, "pos_mask")
    assert "forward" not in vars(model.embed)


def test_occluding_a_patch_is_running_without_it(model, series):
    found = captum.Occlusion(model).attribute(
        series, sliding_window_shapes=(2, 4), strides=(2, 4), target=0
    )
    without = series.clone()
    without[:, :, 8:12] = 0
    expected = (model(series) - model(without))[:, 0]
    torch.testing.assert_close(found[:, 0, 9], expected.to(found.dtype), atol=1e-6, rtol=1e-5)


def test_layer_ablation_replaces_a_position(model, series):
    mask = torch.arange(6)[None, :, None].expand(1, 6, 16)
    found = captum.LayerFeatureAblation(model, model.blocks[1].hook_resid_post).attribute(
        series, target=3, layer_mask=mask
    )

    def zero(value, hook):
        value[:, 4] = 0
        return value

    expected = model(series) - model.run_with_hooks(
        series, fwd_hooks=[("blocks.1.hook_resid_post", zero)]
    )
    torch.testing.assert_close(found[:, 4, 0], expected[:, 3], atol=1e-6, rtol=1e-5)
