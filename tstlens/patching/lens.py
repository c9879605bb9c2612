"""The lens: what the head would say if the stream stopped here.

The final norm and the head are applied to the residual stream between the sublayers, so that the
depth at which a decision is made can be read in the model's own output space: classes, or a
forecast in the units of the series.

The head was trained on the last stream only. On the way there its reading is a heuristic: early
streams may hold what matters in directions that the head does not read. In a post-norm model each
sublayer's sum is also rescaled and shifted by its norm, with other weights each time, so readings
before the last rest on the bet that the blocks share a basis. The last point is the output itself.

What the lens returns: the output as read at every depth.

How a head's pooling routes positions into its pooled vector, as weights that were in force.

| pooling     | weight of a position, for each dimension                                       |
|-------------|--------------------------------------------------------------------------------|
| max         | 1 at the position that is largest in that dimension, else 0                    |
| mean        | 1 / observed positions, 0 at padding                                           |
| first, last | 1 at that (observed) position                                                  |
| flatten     | every position has its own slice of the pooled vector; 0 at padding            |

With these weights held fixed, pooling is linear in what stands at the positions. For all but max
they depend on the mask only; under max another input may have other winners.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from tstlens.arguments import check_finite, checked
from tstlens.data.validate import blanked
from tstlens.effects import Labelled
from tstlens.errors import ArgumentError, LabelError, SeriesShapeError
from tstlens.model import HookedTST, TrunkState
from tstlens.model.parts import Pooling
from tstlens.patching.checks import require_one_stack
from tstlens.patching.outputs import time_cells
from tstlens.patching.sources import rows_of
from tstlens.shapes import PosMask, Residual

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class LensResult(Labelled):
    """The model's output as the head reads it off the stream at every point.

    Args:
        output: [point, series, class] logits, or [point, series, channel, horizon] forecasts in
            the units of the series.
        points: where the stream was read, first to last.
        kind: ``"classes"`` or ``"forecast"``.
        target: int [series] classes, or true values [series, channel, horizon]; None where not
            given.
        final: the model's own output, [series, ...]; equals the last point.
        heuristic: what the readings can and cannot say.
        by_pos: the same with every position read by itself, [point, series, pos, ...], or None.
        observed: bool [series, pos], False at padding; beside ``by_pos``.
        series: what a forecaster read, [series, channel, time]; None for classifiers.
        time_cells: first and one-past-last sample that each position stands for, or None.
        class_names: for tables and figures, or None.
        made: how: model, where its norms are.
    """

    output: Float[Tensor, "point series *out"]
    points: tuple[str, ...]
    kind: Literal["classes", "forecast"]
    target: Tensor | None
    final: Float[Tensor, "*series_out"]
    heuristic: str
    by_pos: Float[Tensor, "point series pos *out"] | None = None
    observed: Bool[Tensor, "series pos"] | None = None
    series: Float[Tensor, "series channel time"] | None = None
    time_cells: tuple[tuple[int, int], ...] | None = None
    class_names: tuple[str, ...] | None = None
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes of ``output``."""
        return ("point", "series", *(("class",) if self._classes() else ("channel", "step")))

    def probabilities(self) -> Float[Tensor, "point series class"]:
        """Class probabilities at every point."""
        return self._logits().softmax(-1)

    def log_prob(self) -> Float[Tensor, "point series"]:
        """Log-probability (nats) of the target class at every point."""
        log_probs = self._logits().log_softmax(-1)
        index = self._labels().expand(log_probs.shape[:2])[..., None]
        return log_probs.gather(-1, index)[..., 0]

    def accuracy(self) -> Float[Tensor, " point"]:
        """Share of series whose largest logit is the target's."""
        return (self._logits().argmax(-1) == self._labels()).double().mean(1)

    def agreement(self) -> Float[Tensor, " point"]:
        """Share of series whose largest logit is that of the model's own output."""
        return (self._logits().argmax(-1) == self.final.argmax(-1)).double().mean(1)

    def kl(self) -> Float[Tensor, "point series"]:
        """KL divergence of each reading from the model's own output, in nats."""
        read, final = self._logits().log_softmax(-1), self.final.log_softmax(-1)
        return (final.exp() * (final - read)).sum(-1)

    @checked
    def mse(self, to: Literal["final", "target"] = "final") -> Float[Tensor, "point series"]:
        """Mean squared distance of each forecast from the final one or from the true values.

        In squared units of the series.
        """
        if self._classes():
            raise ArgumentError("mse is for forecasts, and this model classifies; see kl()")
        if to == "target" and self.target is None:
            raise ArgumentError("no true values were given: call lens(model, series, target)")
        reference = self.target if to == "target" and self.target is not None else self.final
        return ((self.output - reference) ** 2).flatten(2).mean(-1)

    def summary(self) -> pd.DataFrame:
        """One row per point: accuracy, agreement and distance from the model's own output."""
        import pandas as pd

        columns: dict[str, Any] = {"point": list(self.points)}
        if self._classes():
            if self.target is not None:
                columns["accuracy"] = self.accuracy().tolist()
                columns["log_prob"] = self.log_prob().mean(1).tolist()
            columns["agreement"] = self.agreement().tolist()
            columns["kl"] = self.kl().mean(1).tolist()
        else:
            if self.target is not None:
                columns["mse_target"] = self.mse("target").mean(1).tolist()
            columns["mse_final"] = self.mse().mean(1).tolist()
        return pd.DataFrame(columns)

    def entries(self) -> dict[str, Any]:
        """Point and series, then class, or channel and step."""
        sizes = map(range, self.output.shape[1:])
        return dict(zip(self.axes, (self.points, *sizes), strict=True))

    def columns(self) -> dict[str, Any]:
        """Logit and probability (and target), or the forecast."""
        output = self.output.double()
        if not self._classes():
            return {"forecast": output}
        found = {"logit": output, "probability": self.probabilities().double()}
        if self.target is not None:
            found["target"] = self.target.view(-1, 1)
        return found

    def __repr__(self) -> str:
        what = f"{self.output.shape[1]} series at {len(self.points)} points"
        return f"LensResult({self.kind} of {what}; {self.heuristic})"

    def _classes(self) -> bool:
        return self.kind == "classes"

    def _logits(self) -> Tensor:
        if not self._classes():
            raise ArgumentError("this model forecasts: its readings have no classes; see mse()")
        return self.output

    def _labels(self) -> Tensor:
        if self.target is None:
            raise ArgumentError("no classes were given: call lens(model, series, labels)")
        return self.target.to(self.output.device).long()


