"""HookedTST: a time-series transformer with a hook point on every activation."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tstlens.arguments import Count, Seed, checked
from tstlens.data.validate import check_series, usable_device
from tstlens.errors import ArgumentError, SeriesShapeError, SeriesValueError
from tstlens.model.cache import TSTActivationCache
from tstlens.model.codes import CodedModel
from tstlens.model.config import HookedTSTConfig
from tstlens.model.embed import Positions, make_embed, with_covariates
from tstlens.model.encoder_decoder import Trunk
from tstlens.model.heads import check_labels, loss_of, make_head
from tstlens.model.hooking import in_turn
from tstlens.model.norms import watched
from tstlens.model.parts import CustomConfig, LinearPatchesConfig
from tstlens.model.processing import ProcessedWeights
from tstlens.model.saving import SavedModel
from tstlens.model.state import TrunkState
from tstlens.model.steering import pushing
from tstlens.model.weights import StackedWeights
from tstlens.points import Hook, Index
from tstlens.randomness import seeded
from tstlens.shapes import Mask, Residual, Series

if TYPE_CHECKING:
    from tstlens.data.forecasting import ForecastWindows
    from tstlens.model.forecasting import Forecast

ReturnType = Literal["logits", "loss", "both"] | None


class HookedTST(Trunk, CodedModel, StackedWeights, ProcessedWeights, SavedModel):
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

    @seeded(0)
    def __init__(
        self,
        cfg: HookedTSTConfig,
        *,
        embed: nn.Module | None = None,
        head: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(cfg, HookedTSTConfig):
            raise ArgumentError(f"expected a HookedTSTConfig, got {type(cfg).__name__}")
        self.cfg = cfg = copy.copy(cfg)  # flags, device and dtype are this model's own
        self.parity: Any = None
        self.info: dict[str, Any] = {}
        self.hook_series = Hook("batch channel time")  # 0 where the mask says padding
        self.embed = make_embed(cfg, embed)
        self.hook_embed = Hook("row pos d_model")
        if cfg.positions != "none":
            self.pos_embed = Positions(cfg.n_ctx or 512, cfg.d_model, cfg.positions == "learned")
            self.hook_pos_embed = Hook("row pos d_model")
        self._make_trunk()
        self.head = make_head(cfg, head)
        self.init_weights(cfg.seed)
        self.setup()
        for point in self.hook_points():
            point.__dict__["cfg_of_model"] = cfg  # where use_fused stands
        self.eval()

    @property
    def config(self) -> HookedTSTConfig:
        """``cfg``, by the name that other libraries know."""
        return self.cfg

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @checked
    @torch.no_grad()
    def init_weights(self, seed: Seed = 0) -> None:
        """Draw the weights anew: normal with variance 1 / inputs, biases zero, norms one.

        Modules of the user's own keep theirs.

        Args:
            seed: the same seed gives the same weights.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            leaf = name.rsplit(".", 1)[-1]
            if (
                name.startswith("splices.")
                or parameter.is_meta  # a model without memory, made to look at its sizes
                or ".module." in name
                or (parameter.ndim == 1 and leaf in ("w", "weight"))
            ):
                continue
            if leaf.startswith("b"):
                parameter.zero_()
            else:
                in_front = parameter.ndim > 1 and leaf != "weight"
                fan_in = parameter.shape[-2] if in_front else parameter[0].numel()
                fan_in *= parameter.shape[0] if leaf == "W_O" else 1
                draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(draw / fan_in**0.5)

    @in_turn
    def forward(
        self,
        series: Series | Residual,
        return_type: ReturnType = "logits",
        *,
        mask: Mask | None = None,
        covariates: Mapping[str, Tensor] | None = None,
        target: Tensor | None = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        state: TrunkState | None = None,
        **others: Any,
    ) -> Any:
        """Run the model.

        Args:
            series: float [batch, channel, time]; with ``start_at_layer`` the residual stream
                [row, pos, d_model] that enters this layer.
            return_type: ``"logits"`` for the model's output (class logits [batch, class] or a
                forecast [batch, channel, horizon]), ``"loss"`` for the mean cross-entropy or mean
                squared error against ``target``, ``"both"``, or None.
            mask: bool [batch, time], True where a sample was observed; None when all were.
            covariates: see :meth:`with_covariates`, for models that take some.
            target: int [batch] classes, or a forecast's true values [batch, channel, horizon].
            start_at_layer: first layer to run; negative counts from the end.
            stop_at_layer: layer to stop before, returning the residual stream that enters it.
            state: what :meth:`embed_series` returned with the residual, for ``start_at_layer``.
            others: refused, with what to give instead.

        Raises:
            ArgumentError: an argument that is unknown, or does not go with another one.
            SeriesShapeError: axes, channels or length are not the model's.
            SeriesValueError: NaN, infinity, an integer series, or a dtype that is not the model's.
            LabelError: a target outside the classes.
        """
        if others:
            raise ArgumentError(f"the model takes no {next(iter(others))}=; {_instead(others)}")
        if return_type not in ("logits", "loss", "both", None):
            raise ArgumentError(
                f"return_type must be 'logits', 'loss', 'both' or None, got {return_type!r}"
            )
        if return_type in ("loss", "both") and stop_at_layer is not None:
            raise ArgumentError(
                f"stop_at_layer={stop_at_layer} returns the residual stream, which has no loss; "
                f"leave out return_type={return_type!r} or stop_at_layer"
            )
        start, stop = self._layer_range(start_at_layer, stop_at_layer)
        if state is not None and (start_at_layer is None or not isinstance(state, TrunkState)):
            raise ArgumentError(
                "state= is what embed_series returned with the residual stream, for use with "
                f"start_at_layer; got {type(state).__name__} and start_at_layer={start_at_layer}"
            )
        if start_at_layer is None:
            residual, state = self.embed_series(series, mask, covariates)
        else:
            if mask is not None or covariates is not None:
                raise ArgumentError(
                    "with start_at_layer padding is told by state=, which embed_series returns "
                    "with the residual stream; leave out mask= and covariates="
                )
            residual, state = self._check_residual(series), state or TrunkState()
            handed_on = self.cfg.residual_attention and 0 < start < self.cfg.n_layers
            if handed_on and state.previous_scores is None:
                raise ArgumentError(
                    f"every layer of this model adds the scores of the one before, so to start at "
                    f"layer {start} it needs state= with previous_scores: "
                    f"blocks.{start - 1}.attn.hook_attn_scores of the run that gave the residual"
                )
        residual, state = self.run_layers(residual, state, start, stop)
        if stop_at_layer is not None:
            return residual
        output = self.unembed(residual, state)
        if return_type is None or return_type == "logits":
            return output if return_type else None
        loss = self.loss(output, target)
        if return_type == "loss":
            return loss
        return output, loss

    @in_turn
    def embed_series(
        self, series: Series, mask: Mask | None = None, covariates: Any = None
    ) -> tuple[Residual, TrunkState]:
        """The residual stream that enters block 0, and the state that belongs to its rows.

        The arguments are those of :meth:`forward`.
        """
        series = self.with_covariates(series, covariates)
        self.check_series(series, mask)
        if watched(self.hook_series):
            series = self.hook_series(series.clone())  # hooks may edit in place
        embedded, state = self._front_end(series, mask)
        self._check_dtype(embedded, "embeddings")
        self._check_positions(state)
        self._tell_padding(state)
        embedded = self.hook_embed(embedded)
        if self.cfg.position_buckets is not None:
            state = self._biased(state, embedded)
        if self.cfg.positions == "none":
            return self.enter(embedded), state
        positions = self.pos_embed(embedded.shape[1])
        if watched(self.hook_pos_embed):
            positions = self.hook_pos_embed(positions.expand(len(embedded), -1, -1).clone())
        return self.enter(embedded + positions), state

    def _front_end(self, series: Series, mask: Mask | None) -> tuple[Residual, TrunkState]:
        """What the front end gives. Hooks that other libraries put on it see the embedding alone.

        What they do to it counts, as at ``hook_embed``; the state goes by them.
        """
        front: Any = self.embed
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        if not any(getattr(front, name) for name in hooks):
            return front(series, mask)
        inner, own, states = front.forward, vars(front).get("forward"), []

        def alone(*args: Any, **kwargs: Any) -> Residual:
            embedded, state = inner(*args, **kwargs)
            states.append(state)
            return embedded

        front.forward = alone
        try:
            return front(series, mask), states[-1]
        finally:
            del front.forward
            if own is not None:
                front.forward = own

    def _biased(self, state: TrunkState, embedded: Residual) -> TrunkState:
        bias = self.position_bias(embedded.shape[1])
        if watched(self.hook_position_bias):
            bias = self.hook_position_bias(bias.expand(len(embedded), -1, -1, -1).clone())
        return dataclasses.replace(state, score_bias=bias)

    @checked
    def by_channel(self, activation: Tensor) -> Tensor:
        """An activation [row, ...] of a channel-independent model as [batch, channel, ...].

        Args:
            activation: from a cache or a hook; rows are series-major.

        Raises:
            ArgumentError: the model's channels share a trunk, so rows are series already.
            SeriesShapeError: rows that do not divide by the channels.
        """
        if not self.cfg.channel_independent:
            raise ArgumentError(
                "by_channel is for models whose channels go through the trunk one by one; in this "
                "one they share it, and the first axis holds series"
            )
        n_rows = self.cfg.rows_per_series
        if len(activation) % n_rows:
            raise SeriesShapeError(
                f"expected [batch * channel={n_rows}, ...], got {list(activation.shape)}"
            )
        return activation.unflatten(0, (-1, n_rows))

    def with_covariates(
        self, series: Tensor, covariates: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """The series that the model runs on: the values, then their covariates as channels.

        ``model(series, covariates=c)`` is ``model(model.with_covariates(series, c))``. Sweeps,
        attribution, dictionaries and ``compare`` take what this returns.

        Args:
            series: float [batch, channel, time], the values; with their covariates in it already
                it is returned as it is.
            covariates: tensors by name, in the source's layout; None where there are none.

        Returns:
            Float [batch, channel, time] with ``cfg.n_channels`` channels.

        Raises:
            ArgumentError: covariates are missing, left over or misshapen: the names and shapes
                that are needed; or the model takes none.
            SeriesShapeError: a length that the model does not take.
        """
        return with_covariates(self.cfg.embed, series, covariates)

    @property
    def unembed(self) -> Unembedding:
        """From what leaves the last block to the output: ``model.unembed(residual, state)``."""
        return Unembedding(self)

    def loss(self, output: Tensor, target: Tensor | None) -> Tensor:
        """Mean cross-entropy (nats) of a classifier, mean squared error of a forecaster."""
        return loss_of(self.cfg.n_classes, output, target)

    check_labels = staticmethod(check_labels)

    @checked
    @contextmanager
    def steer(
        self, direction: Any, strength: float = 1.0, pos: Index = None
    ) -> Iterator[HookedTST]:
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
        with self.hooks(fwd_hooks=pushing(self, direction, strength, pos)):
            yield self

    def forecast(
        self,
        windows: ForecastWindows | Series,
        horizon: int | None = None,
        levels: Sequence[float] | None = None,
        *,
        n_samples: int | None = None,
        covariates: Mapping[str, Tensor] | None = None,
        recursive: bool = False,
        seed: int = 0,
        batch_size: int = 64,
        progress: bool = False,
    ) -> Forecast:
        """What comes after each window: quantiles, mean and draws, in the series' units.

        As the source's own pipeline says it. Hooks and dictionaries on the model take part:
        inside ``with model.hooks(...)`` it is the forecast under an intervention.

        Args:
            windows: data, or series [batch, channel, time].
            horizon: steps; None for the head's own.
            levels: of the quantiles; None for the head's own, or 0.1 to 0.9 of a distribution.
                Between levels of its own a head of quantiles is read linearly.
            n_samples: draws of each window, where the head gives a distribution or is drawn step
                by step (Chronos-T5, TimeSeriesTransformer; None there for the source's number).
            covariates: of past and future, where the model takes some; see
                :meth:`with_covariates`.
            recursive: go beyond the head's horizon by feeding forecasts back: every quantile as a
                path of its own in Chronos-Bolt (as its pipeline does), the median of what was
                drawn in Chronos-T5, the point forecast elsewhere.
            seed: of the draws.
            batch_size: windows per forward pass.
            progress: show a progress bar.

        Returns:
            A :class:`~tstlens.model.Forecast` with ``median``, ``mean``, ``quantile(level)``,
            ``samples``, a frame and a figure.

        Raises:
            ArgumentError: the model is no forecaster, a horizon or level that it does not reach,
                or draws from a head that has none.
            SeriesShapeError, SeriesValueError: windows that the model does not take.

        Example:
            >>> from tstlens.data import load_forecasting
            >>> windows = load_forecasting("co2")
            >>> HookedTST.from_pretrained("co2").forecast(windows[-3:]).median.shape
            torch.Size([3, 1, 52])
        """
        from tstlens.model.forecasting import forecast

        return forecast(
            self,
            windows,
            horizon,
            levels,
            n_samples=n_samples,
            covariates=covariates,
            recursive=recursive,
            seed=seed,
            batch_size=batch_size,
            progress=progress,
        )

    def check_series(self, series: Series, mask: Mask | None = None) -> None:
        """Raise the error that says what is wrong with a series for this model."""
        embed: Any = self.cfg.embed
        missing = bool(getattr(embed, "takes_missing", False))
        check_series(series, self.cfg.n_channels, self.cfg.n_time, mask, missing=missing)
        self._check_dtype(series)
        n_pos = self.n_pos(series.shape[2])
        if n_pos is not None and n_pos < 1:
            raise SeriesShapeError(
                f"expected enough samples for one position, got {series.shape[2]} samples; "
                "the front end's patches or kernels are longer than that"
            )
        if isinstance(embed, LinearPatchesConfig):
            embed.offset(series.shape[2])
        elif hasattr(embed, "check"):
            embed.check(series.shape[2])

    def _check_dtype(self, given: Tensor, what: str = "series") -> None:
        casts = what == "series" and isinstance(self.cfg.embed, CustomConfig)
        casts = casts or torch.is_autocast_enabled(given.device.type)
        if given.dtype != self.cfg.dtype and not casts:
            raise SeriesValueError(
                f"expected {self.cfg.dtype} {what} like the model's weights, got {given.dtype}; "
                f"cast one of them: series.to({self.cfg.dtype}) or model.to({given.dtype})"
            )

    @staticmethod
    def _check_positions(state: TrunkState) -> None:
        if state.pos_mask is None:
            return
        empty = ~state.pos_mask.any(1)
        if bool(empty.any()):
            row = int(empty.nonzero()[0, 0]) // state.n_series_channels
            raise SeriesShapeError(
                f"expected a mask that leaves every series an observed position, got none in row "
                f"{row}: its observed samples fall between the positions, or in what is dropped"
            )

    @checked
    def run_with_cache(
        self, *model_args: Any, return_cache_object: bool = True, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Run the model and return its output and all activations.

        Takes TransformerLens' arguments: ``names_filter``, ``device``, ``remove_batch_dim``,
        ``incl_bwd``, ``pos_slice``; and those of :meth:`forward`.
        """
        remove_batch_dim = kwargs.get("remove_batch_dim", False)
        if remove_batch_dim is True:
            self._check_one_row(model_args[0] if model_args else kwargs.get("series"), kwargs)
        out, cache = super().run_with_cache(*model_args, **kwargs)
        if return_cache_object:
            cache = TSTActivationCache(cache, self, has_batch_dim=not remove_batch_dim)
        return out, cache

    def _check_one_row(self, given: Any, kwargs: dict[str, Any]) -> None:
        per_channel = self.cfg.channel_independent and kwargs.get("start_at_layer") is None
        if not isinstance(given, Tensor) or not given.ndim:
            return  # the run says what it takes
        rows = len(given) * (self.cfg.rows_per_series if per_channel else 1)
        if rows != 1:
            raise ArgumentError(
                f"remove_batch_dim needs a single row in the trunk, got {rows}"
                + (" (series x channel)" if per_channel else "")
                + "; leave it out, or run one series at a time"
            )

    @checked
    def n_pos(self, n_time: Count) -> int | None:
        """Positions that a series of ``n_time`` samples becomes; None for a custom front end."""
        known = getattr(self.cfg.embed, "n_pos", None)
        return None if known is None else known(n_time)

    def time_span(self, pos: int, n_time: int | None = None) -> slice:
        """Samples that position ``pos`` was embedded from, as a slice of time."""
        return self._time("time_span", pos, n_time)

    def time_cell(self, pos: int, n_time: int | None = None) -> slice:
        """Samples that figures shade for position ``pos``: those nearest to it."""
        return self._time("time_cell", pos, n_time)

    @checked
    def _time(self, kind: str, pos: int, n_time: Count | None) -> slice:
        n_time = self.cfg.n_time if n_time is None else n_time
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

    def _check_residual(self, residual: Tensor) -> Residual:
        if not isinstance(residual, Tensor):
            raise SeriesShapeError(
                f"expected a tensor [row, pos, d_model={self.cfg.d_model}], got "
                f"{type(residual).__name__}"
            )
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
        embed: Any = self.cfg.embed
        folded.cfg.embed = dataclasses.replace(embed, batch_norm="folded")
        folded.parity = None
        stem: Any = folded.embed
        for stage in stem.stages:
            stage.fold()
        folded.setup()
        return folded

    def to(self, *args: Any, print_details: bool = False, **kwargs: Any) -> HookedTST:
        """Move or cast the model; ``cfg.device`` and ``cfg.dtype`` follow.

        ``print_details`` is TransformerLens'; nothing is printed.
        """
        device = kwargs.get("device", args[0] if args else None)
        if isinstance(device, str | int):
            usable_device(device)
        return super().to(*args, **kwargs)._follow_parameters()

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        applied = super()._apply(fn, *args, **kwargs)
        return applied._follow_parameters()

    def _follow_parameters(self) -> HookedTST:
        first = next(self.parameters(), None)
        if first is not None:
            self.cfg.device, self.cfg.dtype = first.device, first.dtype
        self._follow_dictionaries()
        return self


class Unembedding:
    """A model's way from its last block to its output, with the head's weights beside it."""

    def __init__(self, model: HookedTST) -> None:
        self._model = model

    def __call__(self, residual: Residual, state: TrunkState | None = None) -> Tensor:
        """The model's output from what leaves the last block: final norm, pooling, linear map."""
        if not isinstance(residual, Tensor) or not isinstance(state, TrunkState | None):
            got = f"{type(residual).__name__} and {type(state).__name__}"
            raise ArgumentError(f"expected the residual stream and its state, got {got}")
        model, state = self._model, state or TrunkState()
        if model.cfg.n_decoder_layers and state.encoded is None:  # the mask is the encoder's
            state = dataclasses.replace(state, pos_mask=None)
        with model._turn:
            if model.cfg.final_norm:
                residual = model.final_norm(residual)
            return model.head(residual, state)

    @property
    def W_U(self) -> Float[Tensor, "d_pooled d_out"]:
        """The head's linear map from the pooled vector to the outputs."""
        return self._model.W_U

    @property
    def b_U(self) -> Float[Tensor, " d_out"]:
        """The head's bias."""
        return self._model.b_U


# What users of other transformers reach for, and what says the same here.
_INSTEAD = {
    "attention_mask": "padding is told by mask=: bool [batch, time], True where a sample was "
    "observed",
    "past_values": "the series is the first argument, [batch, channel, time]",
    "past_observed_mask": "mask= is bool [batch, time], True where a sample was observed",
    "labels": "targets are target=, with return_type='loss'",
    "inputs_embeds": "start_at_layer=0 takes the residual stream as the first argument",
    "output_hidden_states": "model.run_with_cache(series) gives every activation",
    "output_attentions": "model.run_with_cache(series) gives every activation",
}


def _instead(others: Mapping[str, Any]) -> str:
    takes = [name for name in inspect.signature(HookedTST.forward).parameters if name != "self"]
    return _INSTEAD.get(next(iter(others)), f"it takes {', '.join(takes[:-1])}")
