"""Taking one latent away, or adding it: dose response, beside random latents.

What removing each latent does to the model's output, measured for all latents.

Outputs with more or less of one latent, as plain data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tstlens.arguments import Count, Seed, checked
from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError
from tstlens.model import HookedTST
from tstlens.results import Result
from tstlens.saes.checks import check_at_least, check_data
from tstlens.saes.reading.activity import Worlds, by_head
from tstlens.stats import t_interval

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class LatentEffect(Result):
    """Outputs of a model with more or less of one latent.

    Args:
        kind: ``"ablation"`` or ``"steering"``.
        latent: which latent.
        doses: share of the latent's activation removed (ablation), or multiples of ``unit`` added
            at every position (steering).
        output: [dose, series, ...] logits [class] or forecasts [channel, horizon].
        baseline: [series, ...] without the edit.
        controls: [control, dose, series, ...] the same with other latents.
        control_latents: which those were.
        series: indices of the series in the data.
        outputs: class names, or steps of the forecast.
        task: ``"class"`` or ``"forecast"``.
        labels: class index per series, or None.
        unit: activation that one unit of steering adds; 1 for ablation (a share).
        hook: where the latent lives.
        made: how.
    """

    kind: str
    latent: int
    doses: tuple[float, ...]
    output: Float[Tensor, "dose series *out"]
    baseline: Tensor
    controls: Float[Tensor, "control dose series *out"]
    control_latents: tuple[int, ...]
    series: Int[Tensor, " series"]
    outputs: tuple[str, ...]
    task: str
    labels: Int[Tensor, " series"] | None
    unit: float
    hook: str
    made: dict[str, Any] = field(default_factory=dict)

    def change(self, measure: str | None = None) -> Float[Tensor, " dose series out"]:
        """Change per dose, series and class (or step of the forecast, mean over channels).

        Args:
            measure: ``"probability"`` (the default for classifiers) or ``"logit"``; ``"forecast"``
                for forecasters.

        Raises:
            ArgumentError: another measure.
        """
        return self._measured(self.output, measure) - self._measured(self.baseline, measure)

    def control_change(
        self, measure: str | None = None
    ) -> Float[Tensor, "control dose series out"]:
        """The same for the control latents."""
        return self._measured(self.controls, measure) - self._measured(self.baseline, measure)

    def _measured(self, output: Tensor, measure: str | None) -> Tensor:
        known = ("forecast",) if self.task == "forecast" else ("probability", "logit")
        measure = known[0] if measure is None else measure
        if measure not in known:
            raise ArgumentError(f"expected a measure of {list(known)}, got {measure!r}")
        if measure == "forecast":
            return output.double().mean(-2)
        return output.double().softmax(-1) if measure == "probability" else output.double()

    def to_dataframe(self, measure: str | None = None) -> pd.DataFrame:
        """One row per dose and class (or forecast step).

        ``change`` is the mean over series with a 95 % t interval (``low``, ``high``);
        ``control`` the mean over the control latents of their mean change, ``control_low`` and
        ``control_high`` the least and greatest of these, and ``beyond_controls`` the share of
        control latents with a smaller mean change in size.
        """
        import pandas as pd

        change, control = self.change(measure), self.control_change(measure).mean(2)
        mean = change.mean(1)
        ends = t_interval(change.transpose(0, 1).flatten(1).numpy())  # of [series, dose * output]
        low, high = (torch.from_numpy(end).view_as(mean) for end in ends)
        smaller = (control.abs() < mean.abs()).double().mean(0)
        index = pd.MultiIndex.from_product(
            [self.doses, self.outputs],
            names=["dose", "class" if self.task == "class" else "step"],
        )
        columns = {
            "change": mean,
            "low": low,
            "high": high,
            "control": control.mean(0),
            "control_low": control.amin(0),
            "control_high": control.amax(0),
            "beyond_controls": smaller,
        }
        frame = pd.DataFrame({k: v.flatten().numpy() for k, v in columns.items()}, index=index)
        return frame.reset_index()

    def __repr__(self) -> str:
        size = self.change().mean(1).abs().amax(1)
        shown = ", ".join(f"{d:g}: {float(s):.3g}" for d, s in zip(self.doses, size, strict=True))
        return (
            f"LatentEffect({self.kind} of latent {self.latent} at {self.hook}, "
            f"{len(self.series)} series, largest mean change by dose {{{shown}}})"
        )


@checked
def ablate_latent(
    model: HookedTST,
    sae: Any,
    data: TimeSeriesData,
    latent: Any,
    *,
    doses: Sequence[float | int] = (0.25, 0.5, 0.75, 1.0),
    n_controls: int = 8,
    max_series: int | None = None,
    seed: Seed = 0,
    batch_size: Count = 128,
) -> LatentEffect:
    """What the output would be with less of one latent.

    A share (``doses``) of the latent's term ``activation * direction`` is subtracted from the
    activation, at every position where it is active; the SAE's error stays in place and everything
    downstream is computed anew. Only series in which the latent is active are used: in the others
    nothing would change. Controls are other latents, ablated in the same series, drawn at random
    among those active in at least half of these series (or, where fewer are, those active in the
    most).

    What can mislead: a latent whose loss others make up for has no effect, and may still be used;
    a control that writes a larger term has a larger effect for that alone.

    Args:
        model: the model.
        sae: a sae-lens SAE of one of its hook points, or a codebook.
        data: series to ablate in.
        latent: which one.
        doses: shares to remove; 1 removes it, above 1 turns it around.
        n_controls: control latents.
        max_series: at most so many series, those where the latent is strongest; None for all.
        seed: of the draw of controls.
        batch_size: worlds per forward pass.

    Returns:
        Outputs per dose and series, with frame and figure.

    Raises:
        ArgumentError: no such latent, one that is never active, or no doses.

    Example:
        >>> from tstlens import saes
        >>> saes.ablate_latent(model, sae, data, 12).to_dataframe()  # doctest: +SKIP
    """
    worlds, latents, strongest = _prepare(
        model, sae, data, latent, doses, n_controls, batch_size, max_series
    )
    order = strongest[:, latent].argsort(descending=True, stable=True)
    chosen = order[strongest[order, latent] > 0][:max_series]
    controls = _controls(strongest[chosen] > 0, latent, n_controls, seed)
    active = latents[worlds.row_index(chosen)]
    outputs = [
        torch.stack(
            [
                worlds.outputs(chosen, -dose * active[:, :, one], _same(one, chosen)).cpu()
                for dose in doses
            ]
        )
        for one in (latent, *controls)
    ]
    return _result("ablation", worlds, data, latent, doses, outputs, controls, chosen, 1.0, seed)


@checked
def steer_latent(
    model: HookedTST,
    sae: Any,
    data: TimeSeriesData,
    latent: Any,
    *,
    doses: Sequence[float | int] = (0.5, 1.0, 2.0, 4.0),
    unit: float | int | None = None,
    n_controls: int = 8,
    max_series: int | None = None,
    seed: Seed = 0,
    batch_size: Count = 128,
) -> LatentEffect:
    """What the output would be with more of one latent, at every position.

    ``dose * unit * direction`` is added to the activation at all observed positions. Controls are
    other latents of the SAE, drawn at random among the active ones, with the added vector scaled to
    the same length: so they ask whether *this* direction matters, not how far one has to push.

    What can mislead: a large dose leaves the activations that the model has ever seen, and moves
    the output for that alone: compare with the controls at the same dose.

    Args:
        model: the model.
        sae: a sae-lens SAE of one of its hook points, or a codebook.
        data: series to steer.
        latent: which one.
        doses: multiples of ``unit``; negative ones push the other way.
        unit: activation of one dose; by default the latent's mean activation where it is active
            in the data.
        n_controls: control latents.
        max_series: at most so many series, evenly spaced over the data; None for all.
        seed: of the draw of controls.
        batch_size: worlds per forward pass.

    Returns:
        Outputs per dose and series, with frame and figure.

    Raises:
        ArgumentError: no such latent, one that is never active (give ``unit``), or no doses.

    Example:
        >>> from tstlens import saes
        >>> saes.steer_latent(model, sae, data, 12, doses=(1, 2)).figure()  # doctest: +SKIP
    """
    worlds, latents, strongest = _prepare(
        model, sae, data, latent, doses, n_controls, batch_size, max_series, never=unit is None
    )
    if unit is None:
        values = latents[:, :, latent]
        unit = float(values[values != 0].mean())
    count = min(max_series or len(data), len(data))
    chosen = torch.linspace(0, len(data) - 1, count, dtype=torch.float64).round().long()
    chosen = chosen.to(latents.device)
    controls = _controls((strongest > 0).any(0)[None], latent, n_controls, seed)
    norm = worlds.directions.norm(dim=1)
    n_rows, n_pos = len(chosen) * worlds.rows, latents.shape[1]
    outputs = []
    for one in (latent, *controls):
        size = unit * float(norm[latent] / norm[one].clamp(min=1e-12))
        by_dose = [
            worlds.outputs(chosen, latents.new_full((n_rows, n_pos), d * size), _same(one, chosen))
            for d in doses
        ]
        outputs.append(torch.stack(by_dose).cpu())
    return _result("steering", worlds, data, latent, doses, outputs, controls, chosen, unit, seed)


def _prepare(
    model: HookedTST,
    sae: Any,
    data: TimeSeriesData,
    latent: Any,
    doses: Sequence[float | int],
    n_controls: int,
    batch_size: int,
    max_series: int | None,
    never: bool = True,
) -> tuple[Worlds, Tensor, Tensor]:
    check_data(data)
    check_at_least(1, batch_size=batch_size)
    if max_series is not None:
        check_at_least(1, max_series=max_series)
    if not len(doses) or not all(np.isfinite(dose) for dose in doses):
        raise ArgumentError(f"expected at least one finite dose, got {list(doses)}")
    if n_controls < 0:
        raise ArgumentError(f"expected n_controls of at least 0, got {n_controls}")
    n_latents = len(by_head(model, sae).W_dec)
    if isinstance(latent, bool) or not isinstance(latent, int | np.integer):
        raise ArgumentError(f"expected a latent as an integer, got {latent!r}")
    if not 0 <= latent < n_latents:
        raise ArgumentError(f"expected a latent in 0..{n_latents - 1}, got {latent}")
    worlds = Worlds(model, sae, data, batch_size=batch_size)
    strongest = worlds.latents.unflatten(0, (-1, worlds.rows)).amax((1, 2))  # [series, latent]
    if never and not bool((strongest[:, latent] > 0).any()):
        raise ArgumentError(
            f"latent {latent} is never active on these {len(data)} series; choose one with a "
            "density above 0 in features.table(), or give unit= to steer with it all the same"
        )
    return worlds, worlds.latents, strongest


def _same(latent: int, series: Tensor) -> Tensor:
    return torch.full_like(series, latent)


def _controls(active: Tensor, latent: int, n_controls: int, seed: int) -> tuple[int, ...]:
    """Other latents, at random among those active in at least half of the series."""
    share = active.double().mean(0).cpu()
    share[latent] = -1
    candidates = (share >= 0.5).nonzero()[:, 0]
    if len(candidates) < n_controls:
        order = share.argsort(descending=True, stable=True)
        candidates = order[share[order] > 0][:n_controls]
    generator = torch.Generator().manual_seed(seed)
    drawn = candidates[torch.randperm(len(candidates), generator=generator)[:n_controls]]
    return tuple(sorted(int(one) for one in drawn))


def _result(
    kind: str,
    worlds: Worlds,
    data: TimeSeriesData,
    latent: int,
    doses: Sequence[float | int],
    outputs: list[Tensor],
    controls: tuple[int, ...],
    chosen: Tensor,
    unit: float,
    seed: int,
) -> LatentEffect:
    forecast = worlds.output.ndim == 3
    n_out = worlds.output.shape[-1]
    known = tuple(getattr(worlds.model.cfg, "class_names", None) or data.class_names)
    names = known if len(known) == n_out and not forecast else None
    chosen = chosen.cpu()
    empty = outputs[0][None][:0]
    return LatentEffect(
        kind=kind,
        latent=int(latent),
        doses=tuple(float(dose) for dose in doses),
        output=outputs[0],
        baseline=worlds.output.cpu()[chosen],
        controls=torch.stack(outputs[1:]) if controls else empty,
        control_latents=controls,
        series=chosen,
        outputs=tuple(names or (str(index) for index in range(n_out))),
        task="forecast" if forecast else "class",
        labels=None if data.labels is None else data.labels.cpu()[chosen],
        unit=float(unit),
        hook=worlds.place.reads,
        made={"seed": seed, "n_series": len(chosen)},
    )


@dataclass(frozen=True, eq=False)
class OutputEffects:
    """Mean change of the output when a latent is taken away.

    Args:
        task: ``"class"`` or ``"forecast"``.
        change: [latent, output] mean over the series used, of the logit of each class, or of the
            forecast at each step (mean over channels, in the units of the output; of quantiles or
            a distribution the median); NaN for latents that are never active.
        probability: [latent, class] the same of the probabilities; None for forecasts.
        size: [latent] root mean square change over series and outputs.
        n_series: [latent] series used: those where the latent is strongest.
    """

    task: str
    change: Float[np.ndarray, "latent output"]
    probability: Float[np.ndarray, "latent output"] | None
    size: Float[np.ndarray, " latent"]
    n_series: Int[np.ndarray, " latent"]


def output_effects(
    model: HookedTST,
    dictionary: Any,
    data: TimeSeriesData,
    *,
    n_series: int = 8,
    batch_size: int = 128,
    progress: bool = False,
) -> OutputEffects:
    """The effect on the output of removing one latent's contribution, for every latent.

    Each active latent's term ``activation * direction`` is subtracted from the activation at all
    positions, in the series where the latent is strongest; the dictionary's error stays in place,
    and everything downstream is computed anew. So this is a measured effect, on pre-norm and
    post-norm models alike; it is not a projection of the decoder on the output weights, which
    would claim that the rest of the model is linear.

    What can mislead: other latents keep the activations of the clean run, and a later layer may
    make up for the loss; the effect is that of removal, where the latent is strong, not on an
    average series.

    Args:
        model: the model.
        dictionary: its SAE or codebook.
        data: series to measure on.
        n_series: series per latent.
        batch_size: worlds per forward pass.
        progress: show a progress bar.

    Raises:
        ArgumentError: n_series below 1.
    """
    if n_series < 1:
        raise ArgumentError(f"expected n_series of at least 1, got {n_series}")
    worlds = Worlds(model, dictionary, data, batch_size=batch_size)
    by_series = worlds.latents.unflatten(0, (-1, worlds.rows)).amax((1, 2))  # [series, latent]
    top = by_series.topk(min(n_series, len(data)), dim=0)
    use = top.values > 0  # [rank, latent]
    latents, ranks = use.T.nonzero(as_tuple=True)  # in order of the latent
    series = top.indices[ranks, latents]
    forecast = worlds.output.ndim == 3
    n_out = worlds.output.shape[-1]
    n_latents = by_series.shape[1]
    change = torch.zeros(n_latents, n_out, dtype=torch.float64)
    probability = torch.zeros(n_latents, n_out, dtype=torch.float64)
    square = torch.zeros(n_latents, dtype=torch.float64)
    steps = range(0, len(series), batch_size)
    for start in tqdm(steps, desc="effects", disable=not progress, leave=False):
        which, latent = series[start : start + batch_size], latents[start : start + batch_size]
        rows = worlds.row_index(which)
        per_row = latent.repeat_interleave(worlds.rows)
        amounts = -worlds.latents[rows].gather(
            2, per_row[:, None, None].expand(-1, worlds.latents.shape[1], 1)
        )
        edited = worlds.outputs(which, amounts[..., 0], latent).double().cpu()
        before = worlds.output[which].double().cpu()
        difference = edited - before
        target = latent.cpu()
        square.index_add_(0, target, difference.flatten(1).square().mean(1))
        if forecast:
            change.index_add_(0, target, difference.mean(1))
        else:
            change.index_add_(0, target, difference)
            probability.index_add_(0, target, edited.softmax(-1) - before.softmax(-1))
    count = use.sum(0).cpu()
    mean = torch.where(count > 0, count, torch.nan)
    return OutputEffects(
        task="forecast" if forecast else "class",
        change=(change / mean[:, None]).numpy(),
        probability=None if forecast else (probability / mean[:, None]).numpy(),
        size=(square / mean).sqrt().numpy(),
        n_series=count.numpy(),
    )
