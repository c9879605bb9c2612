"""Family ``chronos-2``: ``Chronos2Model`` of chronos-forecasting.

| source (chronos.chronos2)                    | here                                              |
|----------------------------------------------|---------------------------------------------------|
| ``instance_norm``                            | ``embed.hook_loc``, ``embed.hook_scale``,         |
|                                              | ``embed.hook_scaled``; carried by ``TrunkState``  |
| time encoding, patches, masks                | ``embed.hook_times``, ``embed.hook_patches``,     |
|                                              | ``embed.hook_observed``                           |
| ``input_patch_embedding``                    | ``embed.block`` (``hook_pre``, ``hook_post``)     |
| ``shared``: token 1 (REG)                    | ``embed.reg_token``                               |
| ``encoder.block.{l}``: the input             | ``blocks.{l}.hook_resid_pre``                     |
| ``layer.0`` time attention (rotary)          | ``ln1``, ``attn``, ``hook_attn_out``              |
| ``layer.1`` group attention (along the batch)| ``ln2``, ``channel_attn``,                        |
|                                              | ``hook_channel_attn_out``                         |
| ``layer.2`` MLP                              | ``ln3``, ``mlp``, ``hook_mlp_out``                |
| the block's output                           | ``hook_resid_post``                               |
| ``encoder.final_layer_norm``                 | ``ln_final``                                      |
| ``output_patch_embedding``                   | ``head.patch_block``, ``head.hook_quantiles``     |

**Groups.** The channels of one series are one group (``group_ids``), and groups do not see each
other, as ``predict`` does with series of several channels. For channels that are forecast one by
one convert with ``n_channels=1`` and give them as series. Group attention has no order: its pattern
is [batch, pos, head, query channel, key channel].

Covered: the whole config with REG token, patches that overlap, series of any length up to the
context, missing values, padding at the start; ``num_output_patches=`` of horizon, 1 as in the
source. ``mask`` and NaN are the same thing. Output: [batch, channel, horizon, quantile]. A position
of which no channel of the group has a sample is nothing that anybody reads; the source computes
something else there (it lets it attend to the whole batch).

Refused: ``use_reg_token=False`` (fails upstream); series longer than the context (the source cuts
them without a word); subclasses and changed parts. Future covariates are an argument of the
source's ``forward`` which is not offered here (a hook at ``embed.hook_patches`` and
``embed.hook_observed`` can write scaled values into the patches of the horizon); horizons beyond
``num_output_patches`` are the pipeline's, which feeds quantiles back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import einops
import torch
from torch import Tensor, nn

from tstlens.conversion.checking import Trial
from tstlens.conversion.chronos_bolt import chronos_in_full_precision
from tstlens.conversion.comparing import Tap
from tstlens.conversion.encoder_layers import fill
from tstlens.conversion.registry import Built, Family, register
from tstlens.conversion.t5_layers import activation, dotted
from tstlens.conversion.transformers_source import (
    block_weights,
    class_of,
    rebuilt,
    refuse_changed_parts,
)
from tstlens.errors import ArgumentError, UnsupportedSourceError
from tstlens.model import HookedTST, HookedTSTConfig
from tstlens.model.families.chronos_2 import Chronos2HeadConfig, Chronos2PatchesConfig

_CLASS = "chronos.chronos2.model.Chronos2Model"
_CONFIG = "chronos.chronos2.config.Chronos2CoreConfig"


def build(
    source: nn.Module | Mapping[str, Tensor],
    n_channels: int = 1,
    num_output_patches: int = 1,
    config: Mapping[str, Any] | None = None,
) -> Built:
    """Convert a Chronos-2 model.

    Args:
        source: the model (of a pipeline, ``pipeline.model``), or its state dict.
        n_channels: channels of the series it will be given; they form one group.
        num_output_patches: patches of the horizon.
        config: the entries of its ``config.json`` (state dict only, needed there).
    """
    if isinstance(source, Mapping):
        source = rebuilt(source, config, _CLASS, _CONFIG, "chronos-2")
    elif config is not None:
        raise ArgumentError("config: a live model knows it itself; leave it out")
    refuse_changed_parts(source, "chronos.chronos2", "chronos.chronos_bolt")
    whole: Any = source
    own, core = whole.chronos_config, whole.config
    if not own.use_reg_token:
        raise UnsupportedSourceError(
            "use_reg_token=False: fails upstream, whose forward counts on the token"
        )
    act_fn: Any = activation(core.dense_act_fn, "feed_forward_proj")
    arcsinh = bool(own.use_arcsinh)
    cfg = HookedTSTConfig(
        n_layers=core.num_layers,
        d_model=core.d_model,
        n_heads=core.num_heads,
        d_head=core.d_kv,
        d_mlp=core.d_ff,
        embed=Chronos2PatchesConfig(
            patch_len=own.input_patch_size,
            stride=own.input_patch_stride,
            context_length=own.context_length,
            d_hidden=core.d_ff,
            act_fn=act_fn,
            flat_scale=whole.instance_norm.eps,
            n_future=num_output_patches,
            time_scale=own.time_encoding_scale,
            arcsinh=arcsinh,
        ),
        head=Chronos2HeadConfig(
            horizon=num_output_patches * own.output_patch_size,
            patch_len=own.output_patch_size,
            quantiles=tuple(own.quantiles),
            d_hidden=core.d_ff,
            act_fn=act_fn,
            arcsinh=arcsinh,
        ),
        n_channels=n_channels,
        act_fn=act_fn,
        normalization_type="RMS",
        eps=core.layer_norm_epsilon,
        final_norm=True,
        attn_scale=1.0,
        attn_bias=False,
        mlp_bias=False,
        rotary_base=float(core.rope_theta),
        second_attention="channel",
        model_name="Chronos-2",
    )
    weight = whole.shared.weight
    model = HookedTST(cfg).to(device=weight.device, dtype=weight.dtype)
    _fill_model(model, whole)
    return Built(model, whole, _trials(model), dotted(source))


@torch.no_grad()
def _fill_model(model: HookedTST, source: Any) -> None:
    fill(model.embed, {"reg_token": source.shared.weight[source.config.reg_token_id]})
    fill(model.embed, block_weights(source.input_patch_embedding))
    fill(model.head, block_weights(source.output_patch_embedding, "patch_block"))
    per_head = partial(einops.rearrange, head=model.cfg.n_heads)
    for block, layer in zip(model.blocks, source.encoder.block, strict=True):
        time, group, mlp = layer.layer
        weights = {f"ln{i + 1}.w": part.layer_norm.weight for i, part in enumerate(layer.layer)}
        for name, part in (("attn", time.self_attention), ("channel_attn", group.self_attention)):
            for letter, linear in zip("QKV", (part.q, part.k, part.v), strict=True):
                weights[f"{name}.W_{letter}"] = per_head(linear.weight, "(head d) m -> head m d")
            weights[f"{name}.W_O"] = per_head(part.o.weight, "m (head d) -> head d m")
        weights |= {"mlp.W_in": mlp.mlp.wi.weight.T, "mlp.W_out": mlp.mlp.wo.weight.T}
        fill(block, weights)
    fill(model.ln_final, {"w": source.encoder.final_layer_norm.weight})


def run(source: Any, series: Tensor, mask: Tensor | None, model: HookedTST) -> Tensor:
    """The source's quantiles [batch, channel, horizon, quantile], a group for each series."""
    if mask is not None:
        series = series.masked_fill(~mask[:, None], torch.nan)
    n_series, n_channels = series.shape[:2]
    embed: Any = model.cfg.embed
    with _as_compared(source, series.dtype):
        out = source(
            context=series.flatten(0, 1),
            group_ids=torch.arange(n_series, device=series.device).repeat_interleave(n_channels),
            num_output_patches=embed.n_future,
            output_attentions=series.dtype == torch.float32,
        ).quantile_preds
    return out.unflatten(0, (n_series, n_channels)).transpose(2, 3)


