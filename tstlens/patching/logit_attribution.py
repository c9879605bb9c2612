"""Direct logit attribution: what every component writes to one output, by position.

In a pre-norm model the stream that reaches the head is a plain sum, so an output is one too, once
two things are held as they were in this run: the scales of the norms it passes (the final one, and
those on the embedding and on what sublayers write, where there are any), and which positions the
pooling takes (see :mod:`tstlens.patching.lens`). Only direct contributions are counted: a head
that matters by what a later head reads from it shows nothing here; patch it to see that.

What a logit attribution returns: contributions with named axes, which sum to the output.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from tstlens.arguments import Count, check_finite, checked
from tstlens.data.validate import blanked
from tstlens.effects import Labelled
from tstlens.errors import ArgumentError, NonlinearResidualError, UnknownAxisError
from tstlens.model import HeadConfig, HookedTST
from tstlens.model.norms import HeldNorm
from tstlens.patching.checks import require_one_stack
from tstlens.patching.lens import route
from tstlens.patching.metrics import OutputPart
from tstlens.patching.outputs import time_cells
from tstlens.patching.sources import rows_of

if TYPE_CHECKING:
    import pandas as pd


Kind = Literal["embed", "pos_embed", "head", "attn_bias", "second_attn", "mlp", "norm_bias"]
_REST = "head bias"  # what the output holds without any position


@dataclass(frozen=True)
class Component:
    """Something that writes to the residual stream.

    Args:
        name: what tables and figures call it.
        kind: what it is.
        layer: its block, where it lies in one.
        head: its head.
    """

    name: str
    kind: Kind
    layer: int | None = None
    head: int | None = None

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, eq=False, repr=False)
class LogitAttribution(Labelled):
    """How much of an output each component wrote at each position.

    Args:
        values: [series, (channel,) component, pos], in ``unit``.
        axes: names of the axes of ``values``.
        coords: for every axis what its entries are.
        components: what writes, in the order of the axis.
        constant: [series], the head's bias, which has no position.
        output: [series], what the model gives; the sum of the above.
        target: which output.
        unit: ``"logit"`` or ``"units of the forecast"``.
        pooling: how the head pools.
        weight: [series, (channel,) pos], share of the pooled vector taken from each position.
        winner: [series, (channel,) d_model], the position that each dimension was taken from under
            max pooling; None for other poolings.
        time_cells: first and one-past-last sample that each position stands for, or None.
        error: largest gap between the sum and the output, in ``unit``.
        made: how: model, method.
    """

    values: Float[Tensor, "*axes"]
    axes: tuple[str, ...]
    coords: dict[str, tuple[Any, ...]]
    components: tuple[Component, ...]
    constant: Float[Tensor, "*series"]
    output: Float[Tensor, "*series"]
    target: str
    unit: str
    pooling: str
    weight: Float[Tensor, "*where"]
    winner: Int[Tensor, "*which"] | None = None
    time_cells: tuple[tuple[int, int], ...] | None = None
    error: float = 0.0
    made: dict[str, Any] = field(default_factory=dict)

    def total(self) -> Float[Tensor, "*series"]:
        """The sum of everything, the head's bias included: the output, up to rounding."""
        axes = [at for at, axis in enumerate(self.axes) if axis != "series"]
        return self.values.sum(axes) + self.constant

    def by_component(self) -> Float[Tensor, "*series component"]:
        """Summed over positions (and channels)."""
        return self._summed_to("component")

    def by_pos(self) -> Float[Tensor, "*series pos"]:
        """Summed over components (and channels): ``figures.series(x, effect=...by_pos()[0])``."""
        return self._summed_to("pos")

    def _summed_to(self, axis: str) -> Tensor:
        if axis not in self.axes:
            raise UnknownAxisError(axis, self.axes, "This result has these")
        gone = [at for at, name in enumerate(self.axes) if name not in ("series", axis)]
        return self.values.sum(gone) if gone else self.values

    def mean(self) -> LogitAttribution:
        """The result averaged over series (winners are dropped, weights averaged)."""
        if "series" not in self.axes:
            raise UnknownAxisError("series", self.axes, "This result was averaged before")
        return replace(
            self,
            values=self.values.mean(0),
            axes=self.axes[1:],
            coords={axis: self.coords[axis] for axis in self.axes[1:]},
            constant=self.constant.mean(),
            output=self.output.mean(),
            weight=self.weight.mean(0),
            winner=None,
            made={**self.made, "n_series": len(self.values)},
        )

    @checked
    def top(self, n: Count = 5) -> pd.DataFrame:
        """The ``n`` components with the largest mean contribution in size, strongest first."""
        import pandas as pd

        result = self.mean() if "series" in self.axes else self
        by_component = result.by_component()
        order = by_component.abs().argsort(descending=True, stable=True)[:n].tolist()
        rows = [
            {"component": str(self.components[at]), "contribution": float(by_component[at])}
            for at in order
        ]
        return pd.DataFrame(rows, columns=["component", "contribution"])

    def columns(self) -> dict[str, Any]:
        """The contributions."""
        return {"contribution": self.values.double()}

    def to_dataframe(self) -> pd.DataFrame:
        """Long format: a column per axis, then kind, layer, head and contribution.

        The head's bias is a component without a position, so contributions of a series sum to its
        output.
        """
        import pandas as pd

        frame = super().to_dataframe()
        parts = {str(part): part for part in self.components}
        for name in ("kind", "layer", "head"):
            frame[name] = frame["component"].map({k: getattr(p, name) for k, p in parts.items()})
        rest = pd.DataFrame({"contribution": self.constant.reshape(-1).double().cpu().numpy()})
        if "series" in self.axes:
            rest["series"] = list(self.coords["series"])
        rest["component"], rest["kind"] = _REST, "head_bias"
        frame = pd.concat([frame, rest], ignore_index=True)
        whole = [name for name in ("channel", "layer", "head", "pos") if name in frame]
        frame = frame.astype({name: "Int64" for name in whole})
        return frame[[*self.axes, "kind", "layer", "head", "contribution"]]

    def __repr__(self) -> str:
        return (
            f"LogitAttribution({self.target} [{self.shape_text()}], mean "
            f"{float(self.output.mean()):.4g} {self.unit}, largest gap of the sum {self.error:.1e})"
        )


