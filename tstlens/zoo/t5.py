"""T5 stacks of Hugging Face transformers in a trunk's layout, as MOMENT and Chronos use them.

| source (``encoder.block.{l}``, ``decoder.block.{l}``)  | here                                    |
|--------------------------------------------------------|-----------------------------------------|
| the block's input                                      | ``hook_resid_pre``                      |
| ``layer.0.layer_norm``                                 | ``ln1``                                 |
| ``layer.0.SelfAttention`` (q, k, v, o; no scaling)     | ``attn``, ``attn.hook_q/k/v``,          |
|                                                        | ``attn.hook_pattern``, ``hook_attn_out``|
| ``layer.1.EncDecAttention`` of a decoder               | ``cross_attn``, ``hook_cross_attn_out`` |
| the last layer's ``DenseReluDense``                    | ``mlp`` (``wi_0`` is ``W_gate``),       |
|                                                        | ``hook_mlp_out``                        |
| the block's output                                     | ``hook_resid_post``                     |
| ``block.0…relative_attention_bias``                    | ``position_bias``, for all layers       |
| ``final_layer_norm``                                   | ``ln_final``                            |
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tstlens.errors import UnsupportedSourceError
from tstlens.model import HookedTST
from tstlens.zoo.comparing import Tap
from tstlens.zoo.layers import RESID_POST, RESID_PRE, LayerTable, fill
from tstlens.zoo.registry import dotted

ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}

_RMS_NORMS = ("T5LayerNorm", "TimesFmRMSNorm", "TimesFm2_5RMSNorm", "Chronos2LayerNorm")


def read_t5(stack: Any) -> dict[str, Any]:
    """The config entries of a trunk that computes what a ``T5Stack`` does.

    Raises:
        UnsupportedSourceError: not transformers' own T5Stack, or an option that is not covered.
    """
    own = "transformers.models.t5.modeling_t5.T5Stack"
    if dotted(stack) != own or "forward" in vars(stack):
        raise UnsupportedSourceError(
            f"expected {own}, got {dotted(stack)}"
            + (" with a forward of its own" if dotted(stack) == own else "")
            + "; another stack may compute something else, so it is not converted"
        )
    config = stack.config
    return {
        "n_layers": len(stack.block),
        "d_model": config.d_model,
        "n_heads": config.num_heads,
        "d_head": config.d_kv,
        "d_mlp": config.d_ff,
        "act_fn": activation(config.dense_act_fn, "feed_forward_proj"),
        "gated_mlp": bool(config.is_gated_act),
        "norm_position": "pre",
        "normalization_type": "RMS",
        "final_norm": True,
        "eps": config.layer_norm_epsilon,
        "attn_scale": 1.0,
        "attn_bias": False,
        "mlp_bias": False,
        "position_buckets": config.relative_attention_num_buckets,
        "position_max_distance": config.relative_attention_max_distance,
    }


def activation(name: str, option: str) -> str:
    """Our name of an activation that transformers calls ``name``.

    Raises:
        UnsupportedSourceError: it is not covered.
    """
    if name not in ACTIVATIONS:
        raise UnsupportedSourceError(
            f"{option}: activation {name!r} is not covered; {', '.join(ACTIVATIONS)} are"
        )
    return ACTIVATIONS[name]


def _table(block: Any) -> LayerTable:
    """Of an encoder's block (two sublayers) or a decoder's (three)."""
    last, rows = len(block.layer) - 1, {}
    attentions = {"attn": "layer.0.SelfAttention"}
    if last == 2:
        attentions["cross_attn"] = "layer.1.EncDecAttention"
    for name, path in attentions.items():
        rows |= {f"{name}.{letter}": f"{path}.{letter.lower()}" for letter in "QKVO"}
    dense = f"layer.{last}.DenseReluDense"
    gated = hasattr(block.layer[-1].DenseReluDense, "wi_0")
    rows |= {"mlp.gate": f"{dense}.wi_0", "mlp.in": f"{dense}.wi_1"} if gated else {}
    rows |= {} if gated else {"mlp.in": f"{dense}.wi"}
    rows |= {"mlp.out": f"{dense}.wo"}
    rows |= {f"ln{i + 1}": f"layer.{i}.layer_norm" for i in range(last + 1)}
    patterns = (Tap(f"{name}.hook_pattern", path, third) for name, path in attentions.items())
    return LayerTable(rows, (RESID_PRE, *patterns, RESID_POST))


def fill_stack(
    blocks: nn.ModuleList, position_bias: nn.Module, ln_final: nn.Module, stack: Any
) -> None:
    """Copy a T5 stack's weights into a trunk."""
    for block, layer in zip(blocks, stack.block, strict=True):
        _table(layer).fill(block, layer.state_dict())
    first = stack.block[0].layer[0].SelfAttention
    fill(position_bias, {"weight": first.relative_attention_bias.weight})
    fill(ln_final, {"w": stack.final_layer_norm.weight})


def stack_taps(path: str, ours: str, stack: Any, model: HookedTST) -> list[Tap]:
    """Where a T5 stack computes a trunk's activations.

    Args:
        path: of the stack in its source.
        ours: ``"blocks"``, ``"encoder"`` or ``"decoder"``.
        stack: the stack.
        model: the hooked model.
    """
    return [
        tap
        for layer, block in enumerate(stack.block)
        for tap in _table(block).find(model, f"{ours}.{layer}", f"{path}.block.{layer}")
    ]


def third(seen: Any) -> Tensor:
    """The third of what a module gave."""
    return seen[2]


@contextmanager
def showing_patterns(source: nn.Module) -> Iterator[None]:
    """T5 stacks inside compute attention in the way that gives the pattern (eager)."""
    found = {id(m.config): m.config for m in source.modules() if hasattr(m, "config")}
    configs: list[Any] = [c for c in found.values() if hasattr(c, "_attn_implementation")]
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = "eager"
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation


@contextmanager
def in_full_precision(source: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """In float64, RMS norms of T5 and its kin inside compute their variance in float64 too.

    The source computes it in float32 whatever it runs in, which would leave a float64 comparison
    at 1e-7. In every other precision nothing changes.
    """
    norms: list[Any] = []
    if dtype == torch.float64:
        norms = [m for m in source.modules() if type(m).__name__ in _RMS_NORMS]
    try:
        for norm in norms:
            norm.forward = partial(_rms, norm)
        yield
    finally:
        for norm in norms:
            del norm.forward


def _rms(norm: Any, x: Tensor) -> Tensor:
    variance = x.square().mean(-1, keepdim=True)
    return norm.weight * (x * torch.rsqrt(variance + norm.variance_epsilon))
