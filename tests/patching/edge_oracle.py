"""One edge at a time, stated once more with plain hooks: what edge patching must agree with."""

from __future__ import annotations

import torch
from torch import Tensor

from tstlens.model import HookedTST
from tstlens.patching.circuits import Edge


def contributions(model: HookedTST, series: Tensor) -> dict[str, Tensor]:
    """What every component writes, and the stream that enters block 0."""
    _, cache = model.run_with_cache(series)
    written = {"stream": cache["blocks.0.hook_resid_pre"]}
    for layer, block in enumerate(model.blocks):
        z = cache[f"blocks.{layer}.attn.hook_z"]
        for head in range(model.cfg.n_heads):
            written[f"L{layer}H{head}"] = z[:, :, head] @ block.attn.W_O[head]
        written[f"L{layer}MLP"] = cache[f"blocks.{layer}.hook_mlp_out"]
    return written


def heard(model: HookedTST, written: dict[str, Tensor], edge: Edge) -> Tensor:
    """The receiver's input, built from what everybody wrote: before ``ln1`` of a pre-norm block,
    before the MLP's matrix, or what leaves the last block."""
    cfg, x = model.cfg, written["stream"]
    for layer, block in enumerate(model.blocks):
        if edge.receiver.kind == "head" and edge.receiver.layer == layer:
            return x
        x = x + sum(written[f"L{layer}H{head}"] for head in range(cfg.n_heads)) + block.attn.b_O
        if cfg.norm_position == "post":
            x = block.ln1(x)
        if edge.receiver.kind == "mlp" and edge.receiver.layer == layer:
            return block.ln2(x) if cfg.norm_position == "pre" else x
        x = x + written[f"L{layer}MLP"]
        if cfg.norm_position == "post":
            x = block.ln2(x)
    return x


@torch.no_grad()
def patched_output(model: HookedTST, clean: Tensor, corrupted: Tensor, edge: Edge) -> Tensor:
    """The corrupted run's output with one edge patched, by rebuilding one input in a hook."""
    here, there = contributions(model, corrupted), contributions(model, clean)
    sender, receiver = edge.sender, edge.receiver
    name = sender.name if sender.kind in ("head", "mlp") else "stream"
    mixed = there[name].clone()
    if sender.kind == "pos":
        mixed = here[name].clone()
        mixed[:, sender.index] = there[name][:, sender.index]
    new_input = heard(model, here | {name: mixed}, edge)
    last = model.cfg.n_layers - 1
    if receiver.kind == "output":
        _, state = model.embed_series(corrupted)
        return model.unembed(new_input, state)
    if receiver.kind == "mlp":
        mlp = model.blocks[receiver.layer].mlp

        def replace_pre(pre: Tensor, hook: object) -> Tensor:
            return new_input @ mlp.W_in + mlp.b_in

        hooks = [(f"blocks.{receiver.layer}.mlp.hook_pre", replace_pre)]
        return model.run_with_hooks(corrupted, fwd_hooks=hooks)

    def replace_input(x: Tensor, hook: object) -> Tensor:
        x[:, :, receiver.index] = new_input
        return x

    assert receiver.layer <= last
    model.set_use_split_qkv_input(True)
    try:
        hooks = [(f"blocks.{receiver.layer}.hook_{edge.part}_input", replace_input)]
        return model.run_with_hooks(corrupted, fwd_hooks=hooks)
    finally:
        model.set_use_split_qkv_input(False)
