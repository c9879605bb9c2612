"""Attribution patching: every site of a sweep estimated from a few gradients.

To first order, replacing an activation by its clean value changes the metric by the gradient at
the corrupted run times the difference: one backward pass estimates the effect of every site at
once (AtP). Where the model is far from linear between the two runs, the gradient is averaged along
a path instead (integrated gradients, ``steps`` > 0).

Which path? Two were compared with exact sweeps of a trained classifier. ``"input"`` moves the
embedding of the corrupted series towards the clean one, so that one backward pass per step serves
all layers, but it moves everything upstream and downstream too. ``"site"`` moves the activation of
one layer and leaves the run otherwise corrupted, as the exact sweep does; going all the way would
move a whole layer where the sweep moves one head, so the path goes only as far as one site's
replacement does: the fraction ``1 / sqrt(sites in the layer)`` of the difference, which has the
same norm where the sites' differences are alike in size and unrelated in direction. A sweep of
whole layers goes all the way, and is exact as the number of steps grows.

Gradients of a metric with respect to activations of the corrupted run, averaged along a path.

AtP*'s correction: queries and keys are replaced exactly, and only the pattern is linearised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from tstlens.arguments import (
    Amount,
    Positive,
    check_fields,
    checked,
    configured,
    needs_gradients,
)
from tstlens.errors import ArgumentError
from tstlens.metrics import Metric
from tstlens.model import HookedTST
from tstlens.patching.checks import PairData, check_pairs, described_by
from tstlens.patching.grids import Grid, make_grids
from tstlens.patching.metrics import MeasureOutput, as_metric, pair_blocks, read_metric, read_runs
from tstlens.patching.outputs import Swept, assembled, rows_that_fit
from tstlens.patching.result import SweepResult
from tstlens.patching.sites import Place, Site, axis_of, locate
from tstlens.patching.sources import (
    Reference,
    ReferenceMask,
    Rows,
    Source,
    both,
    observed,
    record,
    replacing,
    rows_of,
    sources,
)
from tstlens.patching.worlds import CorruptedRun, run_corrupted, start_of
from tstlens.shapes import PairMask


@dataclass(frozen=True)
class AttributionConfig:
    """How :func:`attribution` estimates; every field is a keyword of it as well.

    Args:
        path: with ``steps``: ``"site"`` moves each layer's activation by itself, one backward pass
            per step and layer; ``"input"`` moves the embedding, one per step for all layers
            (sites before the trunk are moved by themselves either way, and the source has to be
            ``"clean"``). See the module's documentation for how far the paths go.
        qk_correction: for sites ``q`` and ``k``: replace the queries or keys exactly, recompute
            the softmax, and linearise from the pattern on (AtP*), because a gradient through a
            saturated softmax is near zero whatever a large change would do.
        n_slices: runs that axis ``"slice"`` cuts the last axis into.
        memory_mb: steps run in chunks whose activations stay near this many MiB.
    """

    path: Literal["site", "input"] = "site"
    qk_correction: bool = False
    n_slices: int | None = None
    memory_mb: Positive = 256.0

    def __post_init__(self) -> None:
        check_fields(self)


def points(steps: int, reach: float = 1.0) -> list[float]:
    """Fractions of the way, by the midpoint rule on [0, reach]; the corrupted run without steps."""
    return [reach * (step + 0.5) / steps for step in range(steps)] or [0.0]


def delta(here: Tensor, given: Tensor, name: str) -> Tensor:
    """What replacing changes, ``given - here``; zero where both are the same infinity or NaN.

    Raises:
        ArgumentError: scores that are masked in one run and not in the other, or NaN in one.
    """
    same = (here == given) | (here.isnan() & given.isnan())
    difference = torch.where(same, 0.0, given - here)
    if bool(difference.isnan().any()):
        raise ArgumentError(
            f"{name} is NaN in one of the two runs: the model overflows on that series; leave it "
            "out, or scale it as the training data were"
        )
    if not bool(difference.isfinite().all()):
        raise ArgumentError(
            f"the change of {name} is not finite: the two runs mask different keys there, and no "
            "gradient covers that; attribute site 'pattern' instead, or sweep exactly"
        )
    return difference


def covered(place: Place, grid: Grid, by_series: Tensor) -> Tensor:
    """bool [1, *axes], True where any world of the grid replaces (worlds tile a box)."""
    mask = torch.ones((1,) * by_series.ndim, dtype=torch.bool, device=by_series.device)
    for number, entries in enumerate(grid.masks):
        shape = [1] * by_series.ndim
        shape[1 + number] = entries.shape[1]
        mask = mask & entries.any(0).view(shape)
    return mask


def gradient_of(metric: Metric, output: Tensor, n_pairs: int, at: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of every row's metric with respect to activations; zeros where it has none.

    Raises:
        ArgumentError: the metric cuts the gradient.
    """
    measured = read_metric(metric, output.unflatten(0, (-1, n_pairs)))
    if not measured.requires_grad:
        raise ArgumentError(
            "the metric has no gradient: expected a differentiable function of the output, such "
            "as patching.log_prob(target); does yours detach, or go through numpy or argmax?"
        )
    found = torch.autograd.grad(measured.sum(), list(at), allow_unused=True)
    return [
        torch.zeros_like(activation) if gradient is None else gradient
        for activation, gradient in zip(at, found, strict=True)
    ]


