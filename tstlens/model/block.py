"""One block of the trunk: attention and MLP around a residual stream.

The forward pass of both kinds is written in steps (``attend``, ``add_attention``, ``add_mlp``,
``add_mlp_out``, ``leave``), so that patching can enter a block in the middle: everything after
attention works on each position by itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from tstlens.errors import ArgumentError, HookError
from tstlens.model.attention import Attention, ChannelAttention, CrossAttention
from tstlens.model.config import HookedTSTConfig
from tstlens.model.mlp import MLP
from tstlens.model.norms import NoNorm, hooked, make_norm, watched
from tstlens.model.state import TrunkState
from tstlens.points import Hook
from tstlens.shapes import Hidden, PerHead, Residual


class Block(nn.Module, ABC):
    """What both kinds of block share: parts, hook points and the order of the steps."""

    def __init__(self, cfg: HookedTSTConfig, of_decoder: bool = False) -> None:
        super().__init__()
        self.cfg = cfg
        self.second = "cross" if of_decoder else cfg.second_attention
        self.ln1 = make_norm(cfg)
        self.attn = Attention(cfg, causal=True if of_decoder else None)
        if self.second == "none":
            self.ln2 = make_norm(cfg, of_mlp=True)
        else:
            self.ln2 = make_norm(cfg)
            self.ln3 = make_norm(cfg, of_mlp=True)
        if self.second == "channel":
            self.channel_attn = ChannelAttention(cfg)
            self.hook_channel_attn_out = Hook("row pos d_model")
            self.hook_resid_mid_channel = Hook("row pos d_model")
        if self.second == "cross":
            self.cross_attn = CrossAttention(cfg)
            self.hook_cross_attn_out = Hook("row pos d_model")
            self.hook_resid_mid_cross = Hook("row pos d_model")
        self.mlp = MLP(cfg)
        self.hook_q_input = Hook("row pos head d_model", needs="use_split_qkv_input")
        self.hook_k_input = Hook("row pos head d_model", needs="use_split_qkv_input")
        self.hook_v_input = Hook("row pos head d_model", needs="use_split_qkv_input")
        self.hook_attn_out = Hook("row pos d_model")
        self.hook_mlp_in = Hook("row pos d_model", needs="use_hook_mlp_in")
        self.hook_mlp_out = Hook("row pos d_model")
        self.hook_resid_pre = Hook("row pos d_model")
        self.hook_resid_mid = Hook("row pos d_model")
        self.hook_resid_post = Hook("row pos d_model")

    def forward(self, resid_pre: Residual, state: TrunkState) -> Residual:
        resid_pre = self.hook_resid_pre(resid_pre)
        return self.add_attention(resid_pre, self.attend(resid_pre, state), state)

    @property
    def mlp_norm(self) -> nn.Module:
        """The norm before the MLP (pre-norm) or after it: ``ln2``, ``ln3`` in longer blocks."""
        return self.ln2 if self.second == "none" else self.ln3

    @abstractmethod
    def attend(self, resid_pre: Residual, state: TrunkState) -> Residual:
        """What attention reads from the stream and would write to it, before ``hook_attn_out``."""

    def write_attention(self, z: PerHead) -> Residual:
        """From z to what attention would write, before ``hook_attn_out``."""
        return self.attn.write(z)

    def write_mlp(self, post: Hidden) -> Residual:
        """From the hidden units to what the MLP would write, before ``hook_mlp_out``."""
        return self.mlp.write(post)

    def run_mlp(self, mlp_in: Residual) -> Residual:
        """From what the MLP reads to what it would write, before ``hook_mlp_out``."""
        return self.mlp(mlp_in)

    def add_attention(
        self, resid_pre: Residual, attn_out: Residual, state: TrunkState | None = None
    ) -> Residual:
        """From attention's output to what leaves the block.

        Args:
            resid_pre: the stream that attention read.
            attn_out: what it would write.
            state: of these rows; needed where a second attention follows.
        """
        resid_mid = self.hook_resid_mid(resid_pre + self.hook_attn_out(attn_out))
        if self.second != "none":
            resid_mid = self.second_attention(resid_mid, state or TrunkState())
        return self.add_mlp(resid_mid, resid_pre)

    def second_attention(self, resid_mid: Residual, state: TrunkState) -> Residual:
        """From the stream after the first attention to the stream before the MLP."""
        carried, query = self.read_second(resid_mid)
        if self.second == "cross":
            key = state.encoded
            if key is None:
                raise ArgumentError(
                    "a decoder block reads the encoder's output, and there is none; pass state= "
                    "with encoded"
                )
            written = self.hook_cross_attn_out(self.cross_attn(query, key, key, state))
            return self.hook_resid_mid_cross(carried + written)
        written = self.hook_channel_attn_out(self.channel_attn(query, query, query, state))
        return self.hook_resid_mid_channel(carried + written)

    @abstractmethod
    def read_second(self, resid_mid: Residual) -> tuple[Residual, Residual]:
        """What the stream carries past the second attention, and what its queries read."""

    def add_mlp(self, resid_mid: Residual, resid_pre: Residual | None = None) -> Residual:
        """From the stream between the sublayers to what leaves the block.

        Args:
            resid_mid: the stream before the MLP.
            resid_pre: the stream that entered the block, for ``hook_attn_mlp_sum``.
        """
        carried, mlp_in = self.read_mid(resid_mid)
        return self.add_mlp_out(carried, self.run_mlp(mlp_in), resid_pre)

    @abstractmethod
    def read_mid(self, resid_mid: Residual) -> tuple[Residual, Residual]:
        """What the stream carries past the MLP, and what the MLP reads."""

    def add_mlp_out(
        self, carried: Residual, mlp_out: Residual, resid_pre: Residual | None = None
    ) -> Residual:
        """From the MLP's output to what leaves the block."""
        resid_post = self.sum_up(carried, self.hook_mlp_out(mlp_out), resid_pre)
        return self.leave(self.hook_resid_post(resid_post))

    def sum_up(self, carried: Residual, mlp_out: Residual, resid_pre: Residual | None) -> Residual:
        """The last sum of the block."""
        return carried + mlp_out

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
    """Norm, sublayer, add: TransformerLens' ``TransformerBlock``. The stream is a plain sum.

    ``hook_attn_mlp_sum`` is what the block adds to the stream: attention's and the MLP's output,
    as the MLP read the stream with attention's output in it. With
    ``use_normalization_before_and_after`` what attention and MLP write is normalised too.
    """

    def __init__(self, cfg: HookedTSTConfig, of_decoder: bool = False) -> None:
        super().__init__(cfg, of_decoder)
        self.hook_attn_mlp_sum = Hook("row pos d_model", needs="use_attn_mlp_sum")
        if cfg.use_normalization_before_and_after:
            self.ln1_post = make_norm(cfg)
            self.ln2_post = make_norm(cfg, of_mlp=True)

    def attend(self, resid_pre: Residual, state: TrunkState) -> Residual:
        q_input, k_input, v_input = self._split(resid_pre)
        if q_input is k_input:
            normalized = self.ln1(resid_pre)
            written = self.attn(normalized, normalized, normalized, state)
        else:
            written = self.attn(self.ln1(q_input), self.ln1(k_input), self.ln1(v_input), state)
        return self.ln1_post(written) if self.cfg.use_normalization_before_and_after else written

    def write_attention(self, z: PerHead) -> Residual:
        written = self.attn.write(z)
        return self.ln1_post(written) if self.cfg.use_normalization_before_and_after else written

    def write_mlp(self, post: Hidden) -> Residual:
        written = self.mlp.write(post)
        return self.ln2_post(written) if self.cfg.use_normalization_before_and_after else written

    def run_mlp(self, mlp_in: Residual) -> Residual:
        written = self.mlp(mlp_in)
        return self.ln2_post(written) if self.cfg.use_normalization_before_and_after else written

    def read_second(self, resid_mid: Residual) -> tuple[Residual, Residual]:
        return resid_mid, self.ln2(resid_mid)

    def read_mid(self, resid_mid: Residual) -> tuple[Residual, Residual]:
        return resid_mid, self.mlp_norm(self._mlp_input(resid_mid))

    def sum_up(self, carried: Residual, mlp_out: Residual, resid_pre: Residual | None) -> Residual:
        heard = hooked(self.hook_attn_mlp_sum)
        unfused = self.cfg.use_attn_mlp_sum and resid_pre is not None
        if not (heard or (unfused and watched(self.hook_attn_mlp_sum))):
            return carried + mlp_out
        if resid_pre is None:
            raise HookError(
                "hook_attn_mlp_sum is what the whole block adds to the stream, and this run enters "
                "the block in its middle; run the block from its start"
            )
        return resid_pre + self.hook_attn_mlp_sum(carried - resid_pre + mlp_out)

    def leave(self, resid_post: Residual) -> Residual:
        return resid_post


