"""Multi-head attention with a hook point on every activation."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformer_lens import FactoredMatrix

from tstlens.model.config import HookedTSTConfig
from tstlens.model.embed import rotate
from tstlens.model.norms import watched
from tstlens.model.state import TrunkState, causal_mask
from tstlens.points import Hook
from tstlens.shapes import PerHead, Residual

LOG2_E = 1.442695041  # so that softplus(0) log2(e) is 1, in the digits of the source

_Input = Float[Tensor, "row pos d_model"] | Float[Tensor, "row pos head d_model"]
_Keys = Float[Tensor, "row key d_model"] | Float[Tensor, "row key head d_model"]
_KeysPerHead = Float[Tensor, "row key head d_head"]


def head_major(n_heads: int, d_model: int, d_head: int) -> nn.Parameter:
    """A [head, d_model, d_head] parameter stored so that [d_model, head * d_head] is a view.

    All heads are then projected by one matrix product without copying weights first.
    """
    return nn.Parameter(torch.zeros(d_model, n_heads, d_head).permute(1, 0, 2))


class Attention(nn.Module):
    """Queries, keys and values per head, their pattern, and the sum of what heads write.

    Weights have TransformerLens' layouts: ``W_Q``, ``W_K``, ``W_V`` [head, d_model, d_head],
    ``W_O`` [head, d_head, d_model], ``b_Q``, ``b_K``, ``b_V`` [head, d_head], ``b_O`` [d_model].
    Rotary positions, the norm of queries and keys and the scale of queries are applied after
    ``hook_q`` and ``hook_k``.
    """

    cross = False  # whether queries and keys may be of different lengths

    def __init__(self, cfg: HookedTSTConfig, causal: bool | None = None) -> None:
        super().__init__()
        self.cfg = cfg
        self.causal = cfg.causal if causal is None else causal
        n_heads, d_model, d_head = cfg.n_heads, cfg.d_model, cfg.d_head or 0
        self.scale = math.sqrt(d_head) if cfg.attn_scale is None else cfg.attn_scale
        self.W_Q = head_major(n_heads, d_model, d_head)
        self.W_K = head_major(n_heads, d_model, d_head)
        self.W_V = head_major(n_heads, d_model, d_head)
        self.W_O = nn.Parameter(torch.zeros(n_heads, d_head, d_model))
        self.b_Q = nn.Parameter(torch.zeros(n_heads, d_head), requires_grad=cfg.attn_bias)
        self.b_K = nn.Parameter(torch.zeros(n_heads, d_head), requires_grad=cfg.attn_bias)
        self.b_V = nn.Parameter(torch.zeros(n_heads, d_head), requires_grad=cfg.attn_bias)
        self.b_O = nn.Parameter(torch.zeros(d_model), requires_grad=cfg.attn_bias)

        if cfg.qk_norm != "none":
            self.q_norm = HeadNorm(d_head, cfg.eps)
            self.k_norm = HeadNorm(d_head, cfg.eps)
        if cfg.query_scale:
            self.q_scale = QueryScale(d_head)

        self.hook_q = Hook("row pos head d_head")
        self.hook_k = Hook("row pos head d_head")
        self.hook_v = Hook("row pos head d_head")
        self.hook_attn_scores = Hook("row head query key")
        self.hook_pattern = Hook("row head query key")
        self.hook_z = Hook("row pos head d_head")
        self.hook_result = Hook("row pos head d_model", needs="use_attn_result")

    def forward(
        self, query_input: _Input, key_input: _Keys, value_input: _Keys, state: TrunkState
    ) -> Residual:
        q = self.hook_q(self.project(query_input, self.W_Q, self.b_Q))
        k = self.hook_k(self.project(key_input, self.W_K, self.b_K))
        v = self.hook_v(self.project(value_input, self.W_V, self.b_V))
        return self.write(self.hook_z(self.mix(q, k, v, state)))

    def project(self, x: _Input, weight: nn.Parameter, bias: nn.Parameter) -> PerHead:
        """Project the stream, or with ``use_split_qkv_input`` each head's own copy of it."""
        if x.ndim == 4:
            return torch.einsum("rphm,hmd->rphd", x, weight) + bias
        flat = weight.permute(1, 0, 2).flatten(1)  # [d_model, head * d_head]
        projected = torch.addmm(bias.flatten(), x.flatten(0, 1), flat)
        return projected.view(x.shape[0], x.shape[1], *bias.shape)

    def mix(self, q: PerHead, k: _KeysPerHead, v: _KeysPerHead, state: TrunkState) -> PerHead:
        """Each position's weighted mean of values; fused unless scores or pattern are watched."""
        q, k = self.place(q, state), self.place(k, state, keys=True)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [row, head, pos, d]
        visible = self._visible(q.shape[2], state, q.device)
        bias = self._score_bias(state)
        if state.handed_on is None and not watched(self.hook_attn_scores, self.hook_pattern):
            if bias is not None:
                visible = bias if visible is None else bias.masked_fill(~visible, float("-inf"))
            z = scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=1 / self.scale)
            return z.transpose(1, 2)
        scores: Tensor = q @ k.transpose(2, 3) / self.scale
        if bias is not None:
            scores = scores + bias
        if state.handed_on:
            scores = scores + state.handed_on[-1]
        if visible is not None:
            scores = scores.masked_fill(~visible, float("-inf"))
        scores = self.hook_attn_scores(scores)
        if state.handed_on is not None:
            state.handed_on.append(scores)
        return (self.hook_pattern(scores.softmax(-1)) @ v).transpose(1, 2)

    def place(self, x: PerHead, state: TrunkState, keys: bool = False) -> PerHead:
        """Queries or keys as their products take them: normalised, rotated, scaled as asked for."""
        if self.cfg.qk_norm == "none" and self.cfg.rotary_base is None:
            return x if keys or not self.cfg.query_scale else self.q_scale(x)
        norm = None if self.cfg.qk_norm == "none" else (self.k_norm if keys else self.q_norm)
        if norm is not None and self.cfg.qk_norm == "before_rotary":
            x = norm(x)
        if self.cfg.rotary_base is not None:
            x = rotate(x, state.positions, self.cfg.rotary_base)
        if norm is not None and self.cfg.qk_norm == "after_rotary":
            x = norm(x)
        return x if keys or not self.cfg.query_scale else self.q_scale(x)

    def write(self, z: PerHead) -> Residual:
        """What the heads add to the residual stream, summed over heads, plus ``b_O``."""
        if self.cfg.use_attn_result:
            result = self.hook_result(torch.einsum("rphd,hdm->rphm", z, self.W_O))
            return result.sum(2) + self.b_O
        written = torch.addmm(self.b_O, z.flatten(2).flatten(0, 1), self.W_O.flatten(0, 1))
        return written.view(z.shape[0], z.shape[1], self.W_O.shape[2])

    @property
    def QK(self) -> FactoredMatrix:
        """``W_Q W_K^T`` of every head, factored, [head, d_model, d_model]."""
        return FactoredMatrix(self.W_Q, self.W_K.transpose(-2, -1))

    @property
    def OV(self) -> FactoredMatrix:
        """``W_V W_O`` of every head, factored, [head, d_model, d_model]."""
        return FactoredMatrix(self.W_V, self.W_O)

    def _score_bias(self, state: TrunkState) -> Tensor | None:
        return state.score_bias

    def _visible(self, n_pos: int, state: TrunkState, device: torch.device) -> Tensor | None:
        visible = state.key_mask
        if self.causal:
            causal = causal_mask(n_pos, device)
            if visible is None:
                return causal
            visible = visible & causal
            # A padded position before the first observed one sees nothing. Nobody reads it, but
            # a softmax over nothing is NaN: let it see everything.
            visible = visible | ~visible.any(-1, keepdim=True)
        return visible