def input_gradients(
    model: HookedTST,
    run: CorruptedRun,
    end: Tensor | None,
    names: Sequence[str],
    metric: Metric,
    steps: int,
    per_chunk: int,
) -> dict[str, Tensor]:
    """Mean gradients at all named activations while what enters block 0 moves.

    Args:
        model: the model.
        run: the corrupted run.
        end: the clean embedding [row, pos, d_model]; None stays at the corrupted one.
        names: hook names inside the trunk.
        metric: what is differentiated.
        steps: points on the path; 0 is the corrupted run alone.
        per_chunk: points that run at once.

    Returns:
        Gradients by name, each like one run's activation.
    """
    with torch.no_grad():
        start = model.embed_series(run.series, run.mask)[0]
    way = torch.zeros_like(start) if end is None else end - start

    def runs(some: Sequence[float]) -> tuple[Tensor, list[Tensor]]:
        at = start.new_tensor(some).view(-1, 1, 1, 1)
        residual = (start + at * way).flatten(0, 1).requires_grad_(True)
        kept: dict[str, Tensor] = {}

        def keep(activation: Tensor, hook: Any) -> Tensor:
            if not activation.requires_grad:  # a decoder's, which what enters block 0 does not move
                activation = activation.detach().requires_grad_(True)
            kept[hook.name] = activation
            return activation

        output = model.run_with_hooks(
            residual,
            start_at_layer=0,
            state=_repeated(run, 0, len(some)),
            fwd_hooks=[(name, keep) for name in names],
        )
        return output, [kept[name] for name in names]

    return dict(zip(names, _averaged(runs, points(steps), run, metric, per_chunk), strict=True))


def site_gradients(
    model: HookedTST,
    run: CorruptedRun,
    place: Place,
    layer: int | None,
    change: Tensor,
    at_name: str,
    metric: Metric,
    steps: int,
    reach: float,
    per_chunk: int,
) -> Tensor:
    """The mean gradient at one layer while its own activation moves, [row, ...].

    Args:
        model: the model.
        run: the corrupted run, with the activation at the place.
        place: the site.
        layer: its layer, None outside the blocks.
        change: what the activation moves by at the end of the path, like the activation.
        at_name: where the gradient is taken: the site itself, or the pattern behind q and k.
        metric: what is differentiated.
        steps: points on the path; 0 is the corrupted run alone.
        reach: how far the path goes, as a fraction of ``change``.
        per_chunk: points that run at once.
    """
    name = place.hook_name(layer)
    here = run.acts[name]

    def runs(some: Sequence[float]) -> tuple[Tensor, list[Tensor]]:
        at = change.new_tensor(some).view(-1, *(1,) * change.ndim)
        moved = (here + at * change).flatten(0, 1).requires_grad_(True)
        kept = {name: moved}

        def replace(activation: Tensor, hook: Any) -> Tensor:
            del activation, hook
            return moved

        def keep(activation: Tensor, hook: Any) -> None:
            kept[hook.name] = activation

        hooks: list[Any] = [(name, replace)]
        if at_name != name:
            hooks.append((at_name, keep))
        output = _run_from(model, run, place, layer, len(some), hooks)
        return output, [kept[at_name]]

    return _averaged(runs, points(steps, reach), run, metric, per_chunk)[0]


