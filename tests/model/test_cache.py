"""ActivationCache's sums hold on a pre-norm model and are refused on a post-norm one."""

from __future__ import annotations

import pytest
import torch

from tstlens.errors import NonlinearResidualError, TstlensError, UnknownActivationError
from tstlens.model import LinearPatchesConfig


@pytest.fixture(params=["per-step", "patches-ci"])
def run(request, make_model, series):
    model = make_model(request.param, n_layers=3, positions="learned", final_norm=True)
    return model, model.run_with_cache(series)[1]


@pytest.fixture
def post(make_model, series):
    model = make_model(norm_position="post", positions="learned")
    return model, model.run_with_cache(series)[1]


def close(ours, by_hand):
    torch.testing.assert_close(ours, by_hand, rtol=1e-5, atol=1e-5)


def test_decompose_resid_sums_to_the_stream(run):
    _, cache = run
    for layer, stream in [(None, ("resid_post", 2)), (2, ("resid_pre", 2)), (1, ("resid_pre", 1))]:
        parts, labels = cache.decompose_resid(layer=layer, return_labels=True)
        close(parts.sum(0), cache[stream])
        by_hand = [cache["hook_embed"], cache["hook_pos_embed"]]
        for number in range(3 if layer is None else layer):
            by_hand += [cache["attn_out", number], cache["mlp_out", number]]
        close(parts, torch.stack(by_hand))
        assert labels[:3] == ["embed", "pos_embed", "0_attn_out"] and len(labels) == len(by_hand)
    close(
        cache.decompose_resid(layer=1, mlp_input=True).sum(0),
        cache["resid_mid", 1],
    )


def test_accumulated_resid_is_the_stream_at_every_layer(run):
    model, cache = run
    stream, labels = cache.accumulated_resid(incl_mid=True, return_labels=True)
    by_hand = []
    for layer in range(3):
        by_hand += [cache["resid_pre", layer], cache["resid_mid", layer]]
    close(stream, torch.stack([*by_hand, cache["resid_post", 2]]))
    assert labels == ["0_pre", "0_mid", "1_pre", "1_mid", "2_pre", "2_mid", "final_post"]
    total = cache["hook_embed"] + cache["hook_pos_embed"]
    for layer in range(3):
        close(stream[2 * layer], total)
        total = total + cache["attn_out", layer] + cache["mlp_out", layer]
    normed = cache.accumulated_resid(apply_ln=True)[-1]
    close(normed, cache["ln_final.hook_normalized"] * model.ln_final.w + model.ln_final.b)


def test_stack_head_results_are_z_times_w_o(run):
    model, cache = run
    results, labels = cache.stack_head_results(return_labels=True)
    by_hand = torch.stack(
        [
            cache["z", layer][:, :, head] @ model.W_O[layer, head]
            for layer in range(3)
            for head in range(2)
        ]
    )
    close(results, by_hand)
    assert labels == model.all_head_labels() == [f"L{la}H{h}" for la in range(3) for h in range(2)]
    with_rest = cache.stack_head_results(layer=2, incl_remainder=True)
    close(with_rest.sum(0), cache["resid_post", 1])
    for layer in range(3):
        heads = results[2 * layer : 2 * layer + 2].sum(0)
        close(heads + model.b_O[layer], cache["attn_out", layer])


def test_stack_neuron_results_are_post_times_w_out(run):
    model, cache = run
    results, labels = cache.stack_neuron_results(layer=-1, return_labels=True)
    by_hand = torch.cat(
        [
            torch.einsum("bpm,md->mbpd", cache["post", layer], model.W_out[layer])
            for layer in range(3)
        ]
    )
    close(results, by_hand)
    assert labels[:2] == ["L0N0", "L0N1"] and len(labels) == 30
    for layer in range(3):
        summed = results[10 * layer : 10 * layer + 10].sum(0) + model.b_out[layer]
        close(summed, cache["mlp_out", layer])


def test_stack_activation_stacks_layers(run):
    _, cache = run
    close(cache.stack_activation("z"), torch.stack([cache["z", layer] for layer in range(3)]))
    close(
        cache.stack_activation("pattern", layer=2),
        torch.stack([cache["pattern", layer] for layer in range(2)]),
    )


def test_full_decomposition_sums_to_the_stream(run):
    _, cache = run
    close(cache.get_full_resid_decomposition().sum(0), cache["resid_post", 2])
    normed = cache.get_full_resid_decomposition(apply_ln=True).sum(0)
    close(normed, cache["ln_final.hook_normalized"])


def test_post_norm_models_refuse_what_adds_up_and_say_why(post, no_shape_checks):
    _, cache = post
    for name, call in {
        "decompose_resid": lambda: cache.decompose_resid(),
        "get_full_resid_decomposition": lambda: cache.get_full_resid_decomposition(),
        "apply_ln_to_stack": lambda: cache.apply_ln_to_stack(cache["resid_post", 0][None]),
        r"stack_head_results\(incl_remainder=True\)": lambda: cache.stack_head_results(
            incl_remainder=True
        ),
        r"stack_head_results\(apply_ln=True\)": lambda: cache.stack_head_results(
            -1, False, False, None, True
        ),
        r"stack_neuron_results\(incl_remainder=True\)": lambda: cache.stack_neuron_results(
            -1, incl_remainder=True
        ),
    }.items():
        with pytest.raises(NonlinearResidualError, match=f"{name} adds up.*post-norm.*patch ins"):
            call()


def test_post_norm_models_keep_what_does_not_add_up(post):
    model, cache = post
    results = cache.stack_head_results()
    close(results[:2].sum(0) + model.b_O[0], cache["attn_out", 0])
    close(
        cache.accumulated_resid(),
        torch.stack([cache["resid_pre", 0], cache["resid_pre", 1], cache["resid_post", 1]]),
    )
    close(cache["resid_pre", 1], cache["normalized_resid_post", 0])


def test_logit_attrs_is_refused_and_says_what_to_do(make_model, series, norm_position):
    _, cache = make_model(norm_position=norm_position).run_with_cache(series)
    with pytest.raises(NonlinearResidualError, match="pools over positions first.*hook_pooled"):
        cache.logit_attrs(cache["resid_post", 0][None], tokens=1)


def test_an_unknown_activation_names_the_closest(run):
    _, cache = run
    with pytest.raises(UnknownActivationError, match=r"did you mean 'blocks.0.attn.hook_pattern'"):
        cache["blocks.0.attn.hook_patern"]
    with pytest.raises(KeyError):
        cache["resid_post", 7]
    with pytest.raises(TstlensError):
        cache["no such thing"]


def test_slicing_the_batch_keeps_the_kind_of_cache(post):
    _, cache = post
    sliced = cache.apply_slice_to_batch_dim(slice(1, 3))
    close(sliced["z", 1], cache["z", 1][1:3])
    with pytest.raises(NonlinearResidualError):
        sliced.decompose_resid()


def test_patches_of_all_channels_decompose_too(make_model, series):
    model = make_model(LinearPatchesConfig(4, 4), normalization_type="RMS")
    _, cache = model.run_with_cache(series)
    close(cache.decompose_resid().sum(0), cache["resid_post", -1])
