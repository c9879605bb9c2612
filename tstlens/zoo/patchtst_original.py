"""Family ``patchtst-original``: PatchTST of its authors, of neuralforecast and of TSLib.

Three forms of one model, told apart by their entries:

``backbone``
    the authors' repository (``PatchTST_backbone``) and neuralforecast: batch norm, residual
    attention, learned positions, RevIN with gain and shift or without, heads for all channels or
    one each.
``library``
    Time-Series-Library: layer norm in the layers and batch norm after them, fixed sinusoidal
    positions, no bias in the patch embedding; forecasts and classification.

==========================================  =================================================
source (``L`` a layer)                      here
==========================================  =================================================
``revin_layer``; scaling in ``forecast``    ``embed.hook_loc``, ``.hook_scale``, ``.hook_scaled``
``W_P``; ``patch_embedding``                ``hook_embed``
``W_pos``; ``position_embedding.pe``        ``W_pos``, ``hook_pos_embed``
``layers.L.self_attn``; ``.attention``      ``blocks.L.attn``, ``blocks.L.hook_attn_out``
``layers.L.ff``; ``.conv1``, ``.conv2``     ``blocks.L.mlp.hook_pre``, ``blocks.L.hook_mlp_out``
``layers.L``; ``attn_layers.L``             ``blocks.L.hook_normalized_resid_post``
``encoder.norm`` (library)                  ``ln_final``
input of ``head.linear``                    ``head.hook_pooled``, position-major (there
                                            d_model-major)
==========================================  =================================================

Series are padded at the end by ``stride`` repeats of the last (scaled) sample; samples that fill
no patch are dropped at the end. neuralforecast is univariate: one channel. Its quantile and
distribution losses give [batch, channel, horizon, output].

Refused: ``pre_norm=True`` (neuralforecast: ``batch_normalization=True``; the norm's output
replaces the stream), decomposition (two trunks), pre-training heads, neuralforecast's scalers
outside the network (``scaler_type`` other than ``"identity"``), and its ``attn_dropout > 0`` with
``res_attention=False``, which drops attention at random in eval mode too; TSLib's imputation as a
live model (it takes a mask).

Not told by a state dict: ``stride`` (8), ``n_heads`` (read off the stored scale; TSLib: 8),
``act_fn`` (``"gelu"``), ``res_attention`` (True), ``revin`` (True), ``subtract_last`` (False, as
the authors have it; neuralforecast's default is True), ``padding_patch`` (``"end"``),
``n_channels`` where no weight belongs to a channel (1 for neuralforecast), ``n_quantiles``.

"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tstlens.errors import ArgumentError, StateDictError, UnsupportedSourceError
from tstlens.model import HeadConfig, HookedTST, HookedTSTConfig
from tstlens.zoo.comparing import Tap
from tstlens.zoo.itransformer import outputs_per_step, refuse_scaler
from tstlens.zoo.layers import (
    EPS,
    NORMALIZED_POST,
    STACK,
    Entries,
    LayerTable,
    Restated,
    RestatedTsl,
    activation_name,
    fill,
    fill_trunk,
    flatten_by_pos,
    linear,
    read_options,
    second,
    shortest,
    tsl_taps,
)
from tstlens.zoo.parity import Trial, run_model, series_trials
from tstlens.zoo.parts import FlatHeadConfig, RevINPatchesConfig
from tstlens.zoo.registry import Built, dotted, register_classes

NEURALFORECAST = "neuralforecast.models.patchtst.PatchTST"
LIBRARY = "models.PatchTST.Model"  # the authors' repository has a class of this name too
AUTHORS = ("layers.PatchTST_backbone.PatchTST_backbone",)
BACKBONE_LAYER = LayerTable(
    {
        "attn.Q": "self_attn.W_Q",
        "attn.K": "self_attn.W_K",
        "attn.V": "self_attn.W_V",
        "attn.O": "self_attn.to_out.0",
        "mlp.in": "ff.0",
        "mlp.out": "ff.3",
        "ln1": "norm_attn.1",
        "ln2": "norm_ffn.1",
    },
    (NORMALIZED_POST,),
    scale="self_attn.sdp_attn.scale",
)


class RestatedBackbone(Restated):
    """``PatchTST_backbone`` in eval mode, from a state dict; series [batch, channel, time].

    Args:
        state: names and tensors.
        options: what it does not tell.
        cfg: of the hooked model; only the outputs per step are read.
    """

    def __init__(self, state: Mapping[str, Tensor], options: Mapping[str, Any], cfg: Any) -> None:
        super().__init__(state)
        self.options = dict(options)
        self.at = "model." if "model.backbone.W_pos" in self else ""

    def forward(self, series: Tensor) -> Tensor:
        at, options = self.at, self.options
        x, last = series, options["subtract_last"]
        affine = f"{at}revin_layer.affine_weight" in self
        center = stdev = gain = shift = None
        if options["revin"]:
            center = x[:, :, -1:] if last else x.mean(2, keepdim=True)
            stdev = (x.var(2, keepdim=True, unbiased=False) + 1e-5).sqrt()
            x = (x - center) / stdev
            if affine:
                gain = self[f"{at}revin_layer.affine_weight"][:, None]
                shift = self[f"{at}revin_layer.affine_bias"][:, None]
                x = x * gain + shift
        stride = options["stride"]
        if options["padding_patch"] == "end":
            x = F.pad(x, (0, stride), mode="replicate")
        x = x.unfold(2, self[f"{at}backbone.W_P.weight"].shape[1], stride)
        n_channels = x.shape[1]
        x = self.linear(x, f"{at}backbone.W_P").flatten(0, 1) + self[f"{at}backbone.W_pos"]
        x = self.encode(
            x,
            f"{at}backbone.encoder.layers.",
            BACKBONE_LAYER,
            options["n_heads"],
            options["act_fn"],
            options["res_attention"],
        )
        x = x.transpose(1, 2).unflatten(0, (-1, n_channels)).flatten(2)  # [b, c, d_model * pos]
        if f"{at}head.linear.weight" in self:
            x = self.linear(x, f"{at}head.linear")
        else:
            own = [self.linear(x[:, c], f"{at}head.linears.{c}") for c in range(n_channels)]
            x = torch.stack(own, 1)
        if gain is not None and shift is not None:
            x = (x - shift) / (gain + 1e-5 * 1e-5)
        if center is not None and stdev is not None:
            x = x * stdev + center
        per_step = options["n_quantiles"]
        return x if per_step is None else x.unflatten(2, (-1, per_step))


class RestatedLibrary(RestatedTsl):
    """Time-Series-Library's PatchTST in eval mode, from a state dict.

    Args:
        state: names and tensors.
        options: what it does not tell.
        cfg: of the hooked model; not read.
    """

    def __init__(self, state: Mapping[str, Tensor], options: Mapping[str, Any], cfg: Any) -> None:
        super().__init__(state, options["n_heads"], options["act_fn"])
        self.stride, self.padded = options["stride"], options["padding_patch"] == "end"
        self.revin, self.last = options["revin"], options["subtract_last"]

    def forward(self, series: Tensor) -> Tensor:
        x, means, stdev = self.scaled(series) if self.revin else (series, None, None)
        if self.last and means is not None and stdev is not None:
            means = series[:, :, -1:]
            x = (series - means) / stdev
        x = F.pad(x, (0, self.stride), mode="replicate") if self.padded else x
        x = x.unfold(2, self["patch_embedding.value_embedding.weight"].shape[1], self.stride)
        n_channels = x.shape[1]
        x = self.linear(x, "patch_embedding.value_embedding").flatten(0, 1)
        x = x + self["patch_embedding.position_embedding.pe"][:, : x.shape[1]]
        x = self.encoded(x, "encoder.norm.1").transpose(1, 2)
        x = x.unflatten(0, (-1, n_channels)).flatten(2)  # [b, c, d_model * pos]
        if "projection.weight" in self:
            return self.linear(x.flatten(1), "projection")
        x = self.linear(x, "head.linear")
        return x if means is None or stdev is None else x * stdev + means


def run(source: Any, series: Tensor, mask: Tensor | None = None) -> Tensor:
    """The source's output on [batch, channel, time], in our layout."""
    series = series.clone()  # sources divide in place
    if isinstance(source, RestatedBackbone | RestatedLibrary):
        return source(series)
    path = dotted(source)
    if path in AUTHORS:
        return source(series)
    by_time = series.transpose(1, 2)
    if path == NEURALFORECAST:
        out = source({"insample_y": by_time})  # [batch, horizon, output], one channel
        one = source.loss.outputsize_multiplier == 1
        return out.transpose(1, 2) if one else out[:, None]
    out = source(by_time) if hasattr(source, "model") else source(by_time, None, None, None)
    return out.transpose(1, 2) if out.ndim == 3 else out


