"""Weights of ``torch.nn.TransformerEncoderLayer`` in a block's layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import einops
import torch
from torch import Tensor, nn

from tstlens.conversion.comparing import Tap
from tstlens.errors import StateDictError


def block_weights(layer: Mapping[str, Tensor], n_heads: int) -> dict[str, Tensor]:
    """A block's state dict from an encoder layer's.

    Args:
        layer: ``self_attn.in_proj_weight`` [3 * d_model, d_model] and the rest, as PyTorch names
            them; biases may be missing.
        n_heads: heads that the packed projections hold.
    """

    def projection(name: str, part: int) -> Tensor:
        packed = layer[f"self_attn.in_proj_{name}"].chunk(3)[part]
        if name == "bias":
            return einops.rearrange(packed, "(head d_head) -> head d_head", head=n_heads)
        return einops.rearrange(
            packed, "(head d_head) d_model -> head d_model d_head", head=n_heads
        )

    weights = {
        "attn.W_Q": projection("weight", 0),
        "attn.W_K": projection("weight", 1),
        "attn.W_V": projection("weight", 2),
        "attn.W_O": einops.rearrange(
            layer["self_attn.out_proj.weight"],
            "d_model (head d_head) -> head d_head d_model",
            head=n_heads,
        ),
        "mlp.W_in": layer["linear1.weight"].T,
        "mlp.W_out": layer["linear2.weight"].T,
        "ln1.w": layer["norm1.weight"],
        "ln2.w": layer["norm2.weight"],
    }
    if "self_attn.in_proj_bias" in layer:
        for part, name in enumerate("QKV"):
            weights[f"attn.b_{name}"] = projection("bias", part)
    for ours, theirs in {
        "attn.b_O": "self_attn.out_proj.bias",
        "mlp.b_in": "linear1.bias",
        "mlp.b_out": "linear2.bias",
        "ln1.b": "norm1.bias",
        "ln2.b": "norm2.bias",
    }.items():
        if theirs in layer:
            weights[ours] = layer[theirs]
    return weights


def fill_block(block: nn.Module, layer: Mapping[str, Tensor], n_heads: int) -> None:
    """Copy an encoder layer's weights into a block; biases that the source lacks are zero."""
    fill(block, block_weights(layer, n_heads))


def layer_taps(
    prefix: str, n_layers: int, norm_position: str, batch_first: bool = True
) -> list[Tap]:
    """Where ``torch.nn.TransformerEncoderLayer`` modules compute a block's activations.

    Args:
        prefix: path of the list of layers.
        n_layers: how many there are.
        norm_position: ``"pre"`` or ``"post"``.
        batch_first: whether the encoder's tensors are [batch, pos, ...] or [pos, batch, ...].
    """

    def ours(seen: Any) -> Tensor:
        seen = seen[0] if isinstance(seen, tuple) else seen
        return seen if batch_first else seen.transpose(0, 1)

    leaving = "hook_normalized_resid_post" if norm_position == "post" else "hook_resid_post"
    taps = []
    for layer in range(n_layers):
        block, source = f"blocks.{layer}", f"{prefix}.{layer}"
        taps += [
            Tap(f"{block}.hook_resid_pre", source, ours, "input"),
            Tap(f"{block}.hook_attn_out", f"{source}.self_attn", ours),
            Tap(f"{block}.mlp.hook_pre", f"{source}.linear1", ours),
            Tap(f"{block}.hook_mlp_out", f"{source}.linear2", ours),
            Tap(f"{block}.{leaving}", source, ours),
        ]
    return taps


@torch.no_grad()
def fill(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into a module's parameters and buffers by name.

    Raises:
        StateDictError: a weight has no place in the module, or another shape.
    """
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    for name, weight in weights.items():
        if name not in own or own[name].shape != weight.shape:
            expected = list(own[name].shape) if name in own else "no such weight"
            raise StateDictError(f"{name}: expected {expected}, got {list(weight.shape)}")
        own[name].copy_(weight)


def check_keys(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], family: str) -> None:
    """Raise :class:`StateDictError` unless a state dict has the expected names and shapes."""
    missing = sorted(set(expected) - set(given))
    extra = sorted(set(given) - set(expected))
    misshapen = [
        f"{name} is {list(given[name].shape)}, expected {list(expected[name].shape)}"
        for name in expected
        if name in given and given[name].shape != expected[name].shape
    ]
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing ({', '.join(missing[:4])})")
    if extra:
        problems.append(f"{len(extra)} unexpected ({', '.join(extra[:4])})")
    problems += misshapen[:4]
    if problems:
        raise StateDictError(
            f"this state dict does not fit family {family!r}: {'; '.join(problems)}; "
            "check that it is the whole model's state dict and nothing else"
        )