SERIES_PER_BLOCK = 64  # series whose activations are held at once

PRE_NORM = (
    "the head was trained on the last stream: earlier readings are a heuristic, the last is exact"
)
POST_NORM = (
    "heuristic: post-norm blocks rescale the stream after every sublayer, and the head fits what "
    "leaves the last; only that reading is exact"
)


@checked
@torch.no_grad()
def lens(
    model: HookedTST,
    series: Tensor,
    target: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    by_pos: bool = False,
    progress: bool = True,
) -> LensResult:
    """Apply final norm and head to the residual stream before, within and after every block.

    It answers "how deep in the model is the decision made?". Points are ``resid_pre`` of block 0
    (the embedding), then ``resid_mid`` and ``resid_post`` of every block. In post-norm models they
    are what the norms make of these sums, which is what the model itself goes on with, and the
    result says that it is a heuristic.

    What can mislead: the head was trained on the last stream, so a low early accuracy does not say
    that the information is not there (a probe would tell); with a max pooling the winners differ
    from point to point; and accuracy early on may be the embedding's alone.

    Args:
        model: the model; its head may be any.
        series: float [batch, channel, time].
        target: int [batch] classes, or a forecast's true values [batch, channel, horizon] in the
            units of the series; None for no comparison.
        mask: bool [batch, time], True where observed.
        by_pos: also read every position by itself, as if it were the only one (not for a flatten
            head, whose positions have weights of their own, nor for a head of the user's own).
        progress: show a progress bar where it takes longer than a second.

    Returns:
        Outputs [point, series, class] or [point, series, channel, horizon], with probabilities,
        accuracy, distance from the final output, a frame and a figure.

    Raises:
        LabelError, SeriesShapeError: a target that does not fit.
        ArgumentError: no series, ``by_pos`` where the head does not allow it, or a model with an
            encoder and a decoder.

    Source: nostalgebraist 2020, "interpreting GPT: the logit lens"; Belrose et al. 2023,
        arXiv 2303.08112, on how it misleads.

    Example:
        >>> from tstlens import patching
        >>> from tstlens.model import HookedTST, HookedTSTConfig, HeadConfig, PerStepConfig
        >>> model = HookedTST(HookedTSTConfig(
        ...     n_layers=2, d_model=16, n_heads=4, d_mlp=32, n_channels=3,
        ...     embed=PerStepConfig(), head=HeadConfig("mean", n_classes=5)))
        >>> read = patching.lens(model, torch.randn(8, 3, 20), torch.zeros(8, dtype=torch.long))
        >>> read.points
        ('embed', 'L0 attn', 'L0 MLP', 'L1 attn', 'L1 MLP')
        >>> read.accuracy().shape
        torch.Size([5])
    """
    require_one_stack(model, "lens")
    model.check_series(series, mask)
    series = blanked(series, mask)
    if not len(series):
        raise ArgumentError("expected at least one series, got none")
    if by_pos:
        _check_by_pos(model)
    outputs, each_pos, finals, observed = [], [], [], []
    starts = range(0, len(series), SERIES_PER_BLOCK)
    for start in tqdm(starts, desc="lens", unit="block", disable=not progress, delay=1):
        rows = slice(start, start + SERIES_PER_BLOCK)
        stream, state, final = streams(model, *rows_of(series, mask, rows))
        check_finite(final.flatten(1).T, "the model", start)
        outputs.append(torch.stack([model.unembed(point, state) for point in stream]))
        finals.append(final)
        if by_pos:
            each_pos.append(torch.stack([_at_each_pos(model, point, state) for point in stream]))
            observed.append(_observed(state, stream[0]))
    output = torch.cat(outputs, 1)
    classifies = model.cfg.n_classes is not None or output.ndim == 3
    _check_target(target, output, classifies)
    return LensResult(
        output=output,
        points=point_names(model.cfg.n_layers),
        kind="classes" if classifies else "forecast",
        target=target,
        final=torch.cat(finals),
        heuristic=POST_NORM if model.cfg.norm_position == "post" else PRE_NORM,
        by_pos=torch.cat(each_pos, 1) if by_pos else None,
        observed=torch.cat(observed) if by_pos else None,
        series=None if classifies else series,
        time_cells=time_cells(model, series.shape[2]),
        class_names=model.cfg.class_names,
        made={"model": model.cfg.model_name, "norm_position": model.cfg.norm_position},
    )