def taps(source: Any, model: HookedTST) -> list[Tap]:
    """Where a live PatchTST computes our activations."""
    if dotted(source) == LIBRARY and hasattr(source, "patch_embedding"):
        return _library_taps(source, model)
    inner = "" if dotted(source) in AUTHORS else "model."

    def rows(x: Tensor) -> Tensor:
        return x.flatten(0, 1)

    found = [Tap("hook_embed", f"{inner}backbone.W_P", rows)]
    if "embed.hook_scaled" in model.hook_dict:
        found.append(Tap("embed.hook_scaled", f"{inner}revin_layer", lambda x: x.transpose(1, 2)))
        found.append(Tap("head.hook_scaled", f"{inner}head", rows))
    for layer in range(model.cfg.n_layers):
        ours, theirs = f"blocks.{layer}", f"{inner}backbone.encoder.layers.{layer}"
        found += BACKBONE_LAYER.find(model, ours, theirs)
        if model.cfg.residual_attention:  # neuralforecast gives no pattern without
            found.append(Tap(f"{ours}.attn.hook_pattern", f"{theirs}.self_attn", second))
    return found


def _library_taps(source: Any, model: HookedTST) -> list[Tap]:
    found = [
        Tap("hook_embed", "patch_embedding.value_embedding"),
        *tsl_taps(source, model),
    ]
    if model.cfg.horizon is not None:
        found.append(Tap("head.hook_scaled", "head", lambda x: x.flatten(0, 1)))
    return found


