"""Family ``torch-encoder``: any ``torch.nn.TransformerEncoder`` between modules of your own.

``embed`` maps a series [batch, channel, time] to [batch, pos, d_model] and ``head`` maps
[batch, pos, d_model] to outputs, whatever ``batch_first`` the encoder was made with. Both are
copied into the converted model as they are.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from tstlens.arguments import shown
from tstlens.data.validate import check_series
from tstlens.errors import ArgumentError, UnsupportedSourceError
from tstlens.model import CustomConfig, HookedTST, HookedTSTConfig, TrunkState
from tstlens.zoo.comparing import Tap
from tstlens.zoo.layers import TORCH_LAYER, fill, norm_entries, torch_layer_taps
from tstlens.zoo.parity import Trial
from tstlens.zoo.registry import Built, Family, dotted, register


def build(
    source: nn.TransformerEncoder | WholeEncoder,
    embed: nn.Module | None = None,
    head: nn.Module | None = None,
    example: Tensor | None = None,
    causal: bool = False,
    class_names: tuple[str, ...] | None = None,
) -> Built:
    """Convert a ``torch.nn.TransformerEncoder`` with its front end and head.

    Args:
        source: the encoder: norm first or last, ReLU or GELU, with or without biases and final
            norm, ``batch_first`` either way.
        embed: from a series [batch, channel, time] to [batch, pos, d_model].
        head: from [batch, pos, d_model] to outputs.
        example: series [batch, channel, time] as the model takes them; with it the parity check
            runs from series to output, without it over the trunk alone.
        causal: the source is always called with a causal mask.
        class_names: one name per logit.
    """
    if isinstance(source, WholeEncoder):
        embed, head, causal = embed or source.embed, head or source.head, causal or source.causal
        source = source.encoder
    for name, module in (("embed", embed), ("head", head)):
        if not isinstance(module, nn.Module):
            raise ArgumentError(
                f"a bare TransformerEncoder has no front end and no head; give {name}= as a "
                f"torch module (embed: series [batch, channel, time] -> [batch, pos, d_model]; "
                f"head: [batch, pos, d_model] -> output), got {type(module).__name__}"
            )
    if example is not None:
        check_series(example)
    options = _read_layers(list(source.layers))
    if causal:
        options["causal"] = True
    final_norm = _final_norm(source, options["eps"])
    cfg = HookedTSTConfig(
        embed=CustomConfig(dotted(embed)),
        head=CustomConfig(dotted(head)),
        n_channels=None if example is None else example.shape[1],
        final_norm=final_norm is not None,
        class_names=class_names,
        **options,
    )
    weight = next(source.parameters())
    model = HookedTST(cfg, embed=copy.deepcopy(embed), head=copy.deepcopy(head))
    model.to(device=weight.device, dtype=weight.dtype)
    for block, layer in zip(model.blocks, source.layers, strict=True):
        TORCH_LAYER.fill(block, layer.state_dict())
    if final_norm is not None:
        fill(model.ln_final, norm_entries(source.state_dict(), "norm", model.ln_final))
    whole = WholeEncoder(source, embed, head, causal)
    return Built(model.eval(), whole, _trials(cfg, example), "torch.nn.TransformerEncoder")


class WholeEncoder(nn.Module):
    """Front end, encoder and head as one module: the source that the copy is compared with."""

    def __init__(
        self,
        encoder: nn.TransformerEncoder,
        embed: nn.Module | None,
        head: nn.Module | None,
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.encoder, self.embed, self.head, self.causal = encoder, embed, head, causal
        first: Any = encoder.layers[0]
        self.batch_first = bool(first.self_attn.batch_first)

    def trunk(self, residual: Tensor) -> Tensor:
        """The encoder alone, [batch, pos, d_model] to the same.

        Through the layers' own forward pass: PyTorch's fused inference path, which eval mode
        without gradients takes, computes exact GELU where a layer was given ``GELU("tanh")``.
        """
        fused = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            return self._trunk(residual)
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)

    def _trunk(self, residual: Tensor) -> Tensor:
        mask = None
        if self.causal:
            n_pos = residual.shape[1]
            mask = nn.Transformer.generate_square_subsequent_mask(n_pos, dtype=residual.dtype)
        if self.batch_first:
            return self.encoder(residual, mask=mask, is_causal=self.causal)
        out = self.encoder(residual.transpose(0, 1), mask=mask, is_causal=self.causal)
        return out.transpose(0, 1)

    def forward(self, series: Tensor) -> Tensor:
        if self.embed is None or self.head is None:
            raise ArgumentError("a whole encoder needs its embed and head modules")
        return self.head(self.trunk(self.embed(series)))


def _trials(cfg: HookedTSTConfig, example: Tensor | None) -> tuple[Trial, ...]:
    generator = torch.Generator().manual_seed(0)
    trials = []
    for n_pos in (1, 25):
        shape = (4, n_pos, cfg.d_model)
        residual = torch.randn(shape, generator=generator, dtype=torch.float64)
        name = f"random residual stream {list(shape)} through the trunk"
        trials.append(Trial(name, (residual,), _run_trunk, lambda whole, x: whole.trunk(x)))
    if example is None:
        trials[-1] = dataclasses.replace(
            trials[-1],
            name=trials[-1].name + " (front end and head were copied but not run: give example=)",
        )
    else:
        name = f"the example series {list(example.shape)} from end to end"
        trials.append(
            Trial(name, (example.cpu(),), lambda model, x: model(x), lambda whole, x: whole(x))
        )
    return tuple(trials)


def _run_trunk(model: HookedTST, residual: Tensor) -> Tensor:
    out = model(residual, start_at_layer=0, stop_at_layer=model.cfg.n_layers, state=TrunkState())
    return model.ln_final(out) if model.cfg.final_norm else out


def _read_layers(layers: list[Any]) -> dict[str, Any]:
    """The config entries that all layers share, or the option that is not covered."""
    if not layers:
        raise UnsupportedSourceError("the encoder has no layers")
    options = [_read_layer(layer) for layer in layers]
    for number, other in enumerate(options):
        for name, value in other.items():
            if value != options[0][name]:
                raise UnsupportedSourceError(
                    f"{name} is {options[0][name]!r} in layer 0 but {value!r} in layer {number}; "
                    "one HookedTST has the same options in every block"
                )
    return {**options[0], "n_layers": len(layers)}


def _read_layer(layer: Any) -> dict[str, Any]:
    if type(layer) is not nn.TransformerEncoderLayer:
        raise UnsupportedSourceError(
            f"expected torch.nn.TransformerEncoderLayer, got {type(layer).__name__}; a subclass "
            "may compute something else, so it is not converted"
        )
    attention = layer.self_attn
    for option in ("bias_k", "bias_v"):
        if getattr(attention, option) is not None:
            raise UnsupportedSourceError(f"self_attn.{option} (add_bias_kv) is not covered")
    if attention.add_zero_attn:
        raise UnsupportedSourceError("self_attn.add_zero_attn is not covered")
    if attention.in_proj_weight is None:
        raise UnsupportedSourceError("self_attn.kdim and vdim other than d_model are not covered")
    if layer.norm1.eps != layer.norm2.eps:
        raise UnsupportedSourceError(
            f"norm1.eps={layer.norm1.eps} and norm2.eps={layer.norm2.eps} differ"
        )
    return {
        "d_model": attention.embed_dim,
        "n_heads": attention.num_heads,
        "d_mlp": layer.linear1.out_features,
        "act_fn": _activation(layer.activation),
        "norm_position": "pre" if layer.norm_first else "post",
        "eps": layer.norm1.eps,
        "attn_bias": attention.in_proj_bias is not None,
        "mlp_bias": layer.linear1.bias is not None,
    }


def _activation(activation: Any) -> str:
    if activation in (nn.functional.relu, torch.relu) or isinstance(activation, nn.ReLU):
        return "relu"
    if activation is nn.functional.gelu:
        return "gelu"
    if isinstance(activation, nn.GELU):
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    if activation is nn.functional.silu or isinstance(activation, nn.SiLU):
        return "silu"
    raise UnsupportedSourceError(
        f"activation {shown(activation)} is not covered; relu, gelu (exact or tanh) and silu are"
    )


def _final_norm(source: nn.TransformerEncoder, eps: float) -> nn.LayerNorm | None:
    norm = source.norm
    if norm is None:
        return None
    if type(norm) is not nn.LayerNorm:
        raise UnsupportedSourceError(
            f"the encoder's final norm is {type(norm).__name__}; LayerNorm or none is covered"
        )
    if norm.eps != eps or norm.weight is None:
        raise UnsupportedSourceError(
            f"the final LayerNorm has eps={norm.eps} and weight "
            f"{'missing' if norm.weight is None else 'present'}; the layers have eps={eps}, and "
            "one HookedTST has one eps and a weight in every norm"
        )
    return norm


def recognises(source: nn.Module) -> bool:
    """Whether a module is PyTorch's own encoder, not a subclass; or one made whole."""
    return type(source) in (nn.TransformerEncoder, WholeEncoder)


def run(source: nn.Module, series: Tensor, mask: Tensor | None) -> Tensor:
    """The output of an encoder between its front end and head."""
    if not isinstance(source, WholeEncoder):
        raise ArgumentError(
            "a bare TransformerEncoder takes no series; compare with "
            "tstlens.zoo.torch_encoder.WholeEncoder(encoder, embed, head)"
        )
    if mask is not None:
        raise ArgumentError("a converted TransformerEncoder is compared without a mask")
    return source(series)


def taps(source: nn.Module, model: HookedTST) -> list[Tap]:
    """Where an encoder computes our activations."""
    encoder: Any = source.encoder if isinstance(source, WholeEncoder) else source
    prefix = "encoder.layers" if isinstance(source, WholeEncoder) else "layers"
    first = encoder.layers[0].self_attn.batch_first
    return torch_layer_taps(prefix, model, first)


register(
    Family(
        name="torch-encoder",
        recognises=recognises,
        build=build,
        takes_state_dict=False,
        run=run,
        taps=taps,
    )
)