def _averaged(
    runs: Callable[[Sequence[float]], tuple[Tensor, list[Tensor]]],
    alphas: list[float],
    run: CorruptedRun,
    metric: Metric,
    per_chunk: int,
) -> list[Tensor]:
    totals: list[Tensor] = []
    for start in range(0, len(alphas), per_chunk):
        some = alphas[start : start + per_chunk]
        with torch.enable_grad():
            output, at = runs(some)
            gradients = gradient_of(metric, output, run.n_pairs, at)
        sums = [gradient.unflatten(0, (len(some), -1)).sum(0) for gradient in gradients]
        totals = [a + b for a, b in zip(totals, sums, strict=True)] if totals else sums
    return [total / len(alphas) for total in totals]


def _repeated(run: CorruptedRun, layer: int, n: int) -> Any:
    series_of_row = torch.arange(run.n_pairs, device=run.final.device).repeat(n)
    return run.state_entering(layer).rows(series_of_row)


def _run_from(
    model: HookedTST, run: CorruptedRun, place: Place, layer: int | None, n: int, hooks: list[Any]
) -> Tensor:
    """``n`` copies of the corrupted run, from where the site lies."""

    def repeat(x: Tensor) -> Tensor:
        return x.expand(n, *x.shape).flatten(0, 1)

    first = start_of(model, place, layer)
    if first is not None:
        residual, state = repeat(run.entering(first)), _repeated(run, first, n)
        return model.run_with_hooks(residual, start_at_layer=first, state=state, fwd_hooks=hooks)
    mask = None if run.mask is None else repeat(run.mask)
    return model.run_with_hooks(repeat(run.series), mask=mask, fwd_hooks=hooks)


def pattern_place(place: Place) -> Place:
    """Where the pattern of a query or key site lies."""
    return replace(place, template=place.template.rsplit("hook_", 1)[0] + "hook_pattern")


def corrected(
    model: HookedTST,
    run: CorruptedRun,
    place: Place,
    layer: int,
    grid: Grid,
    source: Tensor,
    gradient: Tensor,
    memory_mb: float,
) -> Tensor:
    """Effects of replacing queries (or keys), [pair, world].

    Every world's pattern is computed with its queries (or keys) replaced; the effect is the
    gradient of the metric with respect to the pattern times the change of the pattern.

    Args:
        model: the model.
        run: the corrupted run, with the activation at the place.
        place: q or k.
        layer: its layer.
        grid: which entries each world replaces.
        source: what they are replaced by, [row, pos, head, d_head].
        gradient: of the metric with respect to the pattern, [row, head, query, key].
        memory_mb: worlds in chunks whose patterns stay near this many MiB.

    Source: Kramár et al. 2024 (arXiv 2403.00745), section 3.1.1.
    """
    here = run.acts[place.hook_name(layer)]
    others = _beside(model, run, place, layer)
    before = _pattern(model, run, layer, place, here[None], others)
    per_chunk = max(1, int(memory_mb * 2**20 / (16 * gradient.numel())))
    by_series, given = place.by_series(here), place.by_series(source)
    effects = []
    for start in range(0, grid.n_worlds, per_chunk):
        worlds = slice(start, min(start + per_chunk, grid.n_worlds))
        mixed = torch.where(grid.condition(worlds), given, by_series)
        mixed = mixed.reshape(-1, *here.shape)  # [world, row, pos, head, d_head]
        changed = _pattern(model, run, layer, place, mixed, others) - before
        of_row = (gradient * changed).flatten(2).sum(-1)  # [world, row]
        effects.append(of_row.unflatten(1, (run.n_pairs, -1)).sum(-1))
    return torch.cat(effects).T