NAME = "patchtst-original"


def backbone(
    entries: Entries,
    options: dict[str, Any],
    n_time: int | None,
    class_names: tuple[str, ...] | None,
) -> HookedTST:
    """The hooked model of ``PatchTST_backbone`` (the authors, neuralforecast).

    Args:
        entries: the state dict.
        options: what it does not tell; ``n_heads`` is filled in.
        n_time: samples of a series, or None.
        class_names: one name per logit.
    """
    if any(name.startswith(("model_trend.", "model_res.")) for name in entries):
        raise UnsupportedSourceError(
            "decomposition is not covered: trend and remainder go through two trunks"
        )
    at = "model." if "model.backbone.W_pos" in entries else ""
    stack = f"{at}backbone.encoder.layers."
    positions = entries[f"{at}backbone.W_pos"]
    d_model = len(entries[f"{at}backbone.W_P.weight"])
    n_layers, n_pos = entries.n_layers(stack), len(positions)
    scales = {float(entries[f"{stack}{layer}.{BACKBONE_LAYER.scale}"]) for layer in range(n_layers)}
    if len(scales) > 1:
        raise UnsupportedSourceError(
            f"the layers scale their scores differently ({sorted(scales)}); one HookedTST has one "
            "attn_scale"
        )
    scale = scales.pop()
    n_heads = options["n_heads"] = options["n_heads"] or max(1, round(d_model * scale**2))
    affine = f"{at}revin_layer.affine_weight" in entries
    individual = f"{at}head.linears.0.weight" in entries
    channels = _channels(entries, options, at, affine, individual)
    maps = [f"{at}head.linears.{c}" for c in range(channels)] if individual else []
    maps = maps or [f"{at}head.linear"]
    query = entries[f"{stack}0.self_attn.W_Q.weight"]
    if len(query) % n_heads:
        raise ArgumentError(
            f"queries have {len(query)} outputs, which do not divide into n_heads={n_heads} heads; "
            "give n_heads="
        )
    per_step = options["n_quantiles"] or 1
    n_out = len(entries[f"{maps[0]}.weight"])
    if n_out % per_step:
        raise ArgumentError(
            f"the {n_out} outputs do not divide into n_quantiles={per_step} per step"
        )
    embed = _embed(entries[f"{at}backbone.W_P.weight"], options, affine, 1e-5 * 1e-5)
    cfg = HookedTSTConfig(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        d_head=len(query) // n_heads,
        d_mlp=len(entries[f"{stack}0.ff.0.weight"]),
        embed=embed,
        head=FlatHeadConfig(
            horizon=n_out // per_step,
            n_quantiles=options["n_quantiles"],
            individual=individual,
            denormalise=options["revin"],
        ),
        n_channels=channels,
        n_time=_length(n_time, embed, n_pos),
        n_ctx=n_pos,
        positions="learned",
        act_fn=options["act_fn"],
        norm_position="post",
        normalization_type="BN",
        attn_scale=1 / scale if options["stored_scale"] else None,
        residual_attention=options["res_attention"],
        class_names=class_names,
    )
    model = HookedTST(cfg).to(device=positions.device, dtype=positions.dtype)
    weights = {
        "W_E": entries[f"{at}backbone.W_P.weight"].T,
        "b_E": entries[f"{at}backbone.W_P.bias"],
    }
    if affine and options["revin"]:
        weights["w"] = entries[f"{at}revin_layer.affine_weight"]
        weights["b"] = entries[f"{at}revin_layer.affine_bias"]
    fill(model.embed, weights)
    fill(model.pos_embed, {"W_pos": positions.expand(-1, d_model)})
    for layer, block in enumerate(model.blocks):
        BACKBONE_LAYER.fill(block, entries, f"{stack}{layer}.")
    _fill_head(model, [linear(entries, name) for name in maps], n_pos, individual)
    return model


