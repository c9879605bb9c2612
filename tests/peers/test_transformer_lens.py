"""What TransformerLens' users do, in its own words; only the import, model and input are ours.

Each step is computed a second time in another way, so that it is right and not merely accepted.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities import get_act_name

from tstlens import patching
from tstlens.model import TSTActivationCache as ActivationCache

FALSE, TRUE = 0, 1  # the classes between which a difference is taken


def logit_diff(logits, per_series=False):
    diff = logits[:, TRUE] - logits[:, FALSE]
    return diff if per_series else diff.mean()


class TestMainDemo:
    """Caching, hooks that ablate, shapes by name, weights by layer and head."""

    def test_cache_by_name_and_by_short_name(self, model, series):
        logits, cache = model.run_with_cache(series, remove_batch_dim=False)
        assert logits.shape == (6, 5)
        assert cache["blocks.0.attn.hook_pattern"] is cache["pattern", 0, "attn"]
        assert cache[get_act_name("q", 2)] is cache["q", 2]
        pattern = cache["pattern", 1]
        torch.testing.assert_close(pattern.sum(-1), torch.ones(6, 4, 6))
        z = torch.einsum("bhqk,bkhd->bqhd", pattern, cache["v", 1])
        torch.testing.assert_close(z, cache["z", 1])

    def test_one_series_without_its_batch_axis(self, model, series):
        _, cache = model.run_with_cache(series[:1], remove_batch_dim=True)
        assert cache["pattern", 0].shape == (4, 6, 6)

    def test_a_filter_keeps_what_it_names(self, model, series):
        _, cache = model.run_with_cache(series, names_filter=lambda name: name.endswith("pattern"))
        assert list(cache) == [f"blocks.{layer}.attn.hook_pattern" for layer in range(3)]

    @pytest.mark.parametrize("head", [0, 3])
    def test_ablating_a_head_by_its_values(self, model, series, head):
        def ablation(value, hook: HookPoint):
            value[:, :, head, :] = 0.0
            return value

        ablated = model.run_with_hooks(
            series, return_type="logits", fwd_hooks=[(get_act_name("v", 1), ablation)]
        )
        weights = model.blocks[1].attn.W_O
        with torch.no_grad():
            kept = weights[head].clone()
            weights[head] = 0
            expected = model(series)
            weights[head] = kept
        torch.testing.assert_close(ablated, expected)
        assert (ablated - model(series)).abs().max() > 1e-3

    def test_permanent_hooks_contexts_and_reset(self, model, series):
        before, seen = model(series), []
        model.add_hook("blocks.0.hook_mlp_out", lambda value, hook: value * 0)
        with model.hooks(
            fwd_hooks=[(lambda name: "hook_z" in name, lambda z, hook: seen.append(hook.layer()))]
        ):
            changed = model(series)
        assert seen == [0, 1, 2] and not torch.equal(changed, before)
        model.reset_hooks()
        assert torch.equal(model(series), before)

    def test_a_hook_keeps_things_in_its_context(self, model, series):
        name = "blocks.1.attn.hook_pattern"

        def keep(pattern, hook):
            hook.ctx["entropy"] = -(pattern * pattern.clamp(min=1e-12).log()).sum(-1).mean((0, 2))

        model.run_with_hooks(series, fwd_hooks=[(name, keep)], clear_contexts=False)
        assert model.hook_dict[name].ctx["entropy"].shape == (4,)

    def test_weights_circuits_and_runs_that_start_and_stop_anywhere(self, model, series):
        assert model.W_Q.shape == (3, 4, 16, 4) and model.W_in.shape == (3, 16, 24)
        ov = model.OV[1, 2]
        torch.testing.assert_close(ov.AB, model.W_V[1, 2] @ model.W_O[1, 2])
        assert len(ov.eigenvalues) == 4
        middle = model(series, stop_at_layer=2)
        torch.testing.assert_close(model(middle, start_at_layer=2), model(series))


class TestExploratoryAnalysis:
    """Where the difference comes from: streams, layers and heads add up; then patching by hand."""

    def test_the_stream_and_its_heads_add_up(self, model, series):
        _, cache = model.run_with_cache(series)
        accumulated, labels = cache.accumulated_resid(
            layer=-1, incl_mid=True, pos_slice=-1, return_labels=True
        )
        per_layer, names = cache.decompose_resid(layer=-1, pos_slice=-1, return_labels=True)
        per_head = cache.stack_head_results(layer=-1, pos_slice=-1, incl_remainder=True)
        assert labels[:3] == ["0_pre", "0_mid", "1_pre"] and names[-1] == "2_mlp_out"
        for parts in (per_layer, per_head):
            torch.testing.assert_close(parts.sum(0), accumulated[-1], atol=1e-5, rtol=1e-5)

    def test_the_difference_is_read_off_the_last_position(self, model, series):
        logits, cache = model.run_with_cache(series)
        direction = model.W_U[:, TRUE] - model.W_U[:, FALSE]
        read = cache["resid_post", 2][:, -1] @ direction + model.b_U[TRUE] - model.b_U[FALSE]
        torch.testing.assert_close(read, logit_diff(logits, per_series=True))

    @pytest.mark.parametrize("activation", ["resid_pre", "attn_out", "mlp_out"])
    def test_patching_by_hand_is_the_function_for_it(self, model, series, other, activation):
        _, clean_cache = model.run_with_cache(series)

        def patch(value, hook, pos, clean_cache):
            value[:, pos, :] = clean_cache[hook.name][:, pos, :]
            return value

        by_hand = torch.zeros(3, 6)
        for layer in range(model.cfg.n_layers):
            for pos in range(6):
                patched = model.run_with_hooks(
                    other,
                    fwd_hooks=[
                        (
                            get_act_name(activation, layer),
                            partial(patch, pos=pos, clean_cache=clean_cache),
                        )
                    ],
                    return_type="logits",
                )
                by_hand[layer, pos] = logit_diff(patched)
        function = getattr(patching, f"get_act_patch_{activation}")
        found = function(model, other, clean_cache, logit_diff)
        torch.testing.assert_close(found, by_hand.detach(), atol=1e-5, rtol=1e-4)


class TestActivationPatchingDemo:
    """Heads at every position, then all of a head's inputs."""

    def test_heads_by_position_and_over_all_positions(self, model, series, other):
        _, clean_cache = model.run_with_cache(series)
        metric = partial(lambda logits, base: logit_diff(logits) - base, base=0.5)
        grid = patching.get_act_patch_attn_head_out_by_pos(model, other, clean_cache, metric)
        every = patching.get_act_patch_attn_head_all_pos_every(model, other, clean_cache, metric)
        assert grid.shape == (3, 6, 4) and every.shape == (5, 3, 4)

        def patch(z, hook, head):
            z[:, :, head] = clean_cache[hook.name][:, :, head]
            return z

        for head in range(4):
            hook = (get_act_name("z", 1), partial(patch, head=head))
            expected = metric(model.run_with_hooks(other, fwd_hooks=[hook]))
            torch.testing.assert_close(every[0, 1, head], expected.detach(), atol=1e-5, rtol=1e-4)