def _beside(model: HookedTST, run: CorruptedRun, place: Place, layer: int) -> Tensor:
    """Keys of the corrupted run where the place is q, queries where it is k."""
    other = "hook_k" if place.kind == "attn.hook_q" else "hook_q"
    name = f"{run.blocks[layer]}.attn.{other}"
    with torch.no_grad():
        return model.run_with_cache(
            run.entering(layer),
            start_at_layer=layer,
            stop_at_layer=layer + 1,
            state=run.state_entering(layer),
            names_filter=[name],
            return_cache_object=False,
        )[1][name]


def _pattern(
    model: HookedTST, run: CorruptedRun, layer: int, place: Place, own: Tensor, others: Tensor
) -> Tensor:
    """Patterns [world, row, head, query, key] of queries or keys [world, row, pos, head, d_head].

    The model's own attention computes them, with whatever biases and masks it has.
    """
    n_worlds = len(own)
    flat, beside = own.flatten(0, 1), others.expand(n_worlds, *others.shape).flatten(0, 1)
    q, k = (flat, beside) if place.kind == "attn.hook_q" else (beside, flat)
    series_of_row = torch.arange(run.n_pairs, device=own.device).repeat(n_worlds)
    kept: list[Tensor] = []

    def keep(pattern: Tensor, hook: Any) -> None:
        del hook
        kept.append(pattern)

    block: Any = model.layers[layer]
    state = run.state_entering(layer)
    with torch.no_grad(), model.hooks(fwd_hooks=[(pattern_place(place).hook_name(layer), keep)]):
        block.attn.mix(q, k, torch.zeros_like(k), state.rows(series_of_row))
    return kept[0].unflatten(0, (n_worlds, -1))