def _fill_head(
    model: HookedTST, maps: list[tuple[Tensor, Tensor | None]], n_pos: int, individual: bool
) -> None:
    weights = [flatten_by_pos(weight, n_pos) for weight, _ in maps]
    biases = [bias for _, bias in maps if bias is not None]
    if individual:
        fill(model.head, {"W_U": torch.stack(weights), "b_U": torch.stack(biases)})
    else:
        fill(model.head, {"W_U": weights[0], "b_U": biases[0]})


def _channels(
    entries: Entries, options: dict[str, Any], at: str, affine: bool, individual: bool
) -> int:
    if affine:
        return len(entries[f"{at}revin_layer.affine_weight"])
    if individual:
        return entries.n_layers(f"{at}head.linears.")
    if options["n_channels"] is None:
        raise ArgumentError(
            "this PatchTST has no weights of its own for any channel, so its state dict does not "
            "tell how many there are; give n_channels= (1 for neuralforecast)"
        )
    return options["n_channels"]


def _embed(
    weight: Tensor, options: dict[str, Any], affine: bool, affine_eps: float, bias: bool = True
) -> RevINPatchesConfig:
    return RevINPatchesConfig(
        patch_len=weight.shape[1],
        stride=options["stride"],
        pad_end=options["stride"] if options["padding_patch"] == "end" else 0,
        scaling="sqrt_var_plus_eps" if options["revin"] else "none",
        location="last" if options["subtract_last"] else "mean",
        affine=affine and options["revin"],
        affine_eps=affine_eps,
        bias=bias,
    )


def _length(n_time: int | None, embed: RevINPatchesConfig, n_pos: int) -> int | None:
    if n_time is not None and embed.n_pos(n_time) != n_pos:
        raise StateDictError(
            f"{n_time} samples make {embed.n_pos(n_time)} patches of {embed.patch_len} every "
            f"{embed.stride}, and the model has {n_pos}; give the n_time= and stride= that it was "
            "trained with"
        )
    return n_time


