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

from torch import Tensor, nn

from tstlens.conversion.checking import Trial, series_trials
from tstlens.conversion.itransformer import outputs_per_step, refuse_scaler
from tstlens.conversion.named_layers import Entries, activation_name, class_path, run_model
from tstlens.conversion.patchtst_original_forms import NAME, backbone, library
from tstlens.conversion.patchtst_original_source import (
    AUTHORS,
    LIBRARY,
    NEURALFORECAST,
    RestatedBackbone,
    RestatedLibrary,
    run,
    taps,
)
from tstlens.conversion.registry import Built, Family, register
from tstlens.errors import ArgumentError, UnsupportedSourceError

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
    told = {name: value for name, value in told.items() if value is not None}
    options = DEFAULTS | {"n_channels": n_channels}
    if isinstance(source, Mapping):
        if told.pop("pre_norm", False):
            refuse_pre_norm()
        entries, options = Entries(source, NAME), options | told
    else:
        if told:
            raise ArgumentError(
                f"{', '.join(told)}: a live PatchTST knows these itself; leave them out"
            )
        entries, options = Entries(source.state_dict(), NAME), options | _read_live(source)
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
        whole, name = source, class_path(source)
    length = model.cfg.n_time or _shortest(model.cfg.embed, model.cfg.n_ctx or 1)
    inputs = list(series_trials(model.cfg.n_channels or 1, length, masked=False))
    if not options["revin"]:  # not scaled: larger values only show rounding
        random, (series,) = inputs[0]
        inputs[1] = (f"{random} times 2 plus 1", (2 * series + 1,))
    trials = tuple(Trial(name, tensors, run_model, run) for name, tensors in inputs)
    return Built(model.eval(), whole, trials, name)


def refuse_pre_norm() -> None:
    """Raise :class:`UnsupportedSourceError` for ``pre_norm=True``."""
    raise UnsupportedSourceError(
        "pre_norm=True (neuralforecast: batch_normalization=True) is not covered: there each "
        "norm's output replaces the residual stream (src = norm(src)), so no sum of what the "
        "layers write exists"
    )


def _shortest(embed: Any, n_pos: int) -> int:
    n_time = 1
    while embed.n_pos(n_time) < n_pos:
        n_time += 1
    return n_time


def _read_live(source: Any) -> dict[str, Any]:
    path = class_path(source)
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


def recognises(source: nn.Module) -> bool:
    """Whether a module is exactly one of the three libraries' PatchTSTs."""
    known = (NEURALFORECAST, LIBRARY, *AUTHORS)
    return class_path(source) in known or isinstance(source, RestatedBackbone | RestatedLibrary)


register(
    Family(
        name=NAME,
        summary="PatchTST of its authors, neuralforecast and Time-Series-Library, live or as a "
        "state dict (stride=, n_channels=, res_attention= where it does not tell)",
        recognises=recognises,
        build=build,
        takes_state_dict=True,
        run=run,
        taps=taps,
    )
)
