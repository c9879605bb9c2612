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

Nothing of tsai is imported: modules are told by the names of their classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tstlens.arguments import Amount, Count, check_fields, configured
from tstlens.errors import ArgumentError, StateDictError, UnsupportedSourceError
from tstlens.model import HeadConfig, HookedTST, HookedTSTConfig, PerStepConfig
from tstlens.zoo.layers import (
    Entries,
    LayerTable,
    activation_name,
    fill,
    flatten_by_pos,
    linear,
    norm_entries,
    shortest,
)
from tstlens.zoo.parity import Trial, run_model, series_trials
from tstlens.zoo.parts import ConvStepsConfig, FlatHeadConfig, RevINPatchesConfig, ScaledStepsConfig
from tstlens.zoo.registry import Built, dotted, register_classes
from tstlens.zoo.tsai_source import LAYERS, RestatedTsai, layer_names, taps

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
    query = linear(entries, f"{stack}0.{names['attn.Q']}")[0]
    scale = _scale(entries, options, stack, n_layers)
    if options.n_heads is None:
        options.n_heads = 16 if scale is None else max(1, round(d_model * scale**2))
    value = linear(entries, f"{stack}0.{names['attn.V']}")[0]
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
    batch_norm = f"{stack}0.{names['ln1']}.running_mean" in entries or options.kind == "TST"
    embed, n_channels = _embed(entries, options, n_pos, d_model)
    head_config, head = _head(entries, options, n_pos, d_model, n_channels)
    cfg = HookedTSTConfig(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=options.n_heads,
        d_head=len(query) // options.n_heads,
        d_mlp=len(entries[f"{stack}0.{names['mlp.in']}.weight"]),
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
        attn_bias=f"{stack}0.{names['attn.Q']}.bias" in entries,
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


def read_live(source: Any, kind: str) -> dict[str, Any]:
    """What a state dict would not tell, as fields of ``TsaiOptions``.

    Args:
        source: the model.
        kind: ``"TST"``, ``"TSTPlus"`` or ``"PatchTST"``.

    Raises:
        UnsupportedSourceError: an option is not covered; it is named.
    """
    if kind == "PatchTST":
        return _patchtst(source)
    trunk = source if kind == "TST" else source.backbone
    layers = list(trunk.encoder.layers)
    found = _layers(layers, kind)
    found |= _live_head(source.head) | _input(trunk.W_P)
    if kind == "TST":
        found["n_time"] = source.seq_len
        return found
    found["res_attention"] = bool(trunk.encoder.res_attention)
    for option in ("padding_var", "attn_mask"):
        if getattr(trunk, option) is not None:
            raise UnsupportedSourceError(f"{option}={getattr(trunk, option)!r} is not covered")
    padding = trunk.key_padding_mask
    if not isinstance(padding, str) and padding == -1:
        raise UnsupportedSourceError(
            "key_padding_mask=-1 (the last channel is the padding mask) is not covered; give the "
            "mask as mask="
        )
    found["takes_missing"] = isinstance(padding, str) and padding == "auto"
    return found


def _layers(layers: list[Any], kind: str) -> dict[str, Any]:
    if not layers:
        raise UnsupportedSourceError("the encoder has no layers")
    read = [_layer(layer, kind) for layer in layers]
    for number, other in enumerate(read):
        for name, value in other.items():
            if value != read[0][name]:
                raise UnsupportedSourceError(
                    f"{name} is {read[0][name]!r} in layer 0 but {value!r} in layer {number}; one "
                    "HookedTST has the same options in every block"
                )
    return read[0]


def _layer(layer: Any, kind: str) -> dict[str, Any]:
    names = ("batchnorm_attn", "batchnorm_ffn") if kind == "TST" else ("norm_attn", "norm_ffn")
    norms = [_norm(getattr(layer, name)) for name in names]
    if norms[0].eps != norms[1].eps or type(norms[0]) is not type(norms[1]):
        raise UnsupportedSourceError(f"the norms of a layer differ: {norms[0]!r}, {norms[1]!r}")
    return {
        "n_heads": layer.self_attn.n_heads,
        "act_fn": activation_name(layer.ff[1], "the MLP's activation"),
        "eps": norms[0].eps,
        "pre_norm": bool(getattr(layer, "pre_norm", False)),
    }


def _norm(module: Any) -> Any:
    parts = list(module) if isinstance(module, nn.Sequential) else [module]
    norms = [part for part in parts if type(part) in (nn.BatchNorm1d, nn.LayerNorm)]
    if len(norms) != 1:
        raise UnsupportedSourceError(f"expected a batch norm or a layer norm, got {module!r}")
    return norms[0]


def _flat(module: Any) -> list[Any]:
    """The modules of nested ``nn.Sequential`` in order."""
    if not isinstance(module, nn.Sequential):
        return [module]
    return [part for child in module for part in _flat(child)]


def _live_head(head: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"head_act_fn": None, "pooling": None}
    pools = {"Flatten": "flatten", "GAP1d": "mean", "GACP1d": "max_mean"}
    order = []
    for part in _flat(head):
        name = type(part).__name__
        order.append(name)
        if name in ("Dropout", "Linear", "BatchNorm1d"):
            continue
        if name in pools:
            found["pooling"] = pools[name]
        elif name == "SigmoidRange":
            found["y_range"] = (float(part.low), float(part.high))
        elif order == [name] and not list(part.children()):
            found["head_act_fn"] = activation_name(part, "the head's activation")
        else:
            raise UnsupportedSourceError(f"custom_head is not covered: it has a {name}")
    if order.count("Linear") != 1 or found["pooling"] is None:
        raise UnsupportedSourceError(
            f"custom_head is not covered: expected activation, flatten or pooling, and one linear "
            f"map, got {', '.join(order)}"
        )
    return found


def _input(embed: Any) -> dict[str, Any]:
    """Padding, stride and dilation of a convolution over time; nothing of a linear map."""
    if type(embed) is nn.Linear:
        return {}
    parts = _flat(embed)
    conv, before = parts[-1], (0, 0)
    if len(parts) == 2 and type(parts[0]).__name__ == "Pad1d":
        if parts[0].value != 0:
            raise UnsupportedSourceError(f"Pad1d with value={parts[0].value} is not covered")
        before = tuple(parts[0].padding)
    elif len(parts) != 1:
        raise UnsupportedSourceError(f"the input encoding {embed!r} is not covered")
    if type(conv) is not nn.Conv1d:
        raise UnsupportedSourceError(
            f"the input encoding is a {type(conv).__name__}, which is not covered; Linear and "
            "plain Conv1d are"
        )
    if conv.groups != 1 or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        raise UnsupportedSourceError(
            f"Conv1d with groups={conv.groups}, padding_mode={conv.padding_mode!r}, "
            f"padding={conv.padding!r} is not covered; one group and a number of zeros are"
        )
    around = conv.padding[0]
    return {
        "stride": conv.stride[0],
        "dilation": conv.dilation[0],
        "padding": (before[0] + around, before[1] + around),
    }


def _patchtst(source: Any) -> dict[str, Any]:
    if source.decomposition:
        raise UnsupportedSourceError(
            "decomposition=True is not covered: trend and remainder go through two trunks"
        )
    model = source.model
    found = _layers(list(model.backbone.layers), "PatchTST")
    revin = model.revin_layer
    return found | {
        "res_attention": bool(model.backbone.res_attention),
        "stride": model.stride,
        "padding": tuple(model.padding_patch_layer.padding),
        "n_channels": model.n_vars,
        "revin": bool(model.revin),
        "affine": bool(revin.affine),
        "subtract_last": bool(revin.subtract_last),
        "revin_eps": float(revin.eps),
    }


@dataclass(frozen=True)
class Told:
    """What weights alone do not tell; None for what :class:`TsaiOptions` has.

    Args:
        n_heads: attention heads; read off the stored scale where there is one, else 16 (tsai's
            default).
        act_fn: of the MLPs and the head; ``"gelu"``.
        res_attention: scores are handed from layer to layer (TSTPlus, PatchTST); True.
        pre_norm: the option of the same name (TSTPlus, PatchTST); False.
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
    """

    n_heads: Count | None = None
    act_fn: Literal["relu", "gelu", "silu"] | None = None
    res_attention: bool | None = None
    pre_norm: bool | None = None
    n_channels: Count | None = None
    stride: Count | None = None
    padding: Amount | tuple[Amount, Amount] | None = None
    dilation: Count | None = None
    pooling: Literal["flatten", "mean", "max_mean"] | None = None
    y_range: tuple[float | int, float | int] | None = None
    revin: bool | None = None
    affine: bool | None = None
    subtract_last: bool | None = None

    def __post_init__(self) -> None:
        check_fields(self)


@configured(Told)
def build(
    source: nn.Module | Mapping[str, Tensor],
    config: Told | None = None,
    *,
    n_time: Count | None = None,
    class_names: tuple[str, ...] | None = None,
    **settings: Any,
) -> Built:
    """Convert a tsai model.

    Args:
        source: the module or its state dict.
        config: what a state dict does not tell; a live model knows it itself.
        n_time: samples of a series. Needed for ``max_seq_len`` inputs (their padding depends on
            it); elsewhere any length that gives the model's positions is taken where not given.
        class_names: one name per logit.
        **settings: fields of :class:`Told`, in place of those of ``config``.
    """
    told = {name: value for name, value in vars(config).items() if value is not None}
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
        options = TsaiOptions(KINDS[dotted(source)])
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
        fill(model.ln_embed, norm_entries(entries, f"{stack}0.{names['ln1']}", model.ln_embed))
    block: Any
    for layer, block in enumerate(model.blocks):
        if options.pre_norm:  # the next norm of the stream ends ours, whichever layer holds it
            after = {"ln1": names["ln2"], "ln2": f"{stack}{layer + 1}.{names['ln1']}"}
            only = {k: v for k, v in names.rows.items() if k not in after}
            LayerTable(only | {"ln1": after["ln1"]}).fill(block, entries, f"{stack}{layer}.")
            if layer + 1 < cfg.n_layers:
                fill(block.ln2, norm_entries(entries, after["ln2"], block.ln2))
        else:
            names.fill(block, entries, f"{stack}{layer}.")
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
    scaled = options.kind == "PatchTST"  # the others take standardised series
    inputs = list(series_trials(cfg.n_channels or 1, n_time, masked, scaled))
    name, (series,) = inputs[0]
    if masked:
        gaps = series.clone()
        generator = torch.Generator().manual_seed(1)
        gaps[torch.rand(gaps.shape, generator=generator) < 0.2] = torch.nan
        gaps[1::2, :, n_time // 2 + 1 :] = torch.nan
        gaps[:, :, 0] = series[:, :, 0]
        inputs.append((f"{name} with missing samples", (gaps,)))
    return tuple(Trial(name, tensors, run_model, run) for name, tensors in inputs)


def run(source: nn.Module, series: Tensor, mask: Tensor | None = None) -> Tensor:
    """The source's output; series are copied, because TSTPlus writes zeros over NaN."""
    if mask is None:
        return source(series.clone())
    return source((series.clone(), ~mask))


FAMILY = register_classes(NAME, tuple(KINDS), build, run, taps, restated=(RestatedTsai,))
