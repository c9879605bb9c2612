"""Over the product of block options: parts of a stream sum to it, or the cache says why not."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformer_lens import ActivationCache

from tests.model.conftest import build, randomise
from tstlens.errors import ArgumentError, NonlinearResidualError, TstlensError
from tstlens.model import HookedTST, HookedTSTConfig
from tstlens.model.cache import TSTActivationCache
from tstlens.zoo.chronos_t5 import BinnedTokensConfig, TokenLogitsConfig

NORMS = st.sampled_from(["LN", "RMS", "BN"])
OTHER_NORMS = st.sampled_from([None, "LN", "RMS", "BN"])
BITS = st.booleans()
ADDS_UP = [
    lambda cache: cache.decompose_resid(),
    lambda cache: cache.get_full_resid_decomposition(),
    lambda cache: cache.apply_ln_to_stack(cache["resid_post", 0][None]),
    lambda cache: cache.stack_head_results(incl_remainder=True),
    lambda cache: cache.stack_head_results(-1, False, False, None, True),
    lambda cache: cache.stack_neuron_results(-1, incl_remainder=True),
    lambda cache: cache.accumulated_resid(apply_ln=True),
]


@st.composite
def options(draw: Any) -> dict[str, Any]:
    chosen: dict[str, Any] = {
        "norm_position": draw(st.sampled_from(["pre", "pre", "pre", "post"])),
        "normalization_type": draw(NORMS),
        "mlp_normalization_type": draw(OTHER_NORMS),
        "final_normalization_type": draw(OTHER_NORMS),
        "final_norm": draw(BITS),
        "positions": draw(st.sampled_from(["learned", "none"])),
        "gated_mlp": draw(BITS),
        "attn_bias": draw(BITS),
        "mlp_bias": draw(BITS),
        "use_attn_result": draw(BITS),
        "seed": draw(st.integers(0, 5)),
    }
    chosen["use_normalization_before_and_after"] = draw(BITS) and chosen["norm_position"] == "pre"
    if draw(st.sampled_from([False, False, True])):
        return {**chosen, "n_layers": 4, "n_decoder_layers": 2, "positions": "none"}
    chosen["embed"] = draw(st.sampled_from(["per-step", "patches", "patches-ci", "conv"]))
    chosen["norm_embed"] = draw(BITS)
    chosen["residual_attention"] = draw(BITS)
    if chosen["embed"] == "patches-ci" and draw(BITS):
        chosen["second_attention"] = "channel"
    return chosen


def made(chosen: dict[str, Any]) -> HookedTST:
    if not chosen.get("n_decoder_layers"):
        return build(**chosen)
    seed = chosen["seed"]
    cfg = HookedTSTConfig(
        d_model=8, n_heads=2, d_mlp=10, n_channels=3, head=TokenLogitsConfig(12, horizon=4),
        embed=BinnedTokensConfig(12, 2, -2.0, 2.0, 30, decoder_steps=3), **chosen,
    )  # fmt: skip
    model = HookedTST(cfg)
    randomise(model, seed)
    return model


def inputs() -> Tensor:
    return torch.randn(3, 3, 12, generator=torch.Generator().manual_seed(1))


def close(parts: Tensor, whole: Tensor) -> None:
    """1e-5 of scale in float32, 1e-10 in float64."""
    bound = {torch.float32: 1e-5, torch.float64: 1e-10}[whole.dtype]
    assert parts.sum(0).shape == whole.shape
    assert (parts.sum(0) - whole).abs().max() <= bound * (1 + parts.abs().sum(0).max())


def by_hand(model: HookedTST, cache: Any, layer: int, mlp_input: bool) -> tuple[Tensor, Tensor]:
    """The stream and the ``hook_normalized`` of what reads it, under their full names."""
    n_layers, decodes = model.cfg.n_layers, model.cfg.n_decoder_layers
    if layer == n_layers:
        stream = cache[f"{model.layer_name(layer - 1)}.hook_resid_post"]
        norm = "decoder_final_ln" if decodes else "ln_final"
        return stream, cache[f"{norm}.hook_normalized"] if model.cfg.final_norm else stream
    name, second = model.layer_name(layer), model.layers[layer].second
    if not mlp_input:
        return cache[f"{name}.hook_resid_pre"], cache[f"{name}.ln1.hook_normalized"]
    mid = "" if second == "none" else f"_{second}"
    norm = "ln3" if mid else "ln2"
    return cache[f"{name}.hook_resid_mid{mid}"], cache[f"{name}.{norm}.hook_normalized"]


@settings(max_examples=60)
@given(options(), st.data(), st.sampled_from([torch.float32, torch.float64]))
def test_parts_sum_to_what_they_decompose_on_every_option(chosen, data, dtype):
    model = made(chosen).to(dtype)
    _, cache = model.run_with_cache(inputs().to(dtype))
    if chosen["norm_position"] == "post":
        for call in ADDS_UP:
            with pytest.raises(NonlinearResidualError, match="post-norm"):
                call(cache)
        return
    n_layers = model.cfg.n_layers
    layer = data.draw(st.integers(0, n_layers), label="layer")
    mlp_input = layer < n_layers and data.draw(BITS, label="mlp_input")
    cut = data.draw(st.sampled_from([None, 1, (0, 2), [0, -1]]), label="pos_slice")
    stream, normalized = by_hand(model, cache, layer, mlp_input)
    reader = torch.randn(8, 2, generator=torch.Generator().manual_seed(2)).to(dtype)

    def at(x: Tensor) -> Tensor:
        if cut is None:
            return x
        return x[..., slice(*cut), :] if isinstance(cut, tuple) else x[..., cut, :]

    for apply_ln, whole in ((False, at(stream)), (True, at(normalized))):
        close(cache.decompose_resid(layer, mlp_input, apply_ln=apply_ln, pos_slice=cut), whole)
        for neurons in (False, True):
            for project in (None, reader, reader[:, 0]):
                stack, labels = cache.get_full_resid_decomposition(
                    layer, mlp_input, neurons, apply_ln, cut, True, project_output_onto=project
                )
                close(stack, whole if project is None else whole @ project)
                assert len(stack) == len(labels) == len(set(labels))
        if not mlp_input:
            close(cache.stack_head_results(layer, False, True, cut, apply_ln), whole)
            for project in (None, reader):
                rest = cache.stack_neuron_results(
                    layer, cut, (0, 3), False, True, apply_ln, project_output_onto=project
                )
                close(rest, whole if project is None else whole @ project)
    divided = cache.apply_ln_to_stack(
        cache.decompose_resid(layer, mlp_input, pos_slice=cut), layer, mlp_input, cut
    )
    close(divided, at(normalized))
    last = cache.accumulated_resid(layer, True, False, cut, mlp_input)[-1]
    assert torch.equal(last, at(stream))
    if layer < n_layers:
        last = cache.accumulated_resid(layer, True, True, cut, mlp_input)[-1:]
        close(last, at(normalized))


@settings(max_examples=30)
@given(options(), st.sampled_from([torch.float32, torch.float64]))
def test_heads_neurons_and_biases_of_a_block_sum_to_what_it_wrote(chosen, dtype):
    model = made({**chosen, "norm_position": "pre"}).to(dtype)
    _, cache = model.run_with_cache(inputs().to(dtype))
    for layer, block in enumerate(model.layers):
        decoding = layer >= model.cfg.n_encoder_layers
        own = [f"L{layer}H{head}" for head in range(2)]
        heads, labels = cache.stack_head_results(layer + 1 if decoding or layer + 1 <
            model.cfg.n_encoder_layers or not model.cfg.n_decoder_layers else layer,
            return_labels=True)  # fmt: skip
        if own[0] not in labels:
            continue  # the encoder's last stream enters no layer
        written = heads[[labels.index(label) for label in own]]
        neurons = cache.get_neuron_results(layer).movedim(-2, 0)
        bias_o, bias_out = block.attn.b_O, block.mlp.b_out
        for parts, bias, out, norm in (
            (written, bias_o, "attn_out", "ln1_post"),
            (neurons, bias_out, "mlp_out", "ln2_post"),
        ):
            whole = cache[out, layer]
            if not model.cfg.use_normalization_before_and_after:
                close(torch.cat([parts, bias.expand_as(whole)[None]]), whole)
                continue
            post = getattr(block, norm)
            zero = -post.running_mean if hasattr(post, "running_mean") else bias * 0
            centred = bias - bias.mean() if hasattr(post, "b") and not hasattr(
                post, "running_mean") else bias + zero  # fmt: skip
            scale = cache[f"{model.layer_name(layer)}.{norm}.hook_scale"]
            rest = centred / scale * post.w + getattr(post, "b", 0.0)
            close(torch.cat([parts, rest[None]]), whole)


def test_every_inherited_public_method_is_ours_or_adds_nothing_up():
    harmless = {"items", "keys", "to", "toggle_autodiff", "values"}
    for name, _ in inspect.getmembers(ActivationCache, inspect.isfunction):
        if not name.startswith("_") and name not in harmless:
            assert name in vars(TSTActivationCache), name


@pytest.mark.parametrize("call", [
    lambda cache: cache.decompose_resid(9),
    lambda cache: cache.decompose_resid(2, mlp_input=True),
    lambda cache: cache.decompose_resid(mode="heads"),
    lambda cache: cache.accumulated_resid(-2),
    lambda cache: cache.stack_head_results(1.5),
    lambda cache: cache.get_neuron_results(2),
    lambda cache: cache.stack_activation("z", 0),
    lambda cache: cache.remove_batch_dim(),
    lambda cache: cache.ssm_layers(),
])  # fmt: skip
def test_what_cannot_be_asked_is_said(call, no_shape_checks):
    _, cache = build().run_with_cache(inputs())
    with pytest.raises(ArgumentError):
        call(cache)


def test_an_edited_stream_is_refused_not_summed():
    model = build("patches-ci", second_attention="channel")
    model.add_hook("blocks.0.hook_resid_mid", lambda x, hook: x * 1.5, is_permanent=True)
    _, cache = model.run_with_cache(inputs())
    for call in (cache.decompose_resid, cache.get_full_resid_decomposition):
        with pytest.raises(NonlinearResidualError, match="edited the stream"):
            call()


def test_activations_of_two_stacks_do_not_stack_and_streams_stay_apart():
    model = made({"n_layers": 4, "n_decoder_layers": 2, "seed": 0})
    _, cache = model.run_with_cache(inputs())
    with pytest.raises(ArgumentError, match="stop at the encoder with layer=2"):
        cache.stack_activation("attn_out")
    assert torch.equal(cache.stack_activation("z", 2)[1], cache["encoder.1.attn.hook_z"])
    labels = cache.decompose_resid(return_labels=True)[1]
    assert labels == ["decoder_embed"] + [
        f"{layer}_{part}" for layer in (2, 3) for part in ("attn_out", "cross_attn_out", "mlp_out")
    ]
    cache.compute_head_results()
    result = cache["decoder.1.attn.hook_result"].sum(2) + model.decoder[1].attn.b_O
    torch.testing.assert_close(result, cache["decoder.1.hook_attn_out"])


def test_without_a_final_norm_apply_ln_leaves_parts_as_they_are():
    _, cache = build(final_norm=False).run_with_cache(inputs())
    torch.testing.assert_close(cache.decompose_resid(apply_ln=True), cache.decompose_resid())


def test_a_run_from_the_middle_sums_from_the_stream_it_was_given():
    model = build(positions="learned")
    residual, state = model.embed_series(inputs())
    _, cache = model.run_with_cache(residual, start_at_layer=0, state=state)
    parts, labels = cache.decompose_resid(return_labels=True)
    assert labels[0] == "0_pre"
    close(parts, cache["resid_post", 1])
    _, cache = model.run_with_cache(residual, start_at_layer=1, state=state)
    with pytest.raises(TstlensError):
        cache.decompose_resid()


def test_accumulated_bias_is_what_the_full_decomposition_calls_bias():
    for chosen in (
        {"embed": "patches-ci", "second_attention": "channel", "seed": 0},
        {"n_layers": 4, "n_decoder_layers": 2, "seed": 0},
    ):
        model = made(chosen)
        _, cache = model.run_with_cache(inputs())
        stack, labels = cache.get_full_resid_decomposition(return_labels=True)
        second = sum(
            getattr(block, f"{block.second}_attn").b_O
            for block in model.layers
            if block.second != "none"
        )
        ours = model.accumulated_bias(model.cfg.n_layers)
        torch.testing.assert_close(ours - second, stack[labels.index("bias")][0, 0])
    with pytest.raises(NonlinearResidualError, match="cache"):
        build(norm_position="post").accumulated_bias(1)
    with pytest.raises(ArgumentError):
        model.accumulated_bias(9)


def test_logit_attrs_and_the_lens_of_one_position_name_what_pools():
    for position in ("pre", "post"):
        _, cache = build(norm_position=position).run_with_cache(inputs())
        with pytest.raises(NonlinearResidualError, match=r"patching\.logit_attribution"):
            cache.logit_attrs(cache["resid_post", 0][None], 1)
        with pytest.raises(NonlinearResidualError, match=r"patching\.lens"):
            cache.logit_lens()
