"""What the strongest sites of a sweep do together, beside random sites as many.

A sweep replaces one site at a time, and effects do not add up: two heads may hold the same, or
matter only with each other. This replaces the strongest one, two, three … at once, every one by
what it was in the source's own run, and as many sites drawn at random.

What can mislead: sites chosen on the same pairs that they are judged on look better than they are;
sweep some pairs and give others here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from tstlens.arguments import Amount, Positive, Seed, checked, shown
from tstlens.data import Pairs
from tstlens.errors import ArgumentError
from tstlens.metrics import Metric
from tstlens.model import HookedTST
from tstlens.patching.checks import check_pairs
from tstlens.patching.grids import Grid, make_grids
from tstlens.patching.metrics import as_metric, metric_named, pair_blocks, read_metric, read_runs
from tstlens.patching.outputs import Swept, assembled, rows_that_fit
from tstlens.patching.result import AblationResult, SweepResult
from tstlens.patching.sources import (
    Reference,
    ReferenceMask,
    Source,
    record,
    rows_of,
    sources,
)
from tstlens.patching.worlds import CorruptedRun, run_corrupted, run_replaced

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, eq=False, repr=False)
class TogetherResult(SweepResult):
    """A :class:`SweepResult` over ("pair", "k"): the metric with the k strongest sites patched.

    Args:
        order: the sites as entries by axis, strongest first.
        one_by_one: [k], the sum of the single effects of the k strongest in the sweep, averaged
            over its pairs: what one might have expected.
        random: [draw, pair, k], the metric with k random sites patched; of one draw each set holds
            the one before.
    """

    order: tuple[dict[str, Any], ...] = ()
    one_by_one: Float[Tensor, " k"] | None = None
    random: Float[Tensor, "draw ..."] | None = None

    ALONG: ClassVar = {
        **SweepResult.ALONG,
        "one_by_one": ("k",),
        "random": ("*draw", "pair", "k"),
    }

    @checked
    def mean(self, axis: str = "pair") -> Self:
        """As :meth:`SweepResult.mean`, the random sets with it."""
        found: Any = super().mean(axis)
        changes: dict[str, Any] = {}
        if self.random is not None:
            changes["random"] = self.random.mean(1 + self.axes.index(axis))
        if self.one_by_one is not None and axis == "k":
            changes["one_by_one"] = self.one_by_one.mean()
        return replace(found, **changes)

    def columns(self) -> dict[str, Any]:
        """As of a sweep; then the single effects' sum, and what random sets give.

        ``random`` is the mean effect of random sets, ``random_low`` and ``random_high`` the least
        and the largest of them.
        """
        columns = super().columns()
        if self.one_by_one is not None:
            columns["one_by_one"] = self.spread(self.one_by_one, "k")
        if self.random is not None and len(self.random):
            effects = self.random - self.spread(self.baseline, "pair")
            columns |= {
                "random": effects.mean(0),
                "random_low": effects.amin(0),
                "random_high": effects.amax(0),
            }
        return columns


@checked
@torch.no_grad()
def together(
    result: SweepResult,
    model: HookedTST,
    pairs: Pairs,
    ks: Sequence[int],
    n_random: Amount = 20,
    *,
    metric: Metric | None = None,
    source: Source | Tensor | None = None,
    reference: Reference | None = None,
    reference_mask: ReferenceMask | None = None,
    seed: Seed = 0,
    memory_mb: Positive | None = None,
    progress: bool = True,
) -> TogetherResult:
    """:meth:`SweepResult.together`, which says what these are."""
    clean, corrupted = check_pairs(
        model, pairs.clean, pairs.corrupted, pairs.clean_mask, pairs.corrupted_mask
    )
    what = _found(result, model)
    axes = [axis for axis in result.axes if axis != "pair"]
    entries = product(*(result.coords[axis] for axis in axes))
    sites = [dict(zip(axes, some, strict=True)) for some in entries]
    sizes = _sizes(ks, len(sites))
    if metric is None:
        metric = metric_named(result.metric, pairs, "the sweep")
    metric = as_metric(metric, len(pairs), model)
    if source is None:
        if result.source not in ("clean", "zero", "mean"):
            raise ArgumentError(
                f"the sweep patched with {result.source}, which results do not keep; give source= "
                "these series [pair, channel, time], or 'clean'"
            )
        source = result.source  # pyright: ignore[reportAssignmentType]
    single, ranked = _ranking(result)
    generator = torch.Generator().manual_seed(seed)
    orders = [ranked] + [
        torch.randperm(len(sites), generator=generator).tolist() for _ in range(n_random)
    ]
    sets = [[sites[at] for at in order[:size]] for order in orders for size in sizes]
    pieces = []
    with tqdm(
        total=len(sets) * len(pairs), desc="patching together", unit="run", disable=not progress
    ) as bar:
        for block in pair_blocks(len(pairs), metric):
            there = rows_of(clean, pairs.clean_mask, block)
            here = rows_of(corrupted, pairs.corrupted_mask, block)
            output, acts = record(model, *there, what.names)
            run = run_corrupted(model, *here, what.place, what.layers)
            own_source = source[block] if isinstance(source, Tensor) else source
            means = (reference, reference_mask)
            given = sources(model, what.place, what.names, own_source, there, acts, run, *means)
            own = metric.of_pairs(block)
            values = _measured(model, run, what, given, own, sets, memory_mb, bar)
            by_order = values.unflatten(1, (len(orders), len(sizes)))
            pieces.append((by_order, read_runs(own, run.output, output)))
    found = assembled(
        TogetherResult,
        model,
        metric,
        {"k": sizes},
        [(values[:, 0], runs) for values, runs in pieces],
        clean.shape[2],
        site=result.site,
        source="other series" if isinstance(source, Tensor) else source,
        place=what.place,
        method="exact",
        seed=seed,
        chosen_on=result.n_pairs,
    )
    return replace(
        found,
        order=tuple(sites[at] for at in ranked[: sizes[-1]]),
        one_by_one=single[ranked].cumsum(0)[[size - 1 for size in sizes]],
        random=torch.cat([values[:, 1:] for values, _ in pieces]).transpose(0, 1),
    )


def _sizes(ks: Sequence[int], n_sites: int) -> tuple[int, ...]:
    sizes = sorted(set(ks))
    if not sizes or sizes[0] < 1:
        raise ArgumentError(f"expected ks as numbers of sites from 1 on, got {shown(list(ks))}")
    if sizes[0] > n_sites:
        raise ArgumentError(f"expected ks within 1..{n_sites}, the sites swept, got {sizes}")
    return tuple(size for size in sizes if size <= n_sites)


def _found(result: SweepResult, model: HookedTST) -> Swept:
    """What was swept, in this model."""
    if isinstance(result, AblationResult):
        raise ArgumentError(
            "an ablation has no clean run to patch from; sweep(..., source='zero') or 'mean' does "
            "the same to pairs, and its result has together()"
        )
    axes = tuple(axis for axis in result.axes if axis != "pair")
    if not axes:
        raise ArgumentError("expected a sweep over some axes, got one of a single site")
    made = result.made
    return Swept.found(model, made.get("fixed") or result.site, axes, made.get("n_slices"))


def _ranking(result: SweepResult) -> tuple[Tensor, list[int]]:
    """Mean single effects [site], and the sites by how far they move it to the clean run."""
    mean = result.mean("pair") if "pair" in result.axes else result
    effect = mean.effect().flatten().double().nan_to_num(0.0).cpu()
    gap = float(mean.clean - mean.baseline)
    towards = effect.abs() if gap == 0 else effect * (1 if gap > 0 else -1)
    return effect, towards.argsort(descending=True, stable=True).tolist()


def _measured(
    model: HookedTST,
    run: CorruptedRun,
    what: Swept,
    given: dict[str, Tensor],
    metric: Metric,
    sets: Sequence[Sequence[dict[str, Any]]],
    memory_mb: float | None,
    bar: Any,
) -> Float[Tensor, "pair set"]:
    """The metric with each of the sets replaced in the corrupted run."""
    acts = [run.acts[name] for name in what.names]
    grids, coords = make_grids(what.place, what.site, what.inner, acts, what.n_slices)
    of_layer = dict(zip(what.layers, grids, strict=True))
    per_chunk = max(1, rows_that_fit(model, run.n_pos, memory_mb) // len(run.final))
    found = []
    for start in range(0, len(sets), per_chunk):
        some = sets[start : start + per_chunk]
        conditions = _conditions(some, of_layer, coords, what.layers[0])
        output = run_replaced(model, run, what.place, conditions, given, len(some))
        found.append(read_metric(metric, output))
        bar.update(len(some) * run.n_pairs)
    return torch.cat(found).T


def _conditions(
    sets: Sequence[Sequence[dict[str, Any]]],
    grids: dict[int | None, Grid],
    coords: dict[str, tuple[Any, ...]],
    only: int | None,
) -> dict[int | None, Tensor]:
    """For each layer that a set has sites in, bool [set, 1 (pair), *axes], True where replaced.

    Args:
        sets: of sites, each as entries by axis.
        grids: the worlds of each layer.
        coords: entries of the axes within a layer.
        only: the layer where the sweep had one.
    """
    place = {axis: {entry: at for at, entry in enumerate(some)} for axis, some in coords.items()}
    found: dict[int | None, Tensor] = {}
    for number, sites in enumerate(sets):
        for site in sites:
            layer, world = site.get("layer", only), 0
            for axis, entries in coords.items():
                world = world * len(entries) + place[axis][site[axis]]
            of_site = grids[layer].condition(slice(world, world + 1))[0]
            if layer not in found:
                sizes = [mask.shape[1] for mask in grids[layer].masks]
                found[layer] = of_site.new_zeros(len(sets), 1, *sizes)
            found[layer][number] |= of_site
    return found