def point_names(n_layers: int) -> tuple[str, ...]:
    """Where the lens reads: after the embedding and after every sublayer."""
    after = [f"L{layer} {sublayer}" for layer in range(n_layers) for sublayer in ("attn", "MLP")]
    return ("embed", *after)


def streams(
    model: HookedTST, series: Tensor, mask: Tensor | None
) -> tuple[list[Tensor], TrunkState, Tensor]:
    """The stream at every point of the lens, the state of its rows, and the model's own output."""
    names = ["blocks.0.hook_resid_pre", *_names(model)]
    residual, state = model.embed_series(series, mask)
    output, cache = model.run_with_cache(
        residual, state=state, start_at_layer=0, names_filter=names, return_cache_object=False
    )
    stream = [cache[name] for name in names]
    if model.cfg.norm_position == "post":  # what was cached at ln1 lacks its weight and bias
        for layer in range(model.cfg.n_layers):
            norm: Any = model.blocks[layer].ln1
            at = 1 + 2 * layer
            stream[at] = stream[at] * norm.w + getattr(norm, "b", 0.0)
    return stream, state, output


def _names(model: HookedTST) -> Sequence[str]:
    mid, post = ("ln1.hook_normalized", "hook_normalized_resid_post")
    if model.cfg.norm_position == "pre":
        mid, post = "hook_resid_mid", "hook_resid_post"
    return [f"blocks.{layer}.{leaf}" for layer in range(model.cfg.n_layers) for leaf in (mid, post)]


