"""Weights of all layers stacked, under TransformerLens' names."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens import FactoredMatrix
from transformer_lens.utilities import composition_scores

from tstlens.arguments import checked
from tstlens.errors import ArgumentError, NonlinearResidualError
from tstlens.model.parts import CustomConfig

_Reading = Float[Tensor, "layer head d_model d_head"]


def stacked(sublayer: str, name: str, says: str) -> Any:
    """A property: one weight of every block, stacked over layers."""

    def weight(self: StackedWeights) -> Tensor:
        return self._stack(sublayer, name)

    weight.__doc__ = says
    return property(weight)


class StackedWeights(nn.Module):
    """Properties that stack one weight over layers; layouts as in TransformerLens."""

    cfg: Any
    layers: list[Any]
    head: nn.Module

    W_Q: _Reading = stacked("attn", "W_Q", "Query weights of every head.")
    W_K: _Reading = stacked("attn", "W_K", "Key weights of every head.")
    W_V: _Reading = stacked("attn", "W_V", "Value weights of every head.")
    W_O: Float[Tensor, "layer head d_head d_model"] = stacked(
        "attn", "W_O", "Output weights of every head."
    )
    b_Q: Float[Tensor, "layer head d_head"] = stacked(
        "attn", "b_Q", "Query biases (zeros where the model has none)."
    )
    b_K: Float[Tensor, "layer head d_head"] = stacked(
        "attn", "b_K", "Key biases (zeros where the model has none)."
    )
    b_V: Float[Tensor, "layer head d_head"] = stacked(
        "attn", "b_V", "Value biases (zeros where the model has none)."
    )
    b_O: Float[Tensor, "layer d_model"] = stacked(
        "attn", "b_O", "Biases of the attention output (zeros where the model has none)."
    )
    W_in: Float[Tensor, "layer d_model d_mlp"] = stacked(
        "mlp", "W_in", "Input weights of every MLP."
    )
    W_gate: Float[Tensor, "layer d_model d_mlp"] = stacked(
        "mlp", "W_gate", "Gate weights of every MLP, of models whose MLPs have a gate."
    )
    b_in: Float[Tensor, "layer d_mlp"] = stacked("mlp", "b_in", "Input biases of every MLP.")
    W_out: Float[Tensor, "layer d_mlp d_model"] = stacked(
        "mlp", "W_out", "Output weights of every MLP."
    )
    b_out: Float[Tensor, "layer d_model"] = stacked("mlp", "b_out", "Output biases of every MLP.")

    def _stack(self, sublayer: str, name: str) -> Tensor:
        if not hasattr(getattr(self.layers[0], sublayer), name):
            raise ArgumentError(f"this model's MLPs have no gate, so there is no {name}")
        return torch.stack([getattr(getattr(block, sublayer), name) for block in self.layers])

    @property
    def W_U(self) -> Float[Tensor, "d_pooled d_out"]:
        """The head's linear map from the pooled vector to the outputs."""
        return self._head("W_U")

    @property
    def b_U(self) -> Float[Tensor, " d_out"]:
        """The head's bias."""
        return self._head("b_U")

    @property
    def W_E(self) -> Float[Tensor, "d_in d_model"]:
        """The linear map of a patch or a time step."""
        weight = getattr(getattr(self, "embed", None), "W_E", None)
        if weight is None:
            raise ArgumentError("this front end is not one linear map, so it has no W_E")
        return weight

    @property
    def W_E_pos(self) -> Float[Tensor, "d_in_and_pos d_model"]:
        """``W_E`` and below it ``W_pos``, as TransformerLens stacks them."""
        return torch.cat([self.W_E, self.W_pos])

    @property
    def W_pos(self) -> Float[Tensor, "pos d_model"]:
        """Position embeddings."""
        positions = getattr(self, "pos_embed", None)
        if positions is None:
            own = isinstance(getattr(self.cfg, "embed", None), CustomConfig)
            raise ArgumentError(
                "this model adds no positions, so it has no W_pos"
                + ("; those that a front end of your own adds are its own" if own else "")
            )
        return positions.W_pos

    @property
    def QK(self) -> FactoredMatrix:
        """``W_Q W_K^T`` of every head, factored, [layer, head, d_model, d_model]."""
        return FactoredMatrix(self.W_Q, self.W_K.transpose(-2, -1))

    @property
    def OV(self) -> FactoredMatrix:
        """``W_V W_O`` of every head, factored, [layer, head, d_model, d_model]."""
        return FactoredMatrix(self.W_V, self.W_O)

    @checked
    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """What the output biases of all blocks before ``layer`` add to the residual stream.

        Args:
            layer: 0 for no block, the number of layers for all of them.
            mlp_input: up to the MLP of ``layer``, so with its attention's bias.
            include_mlp_biases: False leaves out the biases of the MLPs.

        In an encoder and a decoder, the blocks before it of the same stack.

        Raises:
            ArgumentError: there is no such layer.
            NonlinearResidualError: a norm rescales biases on their way into the stream.
        """
        cfg, n_layers = self.cfg, len(self.layers)
        if not 0 <= layer <= n_layers - mlp_input:
            raise ArgumentError(
                f"expected a layer in 0..{n_layers - mlp_input}, got {layer} (with mlp_input="
                f"{mlp_input})"
            )
        if cfg.norm_position == "post" or cfg.use_normalization_before_and_after:
            raise NonlinearResidualError(
                "accumulated_bias adds up the biases of all blocks, but in this model a norm "
                "follows every sublayer and rescales its bias at each position; a run has what "
                "they wrote: cache['attn_out', layer], cache['mlp_out', layer]"
            )
        decoding = cfg.n_decoder_layers and layer >= cfg.n_encoder_layers
        total = self.b_O.new_zeros(cfg.d_model)
        for number in range(cfg.n_encoder_layers if decoding else 0, layer + mlp_input):
            block = self.layers[number]
            total = total + block.attn.b_O
            if block.second != "none":
                total = total + getattr(block, f"{block.second}_attn").b_O
            if include_mlp_biases and number < layer:
                total = total + block.mlp.b_out
        return total

    @checked
    def all_composition_scores(
        self, mode: str, *, fold_ln: bool = False
    ) -> Float[Tensor, "layer head later_layer later_head"]:
        """How much of what each head writes each later head's weights could read.

        ``|W_1 W_2| / (|W_1| |W_2|)`` in Frobenius norms, with the earlier head's OV as ``W_1`` and
        the later head's QK (``"Q"``), its transpose (``"K"``) or its OV (``"V"``) as ``W_2``; zero
        for pairs that are not one after the other.

        What can mislead: these are weights alone. Heads that could compose need not do so on real
        series, random heads score above 0 (compare with ``model.init_weights()``), and rotary
        positions and norms of queries and keys are left out. What heads do to each other in a run
        is :func:`tstlens.patching.head_influence`.

        Args:
            mode: ``"Q"``, ``"K"`` or ``"V"``, the input of the later head.
            fold_ln: count the norm before attention (its gain and, for LN, its centring), as
                TransformerLens' ``from_pretrained`` does on loading; False takes the weights as
                they are.

        Returns:
            Scores from 0 to 1.

        Raises:
            ArgumentError: another mode.
            NonlinearResidualError: a norm between what a head writes and the stream, or no one
                stream that all heads share.

        Source: Elhage et al. 2021; ``HookedTransformer.all_composition_scores``.

        Example:
            >>> from tstlens import HookedTST
            >>> model = HookedTST.from_pretrained("co2")
            >>> model.all_composition_scores("V").shape
            torch.Size([2, 4, 2, 4])
        """
        if mode not in ("Q", "K", "V"):
            raise ArgumentError(f"expected mode as 'Q', 'K' or 'V', got {mode!r}")
        self._require_shared_stream("all_composition_scores")
        w_q, w_k, w_v, w_o = self.W_Q, self.W_K, self.W_V, self.W_O
        if fold_ln:
            w_q, w_k, w_v = map(self._read_through_norm, (w_q, w_k, w_v))
            if self.cfg.normalization_type == "LN":
                w_o = w_o - w_o.mean(-1, keepdim=True)
        left, right = FactoredMatrix(w_v, w_o), FactoredMatrix(w_q, w_k.transpose(-2, -1))
        right = {"Q": right, "K": right.T, "V": left}[mode]
        scores = composition_scores(left, right)
        layer = torch.arange(len(self.layers), device=scores.device)
        later = layer[:, None, None, None] < layer[None, None, :, None]
        return torch.where(later, scores, torch.zeros_like(scores))

    def _read_through_norm(
        self, weight: Float[Tensor, "layer head d_model d_head"]
    ) -> Float[Tensor, "layer head d_model d_head"]:
        """What of the stream a weight behind each block's first norm reads, up to its scale."""
        gain = self._stack("ln1", "w")
        if self.cfg.normalization_type == "BN":
            variance = self._stack("ln1", "running_var")
            gain = gain / (variance + self.cfg.eps).sqrt()
        weight = gain[:, None, :, None] * weight
        centres = self.cfg.normalization_type == "LN"
        return weight - weight.mean(-2, keepdim=True) if centres else weight

    def _require_shared_stream(self, method: str) -> None:
        """Raise unless heads write straight to one stream that later heads read."""
        cfg = self.cfg
        reasons = {
            "normalises the stream after every sublayer (post-norm)": cfg.norm_position == "post",
            "normalises what attention writes": cfg.use_normalization_before_and_after,
            "has an encoder and a decoder, whose streams are two": bool(cfg.n_decoder_layers),
        }
        found = [reason for reason, holds in reasons.items() if holds]
        if found:
            raise NonlinearResidualError(
                f"{method} multiplies what a head writes with what a later one reads, but this "
                f"model {found[0]}; measure it in a run: tstlens.patching.head_influence"
            )

    def all_head_labels(self) -> list[str]:
        """``L0H0`` and so on, layer by layer."""
        n_heads = self.W_Q.shape[1]
        return [f"L{layer}H{head}" for layer in range(len(self.layers)) for head in range(n_heads)]

    def _head(self, name: str) -> Tensor:
        weight = getattr(self.head, name, None)
        if weight is None:
            raise ArgumentError(f"this head is a module of your own, so it has no {name}")
        return weight
