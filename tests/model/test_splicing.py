"""Dictionaries spliced into a model, with a dictionary of our own: sae-lens is not needed."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

from tstlens.errors import ArgumentError, HookError, UnknownHookError
from tstlens.model import HookedTST

MLP_OUT = "blocks.0.hook_mlp_out"


class Dictionary(HookedRootModule):
    """A ReLU autoencoder with the hook points of sae-lens' SAEs."""

    def __init__(self, hook: str, d_in: int = 8, d_out: int | None = None, **metadata):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        place = {"hook_name": hook, "hook_name_out": None, "hook_head_index": None, **metadata}
        self.cfg = SimpleNamespace(
            d_in=d_in, d_out=d_out or d_in, d_sae=12, metadata=SimpleNamespace(**place)
        )
        self.W_enc = nn.Parameter(torch.randn(d_in, 12, generator=generator))
        self.W_dec = nn.Parameter(torch.randn(12, d_out or d_in, generator=generator))
        for name in ("input", "acts_pre", "acts_post", "recons", "error", "output"):
            setattr(self, f"hook_sae_{name}", HookPoint())
        self.setup()

    def encode(self, x):
        pre = self.hook_sae_acts_pre(self.hook_sae_input(x) @ self.W_enc)
        return self.hook_sae_acts_post(pre.relu())

    def decode(self, acts):
        return self.hook_sae_recons(acts @ self.W_dec)

    def reconstruct(self, x):
        """Once more, without hook points."""
        return (x @ self.W_enc).relu() @ self.W_dec

    def save_model(self, folder):
        folder.mkdir(parents=True)
        torch.save(self.state_dict(), folder / "weights.pt")


# hook point -> width of a dictionary there
PLACES = {
    "hook_embed": 8,
    "hook_pos_embed": 8,
    "blocks.0.hook_resid_pre": 8,
    "blocks.0.hook_attn_out": 8,
    "blocks.0.hook_resid_mid": 8,
    MLP_OUT: 8,
    "blocks.1.hook_resid_post": 8,
    "blocks.0.ln1.hook_normalized": 8,
    "blocks.1.mlp.hook_pre": 10,
    "blocks.1.mlp.hook_post": 10,
    "blocks.0.attn.hook_q": 4,
    "blocks.0.attn.hook_k": 4,
    "blocks.1.attn.hook_v": 4,
    "blocks.1.attn.hook_z": 4,
    "head.hook_pooled": 8,
}


@pytest.fixture
def model(make_model) -> HookedTST:
    return make_model("per-step", positions="learned", final_norm=True)


@pytest.mark.parametrize("hook", PLACES)
def test_without_the_error_term_it_is_the_run_with_the_activation_replaced(model, series, hook):
    sae = Dictionary(hook, PLACES[hook])
    by_hook = model.run_with_hooks(series, fwd_hooks=[(hook, lambda x, hook: sae.reconstruct(x))])
    assert not torch.allclose(by_hook, model(series))
    torch.testing.assert_close(model.run_with_saes(series, saes=[sae]), by_hook)


@pytest.mark.parametrize("hook", PLACES)
def test_with_the_error_term_the_output_is_unchanged(model, series, hook):
    sae = Dictionary(hook, PLACES[hook])
    spliced = model.run_with_saes(series, saes=[sae], use_error_term=True)
    torch.testing.assert_close(spliced, model(series), atol=1e-5, rtol=0)


@pytest.mark.parametrize("hook", PLACES)
def test_taking_it_out_restores_logits_hooks_and_names_bit_for_bit(model, series, hook):
    before, points = model(series), list(model.hook_dict.items())
    weights, sae = list(model.state_dict()), Dictionary(hook, PLACES[hook])
    model.add_sae(sae)
    assert hook not in model.hook_dict and f"{hook}.hook_sae_acts_post" in model.hook_dict
    model.reset_saes()
    assert torch.equal(model(series), before)
    assert list(model.hook_dict.items()) == points  # the same objects in the same order
    assert list(model.state_dict()) == weights
    assert {name: point.name for name, point in points} == {name: name for name, _ in points}
    assert sae.hook_sae_input.name == "hook_sae_input"


