"""``model.steer``: what is added, where, for how long."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tstlens.errors import ArgumentError, HookError, UnknownHookError
from tstlens.model import (
    ConvStemConfig,
    HeadConfig,
    HookedTST,
    HookedTSTConfig,
    LinearPatchesConfig,
    PerStepConfig,
)

SIZES = {"n_layers": 2, "d_model": 12, "n_heads": 3, "d_mlp": 20, "n_channels": 2, "n_time": 10}


def classifier(**changes) -> HookedTST:
    options = {"embed": PerStepConfig(), "head": HeadConfig("mean", n_classes=4)} | changes
    return HookedTST(HookedTSTConfig(**SIZES, **options)).to(torch.float64)


def push(hook: str, vector: torch.Tensor, **more) -> SimpleNamespace:
    return SimpleNamespace(hook=hook, vector=vector, **more)


def series(n: int = 3) -> torch.Tensor:
    return torch.randn(n, 2, 10, dtype=torch.float64)


HOOKS = {
    "blocks.0.hook_resid_pre": (12,),
    "blocks.1.hook_resid_post": (12,),
    "blocks.0.hook_mlp_out": (12,),
    "blocks.1.mlp.hook_post": (20,),
    "blocks.1.attn.hook_z": (3, 4),
    "hook_embed": (12,),
    "head.hook_pooled": (12,),
}


@pytest.mark.parametrize("name", HOOKS)
def test_steering_is_what_a_hook_that_adds_gives(name):
    model, x, vector = classifier(), series(), torch.randn(HOOKS[name], dtype=torch.float64)
    expected = model.run_with_hooks(x, fwd_hooks=[(name, lambda act, hook: act + 1.5 * vector)])
    with model.steer(push(name, vector), strength=1.5):
        steered = model(x)
    torch.testing.assert_close(steered, expected, rtol=0, atol=0)
    assert not torch.allclose(steered, model(x))


def test_a_forecast_moves_by_the_push_through_the_head_in_closed_form():
    model = classifier(
        embed=LinearPatchesConfig(5, 5, channel_independent=True),
        head=HeadConfig("mean", horizon=3),
    )
    x, vector = series(), torch.randn(12, dtype=torch.float64)
    with model.steer(push("blocks.1.hook_resid_post", vector), strength=-2.0):
        moved = model(x) - model(x)  # both steered
        steered = model(x)
    assert torch.equal(moved, torch.zeros_like(moved))
    expected = model(x) - 2.0 * vector @ model.head.W_U  # no norm follows the last block
    torch.testing.assert_close(steered, expected)


def test_one_head_is_steered_and_the_others_are_as_they_were():
    model, x, vector = classifier(), series(), torch.randn(4, dtype=torch.float64)
    name = "blocks.0.attn.hook_z"
    _, before = model.run_with_cache(x, names_filter=name)
    with model.steer(push(name, vector, head=1)):
        _, after = model.run_with_cache(x, names_filter=name)
    change = after[name] - before[name]
    torch.testing.assert_close(change[:, :, 1], vector.expand(3, 10, 4))
    assert float(change[:, :, [0, 2]].abs().max()) == 0


@pytest.mark.parametrize(
    ("pos", "chosen"), [(2, [2]), (-1, [9]), ([0, 3], [0, 3]), (slice(7, None), [7, 8, 9])]
)
def test_only_the_given_positions_are_pushed(pos, chosen):
    model, x, name = classifier(), series(), "blocks.0.hook_resid_post"
    _, before = model.run_with_cache(x, names_filter=name)
    with model.steer(push(name, torch.ones(12, dtype=torch.float64)), 3.0, pos=pos):
        _, after = model.run_with_cache(x, names_filter=name)
    change = (after[name] - before[name])[0, :, 0]
    expected = torch.zeros(10, dtype=torch.float64)
    expected[chosen] = 3.0
    torch.testing.assert_close(change, expected)


@pytest.mark.parametrize(
    "embed",
    [PerStepConfig(), ConvStemConfig((8, 12), (3, 3), (1, 2), (1, 1))],
    ids=["step", "conv"],
)
@pytest.mark.parametrize("name", ["hook_embed", "blocks.1.hook_resid_post"])
def test_padded_positions_are_left_alone(embed, name):
    model, x = classifier(embed=embed), series()
    mask = torch.arange(10) < torch.tensor([10, 6, 3])[:, None]
    _, state = model.embed_series(x, mask)
    _, before = model.run_with_cache(x, mask=mask, names_filter=name)
    with model.steer(push(name, torch.ones(12, dtype=torch.float64))):
        _, after = model.run_with_cache(x, mask=mask, names_filter=name)
        # The mask of one run must not leak into the next.
        _, unmasked = model.run_with_cache(x, names_filter=name)
    _, clear = model.run_with_cache(x, names_filter=name)
    change = (after[name] - before[name])[:, :, 0]
    torch.testing.assert_close(change, state.pos_mask.double())
    torch.testing.assert_close((unmasked[name] - clear[name]).mean(), torch.tensor(1.0).double())


def test_a_run_from_the_middle_takes_the_mask_of_its_own_state():
    model, x, name = classifier(), series(), "blocks.1.hook_resid_post"
    mask = torch.arange(10) < torch.tensor([10, 6, 3])[:, None]
    residual, state = model.embed_series(x, mask)
    middle = model(residual, start_at_layer=0, stop_at_layer=1, state=state)
    with model.steer(push(name, torch.ones(12, dtype=torch.float64))):
        model(x)  # a run without a mask before it
        one = model(middle, start_at_layer=1, state=state)
        other = model(x, mask=mask)
    torch.testing.assert_close(one, other)


def test_pushes_add_up_and_the_model_is_restored_bit_for_bit():
    model, x = classifier(), series()
    a, b = torch.randn(2, 12, dtype=torch.float64)
    name = "blocks.0.hook_resid_mid"
    before = model(x)
    with model.steer(push(name, a + 2 * b)):
        together = model(x)
    with model.steer(push(name, a)):
        with model.steer(push(name, b), 2.0):
            nested = model(x)
        outer = model(x)
    torch.testing.assert_close(nested, together)
    alone = model.run_with_hooks(x, fwd_hooks=[(name, lambda act, hook: act + a)])
    torch.testing.assert_close(outer, alone)
    assert torch.equal(model(x), before)


def test_an_error_inside_leaves_no_hook_behind():
    model, x = classifier(), series()
    before = model(x)
    with (
        pytest.raises(RuntimeError, match="on purpose"),
        model.steer(push("hook_embed", torch.ones(12, dtype=torch.float64))),
    ):
        raise RuntimeError("on purpose")
    assert torch.equal(model(x), before)
    assert not any(block._forward_pre_hooks for block in model.blocks)
    assert not model.embed._forward_hooks


def test_gradients_flow_past_the_push():
    model = classifier()
    x = series().requires_grad_()
    vector = torch.randn(12, dtype=torch.float64)
    with model.steer(push("blocks.1.hook_resid_post", vector)):
        model(x)[:, 0].sum().backward()
    assert float(x.grad.abs().sum()) > 0


def test_what_cannot_be_steered_says_why(no_shape_checks):
    model, x = classifier(), series()
    vector = torch.ones(12, dtype=torch.float64)
    with (
        pytest.raises(UnknownHookError, match="hook_resid_post"),
        model.steer(push("blocks.0.hook_resid_pots", vector)),
    ):
        pass
    with (
        pytest.raises(HookError, match="no feature axis"),
        model.steer(push("blocks.0.attn.hook_pattern", vector)),
    ):
        pass
    with (
        pytest.raises(HookError, match="set_use_attn_result"),
        model.steer(push("blocks.0.attn.hook_result", vector)),
    ):
        pass
    with (
        pytest.raises(ArgumentError, match=r"vector \[3, 4\] at blocks.0.attn.hook_z, got \[12\]"),
        model.steer(push("blocks.0.attn.hook_z", vector)),
    ):
        pass
    with (
        pytest.raises(ArgumentError, match="a head in 0..2, got 3"),
        model.steer(push("blocks.0.attn.hook_z", vector[:4], head=3)),
    ):
        pass
    with (
        pytest.raises(ArgumentError, match="no heads"),
        model.steer(push("hook_embed", vector, head=0)),
    ):
        pass
    with (
        pytest.raises(ArgumentError, match="finite number, got nan"),
        model.steer(push("hook_embed", vector), float("nan")),
    ):
        pass
    with (
        pytest.raises(ArgumentError, match="NaN or infinity"),
        model.steer(push("hook_embed", vector / 0)),
    ):
        pass
    with (
        pytest.raises(ArgumentError, match="pos in 0..9, got 10"),
        model.steer(push("hook_embed", vector), pos=10),
    ):
        model(x)
    with (
        pytest.raises(ArgumentError, match="has no positions"),
        model.steer(push("head.hook_pooled", vector), pos=0),
    ):
        pass
    with (
        pytest.raises(ArgumentError, match=r"probing.direction\(...\) makes one"),
        model.steer(vector),
    ):
        pass
