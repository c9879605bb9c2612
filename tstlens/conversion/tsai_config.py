"""From a tsai state dict and what it does not tell to the hooked model's config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tstlens.conversion.named_layers import Entries, linear
from tstlens.conversion.tsai_source import LAYERS, layer_names
from tstlens.errors import ArgumentError, StateDictError, UnsupportedSourceError
from tstlens.model import HeadConfig, HookedTSTConfig, PerStepConfig
from tstlens.model.families.flat_head import FlatHeadConfig
from tstlens.model.families.revin import RevINPatchesConfig
from tstlens.model.families.steps import ConvStepsConfig, ScaledStepsConfig

NAME = "tsai"
KINDS = {
    "tsai.models.TST.TST": "TST",
    "tsai.models.TSTPlus.TSTPlus": "TSTPlus",
    "tsai.models.PatchTST.PatchTST": "PatchTST",
}
PREFIX = {"TST": "", "TSTPlus": "backbone.", "PatchTST": "model.backbone."}


@dataclass
class TsaiOptions:
    """What a tsai state dict does not tell, with tsai's defaults."""

    kind: str
    n_heads: int | None = None
    act_fn: str = "gelu"
    head_act_fn: str | None = None
    res_attention: bool = True
    n_time: int | None = None
    n_channels: int | None = None
    stride: int | None = None
    padding: int | tuple[int, int] | None = None
    dilation: int = 1
    pooling: str | None = None
    y_range: tuple[float | int, float | int] | None = None
    revin: bool = True
    affine: bool = False
    subtract_last: bool = False
    revin_eps: float = 1e-5
    eps: float = 1e-5
    takes_missing: bool = True
    pre_norm: bool = False


def kind_of(state: Mapping[str, Tensor]) -> str:
    """Which of the three models a state dict is of, told by where its positions are."""
    if any(name.startswith(("model_trend.", "model_res.")) for name in state):
        raise UnsupportedSourceError(
            "decomposition=True is not covered: trend and remainder go through two trunks"
        )
    for kind, prefix in PREFIX.items():
        if f"{prefix}W_pos" in state:
            return kind
    raise StateDictError(
        "this state dict does not fit family 'tsai': expected W_pos (TST), backbone.W_pos "
        "(TSTPlus) or model.backbone.W_pos (PatchTST); its first entries are "
        f"{', '.join(list(state)[:4]) or 'none'}"
    )


def config_of(
    entries: Entries, options: TsaiOptions, class_names: tuple[str, ...] | None
) -> tuple[HookedTSTConfig, str]:
    """The config, and what the head's linear map is called."""
    prefix, stack = PREFIX[options.kind], stack_of(options.kind)
    names = layer_names(options.kind, entries, f"{stack}0.")
    n_layers = entries.n_layers(stack)
    n_pos, d_model = (
        len(entries[prefix + "W_pos"]),
        len(entries[prefix + "W_P.bias"])
        if (prefix + "W_P.bias" in entries)
        else _conv_width(entries, prefix),
    )
    query = linear(entries, f"{stack}0.{names.q}")[0]
    scale = _scale(entries, options, stack, n_layers)
    if options.n_heads is None:
        options.n_heads = 16 if scale is None else max(1, round(d_model * scale**2))
    value = linear(entries, f"{stack}0.{names.v}")[0]
    if len(query) != len(value):
        raise UnsupportedSourceError(
            f"d_v is not covered where it is not d_k: queries have {len(query)} outputs, values "
            f"{len(value)}"
        )
    if len(query) % options.n_heads:
        raise ArgumentError(
            f"queries have {len(query)} outputs, which do not divide into "
            f"n_heads={options.n_heads} heads; give n_heads="
        )
    batch_norm = f"{stack}0.{names.norm1}.running_mean" in entries or options.kind == "TST"
    embed, n_channels = _embed(entries, options, n_pos, d_model)
    head_config, head = _head(entries, options, n_pos, d_model, n_channels)
    cfg = HookedTSTConfig(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=options.n_heads,
        d_head=len(query) // options.n_heads,
        d_mlp=len(entries[f"{stack}0.{names.mlp_in}.weight"]),
        embed=embed,
        head=head_config,
        n_channels=n_channels,
        n_time=_length(options, embed, n_pos),
        n_ctx=n_pos,
        positions="learned",
        act_fn=options.act_fn,  # type: ignore[arg-type]
        norm_position="post",
        norm_embed=options.pre_norm,
        last_norm=not options.pre_norm,
        normalization_type="BN" if batch_norm else "LN",
        eps=options.eps,
        attn_scale=None if scale is None else 1 / scale,
        attn_bias=f"{stack}0.{names.q}.bias" in entries,
        residual_attention=options.kind != "TST" and options.res_attention,
        class_names=class_names,
    )
    return cfg, head


def stack_of(kind: str) -> str:
    """The prefix of the numbered layers."""
    return PREFIX[kind] + ("layers." if kind == "PatchTST" else "encoder.layers.")


def _conv_width(entries: Entries, prefix: str) -> int:
    for name in ("W_P.1.weight", "W_P.weight"):
        if prefix + name in entries:
            return len(entries[prefix + name])
    raise StateDictError(
        f"this state dict does not fit family {NAME!r}: {prefix}W_P.weight is missing"
    )


