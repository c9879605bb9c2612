"""The layers of a trunk in one order, whether they are one stack or an encoder and a decoder.

A trunk of one stack is ``blocks.{l}``. With ``cfg.n_decoder_layers`` the first layers are
``encoder.{l}`` and the last ones ``decoder.{l}`` with ``cross_attn``, as in TransformerLens; they
are still numbered through, encoder first, wherever a layer is a number (``start_at_layer``,
``stop_at_layer``, the axis ``layer`` of patching).

Between the stacks the run crosses over: ``encoder_final_ln`` and ``hook_encoded`` give what every
cross attention reads, and the stream becomes ``hook_decoder_embed``. This belongs to the first
decoder layer: what enters that layer, as ``stop_at_layer`` returns it and ``start_at_layer`` takes
it, is still the encoder's stream.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from operator import index
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from tstlens.arguments import shown
from tstlens.errors import ArgumentError
from tstlens.model.block import make_block
from tstlens.model.config import HookedTSTConfig
from tstlens.model.embed import RelativeBias
from tstlens.model.hooking import in_turn
from tstlens.model.norms import make_norm, watched
from tstlens.model.state import TrunkState
from tstlens.points import Hook, layer_of
from tstlens.shapes import Residual

_CROSSING = ("encoder_final_ln", "hook_encoded", "hook_decoder_embed", "hook_decoder_position_bias")
_Left = Float[Tensor, "row new_pos d_model"]  # a decoder has positions of its own


class Trunk(nn.Module):
    """Blocks, the norms after them, and position biases that all layers of a stack share."""

    cfg: HookedTSTConfig
    _tell_padding: Callable[[TrunkState], None]

    def _make_trunk(self) -> None:
        cfg = self.cfg
        if cfg.position_buckets is not None:
            self.position_bias = _relative_bias(cfg, cfg.causal)
            self.hook_position_bias = Hook("row head query key")
        if cfg.norm_embed:
            self.ln_embed = make_norm(cfg)
        if not cfg.n_decoder_layers:
            last = cfg.n_layers - 1
            self.blocks = nn.ModuleList(make_block(cfg, last=n == last) for n in range(last + 1))
            if cfg.final_norm:
                self.ln_final = make_norm(cfg, final=True)
            return
        self.encoder = nn.ModuleList(make_block(cfg) for _ in range(cfg.n_encoder_layers))
        if cfg.final_norm:
            self.encoder_final_ln = make_norm(cfg, final=True)
        self.hook_encoded = Hook("row pos d_model")
        self.hook_decoder_embed = Hook("row pos d_model")
        if cfg.position_buckets is not None:
            self.decoder_position_bias = _relative_bias(cfg, True)
            self.hook_decoder_position_bias = Hook("row head query key")
        self.decoder = nn.ModuleList(
            make_block(cfg, of_decoder=True) for _ in range(cfg.n_decoder_layers)
        )
        if cfg.final_norm:
            self.decoder_final_ln = make_norm(cfg, final=True)

    def enter(self, embedded: Residual) -> Residual:
        """What enters block 0: the embedding with its positions, normalised with ``norm_embed``."""
        return self.ln_embed(embedded) if self.cfg.norm_embed else embedded

    def __getattr__(self, name: str) -> Any:
        if name == "blocks" and "decoder" in self.__dict__.get("_modules", {}):
            raise AttributeError(
                "this model has an encoder and a decoder instead of blocks: use model.layers for "
                "both in order, or model.encoder and model.decoder"
            )
        return super().__getattr__(name)

    @property
    def layers(self) -> list[Any]:
        """All blocks in the order they run."""
        if not self.cfg.n_decoder_layers:
            return list(self.blocks)
        return [*self.encoder, *self.decoder]

    @property
    def final_norm(self) -> nn.Module:
        """The norm between the last block and the head; an identity where there is none."""
        if not self.cfg.final_norm:
            return nn.Identity()
        return self.decoder_final_ln if self.cfg.n_decoder_layers else self.ln_final

    def layer_name(self, layer: int) -> str:
        """The hook name of a layer: ``"blocks.3"``, or ``"encoder.1"`` and ``"decoder.0"``."""
        if not self.cfg.n_decoder_layers:
            return f"blocks.{layer}"
        first = self.cfg.n_encoder_layers
        return f"encoder.{layer}" if layer < first else f"decoder.{layer - first}"

    def layer_of(self, hook_name: str) -> int | None:
        """The layer that a hook point lies in; None outside the blocks."""
        return layer_of(hook_name, self.cfg.n_encoder_layers)

    def crosses(self, hook_name: str) -> bool:
        """Whether a hook point lies between the encoder and the decoder."""
        return bool(self.cfg.n_decoder_layers) and hook_name.split(".")[0] in _CROSSING

    def observed_at(self, hook_name: str, state: TrunkState) -> Tensor | None:
        """Which positions of an activation hold no padding, bool [row, pos]; None for all.

        Args:
            hook_name: where the activation is from; a decoder's positions are all observed, but
                keys and values of its cross attention are the encoder's.
            state: what :meth:`embed_series` returned.
        """
        if not self.cfg.n_decoder_layers or ".cross_attn.hook_k" in hook_name:
            return state.pos_mask
        part = hook_name.split(".")[0]
        after = part in ("decoder", "decoder_final_ln", "head", "hook_decoder_embed")
        return None if after and ".cross_attn.hook_v" not in hook_name else state.pos_mask

    @in_turn
    def run_layers(
        self, residual: Residual, state: TrunkState, start: int, stop: int
    ) -> tuple[_Left, TrunkState]:
        """The stream through layers ``start`` to ``stop - 1``, and the state that goes on with it.

        Args:
            residual: what enters layer ``start``, [row, pos, d_model].
            state: what belongs to its rows.
            start: first layer to run.
            stop: layer to stop before.
        """
        cfg = self.cfg
        self._tell_padding(state)
        first = cfg.n_encoder_layers if cfg.n_decoder_layers else None
        if first is not None and start > first and state.encoded is None:
            raise ArgumentError(
                f"layer {start} lies in the decoder, so it needs state= with what the encoder "
                "gave: model.decoder_state(state, encoded), where state is embed_series' and "
                "encoded is hook_encoded of the run that gave the residual"
            )
        if cfg.position_buckets is not None and state.score_bias is None:
            state = replace(state, score_bias=self.position_bias(residual.shape[1]))
        if cfg.residual_attention:
            state = state.handing_on()
        layers = self.layers
        for number in range(start, stop):
            if number == first:
                residual, state = self.cross_over(residual, state)
            residual = layers[number](residual, state)  # [row, pos, d_model]
        return residual, state

    def cross_over(self, residual: Residual, state: TrunkState) -> tuple[_Left, TrunkState]:
        """From the stream that leaves the encoder to the stream and state of the decoder."""
        if state.decoder_embedded is None:
            raise ArgumentError(
                "the decoder starts from positions that the front end gives: pass the state that "
                "embed_series returned as state="
            )
        if self.cfg.final_norm:
            residual = self.encoder_final_ln(residual)
        state = self.decoder_state(state, self.hook_encoded(residual))
        self._tell_padding(state)
        embedded: Any = state.decoder_embedded
        if watched(self.hook_decoder_embed):
            embedded = self.hook_decoder_embed(embedded.clone())  # rows may share memory
        return embedded, state

    @in_turn
    def decoder_state(self, state: TrunkState, encoded: Tensor) -> TrunkState:
        """The state of a run inside the decoder.

        Args:
            state: what :meth:`embed_series` returned with the residual.
            encoded: ``hook_encoded``, [row, pos, d_model].
        """
        bias = None
        if self.cfg.position_buckets is not None and state.decoder_embedded is not None:
            bias = self.decoder_position_bias(state.decoder_embedded.shape[1])
            if watched(self.hook_decoder_position_bias):
                rows = bias.expand(len(encoded), -1, -1, -1).clone()
                bias = self.hook_decoder_position_bias(rows)
        return replace(
            state,
            pos_mask=None,
            positions=None,
            score_bias=bias,
            encoded=encoded,
            encoded_mask=state.pos_mask,
        )

    def _layer_range(self, start: int | None, stop: int | None) -> tuple[int, int]:
        n_layers = self.cfg.n_layers
        first, last = (
            otherwise if layer is None else _layer(name, layer, n_layers)
            for name, layer, otherwise in (
                ("start_at_layer", start, 0),
                ("stop_at_layer", stop, n_layers),
            )
        )
        if first > last:
            raise ArgumentError(
                f"start_at_layer={start} lies after stop_at_layer={stop}: no layer would run"
            )
        return first, last


def _layer(name: str, layer: Any, n_layers: int) -> int:
    """A layer's number, counted from the first one."""
    try:
        # True has an index too, and so has a bool tensor.
        truth = "bool" in str(getattr(layer, "dtype", type(layer)))
        found = n_layers + 1 if truth else index(layer)
    except TypeError:
        found = n_layers + 1
    if not -n_layers <= found <= n_layers:
        raise ArgumentError(f"{name} must lie in {-n_layers}..{n_layers}, got {shown(layer)}")
    return found + n_layers if found < 0 else found


def _relative_bias(cfg: HookedTSTConfig, causal: bool) -> RelativeBias:
    buckets = cfg.position_buckets or 0
    return RelativeBias(cfg.n_heads, buckets, cfg.position_max_distance, causal)
