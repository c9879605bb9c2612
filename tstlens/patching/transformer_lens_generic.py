"""``generic_activation_patch`` of ``transformer_lens.patching``: any activation, patched any way.

The setters of :mod:`tstlens.patching.patch_setters` are known to the engine of
:mod:`tstlens.patching.worlds`, which patches all their places of a layer in one pass. A setter of
one's own can do anything, so it runs in TransformerLens' way, one forward pass per row.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformer_lens.utilities import get_act_name

from tstlens.arguments import checked, shown
from tstlens.errors import ArgumentError, UnknownAxisError
from tstlens.model import HookedTST
from tstlens.patching.checks import require_one_stack
from tstlens.patching.patch_setters import PatchSetter
from tstlens.patching.sites import AXIS_ALIASES, Site, locate, site_names
from tstlens.patching.transformer_lens_names import ActPatch, Cache, PatchingMetric, one_number
from tstlens.shapes import Series

if TYPE_CHECKING:
    import pandas as pd

Setter = Callable[[Tensor, Sequence[int], Tensor], Tensor]


@checked
def make_df_from_ranges(
    column_max_ranges: Sequence[int], column_names: Sequence[str]
) -> pd.DataFrame:
    """Every combination of indices as a row, the last column running fastest.

    Args:
        column_max_ranges: how many entries each column has.
        column_names: what the columns are called, ``"layer"`` first for patching.

    Returns:
        A frame for ``index_df=``.

    Raises:
        ArgumentError: ranges and names that are not as many.

    Example:
        >>> make_df_from_ranges((2, 2), ("layer", "head")).values.tolist()
        [[0, 0], [0, 1], [1, 0], [1, 1]]
    """
    import pandas as pd

    if len(column_max_ranges) != len(column_names):
        raise ArgumentError(
            f"expected a range per column name, got {len(column_max_ranges)} ranges and "
            f"{len(column_names)} names"
        )
    return pd.DataFrame(
        list(itertools.product(*map(range, column_max_ranges))), columns=list(column_names)
    )


@checked
@torch.no_grad()
def generic_activation_patch(
    model: HookedTST,
    corrupted_tokens: Series,
    clean_cache: Cache,
    patching_metric: PatchingMetric,
    patch_setter: Setter,
    activation_name: str,
    index_axis_names: Sequence[str] | None = None,
    index_df: pd.DataFrame | None = None,
    return_index_df: bool = False,
) -> Any:
    """Patch an activation entry by entry, and measure every patched run.

    It answers what :func:`tstlens.patching.sweep` answers, in TransformerLens' terms: the metric
    of the corrupted run with one entry from the clean run. :func:`sweep` is what to use for new
    work: it keeps pairs apart, takes masks, and its result has effects, intervals and a figure.

    What can mislead: as of :func:`tstlens.patching.sweep`. A setter of your own costs a whole
    forward pass per row; those that come with the library run all rows of a layer together.

    Args:
        model: the model.
        corrupted_tokens: corrupted series [batch, channel, time].
        clean_cache: cache of the clean run, with this activation in every layer asked for.
        patching_metric: from outputs [batch, ...] to one number.
        patch_setter: from (corrupted activation [row, ...], index, clean activation [row, ...]) to
            the patched activation: ``layer_pos_patch_setter`` and its like, or your own. Rows are
            series, or series x channel where every channel goes through the trunk by itself.
        activation_name: as for ``get_act_name``: ``"z"``, ``"resid_pre"``, ``"mlp_out"`` ….
        index_axis_names: axes to go through, ``"layer"`` first, then ``"pos"``, ``"head"`` (or
            ``"head_index"``), ``"dest_pos"`` and ``"src_pos"``. ``pos`` counts the positions that
            the model has; TransformerLens would take the samples of the series.
        index_df: rows to patch instead, the layer first.
        return_index_df: return the rows as well.

    Returns:
        The metric, one axis per index axis, or one entry per row of ``index_df``.

    Raises:
        ArgumentError: both or neither of ``index_axis_names`` and ``index_df``; a setter that does
            not fit them or the activation; a metric that is not one finite number.
        UnknownAxisError: an axis that TransformerLens does not know.
        UnknownHookError, HookError: no such activation, or one that cannot fire.

    Source: ``transformer_lens.patching``.

    Example:
        >>> from tstlens import HookedTST, load_dataset, patching
        >>> model = HookedTST.from_pretrained("gunpoint")
        >>> data = load_dataset("GunPoint", split="test")
        >>> _, cache = model.run_with_cache(data.series[:1])
        >>> patching.generic_activation_patch(
        ...     model, data.series[1:2], cache, lambda logits: logits[:, 0].mean(),
        ...     patching.layer_head_vector_patch_setter, "z", ("layer", "head")).shape
        torch.Size([2, 8])
    """
    require_one_stack(model, "generic_activation_patch")
    model.check_series(corrupted_tokens)
    if not len(corrupted_tokens):
        raise ArgumentError("expected at least one corrupted series, got none")
    if (index_df is None) == (index_axis_names is None):
        both = "neither" if index_df is None else "both"
        raise ArgumentError(
            f"give index_axis_names for a whole grid or index_df for some rows, got {both}"
        )
    shape = None
    if index_df is None:
        sizes = _axis_sizes(model, corrupted_tokens)
        names = list(index_axis_names or ())
        for name in names:
            if _axis(name) not in sizes:
                raise UnknownAxisError(name, _KNOWN)
        shape = [sizes[_axis(name)] for name in names]
        index_df = make_df_from_ranges(shape, names)
    if not hasattr(index_df, "columns"):
        raise ArgumentError(f"expected index_df as a pandas DataFrame, got {shown(index_df)}")
    names = [str(column) for column in index_df.columns]
    if not names or names[0] != "layer":
        raise ArgumentError(f"expected 'layer' as the first axis, got ({', '.join(names)})")
    name = Site(activation_name).name  # "hook_z" is "z"
    patch = _one_by_one
    if isinstance(patch_setter, PatchSetter):
        patch_setter.check_columns(names)
        patch = _in_worlds if _known_to_engine(model, patch_setter, name) else _one_by_one
    values = patch(
        model, corrupted_tokens, clean_cache, patching_metric, patch_setter, name, index_df
    )
    values = values if shape is None else values.view(shape)
    return (values, index_df) if return_index_df else values


_KNOWN = ("layer", "pos", "head", "head_index", "dest_pos", "src_pos")


def _axis(name: str) -> str:
    return AXIS_ALIASES.get(name, name)


def _axis_sizes(model: HookedTST, series: Tensor) -> dict[str, int]:
    n_pos = model.embed_series(series[:1])[0].shape[1]
    sizes = {"layer": model.cfg.n_layers, "head": model.cfg.n_heads}
    return sizes | dict.fromkeys(("pos", "query", "key"), n_pos)


def _site_of(name: str) -> str:
    """Our name of a site in a block that TransformerLens calls ``name``."""
    return Site(get_act_name(name, 0).removeprefix("blocks.0.")).name


def _known_to_engine(model: HookedTST, setter: PatchSetter, name: str) -> bool:
    """Whether the engine of worlds can do what this setter does to this activation."""
    site = _site_of(name)
    if site not in site_names(model):
        return False
    place = locate(model, Site(site))
    axes = place.axes[1:] if place.n_series_channels is not None else place.axes
    if axes[: len(setter.activation_axes)] != setter.activation_axes:
        raise ArgumentError(
            f"{setter.__name__} takes activations [row, {', '.join(setter.activation_axes)}, ...], "
            f"and {name!r} is [row, {', '.join(axes)}]"
        )
    return place.layered


def _in_worlds(
    model: HookedTST,
    series: Tensor,
    cache: Cache,
    metric: PatchingMetric,
    setter: Any,
    name: str,
    index_df: pd.DataFrame,
) -> Tensor:
    """All rows of a layer together."""
    rows = index_df.set_axis(list(setter.index_axis_names), axis="columns")
    patch = ActPatch("generic_activation_patch", _site_of(name), setter.index_axis_names)
    return patch(model, series, cache, metric, index_df=rows)


def _one_by_one(
    model: HookedTST,
    series: Tensor,
    cache: Cache,
    metric: PatchingMetric,
    setter: Setter,
    name: str,
    index_df: pd.DataFrame,
) -> Tensor:
    """A forward pass per row, as TransformerLens does it."""
    measured = []
    rows = list(index_df.itertuples(index=False, name=None))
    for row in tqdm(rows, desc="generic_activation_patch", leave=False):
        hook_name = get_act_name(name, row[0])
        model.require_live([hook_name])
        clean = cache[hook_name]

        def patch(activation: Tensor, hook: Any, row: Any = row, clean: Tensor = clean) -> Tensor:
            patched = setter(activation.clone(), list(row), clean)  # setters edit in place
            if not isinstance(patched, Tensor) or patched.shape != activation.shape:
                raise ArgumentError(
                    "expected patch_setter to return the patched activation "
                    f"{list(activation.shape)}, got {shown(patched)}"
                )
            return patched

        measured.append(
            one_number(metric(model.run_with_hooks(series, fwd_hooks=[(hook_name, patch)])))
        )
    return torch.tensor(measured, device=model.cfg.device)