def test_joined_heads_are_taken_apart_again(model, series):
    z = "blocks.0.attn.hook_z"
    sae = Dictionary(z, d_in=8)

    def replace(z, hook):
        return sae.reconstruct(z.flatten(-2)).view(z.shape)

    expected = model.run_with_hooks(series, fwd_hooks=[(z, replace)])
    out, cache = model.run_with_cache_with_saes(series, saes=[sae])
    torch.testing.assert_close(out, expected)
    assert cache[f"{z}.hook_sae_acts_post"].shape == (4, 12, 12)
    assert cache[f"{z}.hook_sae_output"].shape == (4, 12, 2, 4)


def test_a_dictionary_of_one_head_leaves_the_others_alone(model, series):
    z = "blocks.0.attn.hook_z"
    sae = Dictionary(z, d_in=4, hook_head_index=1)

    def replace(z, hook):
        return torch.stack([z[:, :, 0], sae.reconstruct(z[:, :, 1])], 2)

    expected = model.run_with_hooks(series, fwd_hooks=[(z, replace)])
    torch.testing.assert_close(model.run_with_saes(series, saes=[sae]), expected)


@pytest.mark.parametrize("reads", ["blocks.0.ln2.hook_normalized", "blocks.0.hook_resid_mid"])
def test_a_transcoder_writes_what_it_makes_of_another_activation(model, series, reads):
    sae = Dictionary(reads, hook_name_out=MLP_OUT)
    before, points = model(series), list(model.hook_dict.items())
    _, cache = model.run_with_cache(series)

    def replace(mlp_out, hook):
        return sae.reconstruct(cache[reads])

    expected = model.run_with_hooks(series, fwd_hooks=[(MLP_OUT, replace)])
    torch.testing.assert_close(model.run_with_saes(series, saes=sae), expected)
    whole = model.run_with_saes(series, saes=sae, use_error_term=True)
    torch.testing.assert_close(whole, before, atol=1e-5, rtol=0)
    with model.saes(sae):
        assert reads in model.hook_dict and MLP_OUT not in model.hook_dict
        assert list(model.acts_to_saes) == [reads]
    assert list(model.hook_dict.items()) == points
    assert not any(point.readers for _, point in points)


def test_an_edit_of_what_a_transcoder_reads_reaches_it(model, series):
    reads = "blocks.0.ln2.hook_normalized"
    sae = Dictionary(reads, hook_name_out=MLP_OUT)
    with model.saes(sae):
        edited = model.run_with_hooks(series, fwd_hooks=[(reads, lambda x, hook: x * 0)])
    zeros = torch.zeros(4, 12, 8)
    expected = model.run_with_hooks(series, fwd_hooks=[(MLP_OUT, lambda x, hook: zeros)])
    torch.testing.assert_close(edited, expected)


def test_a_transcoder_reads_what_an_sae_before_it_writes(model, series):
    sae = Dictionary("blocks.0.hook_attn_out")
    transcoder = Dictionary("blocks.0.hook_resid_mid", hook_name_out=MLP_OUT)
    hooks = [("blocks.0.hook_attn_out", lambda x, hook: sae.reconstruct(x))]
    with model.saes(transcoder):
        expected = model.run_with_hooks(series, fwd_hooks=hooks)
    torch.testing.assert_close(model.run_with_saes(series, saes=[transcoder, sae]), expected)


def test_a_transcoder_whose_input_did_not_run_says_so(model, series):
    model.add_sae(Dictionary("blocks.0.hook_resid_mid", hook_name_out="blocks.1.hook_mlp_out"))
    residual = model(series, stop_at_layer=1)
    with pytest.raises(HookError, match="hook_resid_mid, which did not run before it"):
        model(residual, start_at_layer=1)


def test_nesting_puts_back_what_was_there_before(model, series):
    bare = model(series)
    first, second = Dictionary(MLP_OUT), Dictionary(MLP_OUT)
    with torch.no_grad():
        second.W_dec.mul_(2)
    model.add_sae(first)
    once, points = model(series), list(model.hook_dict.items())
    with model.saes([second, Dictionary("blocks.1.hook_attn_out")]):
        assert model.acts_to_saes[MLP_OUT] is second
        with model.saes([first]):
            pass
        assert not torch.allclose(model(series), once)
    assert model.acts_to_saes == {MLP_OUT: first}
    assert torch.equal(model(series), once) and list(model.hook_dict.items()) == points
    model.reset_saes(MLP_OUT)
    assert torch.equal(model(series), bare)


