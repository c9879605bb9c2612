"""One block of the trunk: attention and MLP around a residual stream.

The forward pass of both kinds is written in steps (``attend``, ``add_attention``, ``add_mlp``,
``add_mlp_out``, ``leave``), so that patching can enter a block in the middle: everything after
attention works on each position by itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from tstlens.model.attention import Attention
from tstlens.model.config import HookedTSTConfig
from tstlens.model.mlp import MLP
from tstlens.model.norms import make_norm
from tstlens.model.state import TrunkState
from tstlens.shapes import Residual


class Block(nn.Module, ABC):
    """What both kinds of block share: parts, hook points and the order of the steps."""

    def __init__(self, cfg: HookedTSTConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.ln1 = make_norm(cfg)
        self.attn = Attention(cfg)
        self.ln2 = make_norm(cfg)
        self.mlp = MLP(cfg)
        self.hook_q_input = HookPoint()  # [row, pos, head, d_model]
        self.hook_k_input = HookPoint()  # [row, pos, head, d_model]
        self.hook_v_input = HookPoint()  # [row, pos, head, d_model]
        self.hook_attn_out = HookPoint()  # [row, pos, d_model]
        self.hook_mlp_in = HookPoint()  # [row, pos, d_model]
        self.hook_mlp_out = HookPoint()  # [row, pos, d_model]
        self.hook_resid_pre = HookPoint()  # [row, pos, d_model]
        self.hook_resid_mid = HookPoint()  # [row, pos, d_model]
        self.hook_resid_post = HookPoint()  # [row, pos, d_model]

    def forward(self, resid_pre: Residual, state: TrunkState) -> Residual:
        resid_pre = self.hook_resid_pre(resid_pre)
        return self.add_attention(resid_pre, self.attend(resid_pre, state))

    @abstractmethod
    def attend(self, resid_pre: Residual, state: TrunkState) -> Residual:
        """What attention reads from the stream and would write to it, before ``hook_attn_out``."""

    def add_attention(self, resid_pre: Residual, attn_out: Residual) -> Residual:
        """From attention's output to what leaves the block."""
        resid_mid = resid_pre + self.hook_attn_out(attn_out)
        return self.add_mlp(self.hook_resid_mid(resid_mid))

    def add_mlp(self, resid_mid: Residual) -> Residual:
        """From the stream between the sublayers to what leaves the block."""
        carried, mlp_in = self.read_mid(resid_mid)
        return self.add_mlp_out(carried, self.mlp(mlp_in))

    @abstractmethod
    def read_mid(self, resid_mid: Residual) -> tuple[Residual, Residual]:
        """What the stream carries past the MLP, and what the MLP reads."""

    def add_mlp_out(self, carried: Residual, mlp_out: Residual) -> Residual:
        """From the MLP's output to what leaves the block."""
        return self.leave(self.hook_resid_post(carried + self.hook_mlp_out(mlp_out)))

    @abstractmethod
    def leave(self, resid_post: Residual) -> Residual:
        """From the last sum to what leaves the block."""

    def _split(self, stream: Residual) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs of q, k and v: one copy for each head when ``use_split_qkv_input`` asks for it."""
        if not self.cfg.use_split_qkv_input:
            return stream, stream, stream
        shape = (-1, -1, self.cfg.n_heads, -1)
        per_head = [stream.unsqueeze(2).expand(shape).clone() for _ in range(3)]
        return (
            self.hook_q_input(per_head[0]),
            self.hook_k_input(per_head[1]),
            self.hook_v_input(per_head[2]),
        )

    def _mlp_input(self, resid_mid: Residual) -> Residual:
        return self.hook_mlp_in(resid_mid.clone()) if self.cfg.use_hook_mlp_in else resid_mid


class PreNormBlock(Block):
    """Norm, sublayer, add: TransformerLens' ``TransformerBlock``. The stream is a plain sum."""

    def attend(self, resid_pre: Residual, state: TrunkState) -> Residual:
        q_input, k_input, v_input = self._split(resid_pre)
        if q_input is k_input:
            normalized = self.ln1(resid_pre)
            return self.attn(normalized, normalized, normalized, state)
        return self.attn(self.ln1(q_input), self.ln1(k_input), self.ln1(v_input), state)

    def read_mid(self, resid_mid: Residual) -> tuple[Residual, Residual]:
        return resid_mid, self.ln2(self._mlp_input(resid_mid))

    def leave(self, resid_post: Residual) -> Residual:
        return resid_post


class PostNormBlock(Block):
    """Sublayer, add, norm: TransformerLens' ``BertBlock``.

    ``hook_resid_mid`` and ``hook_resid_post`` are the sums before the norm;
    ``hook_normalized_resid_post`` is what leaves the block.
    """

    def __init__(self, cfg: HookedTSTConfig) -> None:
        super().__init__(cfg)
        self.hook_normalized_resid_post = HookPoint()  # [row, pos, d_model]

    def attend(self, resid_pre: Residual, state: TrunkState) -> Residual:
        return self.attn(*self._split(resid_pre), state)

    def read_mid(self, resid_mid: Residual) -> tuple[Residual, Residual]:
        normalized_mid = self.ln1(self._mlp_input(resid_mid))
        return normalized_mid, normalized_mid

    def leave(self, resid_post: Residual) -> Residual:
        return self.hook_normalized_resid_post(self.ln2(resid_post))


def make_block(cfg: HookedTSTConfig) -> Block:
    """The block that the config asks for."""
    return PreNormBlock(cfg) if cfg.norm_position == "pre" else PostNormBlock(cfg)
