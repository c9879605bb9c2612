"""What sae-lens' users do, in its own words; only the import, model and input are ours.

Each step is computed a second time in another way, so that it is right and not merely accepted.
"""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from transformer_lens.utilities import get_act_name

from tstlens.model import TSTActivationCache as ActivationCache

pytest.importorskip("sae_lens")

from sae_lens import (
    SAE,
    LoggingConfig,
    SAETrainer,
    StandardSAE,
    StandardSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata

from tstlens import saes as our_saes

POS = 3


def made(layer, seed=0):
    """An SAE at a layer's z, heads joined, as one would load it."""
    metadata = SAEMetadata(hook_name=f"blocks.{layer}.attn.hook_z")
    shape = {"d_in": 16, "d_sae": 40, "reshape_activations": "hook_z"}
    sae = StandardSAE(StandardSAEConfig(**shape, metadata=metadata))
    generator = torch.Generator().manual_seed(seed + layer)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return sae.eval()


@pytest.fixture
def hook_name_to_sae():
    saes = [made(layer) for layer in range(3)]
    return {sae.cfg.metadata.hook_name: sae for sae in saes}


def differences(logits):
    return logits[:, 1] - logits[:, 0]


def by_hand(model, series, sae, latents=None, error=False):
    """The run with an SAE put in by an ordinary hook; ``latents`` edits what it encodes."""

    def replace(z, hook):
        flat = z.flatten(-2)
        sae.turn_off_forward_pass_hook_z_reshaping()
        found = sae.encode(flat)
        rest = flat - sae.decode(found) if error else 0
        found = found if latents is None else latents(found.clone())
        out = sae.decode(found) + rest
        sae.turn_on_forward_pass_hook_z_reshaping()
        return out.view(z.shape)

    return model.run_with_hooks(series, fwd_hooks=[(sae.cfg.metadata.hook_name, replace)])


class TestHookedSAETransformerDemo:
    """SAEs for one run, in a cache, under hooks; added for good, reset; error nodes; gradients."""

    @torch.no_grad()
    def test_runs_with_one_or_several_saes_leave_the_model_as_it_was(
        self, model, series, hook_name_to_sae
    ):
        original = model(series)
        for layers in ([0], [1, 2], [0, 1, 2]):
            chosen = [hook_name_to_sae[get_act_name("z", layer)] for layer in layers]
            logits = model.run_with_saes(series, saes=chosen, use_error_term=None)
            assert not torch.allclose(logits, original, atol=1e-4)
            assert torch.equal(model(series), original) and not model.acts_to_saes
        one = hook_name_to_sae[get_act_name("z", 1)]
        spliced = model.run_with_saes(series, saes=one)
        torch.testing.assert_close(spliced, by_hand(model, series, one))

    @torch.no_grad()
    def test_latents_are_in_the_cache_beside_everything_else(self, model, series, hook_name_to_sae):
        name = get_act_name("z", 1)
        sae = hook_name_to_sae[name]
        _, plain = model.run_with_cache(series)
        _, cache = model.run_with_cache_with_saes(series, saes=[sae])
        acts = cache[name + ".hook_sae_acts_post"]
        live = (acts[:, POS] > 0).any(dim=0)
        assert acts.shape == (6, 6, 40) and 0 < live.sum() < 40
        torch.testing.assert_close(acts, sae.encode(plain[name]))
        decoded = sae.decode(acts).view(6, 6, 4, 4)
        torch.testing.assert_close(cache[name + ".hook_sae_output"], decoded)
        assert torch.equal(cache["pattern", 0], plain["pattern", 0]) and name not in cache

    @torch.no_grad()
    def test_ablating_one_latent_after_the_other(self, model, series, hook_name_to_sae):
        name = get_act_name("z", 1)
        sae = hook_name_to_sae[name]

        def ablate(acts, hook, pos, feature_id):
            acts[:, pos, feature_id] = 0.0
            return acts

        clean = differences(model.run_with_saes(series, saes=sae))
        _, cache = model.run_with_cache_with_saes(series, saes=sae)
        live = (cache[name + ".hook_sae_acts_post"][:, POS] > 0).any(0).nonzero().flatten()
        effects = torch.zeros(6, len(live))
        for column, feature_id in enumerate(live.tolist()):
            hook = partial(ablate, pos=POS, feature_id=feature_id)
            logits = model.run_with_hooks_with_saes(
                series, saes=sae, fwd_hooks=[(name + ".hook_sae_acts_post", hook)]
            )
            effects[:, column] = differences(logits) - clean
            expected = by_hand(model, series, sae, lambda z, f=feature_id: ablate(z, None, POS, f))
            torch.testing.assert_close(differences(logits), differences(expected))
        assert effects.abs().max() > 1e-3 and not model.acts_to_saes

    @torch.no_grad()
    def test_saes_added_for_good_and_reset_one_by_one(self, model, series, hook_name_to_sae):
        original = model(series)
        assert model.acts_to_saes == {}
        for sae in hook_name_to_sae.values():
            model.add_sae(sae)
        assert model.acts_to_saes == hook_name_to_sae
        with_all = model(series)
        torch.testing.assert_close(
            with_all, model.run_with_saes(series, saes=list(hook_name_to_sae.values()))
        )
        assert model.acts_to_saes == hook_name_to_sae  # what was added stays
        model.reset_saes(get_act_name("z", 0))
        model.reset_saes([get_act_name("z", 2)])
        (left,) = model.acts_to_saes
        assert left == get_act_name("z", 1)
        torch.testing.assert_close(model(series), by_hand_without(model, series, left))
        model.reset_saes()
        assert model.acts_to_saes == {} and torch.equal(model(series), original)

    @torch.no_grad()
    def test_a_latents_path_into_the_values_of_later_heads(self, model, series, hook_name_to_sae):
        name, heads = get_act_name("z", 0), [(1, 2), (2, 0)]
        sae = hook_name_to_sae[name]
        model.add_sae(sae)
        clean = differences(model(series))
        _, cache = model.run_with_cache(series)
        model.set_use_split_qkv_input(True)
        w_o = model.W_O.flatten(1, 2)  # [layer, head * d_head, d_model]

        def patch(v_input, hook, directions, head_index):
            v_input[:, POS, head_index, :] = v_input[:, POS, head_index, :] - directions
            return v_input

        acts = cache[name + ".hook_sae_acts_post"][:, POS]
        feature_id = int(acts.sum(0).argmax())
        directions = (acts[:, feature_id, None] * sae.W_dec[feature_id]) @ w_o[0]
        hooks = [
            (get_act_name("v_input", layer), partial(patch, directions=directions, head_index=head))
            for layer, head in heads
        ]
        patched = differences(model.run_with_hooks(series, return_type="logits", fwd_hooks=hooks))
        assert (patched - clean).abs().max() > 1e-4
        # The same by the values themselves, at what their inputs had become in that run.
        found = {}
        hooks += [
            (get_act_name("v", layer), lambda v, hook: found.update({hook.name: v.clone()}))
            for layer, _ in heads
        ]
        model.run_with_hooks(series, fwd_hooks=hooks)
        model.set_use_split_qkv_input(False)

        def put(v, hook, head):
            v[:, POS, head] = found[hook.name][:, POS, head]
            return v

        hooks = [(get_act_name("v", layer), partial(put, head=head)) for layer, head in heads]
        again = differences(model.run_with_hooks(series, fwd_hooks=hooks))
        torch.testing.assert_close(again, patched)

    @torch.no_grad()
    def test_error_nodes_keep_the_output_and_can_be_ablated(self, model, series, hook_name_to_sae):
        original, name = model(series), get_act_name("z", 1)
        plain = hook_name_to_sae[name]
        assert not torch.allclose(model.run_with_saes(series, saes=plain), original, atol=1e-4)
        with_error = copy.deepcopy(plain)
        with_error.use_error_term = True
        model.add_sae(with_error)
        torch.testing.assert_close(model(series), original, atol=1e-5, rtol=1e-5)

        def ablate_error(error, hook, pos):
            error[:, pos, ...] = 0.0
            return error

        every = [(name + ".hook_sae_error", partial(ablate_error, pos=slice(None)))]
        without = model.run_with_hooks(series, return_type="logits", fwd_hooks=every)
        torch.testing.assert_close(without, by_hand_without(model, series, name))
        one = [(name + ".hook_sae_error", partial(ablate_error, pos=POS))]
        at_one = model.run_with_hooks(series, return_type="logits", fwd_hooks=one)
        assert not torch.allclose(at_one, original, atol=1e-4)
        assert not torch.allclose(at_one, without, atol=1e-4)
        latent = [(name + ".hook_sae_acts_post", lambda acts, hook: acts * 0)]
        silent = model.run_with_hooks(series, fwd_hooks=latent)
        model.reset_saes()
        expected = by_hand(model, series, with_error, torch.zeros_like, error=True)
        torch.testing.assert_close(silent, expected, atol=1e-5, rtol=1e-5)
        # The same for one run, without touching the SAE.
        kept = model.run_with_saes(series, saes=plain, use_error_term=True)
        torch.testing.assert_close(kept, original, atol=1e-5, rtol=1e-5)
        assert not plain.use_error_term

    def test_attribution_patching_of_latents(self, model, series, hook_name_to_sae):
        name = get_act_name("z", 2)
        point = name + ".hook_sae_acts_post"
        model.double()
        model.add_sae(hook_name_to_sae[name].double(), use_error_term=True)

        def caches(given):
            model.reset_hooks()
            forward, backward = {}, {}

            def of_latents(hook_name):
                return "hook_sae_acts_post" in hook_name

            model.add_hook(
                of_latents, lambda act, hook: forward.update({hook.name: act.detach()}), "fwd"
            )
            model.add_hook(
                of_latents, lambda grad, hook: backward.update({hook.name: grad.detach()}), "bwd"
            )
            value = differences(model(given)).sum()
            value.backward()
            model.reset_hooks()
            return value.item(), ActivationCache(forward, model), ActivationCache(backward, model)

        given = series.double()
        value, acts, gradients = caches(given)
        assert len(acts) == len(gradients) == 1
        attribution = gradients[point] * (0 - acts[point])
        step = 1e-5  # attribution is the slope of a small ablation, times the whole of it
        feature_id = int(attribution.abs().sum((0, 1)).argmax())

        def shrink(latents, hook):
            latents[..., feature_id] *= 1 - step
            return latents

        with torch.no_grad():
            less = differences(model.run_with_hooks(given, fwd_hooks=[(point, shrink)])).sum()
        assert attribution[..., feature_id].sum().item() == pytest.approx(
            (less.item() - value) / step, rel=1e-3
        )


def by_hand_without(model, series, name):
    """The run with the SAE at ``name`` put in by a hook, and nothing spliced in."""
    sae = copy.deepcopy(model.acts_to_saes[name])
    bare = copy.deepcopy(model)
    bare.reset_saes()
    return by_hand(bare, series, sae)


class TestLoadingAndAnalysing:
    """An SAE from disk, how sparse it is, and what the loss becomes with its reconstruction."""

    @torch.no_grad()
    def test_l0_and_the_loss_with_reconstruction_and_ablation(self, model, series, tmp_path):
        saved = StandardSAE(
            StandardSAEConfig(
                d_in=16, d_sae=40, metadata=SAEMetadata(hook_name="blocks.1.hook_resid_pre")
            )
        )
        saved.save_model(tmp_path)
        sae = SAE.load_from_disk(tmp_path, device="cpu")
        sae.eval()
        hook_name = sae.cfg.metadata.hook_name
        _, cache = model.run_with_cache(series)
        feature_acts = sae.encode(cache[hook_name])
        sae_out = sae.decode(feature_acts)
        l0 = (feature_acts[:, 1:] > 0).float().sum(-1)
        assert l0.shape == (6, 5) and 0 < l0.mean() < 40
        target = torch.arange(6) % 5

        def reconstruct(activation, hook, sae_out):
            return sae_out

        def zero(activation, hook):
            return torch.zeros_like(activation)

        whole = model(series, return_type="loss", target=target)
        hook = partial(reconstruct, sae_out=sae_out)
        spliced, ablated = (
            model.run_with_hooks(
                series, return_type="loss", target=target, fwd_hooks=[(hook_name, edit)]
            )
            for edit in (hook, zero)
        )
        expected = model.run_with_saes(series, saes=sae, return_type="loss", target=target)
        assert spliced.item() == pytest.approx(expected.item(), rel=1e-5)
        middle = torch.zeros(6, 6, 16)
        logits = model(middle, start_at_layer=1)
        assert ablated.item() == pytest.approx(
            torch.nn.functional.cross_entropy(logits, target).item(), rel=1e-5
        )
        assert len({round(one.item(), 5) for one in (whole, spliced, ablated)}) == 3
        expected = model.run_with_saes(series, saes=sae)
        with model.hooks(fwd_hooks=[(hook_name, hook)]):
            torch.testing.assert_close(model(series), expected)


class TestTraining:
    """sae-lens' own trainer on a stream of our activations; saved, loaded and spliced in."""

    def test_a_trainer_fed_by_a_model_of_series(self, model, tmp_path):
        series = torch.randn(64, 2, 24, generator=torch.Generator().manual_seed(1))
        hook_name = "blocks.0.hook_mlp_out"
        stream = our_saes.ActivationStream(model, series, hook_name, batch_size=64)
        cfg = StandardTrainingSAEConfig(
            d_in=model.cfg.d_model,
            d_sae=4 * model.cfg.d_model,
            l1_coefficient=0.05,
            l1_warm_up_steps=20,
            apply_b_dec_to_input=True,
            metadata=SAEMetadata(hook_name=hook_name),
        )
        sae = StandardTrainingSAE(cfg)
        held = next(our_saes.ActivationStream(model, series, hook_name, batch_size=200, seed=7))

        def error():
            with torch.no_grad():
                return (sae(held) - held).pow(2).mean().item()

        before = error()
        trainer = SAETrainer(
            cfg=SAETrainerConfig(
                n_checkpoints=0,
                checkpoint_path=None,
                save_final_checkpoint=False,
                total_training_samples=64 * 300,
                device="cpu",
                autocast=False,
                lr=3e-3,
                lr_end=3e-4,
                lr_scheduler_name="constant",
                lr_warm_up_steps=10,
                adam_beta1=0.9,
                adam_beta2=0.999,
                lr_decay_steps=50,
                n_restart_cycles=1,
                train_batch_size_samples=64,
                dead_feature_window=100,
                feature_sampling_window=100,
                logger=LoggingConfig(log_to_wandb=False),
            ),
            sae=sae,
            data_provider=stream,
        )
        trained = trainer.fit()
        assert trained is sae and error() < 0.5 * before
        sae.save_inference_model(tmp_path)
        loaded = SAE.load_from_disk(tmp_path)
        torch.testing.assert_close(loaded(held), sae(held))
        assert loaded.cfg.metadata.hook_name == hook_name
        out = model.run_with_saes(series[:4], saes=loaded, use_error_term=True)
        torch.testing.assert_close(out, model(series[:4]), atol=1e-5, rtol=1e-5)
