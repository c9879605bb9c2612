"""Family ``timesfm-2.5``: ``TimesFm2_5ModelForPrediction`` of Hugging Face transformers.

| source (``model`` and heads)                | here                                             |
|---------------------------------------------|--------------------------------------------------|
| ``_revin`` of the whole context             | ``embed.hook_loc``, ``embed.hook_scale``,        |
|                                             | ``embed.hook_scaled``; carried by ``TrunkState`` |
| ``_update_running_stats``                   | ``embed.hook_running_loc``,                      |
|                                             | ``embed.hook_running_scale``; by ``TrunkState``  |
| patches and 1 - their padding               | ``embed.hook_patches``, ``embed.hook_observed``  |
| ``input_ff_layer``                          | ``embed.block`` (``hook_pre``, ``hook_post``)    |
| ``layers.{l}``: the input                   | ``blocks.{l}.hook_resid_pre``                    |
| ``input_layernorm``                         | ``ln1``                                          |
| ``self_attn`` q, k, v, o                    | ``attn``, ``attn.hook_q/k/v``, ``hook_pattern``, |
|                                             | ``hook_z``                                       |
| ``self_attn.q_norm``, ``k_norm``            | ``attn.q_norm``, ``attn.k_norm``, after rotation |
| ``self_attn.scaling`` (per dimension)       | ``attn.q_scale``, after the norm                 |
| ``post_attention_layernorm``                | ``ln1_post``, ``hook_attn_out``                  |
| ``pre_feedforward_layernorm``               | ``ln2``                                          |
| ``mlp.fc1``, activation, ``mlp.fc2``        | ``mlp``                                          |
| ``post_feedforward_layernorm``              | ``ln2_post``, ``hook_mlp_out``                   |
| the layer's output                          | ``hook_resid_post``                              |
| ``output_projection_point``                 | ``head.block``                                   |
| ``output_projection_quantiles``             | ``head.spread_block``                            |
| the forecast before the context's scale     | ``head.hook_quantiles``                          |

**Two passes.** The source runs its stack on the scaled series and on its mirror image (times -1)
and averages both forecasts. Here both passes are rows of one run: activations of the trunk hold,
for each series, its channels and then their mirror images, so ``model.by_channel`` gives
[batch, 2 * channel, ...] and the axis ``channel`` of patching goes on with the mirror images
(``channel + n_channels`` is the mirror image of ``channel``). A hook sees and edits both. With
``both_signs=False`` there is one pass, the source called with ``force_flip_invariance=False``;
reading SAE features asks for that, as a feature has one place in a series.

Location and scale of the whole context cancel wherever patches vary: the running ones scale once
more. So edits at ``embed.hook_loc`` and ``embed.hook_scale`` change nothing there, as in the
source.

Covered: the whole config with the default kind of rotary positions, grouped keys and values
(repeated for each head), series of any length up to the context, padding before a series (``mask``
or NaN; a shorter series, to the source). Several channels go through the model one by one; their
count belongs to the series, so give ``n_channels=``. ``output=``: ``"quantiles"``
[batch, channel, horizon, quantile], ``"point"`` (the source's ``mean_predictions``)
[batch, channel, horizon], or ``"both"`` (its ``full_predictions``).

With ``infer_is_positive`` the source cuts forecasts at zero where the least sample of the *whole
batch* is not negative, so that a forecast depends on the series beside it. Here each channel is
looked at by itself, as the source does where it is given that channel alone.

The source pads every series to the whole context with patches that no observed one sees; here they
are left out (they count in location and scale, as in the source). At a patch of padding the
source attends to other positions, which nothing reads.

Refused: series longer than the context (the source cuts them without a word); gaps (the source
takes none); other kinds of rotary positions; changed parts and subclasses. ``window_size`` is an
argument of the source's ``forward``, not of the model; call the source for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tstlens.conversion.checking import Trial
from tstlens.conversion.comparing import Tap
from tstlens.conversion.encoder_layers import fill
from tstlens.conversion.registry import Built, Family, register
from tstlens.conversion.t5_layers import activation, dotted
from tstlens.conversion.timesfm import chosen_output
from tstlens.conversion.transformers_source import (
    as_compared,
    attention_taps,
    attention_weights,
    block_weights,
    class_of,
    embedding_taps,
    last,
    rebuilt,
    refuse_changed_parts,
)
from tstlens.errors import ArgumentError, UnsupportedSourceError
from tstlens.model import HookedTST, HookedTSTConfig
from tstlens.model.families.timesfm_25 import TimesFM25HeadConfig, TimesFM25PatchesConfig

_PACKAGE = "transformers.models.timesfm2_5.modeling_timesfm2_5"
_CLASS = f"{_PACKAGE}.TimesFm2_5ModelForPrediction"
_NORMS = {
    "ln1": "input_layernorm",
    "ln1_post": "post_attention_layernorm",
    "ln2": "pre_feedforward_layernorm",
    "ln2_post": "post_feedforward_layernorm",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
}


def build(
    source: nn.Module | Mapping[str, Tensor],
    n_channels: int = 1,
    both_signs: bool | None = None,
    output: str = "quantiles",
    config: Mapping[str, Any] | None = None,
) -> Built:
    """Convert a TimesFM 2.5 model.

    Args:
        source: the model, or its state dict.
        n_channels: channels of the series it will be given.
        both_signs: whether the mirrored series goes through the model too; by default as its
            config has it (``force_flip_invariance``).
        output: what a forecast holds.
        config: the entries of its ``config.json`` (state dict only, needed there).
    """
    if isinstance(source, Mapping):
        source = rebuilt(source, config, _CLASS, "transformers.TimesFm2_5Config", "timesfm-2.5")
    elif config is not None:
        raise ArgumentError("config: a live model knows it itself; leave it out")
    refuse_changed_parts(source, _PACKAGE)
    whole: Any = source
    own = whole.config
    rotary = dict(own.rope_parameters or {})
    if rotary.get("rope_type", "default") != "default":
        raise UnsupportedSourceError(
            f"rope_parameters: rope_type {rotary['rope_type']!r} is not covered, 'default' is"
        )
    if own.context_length % own.patch_length:
        raise UnsupportedSourceError(
            f"context_length={own.context_length} is no multiple of patch_length="
            f"{own.patch_length}, which fails upstream"
        )
    if own.decode_index < 0:
        raise UnsupportedSourceError(f"decode_index={own.decode_index} is not covered, 0 and up is")
    act_fn: Any = activation(own.activation, "activation")
    cfg = HookedTSTConfig(
        n_layers=own.num_hidden_layers,
        d_model=own.hidden_size,
        n_heads=own.num_attention_heads,
        d_head=own.head_dim,
        d_mlp=own.intermediate_size,
        embed=TimesFM25PatchesConfig(
            patch_len=own.patch_length,
            context_length=own.context_length,
            d_hidden=own.hidden_size,
            both_signs=own.force_flip_invariance if both_signs is None else both_signs,
            act_fn=act_fn,
        ),
        head=TimesFM25HeadConfig(
            horizon=own.horizon_length,
            quantiles=tuple(own.quantiles),
            d_hidden=own.hidden_size,
            spread_horizon=own.output_quantile_len if own.use_continuous_quantile_head else 0,
            point=min(own.decode_index, len(own.quantiles)),
            output=output,
            bias=whole.output_projection_point.input_layer.bias is not None,
            not_negative=own.infer_is_positive,
            act_fn=act_fn,
        ),
        n_channels=n_channels,
        act_fn=act_fn,
        normalization_type="RMS",
        use_normalization_before_and_after=True,
        eps=own.rms_norm_eps,
        attn_scale=1.0,
        query_scale=True,
        qk_norm="after_rotary",
        rotary_base=float(rotary.get("rope_theta", 10_000.0)),
        causal=True,
        attn_bias=own.attention_bias,
        mlp_bias=own.use_bias,
        model_name="TimesFM 2.5",
    )
    weight = whole.output_projection_point.input_layer.weight
    model = HookedTST(cfg).to(device=weight.device, dtype=weight.dtype)
    _fill_model(model, whole)
    return Built(model, whole, _trials(model), dotted(source))


@torch.no_grad()
def _fill_model(model: HookedTST, source: Any) -> None:
    fill(model.embed, block_weights(source.model.input_ff_layer))
    fill(model.head, block_weights(source.output_projection_point))
    if hasattr(model.head, "spread_block"):
        fill(model.head, block_weights(source.output_projection_quantiles, "spread_block"))
    for block, layer in zip(model.blocks, source.model.layers, strict=True):
        weights = {f"{n}.w": layer.get_submodule(path).weight for n, path in _NORMS.items()}
        for name, linear in (("in", layer.mlp.fc1), ("out", layer.mlp.fc2)):
            weights[f"mlp.W_{name}"] = linear.weight.T
            if linear.bias is not None:
                weights[f"mlp.b_{name}"] = linear.bias
        fill(block, weights | attention_weights(layer.self_attn, model.cfg.n_heads))


def run(source: Any, series: Tensor, mask: Tensor | None, model: HookedTST) -> Tensor:
    """The source's forecast in the converted model's layout.

    Its stack runs once more before that, on the rows of the converted model's trunk, so that what
    forward hooks see first can be compared with it.
    """
    if mask is not None:
        series = series.masked_fill(~mask[:, None], torch.nan)
    embed: Any = model.cfg.embed
    with as_compared(source, series.dtype):
        before = embed.context_length - series.shape[2]
        whole = nn.functional.pad(series, (before, 0), value=torch.nan).flatten(0, 1)
        padding = whole.isnan().to(series.dtype)
        whole = whole.nan_to_num()
        loc, scale = whole.mean(1, keepdim=True), whole.std(1, keepdim=True)
        reach = embed.n_pos(series.shape[2]) * embed.patch_len
        scaled, padding = (
            x[:, -reach:].unflatten(0, series.shape[:2])
            for x in (source.model._revin(whole, loc, scale), padding)
        )
        if embed.both_signs:
            scaled, padding = torch.cat([scaled, -scaled], 1), torch.cat([padding, padding], 1)
        source._decode_and_project(scaled.flatten(0, 1), padding.flatten(0, 1))
    return _forecast(source, series, model)


def _forecast(source: Any, series: Tensor, model: HookedTST) -> Tensor:
    """The source's forecast; channels that are never negative run without the others."""
    rows = [row[~row.isnan()] for row in series.flatten(0, 1)]
    negative = torch.tensor([bool((row < 0).any()) for row in rows])
    found: dict[int, Tensor] = {}
    embed: Any = model.cfg.embed
    with as_compared(source, series.dtype):
        for which in (negative, ~negative):
            chosen = [int(i) for i in which.nonzero()[:, 0]]
            if chosen:
                given = [rows[i] for i in chosen]
                out = source(past_values=given, force_flip_invariance=embed.both_signs)
                found |= dict(zip(chosen, chosen_output(out, model), strict=True))
    return torch.stack([found[i] for i in range(len(rows))]).unflatten(0, series.shape[:2])


