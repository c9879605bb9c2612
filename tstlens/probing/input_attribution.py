"""Attribution of the output to its input, by captum's and shap's methods.

Nothing is computed here that they compute. What a series is compared with is never left unsaid, and
every channel and unit (patch or sample) has a share of the output.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from tstlens.arguments import Count, Seed, check_fields, check_gradients, checked, configured
from tstlens.data import TimeSeriesData
from tstlens.data.validate import check_series
from tstlens.effects import Labelled
from tstlens.errors import ArgumentError, SeriesShapeError, SeriesValueError
from tstlens.metrics import Metric
from tstlens.model import HookedTST
from tstlens.probing.measures import measured
from tstlens.probing.steering import series_and_mask
from tstlens.randomness import seeded
from tstlens.run import evaluating

if TYPE_CHECKING:
    from tstlens.probing.explanations import AttributionAgreement


NAMES = ("zero", "mean", "samples")


@dataclass(frozen=True, eq=False)
class Baseline:
    """The series that attribution starts from.

    Args:
        values: [batch, channel, time], one for every series, equal to the series where it is
            padding or missing; or [sample, channel, time] for ``"samples"``.
        name: in words, with where it comes from.
        many: whether the values are a set that every series is compared with.
    """

    values: Tensor
    name: str
    many: bool = False


def make_baseline(
    baseline: str | Tensor,
    series: Tensor,
    mask: Tensor | None,
    background: Tensor | TimeSeriesData | None,
) -> Baseline:
    """The baseline that was asked for, for every series.

    Raises:
        ArgumentError: another name, or samples without a background.
        SeriesShapeError: a tensor that does not fit the series.
    """
    if isinstance(baseline, Tensor):
        return Baseline(_keeping_padding(_given(baseline, series), series, mask), "given series")
    if baseline not in NAMES:
        raise ArgumentError(
            f"expected baseline as one of {', '.join(NAMES)}, or series [channel, time] or "
            f"[batch, channel, time], got {baseline!r}"
        )
    if baseline == "zero":
        return Baseline(_keeping_padding(torch.zeros_like(series), series, mask), "zero")
    if background is None:
        if baseline == "samples":
            raise ArgumentError(
                "baseline='samples' takes every series of background= as a baseline; give it"
            )
        others, seen, whose = series, mask, "the series given"
    else:
        others, seen = series_and_mask(background)
        whose = "the background series"
        if others.shape[1:] != series.shape[1:]:
            raise SeriesShapeError(
                f"expected a background [batch, channel={series.shape[1]}, "
                f"time={series.shape[2]}], got {list(others.shape)}"
            )
        check_series(others, mask=seen, missing=True)
        others = others.to(series)
    if baseline == "samples":
        if seen is not None or mask is not None:
            raise ArgumentError(
                "baseline='samples' mixes series, so none of them may be padded; use 'mean' or a "
                "tensor"
            )
        return Baseline(others, f"each of {len(others)} background series", many=True)
    mean = _mean(others, seen)[None].expand_as(series)
    return Baseline(_keeping_padding(mean, series, mask), f"mean of {whose} ({len(others)})")


def _given(baseline: Tensor, series: Tensor) -> Tensor:
    if baseline.ndim == 2:
        baseline = baseline[None]
    fits = baseline.shape[1:] == series.shape[1:] and len(baseline) in (1, len(series))
    if not fits:
        raise SeriesShapeError(
            f"expected a baseline [channel={series.shape[1]}, time={series.shape[2]}], or one for "
            f"each of the {len(series)} series, got {list(baseline.shape)}"
        )
    check_series(baseline)
    return baseline.to(series).expand_as(series)


def _mean(series: Tensor, mask: Tensor | None) -> Tensor:
    """[channel, time] over the series that observed each sample; elsewhere the channel's mean."""
    seen = ~series.isnan() if mask is None else ~series.isnan() & mask[:, None]
    values, count = torch.where(seen, series, 0.0), seen.sum(0)
    empty = ~seen.any(2).any(0)
    if bool(empty.any()):
        raise SeriesValueError(
            f"expected an observed value in every channel to take the mean of, got none in channel "
            f"{int(empty.nonzero()[0, 0])}; give other series as background="
        )
    overall = values.sum((0, 2)) / seen.sum((0, 2))
    return torch.where(count > 0, values.sum(0) / count.clamp(min=1), overall[:, None])