def test_saes_come_out_when_the_run_fails(model, series):
    with pytest.raises(RuntimeError), model.saes([Dictionary(MLP_OUT)]):
        raise RuntimeError
    with pytest.raises(ArgumentError):
        model.run_with_saes(series, saes=[Dictionary(MLP_OUT), Dictionary(MLP_OUT, d_in=3)])
    assert model.acts_to_saes == {} and MLP_OUT in model.hook_dict


def test_an_edited_latent_shows_through_the_error_term(model, series):
    """The error is that of the unedited code, so the edit's decoder direction is what changes."""
    sae, latent = Dictionary(MLP_OUT), 5
    _, cache = model.run_with_cache(series)
    acts = (cache[MLP_OUT] @ sae.W_enc).relu()
    by_hand = cache[MLP_OUT] - acts[..., [latent]] * sae.W_dec[latent]

    def ablate(acts, hook):
        acts[..., latent] = 0.0
        return acts

    with model.saes(sae, use_error_term=True):
        edited = model.run_with_hooks(series, fwd_hooks=[(f"{MLP_OUT}.hook_sae_acts_post", ablate)])
    expected = model.run_with_hooks(series, fwd_hooks=[(MLP_OUT, lambda x, hook: by_hand)])
    assert not torch.allclose(edited, model(series))
    torch.testing.assert_close(edited, expected, atol=1e-5, rtol=0)


def test_gradients_reach_latents_and_the_dictionary_but_not_the_error(model, series):
    sae = Dictionary(MLP_OUT)
    seen = {}
    with model.saes(sae, use_error_term=True):
        hooks = [(f"{MLP_OUT}.hook_sae_acts_post", lambda g, hook: seen.update(grad=g))]
        with model.hooks(bwd_hooks=hooks):
            model(series).sum().backward()
    assert seen["grad"].abs().sum() > 0
    assert sae.W_dec.grad is not None and sae.W_dec.grad.abs().sum() > 0


def test_positions_can_be_left_alone(model, series):
    sae = Dictionary(MLP_OUT)

    def replace(x, hook):
        new = sae.reconstruct(x)
        new[:, [0, -1]] = x[:, [0, -1]]
        return new

    expected = model.run_with_hooks(series, fwd_hooks=[(MLP_OUT, replace)])
    spliced = model.run_with_saes(series, saes=sae, exclude_special_tokens=[0, -1])
    torch.testing.assert_close(spliced, expected)
    _, cache = model.run_with_cache_with_saes(
        series, saes=sae, use_error_term=True, exclude_special_tokens=[0]
    )
    assert not cache[f"{MLP_OUT}.hook_sae_error"][:, 0].any()
    with pytest.raises(ArgumentError, match="a series has none; give the positions"):
        model.add_sae(sae, exclude_special_tokens=True)
    with pytest.raises(ArgumentError, match=r"in 0\.\.11, got 12"):
        model.run_with_saes(series, saes=sae, exclude_special_tokens=[12])


def test_spliced_dictionaries_move_cast_train_and_count_as_parameters(model):
    sae = Dictionary(MLP_OUT)
    n_own = sum(p.numel() for p in model.parameters())
    model.add_sae(sae)
    assert sum(p.numel() for p in model.parameters()) == n_own + 2 * 8 * 12
    model.double()
    assert sae.W_enc.dtype == torch.float64
    model.train()
    assert sae.training
    assert "splices.blocks/0/hook_mlp_out.W_enc" in model.state_dict()
    before = sae.W_enc.clone()
    model.init_weights(5)
    assert torch.equal(sae.W_enc, before)


def test_a_copy_has_dictionaries_of_its_own(model, series):
    model.add_sae(Dictionary("blocks.0.ln2.hook_normalized", hook_name_out=MLP_OUT))
    twin, expected = copy.deepcopy(model), model(series)
    with torch.no_grad():
        for parameter in model.splices.parameters():
            parameter.zero_()
    torch.testing.assert_close(twin(series), expected)
    twin.reset_saes()
    assert list(model.acts_to_saes) and not list(twin.acts_to_saes)