def _at_each_pos(model: HookedTST, stream: Tensor, state: TrunkState) -> Tensor:
    """The output of every position read by itself, [series, pos, *output]."""
    alone = TrunkState(n_series_channels=state.n_series_channels, statistics=state.statistics)
    return torch.stack([model.unembed(pos[:, None], alone) for pos in stream.unbind(1)], 1)


def _observed(state: TrunkState, stream: Tensor) -> Tensor:
    """bool [series, pos], False at padding."""
    if state.pos_mask is None:
        n_series = len(stream) // state.n_series_channels
        return torch.ones(n_series, stream.shape[1], dtype=torch.bool, device=stream.device)
    return state.pos_mask[:: state.n_series_channels]


def _check_by_pos(model: HookedTST) -> None:
    pooling = getattr(model.cfg.head, "pooling", None)
    if pooling in (None, "flatten"):
        kind = "is a module of your own" if pooling is None else "has weights for every position"
        raise ArgumentError(
            f"by_pos=True reads each position as if it were the only one, and this head {kind}; "
            "leave it out, or see patching.logit_attribution for what each position wrote"
        )


def _check_target(target: Any, output: Tensor, classifies: bool) -> None:
    if target is None:
        return
    shape = output.shape[1:]
    if not classifies:
        if target.shape != shape or not target.is_floating_point():
            raise SeriesShapeError(
                f"expected a target like the forecast, float {list(shape)}, got {target.dtype} "
                f"{list(target.shape)}"
            )
        return
    if target.shape != shape[:1] or target.is_floating_point() or target.dtype == torch.bool:
        raise LabelError(
            f"expected a target as integers [batch={shape[0]}], got {target.dtype} "
            f"{list(target.shape)}"
        )
    bad = target[(target < 0) | (target >= shape[1])]
    if len(bad):
        raise LabelError(f"expected targets in 0..{shape[1] - 1}, got {int(bad[0])}")


@dataclass(frozen=True)
class Routing:
    """The weights of one run.

    Args:
        weight: share of the pooled vector that comes from each position, [row, pos]; sums to 1
            (under flatten: 1 divided among the observed positions).
        winner: the position that each dimension was taken from under max pooling, [row, d_model];
            None for other poolings.
        flat: whether positions have slices of their own.
    """

    weight: Float[Tensor, "row pos"]
    winner: Int[Tensor, "row d_model"] | None = None
    flat: bool = False

    def unpool(self, direction: Float[Tensor, "row d_pooled"]) -> Residual:
        """A direction over the pooled vector as one over every position, [row, pos, d_model].

        The product with what stands at the positions, summed, is the product with what was pooled.
        """
        n_pos = self.weight.shape[1]
        if self.flat:
            return direction.unflatten(1, (n_pos, -1)) * (self.weight > 0)[:, :, None]
        if self.winner is None:
            return self.weight[:, :, None] * direction[:, None]
        spread = direction.new_zeros(len(direction), n_pos, direction.shape[1])
        return spread.scatter_(1, self.winner[:, None], direction[:, None])


def route(final: Residual, pooling: Pooling, mask: PosMask | None) -> Routing:
    """The weights with which a pooling took each position of the stream that it was given.

    Where several positions are largest in a dimension at once, max pooling is credited to one.

    Args:
        final: what the head pools, [row, pos, d_model]: after the final norm where there is one.
        pooling: the head's.
        mask: bool [row, pos], False at padding; None where there is none.
    """
    n_rows, n_pos = final.shape[:2]
    observed = torch.ones_like(final[:, :, 0]) if mask is None else mask.to(final.dtype)
    if pooling == "max":
        if mask is not None:
            final = final.masked_fill(~mask[:, :, None], float("-inf"))
        winner = final.argmax(1)
        weight = torch.nn.functional.one_hot(winner, n_pos).to(final.dtype).mean(1)
        return Routing(weight, winner)
    if pooling in ("mean", "flatten"):
        return Routing(observed / observed.sum(1, keepdim=True), flat=pooling == "flatten")
    taken = torch.zeros(n_rows, dtype=torch.long, device=final.device)
    if pooling == "last":
        taken = n_pos - 1 - observed.flip(1).argmax(1)
    return Routing(torch.nn.functional.one_hot(taken, n_pos).to(final.dtype))
