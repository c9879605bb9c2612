"""One way of a data set through a model: batches on its device, in eval mode, without gradients.

Whatever reads activations or outputs of more series than one batch runs the model here, so that
device, number format, masks, training flags, how far to run and where a row comes from are the same
everywhere. Two things are elsewhere: many edits of one series, each as one more row of a batch
(``tstlens/patching/worlds.py``), and whatever needs gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tstlens.arguments import one_per_row
from tstlens.errors import ArgumentError, HookError
from tstlens.metrics import Metric
from tstlens.shapes import Mask

Edits = Sequence[tuple[str, Callable[..., Any]]]  # (hook name, function of activation and hook)
Heads = Literal["joined", "each"] | int
NO_SERIES = "data: expected at least one series, got none"


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Eval mode for a while; afterwards every module has the training flag that it had.

    Args:
        model: a module; a function has no mode, and is left alone.
    """
    # Module.eval() visits and writes every module, which took a tenth of a pass.
    training = [part for part in getattr(model, "modules", tuple)() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


@dataclass(frozen=True, eq=False, repr=False)
class Pass:
    """What one forward pass gave.

    Args:
        model: the model that ran.
        index: [series], which of all series these are.
        acts: activations by hook name, as edits left them.
        output: the model's output [series, ...]; None where the pass stopped before it.
        state: what belongs to the rows of the trunk; None for a plain module.
    """

    model: Any
    index: Int[Tensor, " series"]
    acts: Mapping[str, Tensor]
    output: Tensor | None
    state: Any

    def __len__(self) -> int:
        return len(self.index)

    def observed(self, hook: str) -> Bool[Tensor, "row pos"] | None:
        """Where an activation holds no padding; None where it holds none at all."""
        return self.model.observed_at(hook, self.state)

    def rows(
        self, hook: str, head: Heads = "joined"
    ) -> tuple[Float[Tensor, "row width"], Int[Tensor, "row 4"]]:
        """An activation as rows, padding left out, and the place that each row is from.

        Args:
            hook: hook name.
            head: of q, k, v, z and result: ``"joined"`` makes one row of all heads, ``"each"`` one
                row per head, a number takes that head.

        Returns:
            Rows, and their (series, channel, pos, head). Channel is -1 where the trunk mixes
            channels, pos is -1 for pooled vectors, head is -1 unless heads are rows of their own.
            Models that run the mirrored series too give rows of both passes; there channel
            ``n_channels + c`` is channel c mirrored.

        Raises:
            ArgumentError: a head of an activation that has none.
        """
        found = self.acts[hook]
        if found.ndim < 4 and head != "joined":
            raise ArgumentError(f"head={head!r} was given, but {hook} has no heads")
        if found.ndim > 3 and head != "each":
            found = found.flatten(-2) if head == "joined" else found[..., int(head), :]
        places = self._places(found.shape[:-1]).to(found.device)
        observed = self.observed(hook)
        if observed is not None and found.ndim > 2:
            found, places = found[observed], places[observed]
        return found.reshape(-1, found.shape[-1]), places.reshape(-1, 4)

    def _places(self, shape: Sequence[int]) -> Int[Tensor, "*axis 4"]:
        """(series, channel, pos, head) for activations [row, pos, head] without their features."""
        places = torch.full((*shape, 4), -1, dtype=torch.long)
        per_series = self.state.n_series_channels
        row, *inner = (
            torch.arange(size).view(-1, *(1,) * (len(shape) - 1 - axis))
            for axis, size in enumerate(shape)
        )
        places[..., 0] = self.index.cpu()[row // per_series]
        if per_series > 1:
            places[..., 1] = row % per_series
        for axis, counted in enumerate(inner, 2):
            places[..., axis] = counted
        return places


@dataclass(eq=False, repr=False)
class Runs:
    """A data set, ready to be run through a model as often as needed.

    Hooks and dictionaries that are on the model stay and take part.

    Args:
        model: a :class:`~tstlens.model.HookedTST`; for outputs alone any module or function that
            takes series [batch, channel, time], and ``mask=`` where there is one.
        data: series [n, channel, time], or data with their mask. Data are cast to the model's
            number format; a tensor is taken as it is, so check it first (``model.check_series``).
        mask: bool [n, time], True where observed, for series given as a tensor.
        hooks: names whose activations every pass keeps. A pass runs no further than these need.
        start: no edit lies before this layer: what comes before it is run once, with the model as
            it is when this is made, and kept on the device. None runs everything every time.
        whole: run through the head where the hooks need it or not.
        covariates: tensors by name, first axis series; see ``HookedTST.with_covariates``.
        batch_size: series per forward pass.
        progress: show a progress bar over batches.
        title: of the bar.

    Raises:
        ArgumentError: no series, or data with a mask beside their own.
        UnknownHookError, HookError: a hook that is not there, or that cannot fire.

    Example:
        >>> import torch
        >>> from tstlens import HookedTST
        >>> model = HookedTST.from_pretrained("japanese-vowels")
        >>> runs = Runs(model, torch.randn(10, 12, 25), hooks=["hook_embed"], batch_size=4)
        >>> [one.acts["hook_embed"].shape[0] for one in runs.passes()]
        [4, 4, 2]
    """

    model: Any
    data: Any
    mask: Mask | None = None
    hooks: Sequence[str] = ()
    start: int | None = None
    whole: bool = False
    covariates: Mapping[str, Tensor] | None = None
    batch_size: int = 256
    progress: bool = False
    title: str = "series"
    _entering: list[tuple[Tensor, Any]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        cfg = getattr(self.model, "cfg", None) if hasattr(self.model, "embed_series") else None
        self.series, self._dtype = self.data, None
        if not isinstance(self.data, Tensor):
            if self.mask is not None:
                raise ArgumentError("data bring their own mask; leave out mask=")
            self.series, self.mask = self.data.series, self.data.mask
            self._dtype = None if cfg is None else cfg.dtype
        elif self.mask is not None:  # what stands in padding is read by nothing
            self.series = self.series.masked_fill(~self.mask.to(self.series.device)[:, None], 0.0)
        if not len(self.series):
            raise ArgumentError(NO_SERIES)
        if self.batch_size < 1:
            raise ArgumentError(f"batch_size: expected at least 1, got {self.batch_size}")
        self._hooked = cfg is not None
        parameters = getattr(self.model, "parameters", tuple)()
        first = next(iter(parameters), None)
        self._device = cfg.device if cfg else None if first is None else first.device
        self.hooks = tuple(self.hooks)
        self._stop = None  # runs through the head
        if self.hooks:
            self.model.require_live(self.hooks)
            stops = [self.model.point(name).stop for name in self.hooks]
            self._stop = None if self.whole or None in stops else max(stops)
        if self.start is not None:
            self._check_start()
            with self._quiet():
                self._entering = [self._enter(index) for index in self.parts()]

    def _check_start(self) -> None:
        cfg = self.model.cfg
        if cfg.residual_attention:
            self.start = 0  # later layers read more than the stream
        elif cfg.n_decoder_layers:
            self.start = min(int(self.start or 0), cfg.n_encoder_layers)
        self.model.require_live(self.hooks, start=self.start)

    def __len__(self) -> int:
        return len(self.series)

    def parts(self) -> list[slice]:
        """Which series each batch holds."""
        n, size = len(self.series), self.batch_size
        return [slice(first, min(first + size, n)) for first in range(0, n, size)]

    def placed(self, index: slice | Tensor) -> tuple[Tensor, Tensor | None]:
        """Some of the series and their mask, where the model is."""
        series = self.series[index].to(device=self._device, dtype=self._dtype)
        return series, None if self.mask is None else self.mask[index].to(series.device)

    def at(self, index: slice | Int[Tensor, " series"], edits: Edits = ()) -> Pass:
        """One pass of some of the series.

        Args:
            index: which; a slice of :meth:`parts`, or any of them with repeats.
            edits: (hook name, function) pairs, for this pass.

        Raises:
            HookError: an edit before the layer that the run starts at.
        """
        n = torch.arange(len(self.series))[index] if isinstance(index, slice) else index
        kept: dict[str, Tensor] = {}

        def keep(activation: Tensor, hook: Any) -> None:
            kept[hook.name] = activation.detach()

        if not self._hooked:
            with self._quiet():
                return Pass(self.model, n, kept, self._plain(index), None)
        if self._entering and edits:
            self.model.require_live([name for name, _ in edits], start=self.start)
        keeping = [*edits, *((name, keep) for name in self.hooks)]
        with self._quiet(), self.model.hooks(fwd_hooks=keeping):
            residual, state = self._entered(index)
            output = None
            if self._stop is None:
                output = self.model(residual, start_at_layer=self.start or 0, state=state)
            elif self._stop > (self.start or 0):
                span = {"start_at_layer": self.start or 0, "stop_at_layer": self._stop}
                self.model(residual, **span, state=state)
        if len(kept) < len(self.hooks):
            missing = sorted(set(self.hooks) - set(kept))
            raise HookError(f"{missing} did not fire in this run")
        return Pass(self.model, n, kept, output, state)

    def passes(self, edits: Edits = ()) -> Iterator[Pass]:
        """One pass per batch, in the order of the series."""
        bar = tqdm(self.parts(), desc=self.title, disable=not self.progress, leave=False)
        return (self.at(index, edits) for index in bar)

    def outputs(self, edits: Edits = ()) -> Float[Tensor, "series ..."]:
        """The model's outputs on the CPU.

        Raises:
            ArgumentError: hooks were given, and no ``whole=True``: the run stops before the head.
        """
        return torch.cat([self._output(one).cpu() for one in self.passes(edits)])

    def measure(
        self, metric: Metric | Callable[[Tensor], Any], edits: Edits = ()
    ) -> Float[Tensor, " series"]:
        """One number per series, float64 on the CPU.

        Args:
            metric: a metric whose targets are one per series, or without targets; or a function
                from outputs [batch, ...] to [batch]. It is given batch after batch.
            edits: (hook name, function) pairs.

        Raises:
            ArgumentError: not one finite number per series.
        """
        parts = []
        metric = metric.for_model(self.model) if isinstance(metric, Metric) else metric
        for one, index in zip(self.passes(edits), self.parts(), strict=True):
            output = self._output(one)
            if isinstance(metric, Metric) and metric.targets:
                values = metric.of_pairs(index)(output)
            else:
                values = one_per_row(metric(output), output, "measure")
            parts.append(values.double().cpu())
        return torch.cat(parts)

    @staticmethod
    def _output(one: Pass) -> Tensor:
        if one.output is None:
            raise ArgumentError("these runs stop before the head; make them with whole=True")
        return one.output

    def _plain(self, index: slice | Tensor) -> Tensor:
        series, mask = self.placed(index)
        return self.model(series) if mask is None else self.model(series, mask=mask)

    def _entered(self, index: slice | Tensor) -> tuple[Tensor, Any]:
        if self._entering and isinstance(index, slice) and index in self.parts():
            return self._entering[self.parts().index(index)]
        return self._enter(index)

    def _enter(self, index: slice | Tensor) -> tuple[Tensor, Any]:
        """What enters the layer that runs start at (the first one), and its state."""
        series, mask = self.placed(index)
        known = self.covariates
        given = known and {name: one[index].to(series.device) for name, one in known.items()}
        residual, state = self.model.embed_series(series, mask, given)
        if self.start:
            span = {"start_at_layer": 0, "stop_at_layer": self.start}
            residual = self.model(residual, **span, state=state)
        return residual, state

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        with evaluating(self.model), torch.no_grad():
            yield