@configured(AttributionConfig)
@checked
@needs_gradients
def attribution(
    model: HookedTST,
    clean: PairData,
    corrupted: PairData,
    site: str | Site,
    axes: Sequence[str],
    metric: MeasureOutput,
    steps: Amount = 0,
    source: Source | Tensor = "clean",
    *,
    config: AttributionConfig | None = None,
    reference: Reference | None = None,
    reference_mask: ReferenceMask | None = None,
    clean_mask: PairMask | None = None,
    corrupted_mask: PairMask | None = None,
    progress: bool = True,
    **settings: Any,
) -> SweepResult:
    """What :func:`sweep` would give, estimated from gradients: same sites, axes and result.

    Answers "which sites are worth an exact look?" at a cost that does not grow with the number of
    sites. What can mislead: it is an estimate. It misses effects that only a large change has
    (saturated attention, a ReLU that switches, a maximum that moves to another position), it can
    be wrong in sign, and it is least to be trusted at MLPs and at queries and keys. Run
    :func:`sweep` on what looks strongest, and report :func:`agreement` where both were run.

    Args:
        model: the model.
        clean: series [pair, channel, time] (one pair may come without the pair axis).
        corrupted: series of the same shape.
        site: what is replaced, as for :func:`sweep`.
        axes: what is swept, as for :func:`sweep`; axes that are not named are replaced whole.
        metric: :func:`~tstlens.patching.log_prob` and its like, or any differentiable function
            from outputs [pair, ...] to [pair].
        steps: gradients averaged along the path (midpoint rule); 0 takes the one at the corrupted
            run (AtP).
        source: what replaces: ``"clean"``, ``"zero"``, ``"mean"`` (over ``reference``) or series.
        config: path, correction, slices and memory, see :class:`AttributionConfig`.
        reference: series [batch, channel, time] for ``source="mean"``.
        reference_mask: bool [batch, time] of these; padding and missing values stay out of means.
        clean_mask: bool [pair, time] of the clean series.
        corrupted_mask: bool [pair, time] of the corrupted series.
        progress: show a progress bar.
        **settings: fields of the config, ``path="input"`` say.

    Returns:
        Values [pair, *axes]: baseline plus estimated effect, in the metric's unit;
        ``made["method"]`` is ``"attribution"``.

    Raises:
        ArgumentError: steps, path or correction that are not possible, or a metric without a
            gradient; and as :func:`sweep`.
        UnknownSiteError, UnknownAxisError, SeriesShapeError: as :func:`sweep`.

    Source: Nanda 2023, Attribution patching; Sundararajan et al. 2017 (arXiv 1703.01365);
        Kramár et al. 2024, AtP* (arXiv 2403.00745).

    Example:
        >>> import torch
        >>> from tstlens import patching
        >>> from tstlens.model import HookedTST, HookedTSTConfig, HeadConfig, PerStepConfig
        >>> model = HookedTST(HookedTSTConfig(
        ...     n_layers=2, d_model=16, n_heads=4, d_mlp=32, n_channels=3,
        ...     embed=PerStepConfig(), head=HeadConfig("mean", n_classes=5)))
        >>> a, b = torch.randn(2, 6, 3, 20)
        >>> approximate = patching.attribution(model, a, b, "z", ("layer", "head"),
        ...     patching.log_prob(torch.zeros(6, dtype=torch.long)), steps=5, progress=False)
        >>> approximate.effect().shape
        torch.Size([6, 2, 4])
    """
    words = described_by(clean, metric)
    clean, corrupted = check_pairs(model, clean, corrupted, clean_mask, corrupted_mask)
    config = config or AttributionConfig()
    what = Swept.found(model, site, axes, config.n_slices)
    _check_options(what, steps, source, config)
    metric = as_metric(metric, len(clean), model)
    pieces, coords = [], {}
    with tqdm(total=len(clean), desc="attribution", unit="pair", disable=not progress) as bar:
        for block in pair_blocks(len(clean), metric):
            estimate = _Estimate(model, what, metric.of_pairs(block), steps, config)
            piece, coords = estimate(
                rows_of(clean, clean_mask, block),
                rows_of(corrupted, corrupted_mask, block),
                source[block] if isinstance(source, Tensor) else source,
                reference,
                reference_mask,
            )
            pieces.append(piece)
            bar.update(block.stop - block.start)
    found = assembled(
        SweepResult,
        model,
        metric,
        coords,
        pieces,
        clean.shape[2],
        site=what.site_name,
        source=source if isinstance(source, str) else "other series",
        place=what.place,
        effects=True,
        exact=False,
        method="attribution",
        steps=steps,
        path=config.path if steps else None,
        qk_correction=config.qk_correction,
        n_slices=config.n_slices,
        **what.fixed,
    )
    return replace(found, **words)


def _check_options(
    what: Swept, steps: int, source: Source | Tensor, config: AttributionConfig
) -> None:
    if steps and config.path == "input" and not (isinstance(source, str) and source == "clean"):
        raise ArgumentError(
            "path='input' goes from the corrupted series to the clean one, so source must be "
            "'clean'; use path='site' for other sources"
        )
    if config.qk_correction and what.place.kind not in ("attn.hook_q", "attn.hook_k"):
        raise ArgumentError(
            f"qk_correction is for the sites 'q' and 'k', got {what.site.name!r}; leave it out here"
        )