def _scale(entries: Entries, options: TsaiOptions, stack: str, n_layers: int) -> float | None:
    """What the scores are multiplied by: stored, as float32 has it, or None for d_head^-0.5."""
    name = LAYERS[options.kind].scale
    if name is None:
        return None
    found = {float(entries[f"{stack}{layer}.{name}"]) for layer in range(n_layers)}
    if len(found) > 1:
        raise UnsupportedSourceError(
            f"the layers scale their scores differently ({sorted(found)}); one HookedTST has one "
            "attn_scale"
        )
    return found.pop()


def _length(options: TsaiOptions, embed: Any, n_pos: int) -> int | None:
    """The length of a series, where one is told or the front end takes one only."""
    n_time = options.n_time
    if n_time is None and not isinstance(embed, ConvStepsConfig | RevINPatchesConfig):
        n_time = n_pos
    if n_time is not None and embed.n_pos(n_time) != n_pos:
        raise StateDictError(
            f"{n_time} samples make {embed.n_pos(n_time)} positions, and W_pos has {n_pos}; give "
            "the n_time=, stride= and padding= that the model was trained with"
        )
    return n_time


def _embed(entries: Entries, options: TsaiOptions, n_pos: int, d_model: int) -> tuple[Any, int]:
    """The front end's config, and the channels of a series."""
    at = PREFIX[options.kind] + "W_P"
    if options.kind == "PatchTST":
        stride = options.stride or 8
        start, end = _both(options.padding, (stride, 0))
        revin = RevINPatchesConfig(
            patch_len=entries[f"{at}.weight"].shape[1],
            stride=stride,
            pad_start=start,
            pad_end=end,
            scaling="std_plus_eps" if options.revin else "none",
            location="last" if options.subtract_last else "mean",
            scale_eps=options.revin_eps,
            affine=options.affine and options.revin,
        )
        return revin, _patchtst_channels(entries, options)
    if f"{at}.1.weight" in entries:  # Pad1d, then Conv1d with stride = width
        weight = entries[f"{at}.1.weight"]
        if options.padding is None and options.n_time is None:
            raise ArgumentError(
                "max_seq_len cut the series into windows, and how many zeros stand around it "
                "depends on its length; give n_time="
            )
        width = weight.shape[2]
        total = width * n_pos - (options.n_time or 0)
        start, end = _both(options.padding, (total // 2, total - total // 2))
        return ConvStepsConfig(width, width, start, end), weight.shape[1]
    weight = entries[f"{at}.weight"]
    if weight.ndim == 2:
        if options.kind == "TST":
            return PerStepConfig(), weight.shape[1]
        return ScaledStepsConfig(nan_is_missing=options.takes_missing), weight.shape[1]
    width = weight.shape[2]
    same = width // 2 * options.dilation if options.kind == "TSTPlus" else 0
    start, end = _both(options.padding, (same, same))
    conv = ConvStepsConfig(
        width, options.stride or 1, start, end, options.dilation, bias=f"{at}.bias" in entries
    )
    return conv, weight.shape[1]


def _both(padding: int | tuple[int, int] | None, default: tuple[int, int]) -> tuple[int, int]:
    if padding is None:
        return default
    return (padding, padding) if isinstance(padding, int) else (padding[0], padding[1])


def _patchtst_channels(entries: Entries, options: TsaiOptions) -> int:
    if "model.revin_layer.weight" in entries:
        return entries["model.revin_layer.weight"].shape[1]
    if "model.head.layers.0.1.weight" in entries:
        return entries.n_layers("model.head.layers.")
    if options.n_channels is None:
        raise ArgumentError(
            "this PatchTST has no weights of its own for any channel, so its state dict does not "
            "tell how many there are; give n_channels="
        )
    return options.n_channels


def _head(
    entries: Entries, options: TsaiOptions, n_pos: int, d_model: int, n_channels: int
) -> tuple[Any, str]:
    if options.kind == "PatchTST":
        individual = "model.head.layers.0.1.weight" in entries
        name = "model.head.layers." if individual else "model.head.layer.1"
        first = entries[f"{name}0.1.weight" if individual else f"{name}.weight"]
        config = FlatHeadConfig(
            horizon=len(first), individual=individual, denormalise=options.revin
        )
        return config, name
    maps = [
        name.removesuffix(".weight")
        for name in entries
        if name.startswith("head.") and name.endswith(".weight") and entries[name].ndim == 2
    ]
    norms = [name for name in entries if name.startswith("head.") and name.endswith("running_mean")]
    if len(maps) != 1 or len(norms) > 1:
        raise UnsupportedSourceError(
            f"custom_head is not covered: expected one linear map under head., got "
            f"{', '.join(maps) or 'none'}"
        )
    weight = entries[f"{maps[0]}.weight"]
    widths = {"flatten": n_pos * d_model, "mean": d_model, "max_mean": 2 * d_model}
    fitting = [name for name, width in widths.items() if width == weight.shape[1]]
    pooling = options.pooling or (fitting[0] if fitting else "")
    if widths.get(pooling) != weight.shape[1]:
        raise StateDictError(
            f"the head reads {weight.shape[1]} numbers; flattened, {n_pos} positions of "
            f"d_model={d_model} are {widths['flatten']}, pooled {d_model} or {2 * d_model}"
        )
    bias = f"{maps[0]}.bias" in entries
    if pooling == "mean" and options.kind == "TST":
        return HeadConfig("mean", n_classes=len(weight), bias=bias), maps[0]
    config = FlatHeadConfig(
        n_classes=len(weight),
        pooling=pooling,  # type: ignore[arg-type]
        act_fn=options.head_act_fn if pooling == "flatten" else None,  # type: ignore[arg-type]
        batch_norm=bool(norms),
        output_range=options.y_range,
        bias=bias,
    )
    return config, maps[0]