def _keeping_padding(baseline: Tensor, series: Tensor, mask: Tensor | None) -> Tensor:
    """Padded and missing samples are the series' own: nothing can be attributed to them."""
    seen = ~series.isnan() if mask is None else ~series.isnan() & mask[:, None].to(series.device)
    return torch.where(seen, baseline, series)


Unit = Literal["patch", "time"]
UNITS = ("patch", "time")
AXIS = {"patch": "pos", "time": "time"}  # unit -> name of the last axis of a result

Cells = tuple[tuple[int, int], ...]


def cells_of(model: HookedTST, n_time: int, unit: Unit) -> Cells:
    """(first, one past last) sample of every unit; they never overlap.

    Patches are the time cells of the model's positions: the samples nearest to each. Where patches
    overlap, each keeps its samples up to the start of the next one, so that no sample counts twice.
    A position that is left without samples has an empty cell; samples that the front end drops
    belong to no cell.

    Raises:
        ArgumentError: another unit, or positions that have no known place in time.
    """
    if unit not in UNITS:
        raise ArgumentError(f"expected unit as one of {', '.join(UNITS)}, got {unit!r}")
    if unit == "time":
        return tuple((sample, sample + 1) for sample in range(n_time))
    n_pos = model.n_pos(n_time)
    if n_pos is None:
        raise ArgumentError(
            "this model's positions have no known place in time: its front end is your own "
            "module; use unit='time'"
        )
    if model.cfg.positions_are == "channel":
        raise ArgumentError(
            "this model's positions are channels, each embedded from its whole series, so they "
            "have no place in time; use unit='time'"
        )
    spans = [model.time_cell(pos, n_time) for pos in range(n_pos)]
    starts = [span.start for span in spans] + [n_time]
    return tuple(
        (span.start, max(span.start, min(span.stop, following)))
        for span, following in zip(spans, starts[1:], strict=True)
    )


def unit_of_sample(cells: Cells, n_time: int) -> Int[Tensor, " time"]:
    """The unit that each sample belongs to; ``len(cells)`` for samples of none."""
    owner = torch.full((n_time,), len(cells), dtype=torch.int64)
    for number, (start, stop) in enumerate(cells):
        owner[start:stop] = number
    return owner


def feature_mask(cells: Cells, n_channels: int, n_time: int) -> Int[Tensor, "1 channel time"]:
    """captum's feature mask: one number per channel and unit, channel-major.

    Samples of no unit share one last number; the model does not read them.
    """
    owner = unit_of_sample(cells, n_time)
    channel = torch.arange(n_channels)[:, None]
    mask = channel * len(cells) + owner[None]
    return torch.where(owner[None] == len(cells), n_channels * len(cells), mask)[None]


def summed(
    values: Float[Tensor, "batch channel time"], cells: Cells
) -> Float[Tensor, "batch channel unit"]:
    """Values added up over the samples of every unit."""
    owner = unit_of_sample(cells, values.shape[2]).to(values.device)
    total = values.new_zeros(*values.shape[:2], len(cells) + 1)
    return total.index_add_(2, owner, values)[:, :, : len(cells)]


def seen_units(
    mask: Bool[Tensor, "batch time"] | None, cells: Cells, series: Float[Tensor, "batch _ time"]
) -> Bool[Tensor, "batch channel unit"]:
    """Units with at least one sample that is neither padding nor missing."""
    seen = ~series.isnan() if mask is None else ~series.isnan() & mask[:, None].to(series.device)
    return summed(seen.double().cpu(), cells) > 0


