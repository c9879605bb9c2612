"""Activations as rows: the forward pass up to a layer, padding left out, one row per position.

A row's *place* says where it comes from: (series, channel, pos, head). Channel is -1 where the
trunk mixes channels, pos is -1 for pooled vectors, head is -1 unless heads are rows of their own.
Models that run the mirrored series too give rows of both passes, as a spliced dictionary meets
both; there channel ``n_channels + c`` is channel c mirrored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from tstlens.data import TimeSeriesData
from tstlens.data.validate import blanked
from tstlens.errors import ArgumentError
from tstlens.model import HookedTST
from tstlens.shapes import Mask, Series

Heads = Literal["joined", "each"] | int

Rows = dict[str, Tensor]  # hook name -> [row, width]


class ActivationRows:
    """Calls give the activations of some of the series, as rows, and where they come from.

    Args:
        model: runs in eval mode and without gradients, no further than the hooks need. Hooks and
            spliced dictionaries on it stay and take part.
        series: [batch, channel, time], or data with their mask.
        hooks: hook names.
        mask: [batch, time], True where observed.
        head: of q, k, v, z and result: ``"joined"`` makes one row of all heads, ``"each"`` one row
            per head, a number takes that head.

    Raises:
        UnknownHookError, HookError: a hook point that does not exist, does not fire, or has no
            feature axis.
        ArgumentError: ``head="each"`` with several hooks, or a head that is not there.
    """

    def __init__(
        self,
        model: HookedTST,
        series: Series | TimeSeriesData,
        hooks: Sequence[str],
        mask: Mask | None = None,
        head: Heads = "joined",
    ) -> None:
        if isinstance(series, TimeSeriesData):
            if mask is not None:
                raise ArgumentError("data bring their own mask; leave out mask=")
            series, mask = series.series, series.mask
        model.check_series(series, mask)
        if not len(series):
            raise ArgumentError("expected at least one series, got none")
        model.require_live(hooks)
        for name in hooks:
            model.require_features(name)
        if not hooks or len(set(hooks)) != len(hooks):
            raise ArgumentError(f"expected one or more different hook names, got {list(hooks)}")
        if head == "each" and len(hooks) > 1:
            raise ArgumentError(
                "with head='each' rows of several hooks would not belong together; stream one hook"
            )
        if head not in ("joined", "each") and (
            isinstance(head, str) or not hasattr(head, "__index__")
        ):
            raise ArgumentError(f"expected head 'joined', 'each' or a head's number, got {head!r}")
        if isinstance(head, int) and not 0 <= head < model.cfg.n_heads:
            raise ArgumentError(f"expected a head in 0..{model.cfg.n_heads - 1}, got {head}")
        self.model, self.series, self.mask = model, blanked(series, mask), mask
        self.hooks, self.head = tuple(hooks), head
        self.stop_at_layer, self.runs_head = _extent(model, self.hooks)

    def __len__(self) -> int:
        return len(self.series)

    @torch.no_grad()
    def __call__(self, index: Tensor) -> tuple[Rows, Tensor]:
        """Rows of the series at ``index``, and their places, int [row, 4]."""
        model, device = self.model, self.model.cfg.device
        kept: dict[str, Tensor] = {}

        def keep(activation: Tensor, hook: Any) -> None:
            kept[hook.name] = activation

        # Module.eval() visits every module, which took a tenth of a pass; and parts may differ.
        training = [module for module in model.modules() if module.training]
        for module in training:
            module.training = False
        try:
            mask = None if self.mask is None else self.mask[index].to(device)
            with model.hooks(fwd_hooks=[(name, keep) for name in self.hooks]):
                residual, state = model.embed_series(self.series[index].to(device), mask)
                stop = self.stop_at_layer
                if stop:
                    residual = model(residual, start_at_layer=0, stop_at_layer=stop, state=state)
                if self.runs_head:
                    model.unembed(residual, state)
        finally:
            for module in training:
                module.training = True
        rows, places = {}, None
        for name in self.hooks:
            activation = kept[name]
            places = _places(activation, index, state.n_series_channels, self.head == "each")
            activation = self._by_head(activation, name)
            observed = model.observed_at(name, state)
            if observed is not None and activation.ndim > 2:
                activation, places = activation[observed], places[observed]
            rows[name] = activation.reshape(-1, activation.shape[-1])
            places = places.reshape(-1, 4)
        lengths = {len(tensor) for tensor in rows.values()}
        if len(lengths) > 1:
            shapes = [list(activation.shape) for activation in kept.values()]
            raise ArgumentError(
                f"expected hooks with the same positions, got {shapes} at {list(self.hooks)}; "
                "stream them one by one"
            )
        return rows, places if places is not None else torch.empty(0, 4, dtype=torch.long)

    def _by_head(self, activation: Tensor, name: str) -> Tensor:
        if activation.ndim < 4:
            if self.head not in ("joined",):
                raise ArgumentError(f"head={self.head!r} was given, but {name} has no heads")
            return activation
        if self.head == "joined":
            return activation.flatten(-2)
        return activation if self.head == "each" else activation[..., int(self.head), :]


def _extent(model: HookedTST, hooks: Sequence[str]) -> tuple[int, bool]:
    """The layer to stop before, and whether the head has to run."""
    stop, runs_head = 0, False
    for name in hooks:
        part, layer = name.split(".")[0], model.layer_of(name)
        if layer is not None:
            stop = max(stop, layer + 1)
        elif model.crosses(name):
            stop = max(stop, model.cfg.n_encoder_layers + 1)
        elif part in ("head", "ln_final", "decoder_final_ln"):
            stop, runs_head = model.cfg.n_layers, True
    return stop, runs_head


def _places(activation: Tensor, index: Tensor, n_channels: int, each_head: bool) -> Tensor:
    """(series, channel, pos, head) of every row, shaped like the activation without features."""
    shape = activation.shape[: 3 if each_head else 2] if activation.ndim > 2 else (len(activation),)
    row = torch.arange(shape[0])
    places = torch.full((*shape, 4), -1, dtype=torch.long)
    by_row = (-1, *(1,) * (len(shape) - 1))
    places[..., 0] = index.cpu()[row // n_channels].view(by_row)
    if n_channels > 1:
        places[..., 1] = (row % n_channels).view(by_row)
    if len(shape) > 1:
        places[..., 2] = torch.arange(shape[1]).view(-1, *(1,) * (len(shape) - 2))
    if len(shape) > 2:
        places[..., 3] = torch.arange(shape[2])
    return places.to(activation.device)
