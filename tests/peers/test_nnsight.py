"""What nnsight's users do: trace, save, set, patch between invokes, take gradients."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

nnsight = pytest.importorskip("nnsight", reason="pip install 'tstlens[peers]'")

# Once imported it gives every object of the process a method ``save``, modules included.
pytest.importorskip("nnsight._c.py_mount").unmount("save")

HOOKS = ["blocks.0.hook_mlp_out", "blocks.1.attn.hook_z", "blocks.2.hook_resid_post", "hook_embed"]


@pytest.fixture
def model(model):
    model.set_use_fused(False)  # every point fires, and whoever watches changes no bit
    return model


def at(root, name):
    for part in name.split("."):
        root = root[int(part)] if part.isdigit() else getattr(root, part)
    return root


@pytest.mark.parametrize("name", HOOKS)
def test_a_saved_activation_is_the_caches(model, series, name):
    _, cache = model.run_with_cache(series)
    wrapped = nnsight.NNsight(model)
    with wrapped.trace(series):
        found = nnsight.save(at(wrapped, name).output)
        logits = nnsight.save(wrapped.output)
    assert torch.equal(found, cache[name]) and torch.equal(logits, model(series))


def test_a_pattern_is_read(model, series):
    _, cache = model.run_with_cache(series)
    wrapped = nnsight.NNsight(model)
    with wrapped.trace(series):
        pattern = nnsight.save(wrapped.blocks[1].attn.hook_pattern.output)
    assert torch.equal(pattern, cache["pattern", 1])


def test_setting_a_head_to_zero_is_what_a_hook_does(model, series):
    def without(z, hook):
        z[:, :, 2] = 0
        return z

    expected = model.run_with_hooks(series, fwd_hooks=[("blocks.1.attn.hook_z", without)])
    wrapped = nnsight.NNsight(model)
    with wrapped.trace(series):
        wrapped.blocks[1].attn.hook_z.output[:, :, 2] = 0
        logits = nnsight.save(wrapped.output)
    assert torch.equal(logits, expected) and not torch.equal(logits, model(series))


@pytest.mark.parametrize("name", HOOKS)
def test_an_activation_of_another_run_is_patched_in(model, series, other, name):
    _, cache = model.run_with_cache(other)
    expected = model.run_with_hooks(series, fwd_hooks=[(name, lambda value, hook: cache[name])])
    wrapped = nnsight.NNsight(model)
    with wrapped.trace(other):
        found = nnsight.save(at(wrapped, name).output)
    with wrapped.trace(series):
        at(wrapped, name).output = found
        logits = nnsight.save(wrapped.output)
    assert torch.equal(logits, expected)


def test_gradients_are_those_of_a_backward_hook(model, series):
    found = {}
    hook = ("blocks.1.hook_resid_post", lambda grad, hook: found.update(grad=grad.clone()))
    with model.hooks(bwd_hooks=[hook]):
        model(series)[:, 0].sum().backward()
    wrapped = nnsight.NNsight(model)
    with wrapped.trace(series):
        residual = wrapped.blocks[1].hook_resid_post.output
        with wrapped.output[:, 0].sum().backward():
            grad = nnsight.save(residual.grad)
    torch.testing.assert_close(grad, found["grad"])


def test_its_save_does_not_stand_in_for_ours():
    pytest.importorskip("sae_lens", reason="pip install 'tstlens[saes]'")
    code = (
        "import nnsight; from tstlens import saes; "
        "from tstlens.saes.dictionaries import save; assert saes.save is save"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