class HeadNorm(nn.Module):
    """RMS norm over d_head with one weight for all heads."""

    def __init__(self, d_head: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.w = nn.Parameter(torch.ones(d_head))

    def forward(self, x: PerHead) -> PerHead:
        return nn.functional.rms_norm(x, self.w.shape, self.w, self.eps)


class QueryScale(nn.Module):
    """``softplus(w) log2(e) / sqrt(d_head)`` times every dimension, one weight for all heads.

    Source: Das et al. 2024, "A decoder-only foundation model for time-series forecasting".
    """

    def __init__(self, d_head: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(d_head))

    def forward(self, x: PerHead) -> PerHead:
        return x * nn.functional.softplus(self.w).mul(LOG2_E / math.sqrt(len(self.w)))


class ChannelAttention(Attention):
    """Attention between the channels of one series, at every position by itself.

    Queries, keys, values and z keep the trunk's rows; scores and pattern are [batch, pos, head,
    query channel, key channel]. No order among channels: neither bias nor rotation.
    """

    def __init__(self, cfg: HookedTSTConfig, causal: bool | None = None) -> None:
        super().__init__(cfg, causal)
        self.hook_attn_scores = Hook("batch pos head query key")
        self.hook_pattern = Hook("batch pos head query key")

    def mix(self, q: PerHead, k: PerHead, v: PerHead, state: TrunkState) -> PerHead:
        n_channels = state.n_series_channels

        def by_pos(x: PerHead) -> Tensor:  # [batch, pos, head, channel, d_head]
            return x.unflatten(0, (-1, n_channels)).permute(0, 2, 3, 1, 4)

        q, k, v = by_pos(q), by_pos(k), by_pos(v)
        visible = None
        if state.pos_mask is not None:  # [batch, pos, 1, 1, key channel]
            observed = state.pos_mask.unflatten(0, (-1, n_channels)).transpose(1, 2)
            observed = observed | ~observed.any(-1, keepdim=True)  # nobody reads such a position
            visible = observed[:, :, None, None]
        if watched(self.hook_attn_scores, self.hook_pattern):
            scores = q @ k.transpose(-1, -2) / self.scale
            if visible is not None:
                scores = scores.masked_fill(~visible, float("-inf"))
            z = self.hook_pattern(self.hook_attn_scores(scores).softmax(-1)) @ v
        else:
            z = scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=1 / self.scale)
        return z.permute(0, 3, 1, 2, 4).flatten(0, 1)


class CrossAttention(Attention):
    """A decoder's attention to what the encoder gave (``TrunkState.encoded``).

    Scores and pattern are [row, head, query, key] with the encoder's positions as keys.
    """

    cross = True

    def place(self, x: PerHead, state: TrunkState, keys: bool = False) -> PerHead:
        return x

    def _score_bias(self, state: TrunkState) -> Tensor | None:
        return None

    def _visible(self, n_pos: int, state: TrunkState, device: torch.device) -> Tensor | None:
        return None if state.encoded_mask is None else state.encoded_mask[:, None, None, :]
