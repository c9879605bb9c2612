"""Attribution of the output to its input, by captum's and shap's methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tstlens.arguments import check_gradients, checked
from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError
from tstlens.model import HookedTST
from tstlens.probing.attribution.baselines import Baseline, make_baseline
from tstlens.probing.attribution.methods import METHODS, Task, required, run_method
from tstlens.probing.attribution.result import InputAttribution
from tstlens.probing.attribution.units import Unit, cells_of, seen_units
from tstlens.probing.measures import Measure, measure_of, targets_of
from tstlens.probing.steering_inputs import evaluating, series_and_mask
from tstlens.randomness import seeded

__all__ = ["METHODS", "attribute"]

_N_SAMPLES = {"gradient_shap": 50, "shapley_sampling": 10, "kernel_shap": 2000}


@checked
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
    n_steps: int = 64,
    n_samples: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    rows_per_pass: int = 1024,
    progress: bool = True,
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
        n_steps: of integrated gradients.
        n_samples: of the sampling methods; None for 50, 10, 2000 and 10 in the table's order.
        seed: of the sampling methods; the same seed (and ``batch_size``) repeats them.
        batch_size: series explained together.
        rows_per_pass: perturbed series in one forward pass.
        progress: show a progress bar.

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
    for name, count in (("n_steps", n_steps), ("batch_size", batch_size)):
        if count < 1:
            raise ArgumentError(f"expected {name} of at least 1, got {count}")
    n_samples = _N_SAMPLES.get(method, 10) if n_samples is None else n_samples
    if n_samples < 1 or rows_per_pass < 1:
        raise ArgumentError(
            f"expected n_samples and rows_per_pass of at least 1, got {n_samples}, {rows_per_pass}"
        )
    measured = measure_of(model, measure, "logit")
    targets = targets_of(model, measured, target, len(series))
    cells = cells_of(model, series.shape[2], unit)
    base = make_baseline(baseline, series, mask, background)
    if base.many and method != "gradient_shap":
        raise ArgumentError(
            f"baseline='samples' is for method='gradient_shap', which draws from them; "
            f"{method!r} takes one baseline: 'mean', 'zero' or a tensor"
        )
    starts = range(0, len(series), batch_size)
    parts = []
    with evaluating(model), seeded(seed):
        for start in tqdm(starts, desc=method, unit="block", disable=not progress, delay=1):
            at = slice(start, start + batch_size)
            task = _task(model, measured, series, mask, targets, base, cells, at)
            values = run_method(
                library, method, task, n_steps, n_samples, rows_per_pass, seed + start
            )
            parts.append((values.cpu(), *(x.cpu() for x in _outputs(task, rows_per_pass))))
    values, output, baseline_output = (torch.cat(part) for part in zip(*parts, strict=True))
    seen = seen_units(mask, cells, series)
    empty = torch.tensor([start == stop for start, stop in cells])
    values = torch.where(seen | empty, values, torch.nan)
    named = baseline if isinstance(baseline, str) else "given"
    options: dict[str, Any] = {"baseline": named, "model": model.cfg.model_name}
    if method == "integrated_gradients":
        options["n_steps"] = n_steps
    elif method != "occlusion":
        options |= {"n_samples": n_samples, "seed": seed}
    return InputAttribution(
        values,
        unit,
        cells,
        series.detach().cpu(),
        base.values.detach().cpu(),
        base.name,
        output,
        baseline_output,
        None if targets is None else targets.cpu(),
        method,
        measured.name,
        measured.unit,
        None if mask is None else mask.cpu(),
        options,
    )


def _task(
    model: HookedTST,
    measure: Measure,
    series: Tensor,
    mask: Tensor | None,
    targets: Tensor | None,
    base: Baseline,
    cells: tuple[tuple[int, int], ...],
    at: slice,
) -> Task:
    device = model.cfg.device

    def forward(x: Tensor, mask: Tensor | None, target: Tensor | None) -> Tensor:
        return measure(model(x, mask=mask), target)

    return Task(
        forward,
        series[at].detach().to(device),
        (base.values if base.many else base.values[at]).detach().to(device),
        None if mask is None else mask[at].to(device),
        None if targets is None else targets[at].to(device),
        cells,
        base.many,
    )


@torch.no_grad()
def _outputs(task: Task, rows_per_pass: int) -> tuple[Tensor, Tensor]:
    """The measure of the series and of their baselines."""
    output = task.forward(task.series, task.mask, task.target)
    if not task.many:
        return output, task.forward(task.baseline, task.mask, task.target)
    total = torch.zeros_like(output)
    for sample in task.baseline:
        total += task.forward(sample.expand_as(task.series), None, task.target)
    return output, total / len(task.baseline)
