"""A dictionary of single heads, read at every head of a layer at once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tstlens.errors import ArgumentError
from tstlens.model import HookedTST
from tstlens.saes.checks import check_dictionary

_PER_HEAD = ("hook_q", "hook_k", "hook_v", "hook_z")
_BY_ROW = ("layer_norm", "constant_norm_rescale")


class ByHead(nn.Module):
    """One dictionary of width d_head as a dictionary of all heads: a latent per head and entry.

    Latent ``head * d_sae + i`` is latent ``i`` at that head. So what a latent does at one head is
    never mixed up with what it does at another.

    Args:
        dictionary: of width d_head.
        n_heads: heads of the layer.

    Raises:
        ArgumentError: the dictionary normalises every activation by itself.
    """

    def __init__(self, dictionary: Any, n_heads: int) -> None:
        super().__init__()
        given = dictionary.cfg
        kind = getattr(given, "normalize_activations", "none")
        if kind in _BY_ROW:
            raise ArgumentError(
                f"expected a dictionary that reads heads as they are, got "
                f"normalize_activations={kind!r}; set its cfg.metadata.hook_head_index to read it "
                "at one head"
            )
        self.dictionary, self.n_heads = dictionary, n_heads
        self.n_latents = len(dictionary.W_dec)
        self.cfg = SimpleNamespace(
            d_in=given.d_in * n_heads,
            d_sae=self.n_latents * n_heads,
            metadata=given.metadata,
            normalize_activations="none",
            reshape_activations="hook_z",
            architecture=getattr(given, "architecture", lambda: type(dictionary).__name__),
        )

    @property
    def W_dec(self) -> Float[Tensor, "latent width"]:
        """The decoder's rows, each in the columns of its head."""
        return torch.block_diag(*[self.dictionary.W_dec] * self.n_heads)

    def encode(self, x: Float[Tensor, "*batch head d_head"]) -> Float[Tensor, "*batch latent"]:
        """Latents of every head, one head after the other."""
        found = self.dictionary.encode(x)
        return (found.to_dense() if found.is_sparse else found).flatten(-2)

    def decode(self, latents: Float[Tensor, "*batch latent"]) -> Float[Tensor, "*batch width"]:
        """All heads, joined."""
        return self.dictionary.decode(latents.unflatten(-1, (self.n_heads, -1))).flatten(-2)


def by_head(model: HookedTST, dictionary: Any) -> Any:
    """The dictionary itself, or as :class:`ByHead` where it reads q, k, v or z head by head."""
    check_dictionary(dictionary)
    cfg = getattr(dictionary, "cfg", None)
    metadata = getattr(cfg, "metadata", None)
    hook = getattr(metadata, "hook_name", None) or ""
    single = (
        hook.rsplit(".", 1)[-1] in _PER_HEAD
        and getattr(metadata, "hook_head_index", None) is None
        and getattr(cfg, "d_in", None) == model.cfg.d_head
        and model.cfg.n_heads > 1
    )
    return ByHead(dictionary, model.cfg.n_heads) if single else dictionary