def test_a_saved_model_loads_without_its_dictionaries_which_lie_beside_it(model, series, tmp_path):
    bare = model(series)
    model.add_sae(Dictionary(MLP_OUT))
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "saes" / MLP_OUT / "weights.pt").is_file()
    assert torch.equal(HookedTST.from_pretrained(tmp_path / "saved")(series), bare)
    model.reset_saes()
    model.save_pretrained(tmp_path / "saved")  # files that are not the model's stay
    assert (tmp_path / "saved" / "saes" / MLP_OUT / "weights.pt").is_file()


def test_fast_paths_notice_a_dictionary(model, series):
    """The fused norm is not taken where its output is read, the pattern stays where it was."""
    hook = "blocks.1.ln1.hook_normalized"
    sae = Dictionary(hook)
    _, cache = model.run_with_cache_with_saes(
        series, saes=sae, names_filter=[f"{hook}.hook_sae_acts_post"]
    )
    assert cache[f"{hook}.hook_sae_acts_post"].abs().sum() > 0
    one = model.run_with_saes(series, saes=sae)
    assert not torch.allclose(one, model(series))


def test_any_module_with_encode_and_decode_can_be_spliced(model, series):
    class Halve(nn.Module):
        def encode(self, x):
            return x

        def decode(self, x):
            return x / 2

    model.splice(Halve(), MLP_OUT)
    expected = model(series)
    model.reset_saes()
    by_hook = model.run_with_hooks(series, fwd_hooks=[(MLP_OUT, lambda x, hook: x / 2)])
    torch.testing.assert_close(expected, by_hook)


def test_errors_say_what_is_wrong(model, series):
    sae = Dictionary(MLP_OUT)
    with pytest.raises(UnknownHookError, match="did you mean 'blocks.0.hook_mlp_out'"):
        model.add_sae(Dictionary("blocks.0.hook_mlp_ou"))
    with pytest.raises(ArgumentError, match=r"of width d_model=8 at .*, got d_in=5"):
        model.add_sae(Dictionary(MLP_OUT, d_in=5))
    with pytest.raises(ArgumentError, match="d_head=4 or all heads=8"):
        model.add_sae(Dictionary("blocks.0.attn.hook_z", d_in=5))
    with pytest.raises(HookError, match="has no feature axis"):
        model.add_sae(Dictionary("blocks.0.attn.hook_pattern"))
    with pytest.raises(HookError, match=r"set_use_attn_result\(True\)"):
        model.add_sae(Dictionary("blocks.0.attn.hook_result"))
    with pytest.raises(ArgumentError, match="got none in cfg.metadata.hook_name"):
        model.add_sae(nn.Linear(8, 8))
    with pytest.raises(ArgumentError, match="a Linear without encode"):
        model.splice(nn.Linear(8, 8), MLP_OUT)
    model.add_hook(MLP_OUT, lambda x, hook: x)
    with pytest.raises(HookError, match="hooks sit on blocks.0.hook_mlp_out"):
        model.add_sae(sae)
    model.reset_hooks()
    model.add_sae(sae)
    with pytest.raises(UnknownHookError, match=r"hook blocks.0.hook_mlp_out.hook_sae_input or"):
        model.run_with_hooks(series, fwd_hooks=[(MLP_OUT, lambda x, hook: x)])
    with pytest.raises(HookError, match="only fires with use_error_term=True"):
        model.add_hook(f"{MLP_OUT}.hook_sae_error", lambda x, hook: x)
    with pytest.raises(HookError, match="spliced in at blocks.0.hook_mlp_out already"):
        model.splice(sae, "blocks.1.hook_mlp_out")
    with pytest.raises(UnknownHookError, match="known: blocks.0.hook_mlp_out"):
        model.reset_saes("blocks.1.hook_mlp_out")
    with pytest.raises(UnknownHookError, match="splice one in first"):
        model.run_with_cache(series, names_filter="blocks.1.hook_mlp_out.hook_sae_acts_post")
    assert list(model.acts_to_saes) == [MLP_OUT]