SERIES_PER_BLOCK = 64  # series whose activations are held at once

_REFUSED = (
    "logit_attribution adds up what components wrote to the residual stream, but this model "
    "normalises the stream after every sublayer (post-norm), so what they wrote does not add up to "
    "a logit; patch them instead (patching.sweep), or read the stream with patching.lens"
)


@checked
@torch.no_grad()
def logit_attribution(
    model: HookedTST,
    series: Tensor,
    labels: Tensor | int | None = None,
    *,
    other: Tensor | int | None = None,
    channel: int | None = None,
    step: int | None = None,
    mask: Tensor | None = None,
    progress: bool = True,
) -> LogitAttribution:
    """Split an output of a pre-norm model into what each component wrote at each position.

    It answers "who put this logit there, and when?". Components are the embedding, the positions,
    every head, the attention's output bias, a second attention (its bias included), every MLP (its
    bias included) and the biases of the norms on the embedding and before the head; the head's own
    bias has no position. They sum to the output.

    What can mislead: only direct writing counts, not what later components read; the norms'
    scales and a max pooling's winners are held fixed, so a contribution is not what would be lost
    by removing the component; a constant added to all logits changes no prediction, so compare
    classes with ``other``.

    Args:
        model: a pre-norm model with a linear head.
        series: float [batch, channel, time].
        labels: the class of each series, int [batch], or one class for all; classifiers only.
        other: classes to subtract, for the logit difference.
        channel: channel of the forecast; not needed where there is one.
        step: step of the forecast, negative from the end.
        mask: bool [batch, time], True where observed.
        progress: show a progress bar where it takes longer than a second.

    Returns:
        Contributions [series, (channel,) component, pos], in logits or in units of the forecast;
        the channel axis is there for classifiers whose channels go through the trunk one by one.

    Raises:
        NonlinearResidualError: the model is post-norm, or something edits its stream.
        ArgumentError: the head is not linear, the model has an encoder and a decoder, or the
            output asked for does not exist.
        LabelError: labels that are not classes of the model.

    Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits";
        TransformerLens' ``ActivationCache.logit_attrs``.

    Example:
        >>> from tstlens import patching
        >>> from tstlens.model import HookedTST, HookedTSTConfig, HeadConfig, PerStepConfig
        >>> model = HookedTST(HookedTSTConfig(
        ...     n_layers=2, d_model=16, n_heads=4, d_mlp=32, n_channels=3,
        ...     embed=PerStepConfig(), head=HeadConfig("max", n_classes=5), final_norm=True))
        >>> parts = patching.logit_attribution(model, torch.randn(8, 3, 20), labels=2)
        >>> parts.axes, parts.values.shape
        (('series', 'component', 'pos'), torch.Size([8, 14, 20]))
        >>> torch.allclose(parts.total(), parts.output, atol=1e-5)
        True
    """
    head = _check_model(model)
    model.check_series(series, mask)
    series = blanked(series, mask)
    if not len(series):
        raise ArgumentError("expected at least one series, got none")
    asked = OutputPart.of(model, head, len(series), labels, other, channel, step)
    blocks = []
    starts = range(0, len(series), SERIES_PER_BLOCK)
    bar = tqdm(starts, desc="logit attribution", unit="block", disable=not progress, delay=1)
    for start in bar:
        rows = slice(start, start + SERIES_PER_BLOCK)
        own = rows_of(series, mask, rows)
        blocks.append(_split_block(model, head, asked.rows(rows), *own))
    values = torch.cat([block.values for block in blocks])
    constant = torch.cat([block.constant for block in blocks])
    output = torch.cat([block.output for block in blocks])
    check_finite(output.reshape(len(output), -1).T, "the model")
    winners = [block.winner for block in blocks if block.winner is not None]
    error = _check_sum(values, constant, output)
    parts = components(model)
    per_channel = values.ndim == 4
    coords: dict[str, tuple[Any, ...]] = {
        "series": tuple(range(len(values))),
        **({"channel": tuple(range(values.shape[1]))} if per_channel else {}),
        "component": tuple(str(part) for part in parts),
        "pos": tuple(range(values.shape[-1])),
    }
    return LogitAttribution(
        values=values,
        axes=tuple(coords),
        coords=coords,
        components=parts,
        constant=constant,
        output=output,
        target=asked.name,
        unit="logit" if model.cfg.n_classes else "units of the forecast",
        pooling=head.pooling,
        weight=torch.cat([block.weight for block in blocks]),
        winner=torch.cat(winners) if winners else None,
        time_cells=time_cells(model, series.shape[2]),
        error=error,
        made={"model": model.cfg.model_name, "method": "direct logit attribution"},
    )