def library(
    entries: Entries,
    options: dict[str, Any],
    n_time: int | None,
    class_names: tuple[str, ...] | None,
) -> HookedTST:
    """The hooked model of Time-Series-Library\'s PatchTST.

    Args:
        entries: the state dict.
        options: what it does not tell; ``n_heads`` is filled in.
        n_time: samples of a series, or None.
        class_names: one name per logit.
    """
    patch = entries["patch_embedding.value_embedding.weight"]
    d_model = len(patch)
    embed = _embed(patch, options, False, 0.0, bias=False)
    classifies = "projection.weight" in entries
    name = "projection" if classifies else "head.linear"
    n_out, width = entries[f"{name}.weight"].shape
    channels = options["n_channels"]
    if channels is None:
        raise ArgumentError(
            "TSLib's PatchTST has no weights of its own for any channel; give n_channels="
        )
    side_by_side = channels if classifies else 1
    if width % (d_model * side_by_side):
        raise StateDictError(
            f"this state dict does not fit family {NAME!r}: {name}.weight reads {width} numbers, "
            f"which do not divide into patches of d_model={d_model}"
            + (f" for n_channels={channels}" if classifies else "")
        )
    n_pos = width // (d_model * side_by_side)
    options["n_heads"] = options["n_heads"] or 8
    options["res_attention"] = False
    head: Any = HeadConfig("flatten", n_classes=n_out)
    if not classifies:
        head = FlatHeadConfig(horizon=n_out, denormalise=options["revin"])
    cfg = HookedTSTConfig(
        n_layers=entries.n_layers(STACK),
        d_model=d_model,
        n_heads=options["n_heads"],
        d_mlp=len(entries[f"{STACK}0.conv1.weight"]),
        embed=embed,
        head=head,
        n_channels=channels,
        n_time=_length(n_time, embed, n_pos),
        n_ctx=n_pos,
        positions="sinusoidal",
        act_fn=options["act_fn"],
        norm_position="post",
        final_norm=True,
        final_normalization_type="BN",
        eps=EPS,
        class_names=class_names,
    )
    model = HookedTST(cfg).to(device=patch.device, dtype=patch.dtype)
    fill(model.embed, {"W_E": patch.T})
    fill(
        model.pos_embed,
        {"W_pos": entries["patch_embedding.position_embedding.pe"][0, :n_pos]},
    )
    fill_trunk(model, entries, "encoder.norm.1")
    weight, bias = linear(entries, name)
    weights = {"W_U": flatten_by_pos(weight, n_pos, side_by_side)}
    fill(model.head, weights | ({} if bias is None else {"b_U": bias}))
    return model


DEFAULTS: dict[str, Any] = {
    "n_channels": None, "n_heads": None, "act_fn": "gelu", "stride": 8, "res_attention": True,
    "revin": True, "subtract_last": False, "padding_patch": "end", "n_quantiles": None,
    "stored_scale": True,
}  # fmt: skip


def build(
    source: nn.Module | Mapping[str, Tensor],
    n_channels: int | None = None,
    n_heads: int | None = None,
    act_fn: Literal["relu", "gelu"] | None = None,
    stride: int | None = None,
    res_attention: bool | None = None,
    pre_norm: bool | None = None,
    revin: bool | None = None,
    subtract_last: bool | None = None,
    padding_patch: Literal["end", "none"] | None = None,
    n_quantiles: int | None = None,
    n_time: int | None = None,
    class_names: tuple[str, ...] | None = None,
) -> Built:
    """Convert an original PatchTST.

    Args:
        source: the module or its state dict. All that follows is for state dicts, but for
            ``n_time``, ``class_names`` and, where no weight tells it, ``n_channels``.
        n_channels: channels of a series.
        n_heads: attention heads; read off the stored scale, or 8 (TSLib).
        act_fn: of the MLPs; ``"gelu"``.
        stride: samples between the starts of two patches; 8.
        res_attention: scores are handed from layer to layer; True (TSLib has none).
        pre_norm: the option of the same name; only False is covered.
        revin: whether series are scaled; True.
        subtract_last: whether the last sample is taken away rather than the mean; False.
        padding_patch: ``"end"`` repeats the last sample ``stride`` times; ``"none"`` does not.
        n_quantiles: outputs per step; one.
        n_time: samples of a series; any length that gives the model's patches where not given.
        class_names: one name per logit.
    """
    told = {
        "n_heads": n_heads, "act_fn": act_fn, "stride": stride, "res_attention": res_attention,
        "revin": revin, "subtract_last": subtract_last, "padding_patch": padding_patch,
        "n_quantiles": n_quantiles, "pre_norm": pre_norm,
    }  # fmt: skip
    entries, options = read_options(source, NAME, DEFAULTS, told, _read_live, "PatchTST")
    if options.pop("pre_norm", False):
        refuse_pre_norm()
    options["n_channels"] = options["n_channels"] or n_channels
    make = library if "patch_embedding.value_embedding.weight" in entries else backbone
    model = make(entries, options, n_time, class_names)
    entries.check_all_read(
        [r"loss\.", r"valid_loss\.", r".*sdp_attn\.scale$", r"patch_embedding\.position_embedding"]
    )
    if isinstance(source, Mapping):
        restated = RestatedLibrary if make is library else RestatedBackbone
        whole: nn.Module = restated(source, options, model.cfg)
        name = "PatchTST restated from a state dict"
    else:
        whole, name = source, dotted(source)
    length = model.cfg.n_time or shortest(model.cfg.embed, model.cfg.n_ctx or 1)
    inputs = series_trials(model.cfg.n_channels or 1, length, False, scaled=options["revin"])
    trials = tuple(Trial(name, tensors, run_model, run) for name, tensors in inputs)
    return Built(model.eval(), whole, trials, name)


