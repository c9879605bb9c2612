"""What stands at a hook point while a dictionary is spliced in there."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from tstlens.errors import ArgumentError, HookError

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")


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
        self.__dict__["intercepts"] = True  # see listened_to
        self.reads, self.writes = reads, writes
        self.use_error_term, self.bypass, self.head = use_error_term, bypass, head
        self.listeners: list[Splice] = []
        self._taken: Tensor | None = None
        for name, child in dictionary.named_children():
            if isinstance(child, HookPoint):
                setattr(self, name, child)
        for name in ("hook_sae_error", "hook_sae_output"):
            if not hasattr(self, name):
                setattr(self, name, HookPoint())

    def mark(self, spliced: bool) -> None:
        """Make fast paths that ask whether anybody listens count the dictionary as somebody."""
        for point in self.children():
            if isinstance(point, HookPoint):
                if spliced:
                    point.__dict__["intercepts"] = True
                else:
                    point.__dict__.pop("intercepts", None)

    def joins_heads(self, d_head: int) -> bool:
        """Whether a dictionary at q, k, v or z reads all heads as one vector."""
        width = getattr(getattr(self.dictionary, "cfg", None), "d_in", d_head)
        return self.head is None and width != d_head

    def take(self, activation: Tensor) -> None:
        """The activation that a transcoder reads, kept until the place that it writes is run."""
        self._taken = activation

    def forget(self) -> None:
        """Forget what was read."""
        self._taken = None

    def forward(self, activation: Tensor) -> Tensor:
        try:
            replaced = self._reconstruct(activation)
        finally:
            self.forget()
        for splice in self.listeners:
            splice.take(replaced)
        return replaced

    def _reconstruct(self, activation: Tensor) -> Tensor:
        original = activation if self.head is None else activation[..., self.head, :]
        given = self._input(original)
        result = self._decode(given).to(original.dtype).view(original.shape)
        keep = self._bypassed(original)
        if self.use_error_term:
            with torch.no_grad():
                clean = result
                if any(listened_to_by_hooks(point) for point in self._points()):
                    with self._without_hooks():
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

    def _decode(self, given: Tensor) -> Tensor:
        dictionary: Any = self.dictionary
        decoded = dictionary.decode(dictionary.encode(given))
        skip = getattr(dictionary, "W_skip", None)  # of transcoders, whose decode leaves it out
        return decoded if skip is None else decoded + given @ skip.T

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
