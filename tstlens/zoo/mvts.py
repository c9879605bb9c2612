"""Family ``mvts``: mvts_transformer's ``TSTransformerEncoder`` and its class- and regressor.

What sits where (``L`` a layer):

=================================================  =========================================
mvts_transformer                                   here
=================================================  =========================================
``project_inp`` times ``sqrt(d_model)``            ``hook_embed``
``pos_enc.pe`` [time, 1, d_model]                  ``W_pos``, ``hook_pos_embed``
``transformer_encoder.layers.L.self_attn``         ``blocks.L.attn``, ``blocks.L.hook_attn_out``
``...L.linear1``, ``...L.linear2``                 ``blocks.L.mlp.hook_pre``, ``.hook_mlp_out``
``transformer_encoder.layers.L``                   ``blocks.L.hook_normalized_resid_post``
input of ``output_layer``                          ``head.hook_pooled`` (classes, regression),
                                                   ``head.hook_read`` (reconstruction)
=================================================  =========================================

Covered: batch and layer norm, fixed and learnable positions, ReLU and GELU, padding masks (padded
steps are hidden as keys and zero in the flattened vector), classification, regression and
reconstruction (pre-training, imputation). The repository has no package; live models are known by
their class in ``models.ts_transformer``, and their layers are called one by one, because with
current torch ``nn.TransformerEncoder`` hands the batch-norm layer an argument it does not take.

Refused: the ``Dummy...`` models (no transformer), activations beyond ReLU and GELU.

Not told by a state dict: heads (``n_heads=``, 8 in the repository's options), activation
(``"gelu"``) and whether positions were learned (``pos_encoding=``, ``"fixed"``; the values are
the state dict's either way). Series are float [batch, channel, time] here and [batch, time,
channel] there; padded samples are zero, as the repository's collate functions make them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import einops
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tstlens.errors import StateDictError, UnsupportedSourceError
from tstlens.model import HookedTST, HookedTSTConfig
from tstlens.zoo.comparing import Tap
from tstlens.zoo.itransformer import PositionHeadConfig
from tstlens.zoo.layers import (
    ACT,
    TORCH_LAYER,
    Entries,
    Restated,
    activation_name,
    fill,
    read_options,
    torch_layer_taps,
)
from tstlens.zoo.parity import Trial, run_model, series_trials
from tstlens.zoo.parts import FlatHeadConfig, ScaledStepsConfig
from tstlens.zoo.registry import Built, dotted, register_classes

NAME = "mvts"
STACK = "transformer_encoder.layers."
CLASSES = ("TSTransformerEncoder", "TSTransformerEncoderClassiregressor")
PLACES = ("models.ts_transformer", "src.models.ts_transformer")


def build(
    source: nn.Module | Mapping[str, Tensor],
    n_heads: int | None = None,
    act_fn: Literal["relu", "gelu"] | None = None,
    pos_encoding: Literal["fixed", "learnable"] | None = None,
    class_names: tuple[str, ...] | None = None,
) -> Built:
    """Convert an mvts_transformer model.

    Args:
        source: the module or its state dict.
        n_heads: attention heads (state dict only; 8, the default of the repository's options).
        act_fn: of the MLPs and before the output layer (state dict only; ``"gelu"``).
        pos_encoding: whether positions were learned (state dict only; ``"fixed"``).
        class_names: one name per logit.
    """
    defaults = {"n_heads": 8, "act_fn": "gelu", "pos_encoding": "fixed", "eps": 1e-5}
    told = {"n_heads": n_heads, "act_fn": act_fn, "pos_encoding": pos_encoding}
    entries, options = read_options(source, NAME, defaults, told, _read_live, "mvts model")
    cfg = _config(entries, options, class_names)
    weight = entries["project_inp.weight"]
    model = HookedTST(cfg).to(device=weight.device, dtype=weight.dtype)
    _fill(model, entries)
    entries.check_all_read()
    if isinstance(source, Mapping):
        whole: nn.Module = RestatedMvts(source, options)
        name = "mvts_transformer restated from a state dict"
    else:
        whole, name = source, dotted(source)
    inputs = series_trials(cfg.n_channels or 1, cfg.n_time or 1, masked=True, scaled=False)
    trials = tuple(Trial(name, tensors, run_model, run) for name, tensors in inputs)
    return Built(model.eval(), whole, trials, name)


def _config(
    entries: Entries, options: Mapping[str, Any], class_names: tuple[str, ...] | None
) -> HookedTSTConfig:
    d_model, n_channels = entries["project_inp.weight"].shape
    positions = entries["pos_enc.pe"]
    if positions.ndim != 3 or positions.shape[1:] != (1, d_model):
        raise StateDictError(
            f"this state dict does not fit family {NAME!r}: pos_enc.pe is "
            f"{list(positions.shape)}, expected [time, 1, d_model={d_model}]"
        )
    n_time, output = len(positions), entries["output_layer.weight"]
    if output.shape[1] == d_model * n_time:
        head: Any = FlatHeadConfig(n_classes=len(output), act_fn=options["act_fn"])
    elif output.shape == (n_channels, d_model):
        head = PositionHeadConfig(n_time, "time", act_fn=options["act_fn"])
    else:
        raise StateDictError(
            f"this state dict does not fit family {NAME!r}: output_layer.weight is "
            f"{list(output.shape)}, expected [class, d_model * time = {d_model * n_time}] of a "
            f"classifier or regressor, or [{n_channels}, {d_model}] of a reconstruction"
        )
    n_layers = entries.n_layers(STACK)
    batch_norm = f"{STACK}0.norm1.running_mean" in entries
    return HookedTSTConfig(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=options["n_heads"],
        d_mlp=len(entries[f"{STACK}0.linear1.weight"]),
        embed=ScaledStepsConfig(factor=math.sqrt(d_model)),
        head=head,
        n_channels=n_channels,
        n_time=n_time,
        positions="sinusoidal" if options["pos_encoding"] == "fixed" else "learned",
        act_fn=options["act_fn"],
        norm_position="post",
        normalization_type="BN" if batch_norm else "LN",
        eps=options["eps"],
        class_names=class_names,
    )


def _fill(model: HookedTST, entries: Entries) -> None:
    fill(model.embed, {"W_E": entries["project_inp.weight"].T, "b_E": entries["project_inp.bias"]})
    fill(model.pos_embed, {"W_pos": entries["pos_enc.pe"][:, 0]})
    for layer, block in enumerate(model.blocks):
        TORCH_LAYER.fill(block, entries, f"{STACK}{layer}.")
        for bias in ("self_attn.in_proj_bias", "linear1.bias", "linear2.bias"):
            entries[f"{STACK}{layer}.{bias}"]  # a state dict without is not this model's
    fill(
        model.head,
        {"W_U": entries["output_layer.weight"].T, "b_U": entries["output_layer.bias"]},
    )


def _read_live(source: Any) -> dict[str, Any]:
    layers = list(source.transformer_encoder.layers)
    if getattr(layers[0], "norm_first", False):
        raise UnsupportedSourceError("norm_first layers are not mvts_transformer's; not covered")
    inner = activation_name(layers[0].activation, "the layers' activation")
    outer = activation_name(source.act, "the activation before the output layer")
    if inner != outer:
        raise UnsupportedSourceError(
            f"the layers' activation ({inner}) and the one before the output layer ({outer}) differ"
        )
    fixed = not isinstance(source.pos_enc.pe, nn.Parameter)
    return {
        "n_heads": source.n_heads,
        "act_fn": inner,
        "pos_encoding": "fixed" if fixed else "learnable",
        "eps": layers[0].norm1.eps,
    }


class RestatedMvts(Restated):
    """mvts_transformer's arithmetic in eval mode, from a state dict.

    Args:
        state: names and tensors.
        options: heads and activation.
    """

    def __init__(self, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> None:
        super().__init__(state, options["eps"])
        self.n_heads, self.act = options["n_heads"], ACT[options["act_fn"]]

    def forward(self, series: Tensor, keep: Tensor) -> Tensor:
        """From [batch, time, channel] and bool [batch, time] to the model's output."""
        d_model = self["project_inp.weight"].shape[0]
        x = self.linear(series, "project_inp") * math.sqrt(d_model)
        x = x + self["pos_enc.pe"][: x.shape[1], 0]
        layer = 0
        while f"{STACK}{layer}.linear1.weight" in self:
            at, layer = f"{STACK}{layer}.", layer + 1
            packed = F.linear(
                x, self[f"{at}self_attn.in_proj_weight"], self[f"{at}self_attn.in_proj_bias"]
            )
            q, k, v = einops.rearrange(packed, "b p (n h d) -> n b h p d", n=3, h=self.n_heads)
            context, _ = self.attention(q, k, v, q.shape[3] ** -0.5, keep, None)
            x = self.norm(x + self.linear(context, f"{at}self_attn.out_proj"), f"{at}norm1")
            hidden = self.act(self.linear(x, f"{at}linear1"))
            x = self.norm(x + self.linear(hidden, f"{at}linear2"), f"{at}norm2")
        x = self.act(x)
        if self["output_layer.weight"].shape[1] == d_model and len(x[0]) != 1:
            return self.linear(x, "output_layer")
        return self.linear((x * keep[:, :, None]).flatten(1), "output_layer")


def run(source: Any, series: Tensor, mask: Tensor | None = None) -> Tensor:
    """The source's output in our layout; a live model's layers are called one by one."""
    keep = torch.ones_like(series[:, 0], dtype=torch.bool) if mask is None else mask
    series = (series * keep[:, None]).transpose(1, 2)
    if isinstance(source, RestatedMvts):
        output = source(series, keep)
    else:
        x = source.project_inp(series.transpose(0, 1)) * math.sqrt(source.d_model)
        x = source.pos_enc(x)
        for layer in source.transformer_encoder.layers:
            x = layer(x, src_key_padding_mask=~keep)
        x = source.act(x).transpose(0, 1)
        if type(source).__name__ == CLASSES[1]:
            x = (x * keep[:, :, None]).reshape(len(x), -1)
        output = source.output_layer(x)
    return output.transpose(1, 2) if output.ndim == 3 else output


def taps(source: Any, model: HookedTST) -> list[Tap]:
    """Where a live mvts model computes our activations; it runs [time, batch, d_model]."""
    factor = math.sqrt(model.cfg.d_model)
    found = [
        Tap("hook_embed", "project_inp", lambda x: x.transpose(0, 1) * factor),
        *torch_layer_taps(STACK.removesuffix("."), model, batch_first=False),
    ]
    point = "hook_pooled" if model.cfg.n_classes is not None else "hook_read"
    return [*found, Tap(f"head.{point}", "output_layer", of="input")]


PATHS = [f"{place}.{name}" for place in PLACES for name in CLASSES]
FAMILY = register_classes(NAME, PATHS, build, run, taps, restated=(RestatedMvts,))