def components(model: HookedTST) -> tuple[Component, ...]:
    """What writes to the residual stream of a model, in the order of the forward pass."""
    cfg = model.cfg
    parts = [Component("embedding", "embed")]
    if cfg.positions != "none":
        parts.append(Component("positions", "pos_embed"))
    if cfg.norm_embed and _has_bias(model.ln_embed):
        parts.append(Component("embedding norm bias", "norm_bias"))
    for layer, block in enumerate(model.layers):
        parts += [Component(f"L{layer}H{head}", "head", layer, head) for head in range(cfg.n_heads)]
        if cfg.attn_bias or _has_bias(getattr(block, "ln1_post", None)):
            parts.append(Component(f"L{layer} attn bias", "attn_bias", layer))
        if block.second != "none":
            parts.append(Component(f"L{layer} {block.second} attn", "second_attn", layer))
        parts.append(Component(f"L{layer} MLP", "mlp", layer))
    if cfg.final_norm and _has_bias(model.final_norm):
        parts.append(Component("norm bias", "norm_bias"))
    return tuple(parts)


def _has_bias(norm: Any) -> bool:
    return hasattr(norm, "b")


@dataclass(frozen=True)
class _Block:
    """What a result holds, for some of the series."""

    values: Tensor
    constant: Tensor
    output: Tensor
    weight: Tensor
    winner: Tensor | None


