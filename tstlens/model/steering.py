"""Steering: add a direction to an activation while the model runs, and nothing else.

A direction is any object with ``hook`` (a hook name) and ``vector`` (a tensor over the features of
that activation), such as what :func:`tstlens.probing.direction` returns; at q, k, v and z it may
name one ``head``. Padded positions are never steered.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tstlens.arguments import checked
from tstlens.errors import ArgumentError
from tstlens.model.splicing import SplicedDictionaries
from tstlens.model.state import TrunkState
from tstlens.points import Index, select


class SteeredModel(SplicedDictionaries):
    """A hooked model whose activations can be pushed along a direction for a while."""

    @checked
    @contextmanager
    def steer(
        self, direction: Any, strength: float = 1.0, pos: Index = None
    ) -> Iterator[SteeredModel]:
        """Add ``strength * direction.vector`` at ``direction.hook`` in every run inside the block.

        Answers "what does the model say if this activation moves that way?". What can mislead: a
        large push leaves what the model was trained on, and any large push changes the output, so
        compare with random directions of equal norm (:func:`tstlens.probing.dose_response`).
        Blocks can be nested; the pushes add up. On exit, and on an error, the model is as it was.

        Args:
            direction: with ``hook``, ``vector`` [*feature] ([d_model], [d_mlp], or [head, d_head]
                at q, k, v and z) and optionally ``head``, the one head that a vector [d_head]
                belongs to.
            strength: multiples of the vector; negative pushes the other way.
            pos: positions that are pushed: one, several or a slice; None for all. Padded positions
                (by the mask that the model is called with) are left alone in any case.

        Raises:
            UnknownHookError, HookError: a hook point that is not there, cannot fire, or has no
                feature axis.
            ArgumentError: a vector of another shape, no such head or position, or ``strength``
                that is not a finite number.

        Source: Turner et al. 2023 (arXiv 2308.10248), activation addition.

        Example:
            >>> from types import SimpleNamespace
            >>> import torch
            >>> from tstlens import HookedTST
            >>> model = HookedTST.from_pretrained("japanese-vowels")
            >>> push = SimpleNamespace(hook="blocks.1.hook_resid_post", vector=torch.ones(128))
            >>> series = torch.randn(2, 12, 25)
            >>> with model.steer(push, strength=2.0):
            ...     bool((model(series) != 0).all())
            True
        """
        name, vector, head = self._checked_direction(direction)
        if not isinstance(strength, int | float) or not abs(strength) < float("inf"):
            raise ArgumentError(f"expected strength as a finite number, got {strength!r}")
        axis = self.point(name).pos_axis
        if pos is not None and axis is None:
            raise ArgumentError(f"pos={pos!r} was given, but {name} has no positions")
        state: dict[str, Tensor | None] = {"mask": None}  # of the run that is going on

        def embedded(_module: Any, _args: Any, output: Any) -> None:
            state["mask"] = output[1].pos_mask

        def entered(_module: Any, args: Any, kwargs: Any) -> None:
            given = [x for x in (*args, *kwargs.values()) if isinstance(x, TrunkState)]
            state["mask"] = given[0].pos_mask if given else None

        def push(activation: Tensor, hook: Any) -> Tensor:
            added = strength * vector.to(activation)
            if head is not None:
                whole = added.new_zeros(activation.shape[-2:])
                whole[head] = added
                added = whole
            if tuple(activation.shape[activation.ndim - added.ndim :]) != tuple(added.shape):
                raise ArgumentError(
                    f"expected a vector like the last axes of {name} {list(activation.shape)}, "
                    f"got {list(vector.shape)}"
                )
            chosen = _chosen(activation, axis, pos, state["mask"], added.ndim)
            return activation + added if chosen is None else activation + added * chosen

        layers: Any = self.layers
        with self.hooks(fwd_hooks=[(name, push)]):
            handles = [self.get_submodule("embed").register_forward_hook(embedded)]
            handles += [
                block.register_forward_pre_hook(entered, with_kwargs=True) for block in layers
            ]
            try:
                yield self
            finally:
                for handle in handles:
                    handle.remove()

    def _checked_direction(self, direction: Any) -> tuple[str, Tensor, int | None]:
        name, vector = getattr(direction, "hook", None), getattr(direction, "vector", None)
        if not isinstance(name, str) or not isinstance(vector, Tensor):
            raise ArgumentError(
                "expected a direction with .hook (a hook name) and .vector (a tensor), got "
                f"{type(direction).__name__}; probing.direction(...) makes one"
            )
        [name] = self.require_live([name])
        point = self.point(name)
        point.require_features()
        head = getattr(direction, "head", None)
        expected = point.feature_shape
        if head is not None:
            if expected is None or len(expected) < 2:
                raise ArgumentError(f"head={head} was given, but {name} has no heads")
            if not 0 <= head < expected[0]:
                raise ArgumentError(f"expected a head in 0..{expected[0] - 1}, got {head}")
            expected = expected[1:]
        if expected is not None and tuple(vector.shape) != expected:
            raise ArgumentError(
                f"expected a vector {list(expected)} at {name}, got {list(vector.shape)}; was it "
                "made for another model or hook point?"
            )
        if not bool(torch.isfinite(vector).all()):
            raise ArgumentError("expected a vector of finite numbers, got NaN or infinity")
        return name, vector.detach(), head


def _chosen(
    activation: Tensor, axis: int | None, pos: Index, mask: Tensor | None, n_features: int
) -> Tensor | None:
    """1 where the activation is pushed, else 0, ready to multiply; None for everywhere."""
    if axis is None or activation.ndim <= n_features + axis:
        return None
    n_pos = activation.shape[axis]
    if pos is None and mask is None:
        return None
    chosen = torch.ones(1, n_pos, device=activation.device, dtype=activation.dtype)
    if pos is not None:
        chosen = torch.zeros_like(chosen)
        chosen[:, select(pos, n_pos, "pos")] = 1
    if mask is not None and mask.shape == (len(activation), n_pos):
        chosen = chosen * mask.to(chosen)
    return chosen.view(*chosen.shape, *(1,) * n_features)
