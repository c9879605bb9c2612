"""Family ``tsai``: ``TST``, ``TSTPlus`` and ``PatchTST`` of tsai, live or as a state dict.

What sits where (``L`` a layer):

======================================  ====================================================
tsai                                    here
======================================  ====================================================
``W_P`` (``backbone.W_P``)              ``hook_embed``
``W_pos``                               ``W_pos``, ``hook_pos_embed``
``revin_layer`` (PatchTST)              ``embed.hook_loc``, ``.hook_scale``, ``.hook_scaled``
``layers.L.self_attn``: its pattern     ``blocks.L.attn.hook_pattern``
``layers.L.self_attn``: its output      ``blocks.L.hook_attn_out``
``layers.L.ff.0``, ``layers.L.ff``      ``blocks.L.mlp.hook_pre``, ``blocks.L.hook_mlp_out``
``layers.L``                            ``blocks.L.hook_normalized_resid_post``
input of the head's linear map          ``head.hook_pooled``, position-major (tsai: d_model-major)
======================================  ====================================================

Covered: batch or layer norm, no biases in TST's attention, residual attention (scores handed from
layer to layer), ``pre_norm``, every kind of positions, ``max_seq_len`` and plain ``Conv1d`` inputs
(zeros at the ends), heads that flatten or pool, with ``bn`` and ``y_range``, individual heads,
RevIN with and without ``affine`` and ``subtract_last``, NaN and padding masks of TSTPlus (steps
without any observed channel are hidden as keys and zero in the head).

With ``pre_norm`` each norm's output replaces the stream, so that it is a post-norm stack whose
norms stand one place earlier: ``norm_attn`` of layer 0 is ``ln_embed``, ``norm_ffn`` of layer L is
``blocks.L.ln1``, ``norm_attn`` of layer L + 1 ``blocks.L.ln2``. The last block ends without a norm,
and what leaves tsai's layer L is ``blocks.L.hook_resid_post``.

Refused: ``decomposition=True`` (two trunks), ``custom_head``, ``attn_mask``,
``padding_var``, ``key_padding_mask=-1``, ``d_v`` other than ``d_k``, even ``Conv1d`` widths with
``padding="same"`` and causal ones in live models, activations beyond ReLU, GELU and SiLU.

A live model needs an environment in which tsai 1.0.1 imports (scikit-learn < 1.8, and a
torchvision built for the installed torch); a state dict needs nothing but torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tstlens.conversion.checking import Trial, series_trials
from tstlens.conversion.encoder_layers import fill
from tstlens.conversion.named_layers import (
    Entries,
    fill_layer,
    flatten_by_pos,
    linear,
    norm_entries,
    run_model,
)
from tstlens.conversion.registry import Built, Family, register
from tstlens.conversion.tsai_config import (
    KINDS,
    NAME,
    PREFIX,
    TsaiOptions,
    config_of,
    kind_of,
    stack_of,
)
from tstlens.conversion.tsai_live import read_live
from tstlens.conversion.tsai_source import RestatedTsai, layer_names, taps
from tstlens.errors import ArgumentError, UnsupportedSourceError
from tstlens.model import HookedTST
from tstlens.model.families.revin import RevINPatchesConfig


def build(
    source: nn.Module | Mapping[str, Tensor],
    n_heads: int | None = None,
    act_fn: Literal["relu", "gelu", "silu"] | None = None,
    res_attention: bool | None = None,
    pre_norm: bool | None = None,
    n_time: int | None = None,
    n_channels: int | None = None,
    stride: int | None = None,
    padding: int | tuple[int, int] | None = None,
    dilation: int | None = None,
    pooling: Literal["flatten", "mean", "max_mean"] | None = None,
    y_range: tuple[float | int, float | int] | None = None,
    revin: bool | None = None,
    affine: bool | None = None,
    subtract_last: bool | None = None,
    class_names: tuple[str, ...] | None = None,
) -> Built:
    """Convert a tsai model.

    Args:
        source: the module or its state dict. All that follows is for state dicts, but for
            ``n_time`` and ``class_names``.
        n_heads: attention heads; read off the stored scale where there is one, else 16 (tsai's
            default).
        act_fn: of the MLPs and the head; ``"gelu"``.
        res_attention: scores are handed from layer to layer (TSTPlus, PatchTST); True.
        pre_norm: the option of the same name (TSTPlus, PatchTST); False.
        n_time: samples of a series. Needed for ``max_seq_len`` inputs (their padding depends on
            it); elsewhere any length that gives the model's positions is taken where not given.
        n_channels: channels of a PatchTST whose state dict has no RevIN weights.
        stride: of patches (PatchTST; 8) or of a ``Conv1d`` input (1).
        padding: zeros at both ends of a ``Conv1d`` input, or (start, end); half the width for
            TSTPlus, 0 for TST, as they have it.
        dilation: of a ``Conv1d`` input; 1.
        pooling: of the head, where its width leaves a doubt; ``"flatten"``.
        y_range: low and high of the head's sigmoid; None.
        revin: whether PatchTST scales series; True.
        affine: whether its RevIN has a gain and shift; False.
        subtract_last: whether it takes away the last sample rather than the mean; False.
        class_names: one name per logit.
    """
    told = {
        "n_heads": n_heads, "act_fn": act_fn, "res_attention": res_attention,
        "n_channels": n_channels, "stride": stride, "padding": padding, "dilation": dilation,
        "pooling": pooling, "y_range": y_range, "revin": revin, "affine": affine,
        "subtract_last": subtract_last, "pre_norm": pre_norm,
    }  # fmt: skip
    told = {name: value for name, value in told.items() if value is not None}
    if isinstance(source, Mapping):
        state: Mapping[str, Tensor] = source
        options = TsaiOptions(kind_of(source), n_time=n_time)
        if told.get("pre_norm") and options.kind == "TST":
            raise UnsupportedSourceError("pre_norm=True is for TSTPlus and PatchTST; TST has none")
        for name, value in told.items():
            setattr(options, name, value)
        options.head_act_fn = options.act_fn
    else:
        if told:
            raise ArgumentError(
                f"{', '.join(told)}: a live tsai model knows these itself; leave them out"
            )
        state = source.state_dict()
        options = TsaiOptions(KINDS[f"{type(source).__module__}.{type(source).__qualname__}"])
        for name, value in read_live(source, options.kind).items():
            setattr(options, name, value)
        options.n_time = n_time if n_time is not None else options.n_time
    entries = Entries(state, NAME)
    cfg, head = config_of(entries, options, class_names)
    weight = entries[PREFIX[options.kind] + "W_pos"]
    model = HookedTST(cfg).to(device=weight.device, dtype=weight.dtype)
    _fill(model, entries, options, head)
    entries.check_all_read([r".*sdp_attn\.scale$", *_unused_revin(options)])
    if isinstance(source, Mapping):
        whole: nn.Module = RestatedTsai(state, options, cfg)
        name = f"tsai's {options.kind} restated from a state dict"
    else:
        whole, name = source, f"tsai.models.{options.kind}"
    return Built(model.eval(), whole, _trials(model, options), name)


def _unused_revin(options: TsaiOptions) -> list[str]:
    return [] if options.affine and options.revin else [r"model\.revin_layer\."]


def _fill(model: HookedTST, entries: Entries, options: TsaiOptions, head: str) -> None:
    prefix, cfg = PREFIX[options.kind], model.cfg
    at = prefix + ("W_P.1" if f"{prefix}W_P.1.weight" in entries else "W_P")
    embed = {"W_E": entries[f"{at}.weight"].flatten(1).T}
    if f"{at}.bias" in entries:
        embed["b_E"] = entries[f"{at}.bias"]
    if isinstance(cfg.embed, RevINPatchesConfig) and cfg.embed.affine:
        embed["w"] = entries["model.revin_layer.weight"].flatten()
        embed["b"] = entries["model.revin_layer.bias"].flatten()
    fill(model.embed, embed)
    positions = entries[prefix + "W_pos"]  # [pos, d_model], or [pos, 1] where one number serves
    fill(model.pos_embed, {"W_pos": positions.expand(-1, cfg.d_model)})
    stack = stack_of(options.kind)
    names = layer_names(options.kind, entries, f"{stack}0.")
    if cfg.norm_embed:
        fill(model.ln_embed, norm_entries(entries, f"{stack}0.{names.norm1}", model.ln_embed))
    for layer, block in enumerate(model.blocks):
        norms = None
        if options.pre_norm:  # the next norm of the stream ends ours, whichever layer holds it
            norms = {"ln1": f"{stack}{layer}.{names.norm2}"}
            if layer + 1 < cfg.n_layers:
                norms["ln2"] = f"{stack}{layer + 1}.{names.norm1}"
        fill_layer(block, entries, f"{stack}{layer}.", names, cfg.n_heads, norms)
    fill(model.head, _head_weights(model, entries, head))


def _head_weights(model: HookedTST, entries: Entries, head: str) -> dict[str, Tensor]:
    cfg = model.cfg
    n_pos = (cfg.n_ctx or 1) if getattr(cfg.head, "pooling", "") == "flatten" else 1
    if getattr(cfg.head, "individual", False):
        maps = [linear(entries, f"{head}{channel}.1") for channel in range(cfg.n_channels or 1)]
        weights = torch.stack([flatten_by_pos(weight, n_pos) for weight, _ in maps])
        return {"W_U": weights, "b_U": torch.stack([b for _, b in maps if b is not None])}
    weight, bias = linear(entries, head)
    weights = {"W_U": flatten_by_pos(weight, n_pos)}
    if bias is not None:
        weights["b_U"] = bias
    if getattr(cfg.head, "batch_norm", False):
        found = next(n for n in entries if n.startswith("head.") and n.endswith("running_mean"))
        norm = found.removesuffix("running_mean")
        for ours, theirs in {
            "w": "weight", "b": "bias", "running_mean": "running_mean",
            "running_var": "running_var",
        }.items():  # fmt: skip
            by_pos = flatten_by_pos(entries[norm + theirs][None], n_pos)[:, 0]
            weights[f"norm.{ours}"] = by_pos
    return weights


def _trials(model: HookedTST, options: TsaiOptions) -> tuple[Trial, ...]:
    cfg = model.cfg
    n_time = cfg.n_time or shortest(cfg.embed, cfg.n_ctx or 1)
    masked = getattr(cfg.embed, "takes_missing", False)
    inputs = list(series_trials(cfg.n_channels or 1, n_time, masked=masked))
    name, (series,) = inputs[0]
    if options.kind != "PatchTST":  # takes standardised series; larger ones only show rounding
        inputs[1] = (f"{name} times 2 plus 1", (2 * series + 1,))
    if masked:
        gaps = series.clone()
        generator = torch.Generator().manual_seed(1)
        gaps[torch.rand(gaps.shape, generator=generator) < 0.2] = torch.nan
        gaps[1::2, :, n_time // 2 + 1 :] = torch.nan
        gaps[:, :, 0] = series[:, :, 0]
        inputs.append((f"{name} with missing samples", (gaps,)))
    return tuple(Trial(name, tensors, run_model, run) for name, tensors in inputs)


def shortest(embed: Any, n_pos: int) -> int:
    """The least length of a series that makes so many positions."""
    n_time = 1
    while embed.n_pos(n_time) < n_pos:
        n_time += 1
    return n_time


def run(source: nn.Module, series: Tensor, mask: Tensor | None = None) -> Tensor:
    """The source's output; series are copied, because TSTPlus writes zeros over NaN."""
    if mask is None:
        return source(series.clone())
    return source((series.clone(), ~mask))


def recognises(source: nn.Module) -> bool:
    """Whether a module is exactly one of tsai's classes."""
    return f"{type(source).__module__}.{type(source).__qualname__}" in KINDS or isinstance(
        source, RestatedTsai
    )


register(
    Family(
        name=NAME,
        summary="TST, TSTPlus and PatchTST of tsai, live or as a state dict (n_heads=, act_fn=, "
        "res_attention=, n_time= where it does not tell)",
        recognises=recognises,
        build=build,
        takes_state_dict=True,
        run=run,
        taps=taps,
    )
)
