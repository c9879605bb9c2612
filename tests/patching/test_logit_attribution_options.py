"""Over the product of block options: contributions sum to the output, in the right place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.model.conftest import build
from tstlens.errors import NonlinearResidualError
from tstlens.model import HeadConfig
from tstlens.patching import logit_attribution

BITS = st.booleans()
NORMS = ["LN", "RMS", "BN"]


@st.composite
def options(draw: Any) -> dict[str, Any]:
    pooling = draw(st.sampled_from(["max", "mean", "first", "last", "flatten"]))
    chosen: dict[str, Any] = {
        "embed": draw(st.sampled_from(["per-step", "patches-ci"])),
        "normalization_type": draw(st.sampled_from(NORMS)),
        "mlp_normalization_type": draw(st.sampled_from([None, *NORMS])),
        "final_normalization_type": draw(st.sampled_from([None, *NORMS])),
        "positions": draw(st.sampled_from(["learned", "none"])),
        "head": HeadConfig(pooling, n_classes=4),
    }
    for name in ("final_norm", "norm_embed", "use_normalization_before_and_after", "gated_mlp",
                 "residual_attention", "attn_bias", "mlp_bias"):  # fmt: skip
        chosen[name] = draw(BITS)
    if chosen["embed"] == "patches-ci" and draw(BITS):
        chosen["second_attention"] = "channel"
    return chosen


@settings(max_examples=60)
@given(options(), st.sampled_from([torch.float32, torch.float64]), BITS)
def test_contributions_sum_to_the_logit_on_every_option(chosen, dtype, masked):
    model = build(**chosen).to(dtype)
    x = torch.randn(3, 3, 12, generator=torch.Generator().manual_seed(1)).to(dtype)
    mask = torch.arange(12)[None] < torch.tensor([12, 8, 4])[:, None] if masked else None
    result = logit_attribution(model, x, 2, mask=mask)
    bound = {torch.float32: 1e-5, torch.float64: 1e-10}[dtype]
    size = 1 + result.values.flatten(1).abs().sum(1)
    assert ((result.total() - model(x, mask=mask)[:, 2]).abs() <= bound * size).all()
    last, held = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post", {}
    hooks: list[Any] = [(last, lambda s, hook: held.setdefault("s", s.detach().requires_grad_()))]
    if model.cfg.final_norm:
        hooks.append(("ln_final.hook_scale", lambda scale, hook: scale.detach()))
    out = model.run_with_hooks(x, mask=mask, fwd_hooks=hooks)[:, 2].sum()
    (gradient,) = torch.autograd.grad(out, held["s"])
    _, cache = model.run_with_cache(x, mask=mask)
    names = {f"L{layer} MLP": f"blocks.{layer}.hook_mlp_out" for layer in range(2)}
    if model.cfg.second_attention == "channel":
        names |= {f"L{n} channel attn": f"blocks.{n}.hook_channel_attn_out" for n in range(2)}
    for name, hook in names.items():
        ours = result.values.select(-2, [str(part) for part in result.components].index(name))
        direct = (cache[hook] * gradient).sum(-1)
        assert ((ours.reshape(direct.shape) - direct).abs() <= 10 * bound * size.max()).all(), name
    for layer in range(2):  # heads and bias together are what attention wrote
        rows = [at for at, part in enumerate(result.components)
                if part.layer == layer and part.kind in ("head", "attn_bias")]  # fmt: skip
        direct = (cache["attn_out", layer] * gradient).sum(-1)
        ours = result.values[..., rows, :].sum(-2).reshape(direct.shape)
        assert ((ours - direct).abs() <= 10 * bound * size.max()).all()


def test_post_norm_is_still_refused_on_every_second_attention():
    model = build("patches-ci", norm_position="post", second_attention="channel")
    with pytest.raises(NonlinearResidualError, match="post-norm"):
        logit_attribution(model, torch.randn(2, 3, 12), 1)