def spread(
    chosen: Bool[Tensor, "batch channel unit"], cells: Cells, n_time: int
) -> Bool[Tensor, "batch channel time"]:
    """Whether each sample's unit is chosen; samples of no unit are not."""
    owner = unit_of_sample(cells, n_time).to(chosen.device)
    none = chosen.new_zeros(*chosen.shape[:2], 1)
    return torch.cat([chosen, none], 2)[:, :, owner]


METHODS = (
    "integrated_gradients",
    "gradient_shap",
    "occlusion",
    "shapley_sampling",
    "kernel_shap",
    "permutation_shap",
)


@dataclass(frozen=True, eq=False)
class Task:
    """What is explained, on the model's device.

    Args:
        forward: from (series, mask, target) to one number per series.
        series: [batch, channel, time].
        baseline: [batch, channel, time], or [sample, channel, time] where ``many``.
        mask: [batch, time] or None.
        target: [batch] or None.
        cells: samples of every unit.
        many: whether the baselines are a set.
    """

    forward: Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
    series: Tensor
    baseline: Tensor
    mask: Tensor | None
    target: Tensor | None
    cells: Cells
    many: bool

    @property
    def beside(self) -> tuple[Tensor | None, Tensor | None]:
        """What captum passes on to ``forward`` beside the series."""
        return (self.mask, self.target)

    def each(self) -> Iterator[Task]:
        """The series one by one."""
        for row in range(len(self.series)):
            at = slice(row, row + 1)
            yield replace(
                self,
                series=self.series[at],
                baseline=self.baseline if self.many else self.baseline[at],
                mask=None if self.mask is None else self.mask[at],
                target=None if self.target is None else self.target[at],
            )


@seeded(0)
def required(method: str) -> Any:
    """The module that the method comes from.

    Raises:
        ArgumentError: there is no such method, or its library is not installed.
    """
    if method not in METHODS:
        raise ArgumentError(f"expected method as one of {', '.join(METHODS)}, got {method!r}")
    library = "shap" if method == "permutation_shap" else "captum"
    try:
        return importlib.import_module("shap" if library == "shap" else "captum.attr")
    except ImportError as error:
        raise ArgumentError(
            f"method={method!r} needs {library}, which is not installed: "
            'pip install "tstlens[probing]"'
        ) from error


