"""What stands at a hook point while a dictionary is spliced in there."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from tstlens.errors import ArgumentError, HookError

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")


@dataclass(frozen=True)
class Watched:
    """What a codebook did in the last run.

    Args:
        snap: of ``tstlens.codebooks``: what it read, the k-hot vector and the output, in the graph.
        keep: bool, one per activation, False at padding and where the codebook is bypassed; None
            where all count.
    """

    snap: Any
    keep: Tensor | None


class Tapped(HookPoint):
    """A hook point that a transcoder reads: it passes on its activation as hooks left it."""

    listeners: list[Splice]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        activation = super().__call__(*args, **kwargs)
        for splice in self.listeners:
            splice.take(activation)
        return activation


class Splice(nn.Module):
    """Puts a dictionary's reconstruction in the place of an activation.

    The dictionary is no child of this module (it belongs to ``model.splices``), but its hook points
    are, so that they are named after the place.

    Args:
        dictionary: with ``encode`` and ``decode``.
        reads: the hook point whose activation is encoded.
        writes: the hook point whose activation is replaced.
        replaced: what stood there.
        use_error_term: add back what the dictionary misses.
        bypass: positions that keep the activation.
        head: the one head that is replaced; None for all.
    """

    dictionary: Any
    replaced: Any
    hook_sae_error: HookPoint
    hook_sae_output: HookPoint

    def __init__(
        self,
        dictionary: nn.Module,
        reads: str,
        writes: str,
        replaced: nn.Module,
        use_error_term: bool,
        bypass: tuple[int, ...],
        head: int | None,
    ) -> None:
        super().__init__()
        self.__dict__["dictionary"] = dictionary
        self.__dict__["replaced"] = replaced
        self.__dict__["cfg_of_model"] = replaced.__dict__.get("cfg_of_model")
        self.reads, self.writes = reads, writes
        self.use_error_term, self.bypass, self.head = use_error_term, bypass, head
        self.listeners: list[Splice] = []
        self.on = True
        self.pos_mask: Tensor | None = None  # of the run that goes on, told by the model
        self.watched: dict[str, Watched] | None = None
        self._taken: Tensor | None = None
        for name, child in dictionary.named_children():
            if isinstance(child, HookPoint):
                setattr(self, name, child)
        for name in ("hook_sae_error", "hook_sae_output"):
            if not hasattr(self, name):
                setattr(self, name, HookPoint())

    def switch(self, on: bool) -> None:
        """Let the dictionary replace the activation, or let the activation pass as it is."""
        self.on = on
        self.mark(on)

    def mark(self, spliced: bool) -> None:
        """Make fast paths that ask whether anybody listens count the dictionary as somebody."""
        points = [point for point in self.children() if isinstance(point, HookPoint)]
        for module in (self, *points):
            if spliced:
                module.__dict__["intercepts"] = True
            else:
                module.__dict__.pop("intercepts", None)

    def joins_heads(self, d_head: int) -> bool:
        """Whether a dictionary at q, k, v or z reads all heads as one vector."""
        width = getattr(getattr(self.dictionary, "cfg", None), "d_in", d_head)
        return self.head is None and width != d_head

    def take(self, activation: Tensor) -> None:
        """The activation that a transcoder reads, kept until the place that it writes is run."""
        self._taken = activation

    def forget(self) -> None:
        """Forget what a run has left here."""
        self._taken = self.pos_mask = None

    def forward(self, activation: Tensor) -> Tensor:
        try:
            replaced = self._reconstruct(activation) if self.on else activation
        finally:
            self._taken = None
        for splice in self.listeners:
            splice.take(replaced)
        return replaced

    def _reconstruct(self, activation: Tensor) -> Tensor:
        original = activation if self.head is None else activation[..., self.head, :]
        given = self._input(original)
        keep = self._bypassed(original)
        result = self._decode(given, keep).to(original.dtype).view(original.shape)
        if self.use_error_term:
            with torch.no_grad():
                clean = result
                if any(listened_to_by_hooks(point) for point in self._points()):
                    with self._without_hooks(), self._unwatched():
                        clean = self._decode(given).to(original.dtype).view(original.shape)
                error = original - clean
                if keep is not None:
                    error = error.masked_fill(keep, 0.0)
            result = result + self.hook_sae_error(error)
        if keep is not None:
            result = torch.where(keep, original, result)
        result = self.hook_sae_output(result)
        if self.head is None:
            return result
        whole = activation.clone()
        whole[..., self.head, :] = result
        return whole

    def _input(self, original: Tensor) -> Tensor:
        given = original
        if self.reads != self.writes:
            if self._taken is None:
                raise HookError(
                    f"{self.writes} is to be written from {self.reads}, which did not run before "
                    "it; start the run earlier, or check the order of the two"
                )
            given = self._taken if self.head is None else self._taken[..., self.head, :]
        width = getattr(getattr(self.dictionary, "cfg", None), "d_in", None)
        if width is None or given.shape[-1] == width:
            return given
        if given.ndim == 4 and given.shape[-2] * given.shape[-1] == width:
            # sae-lens joins heads itself, but only for z and only outside of training.
            reshapes = getattr(self.dictionary, "hook_z_reshaping_mode", False)
            return given if reshapes else given.flatten(-2)
        raise ArgumentError(
            f"expected activations of width {width} at {self.reads} for the dictionary, got "
            f"{list(given.shape)}"
        )

    def _decode(self, given: Tensor, bypassed: Tensor | None = None) -> Tensor:
        dictionary: Any = self.dictionary
        trace = getattr(dictionary, "trace", None)
        if trace is not None:  # a codebook, whose gradient needs what was encoded
            snap = trace(given)
            if self.watched is not None:
                keep = self._kept(snap.given.shape[:-2], bypassed)
                self.watched[self.reads] = Watched(snap, keep)
            return snap.output
        decoded = dictionary.decode(dictionary.encode(given))
        skip = getattr(dictionary, "W_skip", None)  # of transcoders, whose decode leaves it out
        return decoded if skip is None else decoded + given @ skip.T

    def _kept(self, places: torch.Size, bypassed: Tensor | None) -> Tensor | None:
        """bool [row, pos, ...], False at padding and where the dictionary is bypassed."""
        masks = [] if bypassed is None else [~bypassed.flatten(2)[..., 0]]
        if self.pos_mask is not None and places[:2] == self.pos_mask.shape:
            masks.append(self.pos_mask)
        if not masks or len(places) < 2:
            return None
        keep = masks[0] if len(masks) == 1 else masks[0] & masks[1]
        return keep.view(*keep.shape, *(1,) * (len(places) - 2)).expand(places)

    def _bypassed(self, original: Tensor) -> Tensor | None:
        """bool, broadcast over the activation, True at positions that keep it."""
        if not self.bypass:
            return None
        if original.ndim < 3:
            raise ArgumentError(f"{self.writes} has no positions that could bypass a dictionary")
        n_pos = original.shape[1]
        outside = [pos for pos in self.bypass if not -n_pos <= pos < n_pos]
        if outside:
            raise ArgumentError(
                f"expected positions to leave alone in 0..{n_pos - 1}, got {outside[0]}"
            )
        keep = torch.zeros(n_pos, dtype=torch.bool, device=original.device)
        keep[list(self.bypass)] = True
        return keep.view(1, n_pos, *(1,) * (original.ndim - 2))

    def _points(self) -> Iterator[HookPoint]:
        return (point for point in self.dictionary.modules() if isinstance(point, HookPoint))

    @contextmanager
    def _unwatched(self) -> Iterator[None]:
        watched, self.watched = self.watched, None
        try:
            yield
        finally:
            self.watched = watched

    @contextmanager
    def _without_hooks(self) -> Iterator[None]:
        held = [(point, [getattr(point, name) for name in _HOOKS]) for point in self._points()]
        try:
            for point, _ in held:
                for name in _HOOKS:
                    setattr(point, name, OrderedDict())
            yield
        finally:
            for point, hooks in held:
                for name, value in zip(_HOOKS, hooks, strict=True):
                    setattr(point, name, value)


def listened_to_by_hooks(point: HookPoint) -> bool:
    """Whether a hook sits on a point, whatever is spliced in there."""
    return any(getattr(point, name) for name in _HOOKS)
