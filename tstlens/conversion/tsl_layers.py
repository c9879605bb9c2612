"""Encoder layers of Time-Series-Library and neuralforecast: attention wrapped, MLP as convolutions.

Both name the parts alike; ``RestatedTsl`` holds what PatchTST and iTransformer have in common.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tstlens.conversion.comparing import Tap
from tstlens.conversion.encoder_layers import fill
from tstlens.conversion.named_layers import Entries, LayerNames, Restated, fill_layer, norm_entries
from tstlens.model import HookedTST

STACK = "encoder.attn_layers."
EPS = 1e-5  # of every norm and of the scaling, fixed in the source
LAYER = LayerNames(
    q="attention.query_projection",
    k="attention.key_projection",
    v="attention.value_projection",
    o="attention.out_projection",
    norm1="norm1",
    mlp_in="conv1",
    mlp_out="conv2",
    norm2="norm2",
)


def fill_trunk(model: HookedTST, entries: Entries, final: str) -> None:
    """Copy all encoder layers and the norm after them.

    Args:
        model: the hooked model.
        entries: the source's weights.
        final: what the final norm is called.
    """
    for layer, block in enumerate(model.blocks):
        fill_layer(block, entries, f"{STACK}{layer}.", LAYER, model.cfg.n_heads)
    fill(model.ln_final, norm_entries(entries, final, model.ln_final))


class RestatedTsl(Restated):
    """What the two models share: scaling, encoder, final norm.

    Args:
        state: names and tensors.
        n_heads: attention heads.
        act_fn: of the MLPs.
    """

    def __init__(self, state: Mapping[str, Tensor], n_heads: int, act_fn: str) -> None:
        super().__init__(state, EPS)
        self.n_heads, self.act_fn = n_heads, act_fn

    def scaled(self, series: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Series [batch, channel, time] without mean and standard deviation, and both of these."""
        means = series.mean(2, keepdim=True)
        centred = series - means
        stdev = (centred.var(2, keepdim=True, unbiased=False) + EPS).sqrt()
        return centred / stdev, means, stdev

    def encoded(self, x: Tensor, final: str) -> Tensor:
        """The encoder's output [row, pos, d_model]."""
        return self.norm(self.encode(x, STACK, LAYER, self.n_heads, self.act_fn), final)


def layer_taps(n_layers: int) -> list[Tap]:
    """Where live encoder layers compute our activations; [row, pos, d_model] there too."""

    def swapped(x: Any) -> Tensor:
        return x.transpose(1, 2)

    def first(out: Any) -> Tensor:
        return out[0]

    found = []
    for layer in range(n_layers):
        ours, theirs = f"blocks.{layer}.", f"{STACK}{layer}"
        found += [
            Tap(f"{ours}hook_attn_out", f"{theirs}.attention", first),
            Tap(f"{ours}mlp.hook_pre", f"{theirs}.conv1", swapped),
            Tap(f"{ours}hook_mlp_out", f"{theirs}.conv2", swapped),
            Tap(f"{ours}hook_normalized_resid_post", theirs, first),
        ]
    return found


def pattern_taps(source: Any, n_layers: int) -> list[Tap]:
    """Patterns, where the source's attention gives them (``output_attention=True``)."""
    paths = [(layer, f"{STACK}{layer}.attention") for layer in range(n_layers)]
    return [
        Tap(f"blocks.{layer}.attn.hook_pattern", path, lambda out: out[1])
        for layer, path in paths
        if getattr(source.get_submodule(path).inner_attention, "output_attention", False)
    ]
