"""Options of live tsai models, read off their modules; what is not covered is named.

Nothing of tsai is imported: modules are told by the names of their classes.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from tstlens.conversion.named_layers import activation_name
from tstlens.errors import UnsupportedSourceError


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
    found |= _head(source.head) | _input(trunk.W_P)
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


def _head(head: Any) -> dict[str, Any]:
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
