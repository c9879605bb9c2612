"""Influence: how much patching one head changes what later heads write.

A sweep says what a head does to the output. Influence says whom it talks to on the way: patch one
head's ``z`` and look at every later head's.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from tstlens.arguments import Positive, check_finite, checked
from tstlens.effects import Labelled
from tstlens.errors import ArgumentError
from tstlens.model import HookedTST
from tstlens.patching.checks import PairData, check_pairs, require_two_writers
from tstlens.patching.grids import Grid, make_grid
from tstlens.patching.metrics import PAIRS_PER_BLOCK
from tstlens.patching.outputs import Swept, rows_that_fit
from tstlens.patching.sites import Site, locate
from tstlens.patching.sources import Rows, record, rows_of, sources
from tstlens.patching.worlds import CorruptedRun, run_corrupted
from tstlens.shapes import PairMask

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class Influence(Labelled):
    """What patching one head (or slice) does to every other one, pair by pair.

    Args:
        values: [pair, layer, head, layer, head] mean squared change of the second head's output
            when the first is patched, in squared units of the residual stream; zero where the
            second does not come later. For slices the diagonal is the slice's own change.
        projection: like ``values``: the change along the way from the corrupted to the clean
            output of the second head, times the length of that way (mean over entries).
        gap: [pair, layer, head] mean squared difference between clean and corrupted output.
        axes: names of the axes of ``values``.
        unit: ``"head"`` or ``"slice"``.
        n_pairs: pairs that the values come from.
        made: how.
    """

    values: Float[Tensor, "*pair layer head layer head"]
    projection: Float[Tensor, "*pair layer head layer head"]
    gap: Float[Tensor, "*pair layer head"]
    axes: tuple[str, ...]
    unit: str = "head"
    n_pairs: int = 1
    made: dict[str, Any] = field(default_factory=dict)

    def normalized(self) -> Float[Tensor, "*pair layer head layer head"]:
        """Size of the change as a share of the second head's own gap: root mean square over rms.

        1 means that the second head's output moves as far as clean and corrupted are apart, in
        whatever direction. NaN where the second head does not differ between the two runs.
        """
        gap = self.gap[..., None, None, :, :]
        return torch.where(gap <= 0, torch.nan, (self.values / gap).sqrt())

    def signed(self) -> Float[Tensor, "*pair layer head layer head"]:
        """Share of the second head's gap that is closed: 1 restores it, below 0 moves it away.

        The change is projected on the way from the corrupted to the clean output; what is
        orthogonal to it is in :meth:`normalized` but not here.
        """
        gap = self.gap[..., None, None, :, :]
        return torch.where(gap <= 0, torch.nan, self.projection / gap)

    def mean(self) -> Influence:
        """The mean over pairs; ratios are then mean change over mean gap."""
        if "pair" not in self.axes:
            return self
        parts = {name: getattr(self, name).mean(0) for name in ("values", "projection", "gap")}
        return replace(self, **parts, axes=self.axes[1:])

    def entries(self) -> dict[str, Any]:
        """Pair, from_layer, from_head, to_layer and to_head."""
        names = ["from_layer", f"from_{self.unit}", "to_layer", f"to_{self.unit}"]
        names = (["pair"] if "pair" in self.axes else []) + names
        return {n: range(size) for n, size in zip(names, self.values.shape, strict=True)}

    def columns(self) -> dict[str, Any]:
        """The three measures."""
        return {
            "mean_squared": self.values,
            "normalized": self.normalized(),
            "signed": self.signed(),
        }

    def to_dataframe(self) -> pd.DataFrame:
        """Long format; only rows where the second comes later than the first."""
        frame = super().to_dataframe()
        return frame.query("to_layer > from_layer").reset_index(drop=True)

    def __repr__(self) -> str:
        return f"Influence({self.unit}s [{self.shape_text()}], {self.n_pairs} pairs)"


@checked
@torch.no_grad()
def head_influence(
    model: HookedTST,
    clean: PairData,
    corrupted: PairData,
    *,
    n_slices: int | None = None,
    site: str = "z",
    clean_mask: PairMask | None = None,
    corrupted_mask: PairMask | None = None,
    memory_mb: Positive = 256.0,
    progress: bool = True,
) -> Influence:
    """How much patching one head's output changes every later head's output.

    Answers "which heads read, directly or through others, what this head writes?". The corrupted
    run is repeated with one head's ``z`` taken from the clean run, at all positions; what changes
    in each later head is measured on what that head writes to the stream (``z W_O``, without bias).
    What can mislead: this is total influence along all routes, including MLPs and heads between;
    a large change need not matter to the output; heads of one layer never influence each other.

    Args:
        model: the model.
        clean: series [pair, channel, time] (one pair may come without the pair axis).
        corrupted: series of the same shape.
        n_slices: look at slices instead of heads: cut the last axis of ``site`` into this many
            runs, patch one, and measure the change of every one (the patched layer included).
        site: for slices, ``"attn_out"`` or another site of every block with axes pos and feature;
            heads are at ``"z"``.
        clean_mask: bool [pair, time] of the clean series.
        corrupted_mask: bool [pair, time] of the corrupted series; padded positions do not count.
        memory_mb: worlds run in chunks whose activations stay near this many MiB.
        progress: show a progress bar.

    Returns:
        Mean squared changes [pair, layer, head, layer, head] with ``normalized()``,
        ``signed()``, frame and figure.

    Raises:
        ArgumentError: a site other than z without ``n_slices``, slices that do not fit, or a run
            that is not finite.
        SeriesShapeError: clean and corrupted differ in shape, or do not fit the model.

    Source: the head-to-head matrix of Kalnāre 2025 (arXiv 2511.21514), there over slices of
        ``attn_out``: ``head_influence(model, clean, corrupted, site="attn_out", n_slices=8)``.

    Example:
        >>> import torch
        >>> from tstlens import patching
        >>> from tstlens.model import HookedTST, HookedTSTConfig, HeadConfig, PerStepConfig
        >>> model = HookedTST(HookedTSTConfig(
        ...     n_layers=2, d_model=16, n_heads=4, d_mlp=32, n_channels=3,
        ...     embed=PerStepConfig(), head=HeadConfig("mean", n_classes=5)))
        >>> a, b = torch.randn(2, 6, 3, 20)
        >>> patching.head_influence(model, a, b, progress=False).values.shape
        torch.Size([6, 2, 4, 2, 4])
    """
    require_two_writers(model, "head_influence")
    clean, corrupted = check_pairs(model, clean, corrupted, clean_mask, corrupted_mask)
    place = locate(model, Site(site))
    unit = "head" if n_slices is None else "slice"
    if not place.layered or (unit == "head") != ("head" in place.axes) or "pos" not in place.axes:
        raise ArgumentError(
            "expected site='z' for heads, or n_slices with a site of every block that has axes "
            f"pos and feature (site='attn_out', n_slices=8, say), got site={site!r} and "
            f"n_slices={n_slices}"
        )
    what = Swept.found(model, site, ("layer", unit), n_slices)
    pieces = []
    with tqdm(total=len(clean), desc="influence", unit="pair", disable=not progress) as bar:
        for start in range(0, len(clean), PAIRS_PER_BLOCK):
            block = slice(start, min(start + PAIRS_PER_BLOCK, len(clean)))
            runs = rows_of(clean, clean_mask, block), rows_of(corrupted, corrupted_mask, block)
            pieces.append(_of_block(model, what, *runs, memory_mb))
            bar.update(block.stop - block.start)
    values, projection, gap = (torch.cat(part) for part in zip(*pieces, strict=True))
    check_finite(values.movedim(0, -1), f"{site} of later layers")
    return Influence(
        values,
        projection,
        gap,
        ("pair", "layer", unit, "layer", unit),
        unit,
        len(clean),
        {"model": model.cfg.model_name, "site": site, "n_slices": n_slices},
    )


def _of_block(
    model: HookedTST,
    what: Swept,
    clean: Rows,
    corrupted: Rows,
    memory_mb: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean squares, projections and gaps of some of the pairs."""
    acts = record(model, *clean, what.names)[1]
    run = run_corrupted(model, *corrupted, what.place, what.layers)
    acts = sources(model, what.place, what.names, "clean", clean, acts, run)
    place = what.place
    sizes = place.by_series(run.acts[what.names[0]]).shape[1:]
    grid, _ = make_grid(place, what.site, what.inner, sizes, what.n_slices, run.final.device)
    written = _Written(model, what, run)
    ways = [
        written(layer, (acts[name] - run.acts[name])[None]) for layer, name in enumerate(what.names)
    ]
    gap = torch.stack([written.mean(way, way) for way in ways], -1)  # [1, pair, unit, layer]
    per_chunk = max(1, rows_that_fit(model, run.final.shape[1], memory_mb / 2) // len(run.final))
    n_layers, n_units = len(what.names), grid.n_worlds
    shape = (run.n_pairs, n_layers, n_units, n_layers, n_units)
    values, projection = (run.final.new_zeros(shape) for _ in range(2))
    for layer, name in enumerate(what.names):
        for start in range(0, n_units, per_chunk):
            worlds = slice(start, min(start + per_chunk, n_units))
            seen = _patched(model, what, run, layer, grid, acts[name], worlds)
            for later, patched in seen.items():
                if what.n_slices is None and later == layer:
                    continue
                change = written(later, patched - run.acts[what.names[later]])
                square = written.mean(change, change).transpose(0, 1)  # [pair, world, unit]
                values[:, layer, worlds, later] = square
                along = written.mean(change, ways[later]).transpose(0, 1)
                projection[:, layer, worlds, later] = along
    return values, projection, gap[0].transpose(1, 2)


def _patched(
    model: HookedTST,
    what: Swept,
    run: CorruptedRun,
    layer: int,
    grid: Grid,
    source: Tensor,
    worlds: slice,
) -> dict[int, Tensor]:
    """The site's activations [world, row, ...] in this and later layers, patched in this one."""
    place, n_worlds = what.place, worlds.stop - worlds.start
    condition, given = grid.condition(worlds), place.by_series(source)
    kept: dict[int, Tensor] = {}

    def replace(activation: Tensor, hook: Any) -> Tensor:
        del hook
        per_world = place.by_series(activation).unflatten(0, (n_worlds, run.n_pairs))
        return torch.where(condition, given, per_world).reshape(activation.shape)

    def keep(activation: Tensor, hook: Any) -> None:
        kept[int(hook.name.split(".")[1])] = activation.unflatten(0, (n_worlds, -1))

    series_of_row = torch.arange(run.n_pairs, device=run.final.device).repeat(n_worlds)
    entering = run.entering(layer)
    model.run_with_hooks(
        entering.expand(n_worlds, *entering.shape).flatten(0, 1),
        start_at_layer=layer,
        stop_at_layer=len(what.names),
        state=run.state.rows(series_of_row),
        fwd_hooks=[(what.names[layer], replace), *((name, keep) for name in what.names[layer:])],
    )
    return kept


class _Written:
    """What units (heads or slices) write to the stream, and means over their entries."""

    def __init__(self, model: HookedTST, what: Swept, run: CorruptedRun) -> None:
        self.model, self.what, self.n_pairs = model, what, run.n_pairs
        self.pos_mask = run.state.pos_mask

    def __call__(self, layer: int, change: Tensor) -> Tensor:
        """A change of the site [world, row, pos, ...] as [world, row, pos, unit, entry]."""
        n_slices = self.what.n_slices
        if isinstance(n_slices, int):
            return change.unflatten(-1, (n_slices, -1))
        block: Any = self.model.blocks[layer]
        return torch.einsum("wrphd,hdm->wrphm", change, block.attn.W_O)

    def mean(self, one: Tensor, other: Tensor) -> Tensor:
        """Mean of the product over observed positions and entries, [world, pair, unit]."""
        product = (one * other).mean(-1)  # [world, row, pos, unit]
        if self.pos_mask is None:
            of_row = product.mean(2)
        else:
            weight = self.pos_mask[:, :, None].to(product.dtype)
            of_row = (product * weight).sum(2) / weight.sum(1)
        return of_row.unflatten(1, (self.n_pairs, -1)).mean(2)
