"""HookedTST: a time-series transformer with a hook point on every activation."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from tstlens.data.validate import check_series
from tstlens.errors import ArgumentError, LabelError, SeriesShapeError
from tstlens.model.block import make_block
from tstlens.model.cache import TSTActivationCache
from tstlens.model.config import HookedTSTConfig, LinearPatchesConfig
from tstlens.model.embed import Positions, make_embed
from tstlens.model.heads import make_head
from tstlens.model.hooking import CheckedHooks
from tstlens.model.norms import listened_to, make_norm
from tstlens.model.saving import SavedModel
from tstlens.model.state import TrunkState
from tstlens.model.weights import StackedWeights
from tstlens.shapes import Labels, Mask, Residual, Series

ReturnType = Literal["logits", "loss", "both"] | None


class HookedTST(CheckedHooks, StackedWeights, SavedModel):
    """A trunk of transformer blocks between an embedding front end and a head.

    Everything a TransformerLens user expects works: ``run_with_cache``, ``run_with_hooks``,
    ``hooks``, ``add_hook``, ``names_filter``, ``start_at_layer`` and ``stop_at_layer``, with the
    same names for activations and the same layouts for weights. The input is a float series
    [batch, channel, time] instead of tokens. New models are in eval mode.

    Args:
        cfg: sizes and options.
        embed: the front end, where ``cfg.embed`` says it is the user's own module.
        head: the head, where ``cfg.head`` says so.

    Example:
        >>> from tstlens.model import HookedTST, HookedTSTConfig, HeadConfig, PerStepConfig
        >>> model = HookedTST(HookedTSTConfig(
        ...     n_layers=2, d_model=16, n_heads=4, d_mlp=32, n_channels=3,
        ...     embed=PerStepConfig(), head=HeadConfig("mean", n_classes=5)))
        >>> logits, cache = model.run_with_cache(torch.randn(8, 3, 20))
        >>> logits.shape, cache["pattern", 1].shape
        (torch.Size([8, 5]), torch.Size([8, 4, 20, 20]))
    """

    def __init__(
        self,
        cfg: HookedTSTConfig,
        *,
        embed: nn.Module | None = None,
        head: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.cfg = cfg
        self.parity: Any = None
        self.info: dict[str, Any] = {}
        self.hook_series = HookPoint()  # [batch, channel, time]
        self.embed = make_embed(cfg, embed)
        self.hook_embed = HookPoint()  # [row, pos, d_model]
        if cfg.positions != "none":
            self.pos_embed = Positions(cfg.n_ctx or 512, cfg.d_model, cfg.positions == "learned")
            self.hook_pos_embed = HookPoint()  # [row, pos, d_model]
        self.blocks = nn.ModuleList(make_block(cfg) for _ in range(cfg.n_layers))
        if cfg.final_norm:
            self.ln_final = make_norm(cfg)
        self.head = make_head(cfg, head)
        self.setup()
        self.eval()

    def forward(
        self,
        series: Series | Residual,
        return_type: ReturnType = "logits",
        *,
        mask: Mask | None = None,
        target: Tensor | None = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        state: TrunkState | None = None,
    ) -> Any:
        """Run the model.

        Args:
            series: float [batch, channel, time]; with ``start_at_layer`` the residual stream
                [row, pos, d_model] that enters this layer.
            return_type: ``"logits"`` for the model's output (class logits [batch, class] or a
                forecast [batch, channel, horizon]), ``"loss"`` for the mean cross-entropy or mean
                squared error against ``target``, ``"both"``, or None.
            mask: bool [batch, time], True where a sample was observed; None when all were.
            target: int [batch] classes, or a forecast's true values [batch, channel, horizon].
            start_at_layer: first layer to run; negative counts from the end.
            stop_at_layer: layer to stop before, returning the residual stream that enters it.
            state: what :meth:`embed_series` returned with the residual, for ``start_at_layer``.

        Raises:
            SeriesShapeError: axes, channels or length are not the model's.
            SeriesValueError: NaN, infinity or an integer series.
            LabelError: a target outside the classes.
        """
        start, stop = self._layer_range(start_at_layer, stop_at_layer)
        if start_at_layer is None:
            residual, state = self.embed_series(series, mask)
        else:
            residual, state = self._check_residual(series), state or TrunkState()
        for block in self.blocks[start:stop]:
            residual = block(residual, state)  # [row, pos, d_model]
        if stop_at_layer is not None:
            return residual
        if return_type is None:
            return None
        output = self.unembed(residual, state)
        if return_type == "logits":
            return output
        loss = self.loss(output, target)
        if return_type == "loss":
            return loss
        if return_type == "both":
            return output, loss
        raise ArgumentError(
            f"return_type must be 'logits', 'loss', 'both' or None, got {return_type!r}"
        )

    def embed_series(
        self, series: Series, mask: Mask | None = None
    ) -> tuple[Residual, TrunkState]:
        """The residual stream that enters block 0, and the state that belongs to its rows.

        Args:
            series: float [batch, channel, time].
            mask: bool [batch, time], True where a sample was observed.
        """
        self.check_series(series, mask)
        if listened_to(self.hook_series):
            series = self.hook_series(series.clone())  # hooks may edit in place
        embedded, state = self.embed(series, mask)
        embedded = self.hook_embed(embedded)
        if self.cfg.positions == "none":
            return embedded, state
        positions = self.pos_embed(embedded.shape[1])
        if listened_to(self.hook_pos_embed):
            positions = self.hook_pos_embed(positions.expand(len(embedded), -1, -1).clone())
        return embedded + positions, state

    def unembed(self, residual: Residual, state: TrunkState | None = None) -> Tensor:
        """The model's output from what leaves the last block: final norm, pooling, linear map."""
        if self.cfg.final_norm:
            residual = self.ln_final(residual)
        return self.head(residual, state or TrunkState())

    def loss(self, output: Tensor, target: Tensor | None) -> Tensor:
        """Mean cross-entropy (nats) of a classifier, mean squared error of a forecaster."""
        if target is None:
            raise ArgumentError("return_type='loss' needs target=: labels or true values")
        if target.is_floating_point():
            if target.shape != output.shape:
                raise SeriesShapeError(
                    f"expected a target like the output {list(output.shape)}, "
                    f"got {list(target.shape)}"
                )
            return nn.functional.mse_loss(output, target)
        self.check_labels(target, len(output), output.shape[-1])
        return nn.functional.cross_entropy(output, target)

    def check_series(self, series: Series, mask: Mask | None = None) -> None:
        """Raise the error that says what is wrong with a series for this model."""
        check_series(series, n_channels=self.cfg.n_channels, n_time=self.cfg.n_time, mask=mask)
        n_pos = self.n_pos(series.shape[2])
        if n_pos is not None and n_pos < 1:
            raise SeriesShapeError(
                f"expected enough samples for one position, got {series.shape[2]} samples"
            )
        if isinstance(self.cfg.embed, LinearPatchesConfig):
            self.cfg.embed.offset(series.shape[2])

    @staticmethod
    def check_labels(labels: Labels, n: int, n_classes: int) -> None:
        """Raise :class:`LabelError` unless labels are [n] within 0..n_classes-1."""
        if labels.ndim != 1 or len(labels) != n:
            raise LabelError(f"expected one label per series [{n}], got {list(labels.shape)}")
        if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= n_classes):
            bad = labels[(labels < 0) | (labels >= n_classes)][0]
            raise LabelError(f"expected labels in 0..{n_classes - 1}, got {int(bad)}")

    def run_with_cache(
        self, *model_args: Any, return_cache_object: bool = True, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Run the model and return its output and all activations.

        Takes TransformerLens' arguments: ``names_filter``, ``device``, ``remove_batch_dim``,
        ``incl_bwd``, ``pos_slice``; and those of :meth:`forward`.
        """
        remove_batch_dim = kwargs.get("remove_batch_dim", False)
        out, cache = super().run_with_cache(*model_args, **kwargs)
        if return_cache_object:
            cache = TSTActivationCache(cache, self, has_batch_dim=not remove_batch_dim)
        return out, cache

    def n_pos(self, n_time: int) -> int | None:
        """Positions that a series of ``n_time`` samples becomes; None for a custom front end."""
        known = getattr(self.cfg.embed, "n_pos", None)
        return None if known is None else known(n_time)

    def time_span(self, pos: int, n_time: int | None = None) -> slice:
        """Samples that position ``pos`` was embedded from, as a slice of time."""
        return self._time("time_span", pos, n_time)

    def time_cell(self, pos: int, n_time: int | None = None) -> slice:
        """Samples that figures shade for position ``pos``: those nearest to it."""
        return self._time("time_cell", pos, n_time)

    def _time(self, kind: str, pos: int, n_time: int | None) -> slice:
        n_time = n_time or self.cfg.n_time
        of_pos: Callable[[int, int], slice] | None = getattr(self.cfg.embed, kind, None)
        if of_pos is None or n_time is None:
            raise ArgumentError(
                "this model's positions have no known place in time: "
                + ("its front end is your own module" if of_pos is None else "give n_time=")
            )
        n_pos = self.n_pos(n_time) or 0
        if not -n_pos <= pos < n_pos:
            raise ArgumentError(f"expected a position in 0..{n_pos - 1}, got {pos}")
        return of_pos(pos % n_pos, n_time)

    def _layer_range(self, start: int | None, stop: int | None) -> tuple[int, int]:
        n_layers = self.cfg.n_layers
        for name, layer in (("start_at_layer", start), ("stop_at_layer", stop)):
            if layer is not None and not -n_layers <= layer <= n_layers:
                raise ArgumentError(f"{name} must lie in {-n_layers}..{n_layers}, got {layer}")
        first = 0 if start is None else (start + n_layers if start < 0 else start)
        last = n_layers if stop is None else (stop + n_layers if stop < 0 else stop)
        return first, last

    def _check_residual(self, residual: Tensor) -> Residual:
        if residual.ndim != 3 or residual.shape[2] != self.cfg.d_model:
            raise SeriesShapeError(
                "with start_at_layer the input is the residual stream: expected "
                f"[row, pos, d_model={self.cfg.d_model}], got {list(residual.shape)}"
            )
        return residual

    def fold_batch_norm(self) -> HookedTST:
        """A copy whose conv stem has its batch norms multiplied into the convolutions.

        The same function in eval mode, up to rounding (parity is not carried over).

        Raises:
            ArgumentError: the front end has no live batch norm.
        """
        if getattr(self.cfg.embed, "batch_norm", None) != "live":
            raise ArgumentError("this model's front end has no live batch norm to fold")
        folded = copy.deepcopy(self)
        folded.reset_hooks(including_permanent=True)
        folded.cfg.embed = dataclasses.replace(self.cfg.embed, batch_norm="folded")
        folded.parity = None
        for stage in folded.embed.stages:
            stage.fold()
        folded.setup()
        return folded

    def to(self, *args: Any, **kwargs: Any) -> HookedTST:
        """Move or cast the model; ``cfg.device`` and ``cfg.dtype`` follow."""
        moved = super().to(*args, **kwargs)
        return moved._follow_parameters()

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        applied = super()._apply(fn, *args, **kwargs)
        return applied._follow_parameters()

    def _follow_parameters(self) -> HookedTST:
        first = next(self.parameters(), None)
        if first is not None:
            self.cfg.device, self.cfg.dtype = first.device, first.dtype
        return self