class PostNormBlock(Block):
    """Sublayer, add, norm: TransformerLens' ``BertBlock``.

    ``hook_resid_mid`` and ``hook_resid_post`` are the sums before the norm;
    ``hook_normalized_resid_post`` is what leaves the block.

    Args:
        cfg: the model's.
        of_decoder: whether there is cross attention.
        last: whether it is the trunk's last block, whose norm ``cfg.last_norm`` may leave out.
    """

    def __init__(self, cfg: HookedTSTConfig, of_decoder: bool = False, last: bool = False) -> None:
        super().__init__(cfg, of_decoder)
        if last and not cfg.last_norm:
            self.ln2 = NoNorm()
        self.hook_normalized_resid_post = Hook("row pos d_model")

    def attend(self, resid_pre: Residual, state: TrunkState) -> Residual:
        return self.attn(*self._split(resid_pre), state)

    def read_second(self, resid_mid: Residual) -> tuple[Residual, Residual]:
        normalized_mid = self.ln1(resid_mid)
        return normalized_mid, normalized_mid

    def read_mid(self, resid_mid: Residual) -> tuple[Residual, Residual]:
        before = self.ln1 if self.second == "none" else self.ln2
        normalized_mid = before(self._mlp_input(resid_mid))
        return normalized_mid, normalized_mid

    def leave(self, resid_post: Residual) -> Residual:
        return self.hook_normalized_resid_post(self.mlp_norm(resid_post))


def make_block(cfg: HookedTSTConfig, of_decoder: bool = False, last: bool = False) -> Block:
    """The block that the config asks for; a decoder's is causal and has cross attention."""
    if cfg.norm_position == "pre":
        return PreNormBlock(cfg, of_decoder)
    return PostNormBlock(cfg, of_decoder, last)
