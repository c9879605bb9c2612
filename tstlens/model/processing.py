"""Weights rewritten so that the model computes the same and its parts are easier to read.

TransformerLens' names and meaning, on state dicts of a :class:`HookedTST`: a norm's gain and bias
go into the maps that read it, what is written to the stream is centred where every reader centres
it anyway, logits are centred, value biases join the output bias. Hook points stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tstlens.arguments import checked
from tstlens.errors import ArgumentError, HookError, NonlinearResidualError
from tstlens.model.norms import LayerNorm
from tstlens.model.parts import HeadConfig, LinearPatchesConfig, PerStepConfig

State = dict[str, Tensor]

POST_NORM = (
    "in a post-norm model the stream itself goes on from the norm, so its gain and bias cannot go "
    "into the maps that read it; fold_ln=False leaves them"
)


@dataclass(frozen=True)
class _Reader:
    """A linear map that reads a norm.

    Args:
        weight: its name.
        bias: that of its bias; None where it has none that a constant could go into.
        axis: where d_model lies in the weight.
        stacked: whether this axis holds d_model several times over (positions, channels).
    """

    weight: str
    bias: str | None
    axis: int = 0
    stacked: bool = False


class ProcessedWeights(nn.Module):
    """TransformerLens' rewriting of weights, for models in which it changes no output."""

    cfg: Any
    info: dict[str, Any]
    parity: Any
    head: nn.Module
    layers: list[Any]
    layer_name: Callable[[int], str]
    acts_to_saes: dict[str, Any]

    @property
    def processing(self) -> tuple[str, ...]:
        """What :meth:`process_weights_` has done to the weights, as its arguments are called."""
        return tuple(self.info.get("processing", ()))

    @checked
    def fold_layer_norm(
        self,
        state_dict: Mapping[str, Tensor],
        fold_biases: bool = True,
        center_weights: bool = True,
    ) -> State:
        """Put norms' gains and biases into the maps that read them; the norms are left plain.

        Afterwards what a head or neuron reads of ``hook_normalized`` is its weights alone. Layer,
        RMS and batch norms are folded alike. Some norms stay as they are, since no linear map alone
        reads them: ``ln_embed``, ``ln1_post`` and ``ln2_post``, and the final norm before a head
        that is more than one linear map of pooled positions, or that takes the maximum of a
        dimension with a negative gain. A bias whose reader could not take it (a gate has none, and
        a flattened head leaves padding out) stays with its norm, divided by the gain.

        Args:
            state_dict: of this model, ``model.state_dict()``.
            fold_biases: False leaves every bias with its norm, divided by the gain.
            center_weights: take the mean over d_model off the maps that read a layer norm, whose
                output has none.

        Returns:
            Another state dict; ``model.load_state_dict`` takes it.

        Raises:
            NonlinearResidualError: a post-norm model.
            ArgumentError: a bias has to stay where the gain is zero; or no state dict of the model.

        Source: ``HookedTransformer.fold_layer_norm``.
        """
        if self.cfg.norm_position == "post":
            raise NonlinearResidualError(f"fold_layer_norm: {POST_NORM}")
        state = self._copied(state_dict)
        for name, (norm, readers) in self._norms().items():
            # The largest of every dimension does not have the mean of what it was taken from.
            pools = any(reader.weight == "head.W_U" for reader in readers)
            largest = pools and getattr(self.cfg.head, "pooling", None) == "max"
            centres = center_weights and isinstance(norm, LayerNorm) and not largest
            self._fold(state, name, readers, centres, fold_biases)
        return self._cast(state, state_dict)

    @checked
    def center_writing_weights(self, state_dict: Mapping[str, Tensor]) -> State:
        """Take the mean over d_model off everything that is written to the stream.

        Every layer norm takes it off again, so no output changes, and the stream has mean zero.

        Args:
            state_dict: of this model.

        Returns:
            Another state dict.

        Raises:
            NonlinearResidualError: something reads the stream's mean, or writes one that no weight
                holds; the message says what.

        Source: ``HookedTransformer.center_writing_weights``.
        """
        reason = self._why_not_centred()
        if reason is not None:
            raise NonlinearResidualError(
                f"center_writing_weights: {reason}; center_writing_weights=False leaves them"
            )
        state = self._copied(state_dict)
        writers = ["embed.W_E", "embed.b_E", "pos_embed.W_pos"]
        for layer, block in enumerate(self.layers):
            name = self.layer_name(layer)
            writers += [f"{name}.{attn}.{part}" for attn in _attentions(block) for part in _OUT]
            writers += [f"{name}.mlp.W_out", f"{name}.mlp.b_out"]
        for name in writers:
            if name in state:
                state[name] = state[name] - state[name].mean(-1, keepdim=True)
        return self._cast(state, state_dict)

    @checked
    def center_unembed(self, state_dict: Mapping[str, Tensor]) -> State:
        """Take the mean over classes off the head's map.

        Every series' logits change by one number, its probabilities and their losses do not.

        Args:
            state_dict: of this model.

        Returns:
            Another state dict.

        Raises:
            ArgumentError: outputs that are no logits of one softmax, or a head of another kind.

        Source: ``HookedTransformer.center_unembed``.
        """
        if not isinstance(self.cfg.head, HeadConfig) or self.cfg.n_classes is None:
            what = "a forecast" if self.cfg.horizon is not None else "made by a head of its own"
            raise ArgumentError(
                "center_unembed: expected a classifier with a linear head, whose logits may all "
                f"change by one number; this model's output is {what}"
            )
        state = self._copied(state_dict)
        for name in ("head.W_U", "head.b_U"):
            state[name] = state[name] - state[name].mean(-1, keepdim=True)
        return self._cast(state, state_dict)

    @checked
    def fold_value_biases(self, state_dict: Mapping[str, Tensor]) -> State:
        """Put every head's value bias into the output bias of its attention.

        A pattern sums to one, so a value bias writes the same at every position. ``hook_v`` and
        ``hook_z`` lose it, ``hook_attn_out`` and the output stay. Post-norm models too.

        Args:
            state_dict: of this model.

        Returns:
            Another state dict.

        Source: ``HookedTransformer.fold_value_biases``.
        """
        state = self._copied(state_dict)
        for layer, block in enumerate(self.layers):
            for attn in _attentions(block):
                name = f"{self.layer_name(layer)}.{attn}"
                written = torch.einsum("hd,hdm->m", state[f"{name}.b_V"], state[f"{name}.W_O"])
                state[f"{name}.b_O"] = state[f"{name}.b_O"] + written
                state[f"{name}.b_V"] = torch.zeros_like(state[f"{name}.b_V"])
        return self._cast(state, state_dict)

    @checked
    def process_weights_(
        self,
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = False,
        refactor_factored_attn_matrices: bool = False,
        fold_value_biases: bool = True,
    ) -> None:
        """Rewrite the weights in place, one step after the other.

        The output stays what it was, to rounding; ``center_unembed`` alone moves all logits of a
        series by one number, which is why, other than in TransformerLens, it has to be asked for.
        What has been done stands in :attr:`processing`, is saved with the model, and goes into the
        metadata of dictionaries trained on it. Where one step is refused none is done. Parity with
        the source is not carried over.

        Args:
            fold_ln: see :meth:`fold_layer_norm`.
            center_writing_weights: see :meth:`center_writing_weights`.
            center_unembed: see :meth:`center_unembed`.
            refactor_factored_attn_matrices: not offered; ``model.QK.svd()`` and ``model.OV.svd()``
                give the factors.
            fold_value_biases: see :meth:`fold_value_biases`.

        Raises:
            NonlinearResidualError, ArgumentError: a step that would change the output.
            HookError: dictionaries are spliced in, which read activations as they are.

        Example:
            >>> import torch
            >>> from tstlens import HookedTST
            >>> model = HookedTST.from_pretrained("gunpoint")
            >>> series = torch.randn(4, 1, 150)
            >>> before = model(series)
            >>> model.process_weights_(fold_ln=False, center_writing_weights=False)
            >>> model.processing, torch.allclose(model(series), before, atol=1e-4)
            (('fold_value_biases',), True)
        """
        if refactor_factored_attn_matrices:
            raise ArgumentError(
                "refactor_factored_attn_matrices is not offered; model.QK.svd() and model.OV.svd() "
                "give the factors of every head"
            )
        if self.acts_to_saes:
            raise HookError(
                f"dictionaries at {', '.join(self.acts_to_saes)} read activations as they are; "
                "model.reset_saes() first"
            )
        steps = {
            "fold_ln": (fold_ln, self.fold_layer_norm),
            "center_writing_weights": (center_writing_weights, self.center_writing_weights),
            "center_unembed": (center_unembed, self.center_unembed),
            "fold_value_biases": (fold_value_biases, self.fold_value_biases),
        }
        chosen = {name: step for name, (wanted, step) in steps.items() if wanted}
        if not chosen:
            return
        state: State = dict(self.state_dict())
        dtypes = {name: tensor.dtype for name, tensor in state.items()}
        state = {name: _double(tensor) for name, tensor in state.items()}
        for step in chosen.values():
            state = step(state)
        self.load_state_dict({name: tensor.to(dtypes[name]) for name, tensor in state.items()})
        done = {*self.processing, *chosen}
        self.info = {**self.info, "processing": [name for name in steps if name in done]}
        self.parity = None

    def _copied(self, state_dict: Mapping[str, Tensor]) -> State:
        missing = sorted(set(self.state_dict()) - set(state_dict))
        if missing:
            raise ArgumentError(
                f"expected this model's state_dict(), got one without {', '.join(missing[:3])}"
            )
        return {name: _double(tensor) for name, tensor in state_dict.items()}

    @staticmethod
    def _cast(state: State, like: Mapping[str, Tensor]) -> State:
        return {name: tensor.to(like[name].dtype) for name, tensor in state.items()}

    def _norms(self) -> dict[str, tuple[nn.Module, list[_Reader]]]:
        """The norms that only linear maps read, by name, and their readers."""
        found: dict[str, tuple[nn.Module, list[_Reader]]] = {}
        crossing: list[_Reader] = []
        for layer, block in enumerate(self.layers):
            name = self.layer_name(layer)
            found[f"{name}.ln1"] = block.ln1, _projections(f"{name}.attn", "QKV")
            if block.second != "none":
                second = f"{name}.{block.second}_attn"
                crosses = block.second == "cross"  # keys and values are the encoder's
                found[f"{name}.ln2"] = block.ln2, _projections(second, "Q" if crosses else "QKV")
                crossing += _projections(second, "KV") if crosses else []
            mlp = [_Reader(f"{name}.mlp.W_in", f"{name}.mlp.b_in")]
            if block.mlp.gated:
                mlp.append(_Reader(f"{name}.mlp.W_gate", None))
            last = "ln2" if block.second == "none" else "ln3"
            found[f"{name}.{last}"] = block.mlp_norm, mlp
        if not self.cfg.final_norm:
            return found
        final: Any = self
        if self.cfg.n_decoder_layers:
            found["encoder_final_ln"] = final.encoder_final_ln, crossing
        if isinstance(self.cfg.head, HeadConfig):
            name = "decoder_final_ln" if self.cfg.n_decoder_layers else "ln_final"
            pooling = self.cfg.head.pooling
            if pooling != "max" or not bool((final.final_norm.w < 0).any()):
                bias = None if pooling == "flatten" else "head.b_U"
                found[name] = final.final_norm, [_Reader("head.W_U", bias, stacked=True)]
        return found

    def _fold(
        self, state: State, name: str, readers: list[_Reader], centres: bool, takes_bias: bool
    ) -> None:
        gain, shift = state[f"{name}.w"], state.get(f"{name}.b")
        shift = None if shift is None or not bool(shift.any()) else shift
        takes_bias = takes_bias and all(reader.bias for reader in readers)
        if shift is not None and not takes_bias and bool(((gain == 0) & (shift != 0)).any()):
            raise ArgumentError(
                f"fold_layer_norm: the bias of {name} would have to stay with it, divided by its "
                "gain, and that is zero somewhere; fold_ln=False leaves the norms"
            )
        for reader in readers:
            whole = state[reader.weight]
            weight = whole.unflatten(0, (-1, len(gain))) if reader.stacked else whole
            axis = 1 if reader.stacked else reader.axis
            along = [-1 if at == axis else 1 for at in range(weight.ndim)]
            if shift is not None and takes_bias and reader.bias is not None:
                added = (weight * shift.view(along)).sum(axis)
                state[reader.bias] = state[reader.bias] + (
                    added.sum(0) if reader.stacked else added
                )
            weight = weight * gain.view(along)
            if centres and (shift is None or takes_bias):  # what is read has mean zero
                weight = weight - weight.mean(axis, keepdim=True)
            state[reader.weight] = weight.reshape(whole.shape)
        if shift is not None:
            kept = torch.where(shift == 0, 0.0, shift / gain)
            state[f"{name}.b"] = torch.zeros_like(shift) if takes_bias else kept
        state[f"{name}.w"] = torch.ones_like(gain)

    def _why_not_centred(self) -> str | None:
        """What would tell a centred stream from the stream as it is; None where nothing does."""
        cfg = self.cfg
        kinds = {cfg.normalization_type, cfg.mlp_normalization_type or cfg.normalization_type}
        kinds.add(cfg.final_normalization_type or cfg.normalization_type)
        others = {"RMS": "an RMS norm", "BN": "a batch norm"}
        found = [others[kind] for kind in others if kind in kinds]
        linear = isinstance(cfg.embed, LinearPatchesConfig | PerStepConfig)
        reasons = {
            "in a post-norm model the stream goes on from the norm, mean and all": (
                cfg.norm_position == "post"
            ),
            f"{' and '.join(found)} reads the stream's mean, which layer norms alone take off": (
                bool(found)
            ),
            "without a final norm the head reads the stream's mean": not cfg.final_norm,
            "ln_embed writes a mean that no weight holds": cfg.norm_embed,
            "ln1_post and ln2_post write a mean that no weight holds": (
                cfg.use_normalization_before_and_after
            ),
            "the front end is not one linear map, so that its mean stands in no weight": not linear,
        }
        return next((reason for reason, holds in reasons.items() if holds), None)


_OUT = ("W_O", "b_O")


def _attentions(block: Any) -> list[str]:
    return ["attn"] if block.second == "none" else ["attn", f"{block.second}_attn"]


def _projections(attn: str, letters: str) -> list[_Reader]:
    return [_Reader(f"{attn}.W_{one}", f"{attn}.b_{one}", axis=1) for one in letters]


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().double() if tensor.is_floating_point() else tensor