def refuse_pre_norm() -> None:
    """Raise :class:`UnsupportedSourceError` for ``pre_norm=True``."""
    raise UnsupportedSourceError(
        "pre_norm=True (neuralforecast: batch_normalization=True) is not covered: there each "
        "norm's output replaces the residual stream (src = norm(src)), so no sum of what the "
        "layers write exists"
    )


def _read_live(source: Any) -> dict[str, Any]:
    path = dotted(source)
    if path == LIBRARY and hasattr(source, "patch_embedding"):
        return _read_library(source)
    if getattr(source, "decomposition", False):
        raise UnsupportedSourceError(
            "decomposition is not covered: trend and remainder go through two trunks"
        )
    model = source if path in AUTHORS else source.model
    layer = model.backbone.encoder.layers[0]
    if layer.pre_norm:
        refuse_pre_norm()
    if model.pretrain_head or model.head_type != "flatten":
        raise UnsupportedSourceError(
            f"pretrain_head={model.pretrain_head}, head_type={model.head_type!r} is not covered; "
            "the flatten head is"
        )
    residual = bool(model.backbone.encoder.res_attention)
    found = {
        "n_heads": layer.self_attn.n_heads,
        "act_fn": activation_name(layer.ff[1], "the MLP's activation"),
        "stride": model.stride,
        "res_attention": residual,
        "revin": bool(model.revin),
        "subtract_last": bool(model.revin and model.revin_layer.subtract_last),
        "padding_patch": "end" if model.padding_patch == "end" else "none",
        "n_channels": model.n_vars,
    }
    if path == NEURALFORECAST:
        refuse_scaler(source)
        found["n_quantiles"] = outputs_per_step(source)
        found["stored_scale"] = residual  # without, torch's own d_head ** -0.5
        dropped = layer.self_attn.sdp_attn.attn_dropout.p
        if dropped and not residual:
            raise UnsupportedSourceError(
                f"attn_dropout={dropped} with res_attention=False is not covered: neuralforecast "
                "then drops attention at random in eval mode too; set it to 0 on the model's "
                "layers, self_attn.sdp_attn.attn_dropout.p"
            )
    return found


def _read_library(source: Any) -> dict[str, Any]:
    if source.task_name == "imputation":
        raise UnsupportedSourceError(
            "task_name='imputation' runs with a mask of its own; convert its state dict, which is "
            "a forecast of the series' own length"
        )
    layer = source.encoder.attn_layers[0]
    return {
        "n_heads": layer.attention.n_heads,
        "act_fn": activation_name(layer.activation, "the layers' activation"),
        "stride": source.patch_embedding.stride,
        "n_channels": getattr(getattr(source, "head", None), "n_vars", None),
    }


FAMILY = register_classes(
    NAME,
    (NEURALFORECAST, LIBRARY, *AUTHORS),
    build,
    run,
    taps,
    restated=(RestatedBackbone, RestatedLibrary),
)