class TestAttributionPatchingDemo:
    """Both caches by hand, forward and backward, then clean minus corrupted times gradient."""

    def caches(self, model, series):
        model.reset_hooks()
        forward, backward = {}, {}

        def kept(name):
            return "_input" not in name

        model.add_hook(kept, lambda act, hook: forward.update({hook.name: act.detach()}), "fwd")
        model.add_hook(kept, lambda grad, hook: backward.update({hook.name: grad.detach()}), "bwd")
        value = logit_diff(model(series))
        value.backward()
        model.reset_hooks()
        return value.item(), ActivationCache(forward, model), ActivationCache(backward, model)

    def test_gradients_times_differences_are_the_slope_of_a_small_patch(self, model, series, other):
        step = 1e-3
        near = other + step * (series - other)
        _, clean, _ = self.caches(model.double(), near.double())
        value, corrupted, gradients = self.caches(model, other.double())
        for name in ("blocks.0.hook_mlp_out", "blocks.1.attn.hook_z", "blocks.2.hook_resid_pre"):
            estimate = ((clean[name] - corrupted[name]) * gradients[name]).sum()
            patched = model.run_with_hooks(
                other.double(), fwd_hooks=[(name, lambda act, hook: clean[hook.name])]
            )
            measured = logit_diff(patched).item() - value
            assert abs(measured) > 1e-7
            assert estimate.item() == pytest.approx(measured, rel=0.05)

    def test_by_position_and_layer(self, model, series, other):
        _, clean, _ = self.caches(model, series)
        _, corrupted, gradients = self.caches(model, other)
        stacked, labels = clean.accumulated_resid(-1, incl_mid=False, return_labels=True)
        attribution = torch.einsum(
            "cbpd,cbpd->cp",
            stacked - corrupted.accumulated_resid(-1, incl_mid=False),
            gradients.accumulated_resid(-1, incl_mid=False),
        )
        assert attribution.shape == (len(labels), 6) and torch.isfinite(attribution).all()
        assert attribution.abs().max() > 0