@dataclass(frozen=True, eq=False)
class _Estimate:
    """Effects, and what the two runs give, of some of the pairs."""

    model: HookedTST
    what: Swept
    metric: Metric
    steps: int
    config: AttributionConfig

    def __call__(
        self,
        clean: Rows,
        corrupted: Rows,
        source: Source | Tensor,
        reference: Tensor | None,
        reference_mask: Tensor | None,
    ) -> tuple[tuple[Tensor, dict[str, Tensor]], dict[str, tuple[int, ...]]]:
        model, what, place = self.model, self.what, self.what.place
        with torch.no_grad():
            clean_output, clean_acts = record(model, *clean, what.names)
            run = run_corrupted(model, *corrupted, place, what.layers)
            means = (reference, reference_mask)
            given = sources(model, place, what.names, source, clean, clean_acts, run, *means)
        acts = [run.acts[name] for name in what.names]
        grids, coords = make_grids(place, what.site, what.inner, acts, what.n_slices)
        change = {}
        for name, grid in zip(what.names, grids, strict=True):
            moved = place.by_series(delta(run.acts[name], given[name], name))
            box = covered(place, grid, moved)
            change[name] = torch.where(box, moved, 0.0).reshape(run.acts[name].shape)
        gradients = self._gradients(run, change, clean, grids[0].n_worlds)
        effects = []
        for layer, name, grid in zip(what.layers, what.names, grids, strict=True):
            if self.config.qk_correction and layer is not None:
                moves = (grid, given[name], gradients[layer])
                effect = corrected(model, run, place, layer, *moves, self.config.memory_mb)
            else:
                moved = place.by_series(gradients[layer] * change[name])
                effect = _by_world(moved, what, grid, coords)
            effects.append(effect)
        found = what.in_order(torch.stack(effects, 1), coords)
        runs = read_runs(self.metric, run.output, clean_output)
        return (found, runs), what.all_coords(coords)

    def _gradients(
        self,
        run: CorruptedRun,
        change: dict[str, Tensor],
        clean: Rows,
        n_sites: int,
    ) -> dict[int | None, Tensor]:
        """The mean gradient of the metric at the site (or its pattern) along the path, by layer."""
        model, what, steps = self.model, self.what, self.steps
        rows = rows_that_fit(model, run.n_pos, self.config.memory_mb / 2)
        per_chunk = max(1, rows // len(run.final))
        place = pattern_place(what.place) if self.config.qk_correction else what.place
        names = {layer: place.hook_name(layer) for layer in what.layers}
        if what.place.in_trunk and (self.config.path == "input" or not steps):
            end = None
            if steps:
                with torch.no_grad():
                    end = model.embed_series(*clean)[0]
                    start = model.embed_series(run.series, run.mask)[0]
                entering = locate(model, Site("embed"))
                seen = both(
                    *(
                        observed(model, entering, ["hook_embed"], *rows)
                        for rows in (clean, (run.series, run.mask))
                    )
                )
                end = replacing(entering, end, start, seen["hook_embed"])
            found = input_gradients(
                model, run, end, list(names.values()), self.metric, steps, per_chunk
            )
            return {layer: found[name] for layer, name in names.items()}
        reach = 1 / n_sites**0.5
        gradients = {}
        for layer, at_name in names.items():
            moved = change[what.place.hook_name(layer)]
            gradients[layer] = site_gradients(
                model, run, what.place, layer, moved, at_name, self.metric, steps, reach, per_chunk
            )
        return gradients


def _by_world(moved: Tensor, what: Swept, grid: Grid, coords: dict[str, tuple[int, ...]]) -> Tensor:
    """Contributions [pair, *place axes] summed over what each world replaces, [pair, world]."""
    place = what.place
    order = []
    for number in range(len(place.axes) - 1, -1, -1):
        target = place.axes[number]
        swept_axis = [axis for axis in what.inner if axis_of(place, axis) == target]
        along = 1 + number
        if not swept_axis:
            mask = grid.masks[number][0].to(moved.dtype)
            moved = moved.movedim(along, -1) @ mask
            continue
        entries = coords[swept_axis[0]]
        if swept_axis[0] == "slice":
            moved = moved.unflatten(along, (len(entries), -1)).sum(along + 1)
        else:
            moved = moved.index_select(along, torch.tensor(entries, device=moved.device))
        order.insert(0, swept_axis[0])
    moved = moved.permute(0, *(1 + order.index(axis) for axis in what.inner))
    return moved.flatten(1) if what.inner else moved[:, None]