def _split_block(
    model: HookedTST, head: HeadConfig, asked: OutputPart, series: Tensor, mask: Tensor | None
) -> _Block:
    cfg = model.cfg
    last = f"blocks.{cfg.n_layers - 1}.hook_resid_post"
    _, state = model.embed_series(series, mask)
    names = ["hook_embed", last]
    names += ["hook_pos_embed"] if cfg.positions != "none" else []
    names += ["ln_embed.hook_scale"] if cfg.norm_embed else []
    names += ["ln_final.hook_scale", "ln_final.hook_normalized"] if cfg.final_norm else []
    for layer, block in enumerate(model.layers):
        leaves = ["attn.hook_z", "hook_mlp_out"]
        leaves += ["ln1_post.hook_scale"] if cfg.use_normalization_before_and_after else []
        leaves += [f"hook_{block.second}_attn_out"] if block.second != "none" else []
        names += [f"blocks.{layer}.{leaf}" for leaf in leaves]
    output, cache = model.run_with_cache(
        series, mask=mask, names_filter=names, return_cache_object=False
    )

    def held(norm: Any, name: str) -> HeldNorm:
        return HeldNorm(norm, cache[f"{name}.hook_scale"])

    final = cache[last]
    if cfg.final_norm:
        norm: Any = model.final_norm
        final = cache["ln_final.hook_normalized"] * norm.w + getattr(norm, "b", 0.0)
    routing = route(final, head.pooling, state.pos_mask)
    read = routing.unpool(asked.direction.flatten(0, 1))  # [row, pos, d_model], after the norm
    after: list[Tensor] = []
    written = read
    if cfg.final_norm:
        norm = held(model.final_norm, "ln_final")
        written, after = norm.read(read), _of_bias(norm, read)
    entered, between = written, []
    if cfg.norm_embed:
        norm = held(model.ln_embed, "ln_embed")
        entered, between = norm.read(written), _of_bias(norm, written)
    parts = [(cache["hook_embed"] * entered).sum(-1)]
    if cfg.positions != "none":
        parts.append((cache["hook_pos_embed"] * entered).sum(-1))
    parts += between
    for layer, block in enumerate(model.layers):
        name = f"blocks.{layer}"
        attn: Any = block.attn
        attended, own = written, []
        if cfg.use_normalization_before_and_after:
            norm = held(block.ln1_post, f"{name}.ln1_post")
            attended, own = norm.read(written), _of_bias(norm, written)
        per_head = torch.einsum("rpm,hdm->rphd", attended, attn.W_O)
        parts += (cache[f"{name}.attn.hook_z"] * per_head).sum(-1).unbind(-1)
        own += [attended @ attn.b_O] if cfg.attn_bias else []
        parts += [torch.stack(own).sum(0)] if own else []
        if block.second != "none":
            parts.append((cache[f"{name}.hook_{block.second}_attn_out"] * written).sum(-1))
        parts.append((cache[f"{name}.hook_mlp_out"] * written).sum(-1))
    parts += after
    return _Block(
        values=asked.by_series(torch.stack(parts, 1)),
        constant=asked.constant,
        output=asked.read(output),
        weight=asked.by_series(routing.weight),
        winner=None if routing.winner is None else asked.by_series(routing.winner),
    )


def _of_bias(norm: HeldNorm, direction: Tensor) -> list[Tensor]:
    """What a norm's bias adds in a direction behind it, [row, pos]; nothing where it has none."""
    bias = norm.bias
    return [] if bias is None else [(bias * direction).sum(-1)]


def _check_model(model: HookedTST) -> HeadConfig:
    require_one_stack(model, "logit_attribution")
    if model.cfg.norm_position == "post":
        raise NonlinearResidualError(_REFUSED)
    if not isinstance(model.cfg.head, HeadConfig):
        raise ArgumentError(
            "logit_attribution needs a head that pools and then maps linearly, and this model's is "
            "another; patch with patching.sweep, or read the stream with patching.lens"
        )
    return model.cfg.head


def _check_sum(values: Tensor, constant: Tensor, output: Tensor) -> float:
    """The largest gap between the sum of all parts and the output."""
    total = values.flatten(1).sum(1) + constant
    size = 1 + values.flatten(1).abs().sum(1) + constant.abs()
    gap = (total - output).abs()
    if bool((gap > 1e3 * torch.finfo(values.dtype).eps * size).any()):
        raise NonlinearResidualError(
            f"contributions add up to {float(total[gap.argmax()]):.4g} where the model gives "
            f"{float(output[gap.argmax()]):.4g}: something edits the residual stream or the head "
            "(a permanent hook, a spliced module); remove it with model.reset_hooks()"
        )
    return float(gap.max())