class TestActivationPatchingDemoInFull:
    """Every ready-made grid beside its pieces, and a patch of one's own through the generic one."""

    def test_all_streams_at_once_are_the_three_grids(self, model, series, other):
        _, clean_cache = model.run_with_cache(series)
        every = patching.get_act_patch_block_every(model, other, clean_cache, logit_diff)
        each = [
            getattr(patching, f"get_act_patch_{name}")(model, other, clean_cache, logit_diff)
            for name in ("resid_pre", "attn_out", "mlp_out")
        ]
        torch.testing.assert_close(every, torch.stack(each))

    def test_a_heads_parts_by_position(self, model, series, other):
        _, clean_cache = model.run_with_cache(series)
        every = patching.get_act_patch_attn_head_by_pos_every(model, other, clean_cache, logit_diff)
        assert every.shape == (5, 3, 6, 4)
        for row, name in ((1, "q"), (2, "k"), (3, "v")):

            def patch(vector, hook):
                vector[:, 2, 3] = clean_cache[hook.name][:, 2, 3]
                return vector

            patched = model.run_with_hooks(other, fwd_hooks=[(get_act_name(name, 1), patch)])
            expected = logit_diff(patched).detach()
            torch.testing.assert_close(every[row, 1, 2, 3], expected, atol=1e-5, rtol=1e-4)

    def test_a_setter_of_ones_own(self, model, series, other):
        _, clean_cache = model.run_with_cache(series)

        def setter(corrupted, index, clean):
            _, head = index
            corrupted[:, :, head] = clean[:, :, head]
            return corrupted

        found, frame = patching.generic_activation_patch(
            model,
            other,
            clean_cache,
            logit_diff,
            setter,
            "z",
            index_axis_names=("layer", "head"),
            return_index_df=True,
        )
        ready = patching.get_act_patch_attn_head_out_all_pos(model, other, clean_cache, logit_diff)
        torch.testing.assert_close(found, ready)
        assert list(frame.columns) == ["layer", "head"] and len(frame) == 12


class TestAttributionPatchingDemoInFull(TestAttributionPatchingDemo):
    """What every layer and every head wrote, times the gradient at what it was added to."""

    def test_layers_heads_and_their_vectors(self, model, series, other):
        model.double()
        model.set_use_attn_result(True)
        given, base = series.double(), other.double()
        near = base + 1e-4 * (given - base)
        _, clean, _ = self.caches(model, near)
        value, corrupted, gradients = self.caches(model, base)
        # A small step's attribution, all layers' writings together, is the change of the output.
        change = logit_diff(model(near)).item() - value
        layers, labels = clean.decompose_resid(-1, return_labels=True)
        slope = gradients["resid_post", 2]
        written = ((layers - corrupted.decompose_resid(-1)) * slope).sum()
        assert written.item() == pytest.approx(change, rel=1e-2)
        heads, names = clean.stack_head_results(-1, return_labels=True)
        assert labels[-1] == "2_mlp_out" and names[-1] == "L2H3"
        difference = heads - corrupted.stack_head_results(-1)
        for layer in range(3):
            result = gradients["result", layer].movedim(2, 0)
            through = (difference[4 * layer : 4 * layer + 4] * result).sum((1, 2, 3))
            z = (clean["z", layer] - corrupted["z", layer]) * gradients["z", layer]
            torch.testing.assert_close(through, z.sum((0, 1, 3)), atol=1e-9, rtol=1e-6)

    def test_the_same_words_on_the_cache_of_gradients(self, model, series):
        model.set_use_attn_result(True)
        _, _, gradients = self.caches(model, series)
        layers, labels = gradients.decompose_resid(-1, return_labels=True)
        for label, part in zip(labels[2:], layers[2:], strict=True):
            layer, name = label.split("_", 1)
            assert torch.equal(part, gradients[name, int(layer)])
        heads = gradients.stack_head_results(-1)
        assert torch.equal(heads[5], gradients["result", 1][:, :, 1])