@contextmanager
def _as_compared(source: Any, dtype: torch.dtype) -> Iterator[None]:
    """In float64 all digits count: attention that gives its pattern rounds to float32."""
    config = source.encoder.block[0].layer[0].self_attention.config
    before = config._attn_implementation
    try:
        if dtype == torch.float64:
            config._attn_implementation = "sdpa"
        with chronos_in_full_precision(source, dtype):
            yield
    finally:
        config._attn_implementation = before


def _trials(model: HookedTST) -> tuple[Trial, ...]:
    embed: Any = model.cfg.embed
    generator = torch.Generator().manual_seed(0)
    longest = min(embed.context_length, 16 * embed.patch_len)
    shape = (4, model.cfg.n_channels or 1, longest)
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    missing, padded, empty = normal.clone(), normal.clone(), normal.clone()
    missing[torch.rand(shape, generator=generator) < 0.3] = torch.nan
    for row, before in enumerate((0, 1, longest // 2, longest - 1)):
        padded[row, :, :before] = torch.nan
    empty[0] = torch.nan
    shorter = normal[..., -max(1, longest - embed.patch_len // 2) :].clone()
    given = [
        (f"random {list(shape)} times 10 plus 3", 10 * normal + 3),
        (f"constant {list(shape)}", normal[..., :1].expand(shape).clone()),
        (f"missing values {list(shape)}", missing),
        (f"padded at the start {list(shape)}", padded),
        (f"no whole number of patches {list(shorter.shape)}", shorter),
        (f"one without observed values {list(shape)}", empty),
    ]

    def run_source(source: nn.Module, series: Tensor) -> Tensor:
        return run(source, series, None, model)

    return tuple(Trial(name, (series,), _run_model, run_source) for name, series in given)


def _run_model(model: HookedTST, series: Tensor) -> Tensor:
    return model(series)


def taps(source: Any, model: HookedTST) -> list[Tap]:
    """Where a Chronos-2 model computes our activations (patterns in float32 only)."""
    n_channels, n_heads = model.cfg.n_channels or 1, model.cfg.n_heads
    patterns = model.cfg.dtype == torch.float32
    found = [Tap("hook_embed", "encoder.block.0", of="input", observed_only=True)]

    def per_head(seen: Tensor) -> Tensor:
        return seen.unflatten(-1, (n_heads, -1))

    def from_groups(seen: Tensor) -> Tensor:  # [pos, row, ...] as [row, pos, ...]
        return seen.transpose(0, 1)

    def per_head_of_groups(seen: Tensor) -> Tensor:
        return per_head(from_groups(seen))

    def in_groups(seen: Any) -> Tensor:  # [pos, head, row, row] as [batch, pos, head, query, key]
        apart = seen.attn_weights.unflatten(3, (-1, n_channels)).unflatten(2, (-1, n_channels))
        return torch.einsum("phbqbk->bphqk", apart)

    for number in range(model.cfg.n_layers):
        here, there = f"blocks.{number}", f"encoder.block.{number}"
        found.append(Tap(f"{here}.hook_resid_pre", there, of="input", observed_only=True))
        kinds = (
            ("attn", "hook_attn_out", per_head, _written),
            ("channel_attn", "hook_channel_attn_out", per_head_of_groups, from_groups),
        )
        for layer, (name, out, by_head, by_row) in enumerate(kinds):
            path = f"{there}.layer.{layer}.self_attention"
            found += [
                Tap(f"{here}.{name}.hook_{letter}", f"{path}.{letter}", by_head, observed_only=True)
                for letter in "qkv"
            ]
            found += [
                Tap(f"{here}.{name}.hook_z", f"{path}.o", by_head, "input", observed_only=True),
                Tap(f"{here}.{out}", f"{path}.o", by_row, observed_only=True),
            ]
        if patterns:
            for layer, (name, by_row) in enumerate(
                (("attn", _weights), ("channel_attn", in_groups))
            ):
                path = f"{there}.layer.{layer}.self_attention"
                pattern = f"{here}.{name}.hook_pattern"
                found.append(Tap(pattern, path, by_row, observed_only=True))
        mlp = f"{there}.layer.2"
        found += [
            Tap(f"{here}.hook_resid_mid_channel", mlp, of="input", observed_only=True),
            Tap(f"{here}.mlp.hook_pre", f"{mlp}.mlp.wi", observed_only=True),
            Tap(f"{here}.hook_mlp_out", f"{mlp}.mlp", observed_only=True),
            Tap(f"{here}.hook_resid_post", mlp, observed_only=True),
        ]
    return [
        *found,
        Tap("head.hook_future", "output_patch_embedding", of="input"),
        Tap("head.patch_block.hook_pre", "output_patch_embedding.hidden_layer"),
    ]


def _written(seen: Tensor) -> Tensor:
    return seen


def _weights(seen: Any) -> Tensor:
    return seen.attn_weights


def load(folder: Path) -> nn.Module:
    """The source from a folder with its ``config.json`` and weights."""
    return class_of(_CLASS).from_pretrained(str(folder)).eval()


def reads(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is a Chronos-2 model's."""
    return _CLASS.rsplit(".", 1)[1] in (config.get("architectures") or ())


def recognises(source: nn.Module) -> bool:
    """Whether a module is chronos-forecasting's own, not a subclass."""
    return dotted(source) == _CLASS


register(
    Family(
        name="chronos-2",
        summary="Chronos-2 (chronos-forecasting): pipeline.model, live, or weights with config=",
        recognises=recognises,
        build=build,
        takes_state_dict=True,
        run=run,
        taps=taps,
        reads=reads,
        load=load,
    )
)