def _trials(model: HookedTST) -> tuple[Trial, ...]:
    embed: Any = model.cfg.embed
    generator = torch.Generator().manual_seed(0)
    longest = min(embed.context_length, 16 * embed.patch_len)
    shape = (4, model.cfg.n_channels or 1, longest)
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    padded = normal.clone()
    for row, before in enumerate((0, 1, longest // 2, longest - 1)):
        padded[row, :, :before] = torch.nan
    shorter = normal[..., -max(1, longest - embed.patch_len // 2) :].clone()
    given = [
        (f"random {list(shape)} times 10 plus 3", 10 * normal + 3),
        (f"never negative {list(shape)}", normal.abs()),
        (f"constant {list(shape)}", normal[..., :1].expand(shape).clone()),
        (f"padded at the start {list(shape)}", padded),
        (f"no whole number of patches {list(shorter.shape)}", shorter),
    ]

    def run_source(source: nn.Module, series: Tensor) -> Tensor:
        return _forecast(source, series, model)

    return tuple(Trial(name, (series,), _run_model, run_source) for name, series in given)


def _run_model(model: HookedTST, series: Tensor) -> Tensor:
    return model(series)


def taps(source: Any, model: HookedTST) -> list[Tap]:
    """Where a TimesFM 2.5 model computes our activations (patterns in float32 only)."""
    patterns = model.cfg.dtype == torch.float32
    found = embedding_taps("model.input_ff_layer", source.config.patch_length, model.by_channel)
    for number, layer in enumerate(source.model.layers):
        here, there = f"blocks.{number}", f"model.layers.{number}"
        found += attention_taps(here, there, layer.self_attn, patterns)
        after_mlp = f"{there}.post_feedforward_layernorm"
        norm = f"{there}.pre_feedforward_layernorm"
        found += [
            Tap(
                f"{here}.hook_attn_out",
                f"{there}.post_attention_layernorm",
                observed_only=True,
            ),
            Tap(f"{here}.hook_resid_mid", norm, of="input", observed_only=True),
            Tap(f"{here}.mlp.hook_pre", f"{there}.mlp.fc1", observed_only=True),
            Tap(f"{here}.mlp.hook_post", f"{there}.mlp.fc2", of="input", observed_only=True),
            Tap(f"{here}.hook_mlp_out", after_mlp, observed_only=True),
            Tap(f"{here}.hook_resid_post", there, observed_only=True),
        ]
    blocks = {"block": "output_projection_point", "spread_block": "output_projection_quantiles"}
    found.append(Tap("head.hook_pooled", blocks["block"], last, "input"))
    return found + [
        Tap(f"head.{ours}.hook_pre", f"{theirs}.input_layer", last)
        for ours, theirs in blocks.items()
        if hasattr(model.head, ours)
    ]


def load(folder: Path) -> nn.Module:
    """The source from a folder with its ``config.json`` and weights."""
    return class_of(_CLASS).from_pretrained(str(folder)).eval()


def reads(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is a TimesFM 2.5 model's, as transformers writes it."""
    return _CLASS.rsplit(".", 1)[1] in (config.get("architectures") or ())


def recognises(source: nn.Module) -> bool:
    """Whether a module is transformers' own, not a subclass."""
    return dotted(source) == _CLASS


register(
    Family(
        name="timesfm-2.5",
        summary="TimesFM 2.5 (transformers' TimesFm2_5ModelForPrediction), live or weights and "
        "config=",
        recognises=recognises,
        build=build,
        takes_state_dict=True,
        run=run,
        taps=taps,
        reads=reads,
        load=load,
    )
)
