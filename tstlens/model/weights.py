"""Weights of all layers stacked, under TransformerLens' names."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens import FactoredMatrix

from tstlens.arguments import checked
from tstlens.errors import ArgumentError
from tstlens.model.parts import CustomConfig


class StackedWeights(nn.Module):
    """Properties that stack one weight over layers; layouts as in TransformerLens."""

    layers: list[Any]
    head: nn.Module

    def _stack(self, sublayer: str, name: str) -> Tensor:
        return torch.stack([getattr(getattr(block, sublayer), name) for block in self.layers])

    @property
    def W_Q(self) -> Float[Tensor, "layer head d_model d_head"]:
        """Query weights of every head."""
        return self._stack("attn", "W_Q")

    @property
    def W_K(self) -> Float[Tensor, "layer head d_model d_head"]:
        """Key weights of every head."""
        return self._stack("attn", "W_K")

    @property
    def W_V(self) -> Float[Tensor, "layer head d_model d_head"]:
        """Value weights of every head."""
        return self._stack("attn", "W_V")

    @property
    def W_O(self) -> Float[Tensor, "layer head d_head d_model"]:
        """Output weights of every head."""
        return self._stack("attn", "W_O")

    @property
    def b_Q(self) -> Float[Tensor, "layer head d_head"]:
        """Query biases (zeros where the model has none)."""
        return self._stack("attn", "b_Q")

    @property
    def b_K(self) -> Float[Tensor, "layer head d_head"]:
        """Key biases (zeros where the model has none)."""
        return self._stack("attn", "b_K")

    @property
    def b_V(self) -> Float[Tensor, "layer head d_head"]:
        """Value biases (zeros where the model has none)."""
        return self._stack("attn", "b_V")

    @property
    def b_O(self) -> Float[Tensor, "layer d_model"]:
        """Biases of the attention output (zeros where the model has none)."""
        return self._stack("attn", "b_O")

    @property
    def W_in(self) -> Float[Tensor, "layer d_model d_mlp"]:
        """Input weights of every MLP."""
        return self._stack("mlp", "W_in")

    @property
    def b_in(self) -> Float[Tensor, "layer d_mlp"]:
        """Input biases of every MLP."""
        return self._stack("mlp", "b_in")

    @property
    def W_out(self) -> Float[Tensor, "layer d_mlp d_model"]:
        """Output weights of every MLP."""
        return self._stack("mlp", "W_out")

    @property
    def b_out(self) -> Float[Tensor, "layer d_model"]:
        """Output biases of every MLP."""
        return self._stack("mlp", "b_out")

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
        """
        total = self.b_O[: layer + mlp_input].sum(0)
        return total + self.b_out[:layer].sum(0) if include_mlp_biases else total

    def all_head_labels(self) -> list[str]:
        """``L0H0`` and so on, layer by layer."""
        n_heads = self.W_Q.shape[1]
        return [f"L{layer}H{head}" for layer in range(len(self.layers)) for head in range(n_heads)]

    def _head(self, name: str) -> Tensor:
        weight = getattr(self.head, name, None)
        if weight is None:
            raise ArgumentError(f"this head is a module of your own, so it has no {name}")
        return weight