def run_method(library: Any, method: str, task: Task, how: AttributionConfig) -> Tensor:
    """Values [batch, channel, unit] of one method."""
    n_samples, rows_per_pass = how.n_samples or 1, how.rows_per_pass
    if method == "integrated_gradients":
        values = library.IntegratedGradients(task.forward).attribute(
            task.series,
            baselines=task.baseline,
            additional_forward_args=task.beside,
            n_steps=how.n_steps,
            internal_batch_size=max(rows_per_pass, len(task.series)),
        )
        return _summed(values.detach().to(task.series), task)
    if method == "gradient_shap":
        return _summed(_gradient_shap(library, task, n_samples), task)
    if method == "permutation_shap":
        rows = [
            _permutation_shap(library, one, n_samples, rows_per_pass, how.seed + row)
            for row, one in enumerate(task.each())
        ]
        return torch.cat(rows)
    n_channels, n_time = task.series.shape[1:]
    options: dict[str, Any] = {
        "baselines": task.baseline,
        "additional_forward_args": task.beside,
        "feature_mask": feature_mask(task.cells, n_channels, n_time).to(task.series.device),
        "perturbations_per_eval": max(1, rows_per_pass // len(task.series)),
    }
    if method == "occlusion":
        values = library.FeatureAblation(task.forward).attribute(task.series, **options)
    elif method == "shapley_sampling":
        sampling = library.ShapleyValueSampling(task.forward)
        values = sampling.attribute(task.series, n_samples=n_samples, **options)
    else:
        values = torch.cat(
            [
                library.KernelShap(one.forward).attribute(
                    one.series,
                    n_samples=n_samples,
                    **options
                    | {
                        "baselines": one.baseline,
                        "additional_forward_args": one.beside,
                        "perturbations_per_eval": rows_per_pass,
                    },
                )
                for one in task.each()
            ]
        )
    return _of_first_sample(values.detach().to(task.series), task.cells)


def _summed(values: Tensor, task: Task) -> Tensor:
    """Added up over units; missing values, which no baseline fills in, have no share."""
    return summed(torch.where(task.series.isnan(), 0.0, values), task.cells)


def _of_first_sample(values: Tensor, cells: Cells) -> Tensor:
    """captum gives every sample of a unit the unit's value; 0 for units without samples."""
    found = values.new_zeros(*values.shape[:2], len(cells))
    for number, (start, stop) in enumerate(cells):
        if stop > start:
            found[:, :, number] = values[:, :, start]
    return found


def _gradient_shap(library: Any, task: Task, n_samples: int) -> Tensor:
    """captum draws baselines from one set for all series, so those with their own go one by one."""
    explainer = library.GradientShap(task.forward)

    def run(part: Task, baselines: Tensor) -> Tensor:
        values = explainer.attribute(
            part.series,
            baselines=baselines,
            additional_forward_args=part.beside,
            n_samples=n_samples,
            stdevs=0.0,
        )
        return values.detach().to(part.series)

    if task.many:
        return run(task, task.baseline)
    if bool((task.baseline == task.baseline[:1]).all()):
        return run(task, task.baseline[:1])
    return torch.cat([run(one, one.baseline) for one in task.each()])


@torch.no_grad()
def _permutation_shap(
    library: Any, task: Task, n_samples: int, rows_per_pass: int, seed: int
) -> Tensor:
    """shap's explainer over which units are the series' own (1) and which the baseline's (0)."""
    n_channels, n_time = task.series.shape[1:]
    n_units = len(task.cells)
    seen = seen_units(task.mask, task.cells, task.series).flatten()
    plays = seen.nonzero()[:, 0]

    def output(coalitions: np.ndarray) -> np.ndarray:
        parts = []
        for start in range(0, len(coalitions), rows_per_pass):
            own = torch.from_numpy(coalitions[start : start + rows_per_pass]) > 0.5
            chosen = torch.ones(len(own), n_channels * n_units, dtype=torch.bool)
            chosen[:, plays] = own
            where = spread(chosen.view(-1, n_channels, n_units), task.cells, n_time)
            mixed = torch.where(where.to(task.series.device), task.series, task.baseline)
            beside = [None if x is None else x.expand(len(own), *x.shape[1:]) for x in task.beside]
            parts.append(task.forward(mixed, beside[0], beside[1]).double().cpu())
        return torch.cat(parts).numpy()

    explainer = library.explainers.Permutation(output, np.zeros((1, len(plays))), seed=seed)
    everything = np.ones((1, len(plays)))
    found = explainer(everything, max_evals=n_samples * (2 * len(plays) + 1), silent=True)
    values = torch.zeros(n_channels * n_units, dtype=torch.float64)
    values[plays] = torch.from_numpy(np.asarray(found.values)[0])
    return values.view(1, n_channels, n_units).to(task.series)


@dataclass(frozen=True, repr=False)
class InputAttribution(Labelled):
    """Attribution of a measure to channel x patch or channel x sample, series by series.

    Args:
        values: [batch, channel, pos] or [batch, channel, time], in the measure's unit: what each
            unit adds on the way from the baseline to the series. NaN where a unit is padding.
        unit: ``"patch"`` or ``"time"``.
        cells: (first, one past last) sample of every unit.
        series: [batch, channel, time], as given.
        baseline: [batch, channel, time], what they were compared with; [sample, channel, time]
            where every series was compared with a set.
        baseline_name: in words.
        output: [batch], the measure of the series.
        baseline_output: [batch], the measure of the baseline (the mean over a set).
        target: [batch] classes, or None.
        method: which.
        measure: name of the measure.
        measure_unit: its unit.
        mask: [batch, time], False where padded; None where everything was observed.
        made: how: options of the method and its seed.
    """

    values: Float[Tensor, "batch channel unit"]
    unit: Unit
    cells: Cells
    series: Float[Tensor, "batch channel time"]
    baseline: Float[Tensor, "other channel time"]
    baseline_name: str
    output: Float[Tensor, " batch"]
    baseline_output: Float[Tensor, " batch"]
    target: Int[Tensor, " batch"] | None
    method: str
    measure: str
    measure_unit: str
    mask: Bool[Tensor, "batch time"] | None = None
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def axes(self) -> tuple[str, str, str]:
        """Names of the axes of ``values``."""
        return ("batch", "channel", AXIS[self.unit])

    @property
    def residual(self) -> Float[Tensor, " batch"]:
        """Sum of the attributions less the difference of the outputs; 0 where they are complete.

        Integrated gradients, GradientSHAP and Shapley values should add up to the difference;
        occlusion need not. A large residual of integrated gradients asks for more ``n_steps``.
        """
        return self.values.nansum((1, 2)) - (self.output - self.baseline_output)

    @property
    def completeness(self) -> Float[Tensor, " batch"]:
        """Size of the residual over that of the difference of outputs; NaN without a difference."""
        gap = (self.output - self.baseline_output).abs()
        return torch.where(gap > 1e-6, self.residual.abs() / gap, torch.nan)

    def per_sample(self) -> Float[Tensor, "batch channel time"]:
        """Every sample's unit's value, [batch, channel, time]; NaN for samples of no unit."""
        owner = unit_of_sample(self.cells, self.series.shape[2])
        none = self.values.new_full((*self.values.shape[:2], 1), torch.nan)
        return torch.cat([self.values, none], 2)[:, :, owner]

    @checked
    def agreement(self, sweep: Any, **options: Any) -> AttributionAgreement:
        """Rank agreement with causal patching of the same inputs; see ``attribution.agreement``.

        Args:
            sweep: a :class:`tstlens.patching.SweepResult` of the same series.
            **options: ``absolute``, ``level``, ``n_boot``, ``seed``.
        """
        from tstlens.probing.explanations import agreement

        return agreement(self, sweep, **options)

    def entries(self) -> dict[str, Sequence[int]]:
        """Series, channels and units."""
        return {name: range(n) for name, n in zip(self.axes, self.values.shape, strict=True)}

    def columns(self) -> dict[str, Any]:
        """First and last sample of every unit, and the attribution."""
        start, stop = np.array(self.cells).reshape(-1, 2).T
        return {"start": start, "stop": stop, "attribution": self.values}

    @checked
    def one(self, index: int) -> InputAttribution:
        """The attribution of one series, with its batch axis."""
        n = len(self.values)
        if not -n <= index < n:
            raise ArgumentError(f"expected a series in 0..{n - 1}, got {index}")
        at = slice(index % n, index % n + 1)
        own = len(self.baseline) == n and self.made.get("baseline") != "samples"
        per_series = {"values": self.values, "series": self.series, "output": self.output}
        per_series |= {"baseline_output": self.baseline_output, "target": self.target}
        per_series |= {"mask": self.mask} | ({"baseline": self.baseline} if own else {})
        cut = {name: part[at] for name, part in per_series.items() if part is not None}
        return replace(self, **cut)

    def __repr__(self) -> str:
        median = float(self.completeness.nanmedian())
        return (
            f"InputAttribution({self.method} [{self.shape_text()}], {self.measure}, against "
            f"{self.baseline_name}; residual {median:.1%} of the difference)"
        )


_N_SAMPLES = {"gradient_shap": 50, "shapley_sampling": 10, "kernel_shap": 2000}


@dataclass(frozen=True)
class AttributionConfig:
    """How much the methods compute; every field is also a keyword of :func:`attribute`.

    Args:
        n_steps: of integrated gradients.
        n_samples: of the sampling methods; None for 50, 10, 2000 and 10 in the order of the table
            at :func:`attribute`.
        seed: of the sampling methods; the same seed (and ``batch_size``) repeats them.
        batch_size: series explained together.
        rows_per_pass: perturbed series in one forward pass.
        progress: show a progress bar.
    """

    n_steps: Count = 64
    n_samples: Count | None = None
    seed: Seed = 0
    batch_size: Count = 64
    rows_per_pass: Count = 1024
    progress: bool = True

    def __post_init__(self) -> None:
        check_fields(self)


@checked
@configured(AttributionConfig)
def attribute(
    model: HookedTST,
    series: Tensor | TimeSeriesData,
    target: Tensor | int | None,
    *,
    method: str,
    baseline: str | Tensor,
    unit: Unit = "patch",
    measure: str | Callable[[Tensor], Tensor] | None = None,
    background: Tensor | TimeSeriesData | None = None,
    mask: Tensor | None = None,
    config: AttributionConfig | None = None,
    **settings: Any,
) -> InputAttribution:
    """Each channel's and patch's (or sample's) share of the output, against a named baseline.

    Answers "which part of this series made the output differ from that of the baseline?". The
    methods are captum's and shap's, called as they are:

    ======================== ======================================================================
    ``integrated_gradients`` captum ``IntegratedGradients`` (Gauss-Legendre, ``n_steps``), summed
                             over the samples of a unit
    ``gradient_shap``        captum ``GradientShap`` without noise, ``n_samples`` points, summed
    ``occlusion``            captum ``FeatureAblation``: each unit replaced by the baseline in turn
    ``shapley_sampling``     captum ``ShapleyValueSampling``, ``n_samples`` permutations
    ``kernel_shap``          captum ``KernelShap``, ``n_samples`` coalitions (noisy: with 300 units
                             2000 coalitions are few)
    ``permutation_shap``     shap ``PermutationExplainer``, ``n_samples`` permutations, each walked
                             forwards and backwards; complete by construction
    ======================== ======================================================================

    What can mislead: every number depends on the baseline, so it has to be named; one far from the
    data makes the model answer for inputs it never saw. Gradients saturate where the model is
    certain: take logits, not probabilities. Where units share what they say, Shapley values divide
    it between them and occlusion gives it to none. Test with :func:`deletion_insertion` and against
    causal patching (``result.agreement(sweep)``).

    Args:
        model: the model.
        series: [batch, channel, time], or data with their mask.
        target: the class that is explained, for every series (int [batch]) or for all (an int);
            None for forecasters and measures of your own.
        method: see above.
        baseline: ``"zero"``; ``"mean"``, the mean series of ``background`` (of ``series`` where
            there is none); ``"samples"``, every series of ``background`` (``gradient_shap``
            only); or a tensor [channel, time] or [batch, channel, time], such as segments of other
            series.
        unit: ``"patch"`` shares out over channel x position (:meth:`HookedTST.time_cell`),
            ``"time"`` over channel x sample.
        measure: ``"logit"`` (None, of a classifier), ``"log_probability"``, ``"probability"``,
            ``"mean_forecast"`` (None, of a forecaster) or a function from outputs [batch, ...] to
            [batch].
        background: series that the mean or the samples are taken from: the training set.
        mask: bool [batch, time], True where observed. Padding is never attributed to: NaN. Nor
            are missing values, in models that take them: a unit's share is that of its observed
            samples.
        config: how much is computed; None for the defaults.
        **settings: fields of :class:`AttributionConfig`: ``n_steps``, ``n_samples``, ``seed``,
            ``batch_size``, ``rows_per_pass`` and ``progress``.

    Returns:
        Values [batch, channel, pos] or [batch, channel, time], with frame and figure.

    Raises:
        ArgumentError: another method, unit, baseline or measure, or captum or shap is missing.
        SeriesShapeError, SeriesValueError, LabelError: series or targets that do not fit.

    Source: Sundararajan et al. 2017; Lundberg and Lee 2017; Castro et al. 2009; Zeiler and Fergus
        2014; captum (Kokhlikyan et al. 2020) and shap.

    Example:
        >>> import torch
        >>> from tstlens import HookedTST, probing
        >>> model = HookedTST.from_pretrained("japanese-vowels")
        >>> found = probing.attribute(model, torch.randn(2, 12, 25), torch.tensor([0, 3]),
        ...     method="integrated_gradients", baseline="zero", n_steps=8, progress=False)
        >>> found.values.shape
        torch.Size([2, 12, 25])
    """
    library = required(method)
    series, mask = series_and_mask(series, mask)
    model.check_series(series, mask)
    if method in ("integrated_gradients", "gradient_shap"):
        check_gradients(f"method={method!r}", model, series)
    config = config or AttributionConfig()
    config = replace(config, n_samples=config.n_samples or _N_SAMPLES.get(method, 10))
    metric = measured(model, measure, target, len(series), "logit")
    cells = cells_of(model, series.shape[2], unit)
    base = make_baseline(baseline, series, mask, background)
    if base.many and method != "gradient_shap":
        raise ArgumentError(
            f"baseline='samples' is for method='gradient_shap', which draws from them; "
            f"{method!r} takes one baseline: 'mean', 'zero' or a tensor"
        )
    starts = range(0, len(series), config.batch_size)
    parts = []
    with evaluating(model), seeded(config.seed):
        for start in tqdm(starts, desc=method, unit="block", disable=not config.progress, delay=1):
            at = slice(start, start + config.batch_size)
            task = _task(model, metric, series, mask, base, cells, at)
            values = run_method(library, method, task, replace(config, seed=config.seed + start))
            parts.append((values, *_outputs(task)))
    values, output, baseline_output = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    seen = seen_units(mask, cells, series)
    empty = torch.tensor([start == stop for start, stop in cells])
    values = torch.where(seen | empty, values, torch.nan)
    named = baseline if isinstance(baseline, str) else "given"
    options: dict[str, Any] = {"baseline": named, "model": model.cfg.model_name}
    if method == "integrated_gradients":
        options["n_steps"] = config.n_steps
    elif method != "occlusion":
        options |= {"n_samples": config.n_samples, "seed": config.seed}
    return InputAttribution(
        values,
        unit,
        cells,
        series.detach().cpu(),
        base.values.detach().cpu(),
        base.name,
        output,
        baseline_output,
        metric.targets[0].cpu() if metric.targets else None,
        method,
        metric.name,
        metric.unit,
        None if mask is None else mask.cpu(),
        options,
    )


def _task(
    model: HookedTST,
    metric: Metric,
    series: Tensor,
    mask: Tensor | None,
    base: Baseline,
    cells: Cells,
    at: slice,
) -> Task:
    device = model.cfg.device

    def forward(x: Tensor, mask: Tensor | None, target: Tensor | None) -> Tensor:
        return metric.of_rows(model(x, mask=mask), *([] if target is None else [target]))

    return Task(
        forward,
        series[at].detach().to(device),
        (base.values if base.many else base.values[at]).detach().to(device),
        None if mask is None else mask[at].to(device),
        metric.targets[0][at].to(device) if metric.targets else None,
        cells,
        base.many,
    )


@torch.no_grad()
def _outputs(task: Task) -> tuple[Tensor, Tensor]:
    """The measure of the series and of their baselines."""
    output = task.forward(task.series, task.mask, task.target)
    if not task.many:
        return output, task.forward(task.baseline, task.mask, task.target)
    total = torch.zeros_like(output)
    for sample in task.baseline:
        total += task.forward(sample.expand_as(task.series), None, task.target)
    return output, total / len(task.baseline)
