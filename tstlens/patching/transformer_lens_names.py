"""The functions of ``transformer_lens.patching``, with their names, signatures and results.

They run on the engine of :mod:`tstlens.patching.worlds`, so all sites of a layer are patched in one
pass. TransformerLens' own loop takes the number of positions from the last axis of the input, which
for a series is time; here ``pos`` counts the positions that the model really has.

``corrupted_tokens`` is the corrupted series [batch, channel, time], ``clean_cache`` the cache of
the clean run, ``patching_metric`` any function from outputs [batch, ...] to one number.

``generic_activation_patch`` of ``transformer_lens.patching``: any activation, patched any way.

The setters of :mod:`tstlens.patching.patch` are known to the engine of
:mod:`tstlens.patching.worlds`, which patches all their places of a layer in one pass. A setter of
one's own can do anything, so it runs in TransformerLens' way, one forward pass per row.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from math import isfinite, prod
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm
from transformer_lens import ActivationCache
from transformer_lens.utilities import get_act_name

from tstlens.arguments import checked, shown
from tstlens.errors import ArgumentError, SeriesShapeError, UnknownAxisError
from tstlens.model import HookedTST
from tstlens.patching.checks import require_one_stack
from tstlens.patching.grids import grid_of_rows
from tstlens.patching.outputs import rows_that_fit
from tstlens.patching.patch import PatchSetter
from tstlens.patching.sites import AXIS_ALIASES, Site, locate, site_names
from tstlens.patching.worlds import run_corrupted, run_worlds
from tstlens.shapes import Series

if TYPE_CHECKING:
    import pandas as pd


PatchingMetric = Callable[[Tensor], Any]
Cache = ActivationCache | Mapping[str, Tensor]


def one_number(value: Any) -> float:
    """What a metric of all outputs gave.

    Raises:
        ArgumentError: it is not one finite number.
    """
    plain = isinstance(value, int | float)
    single = plain or prod(getattr(value, "shape", (0,))) == 1
    number = value.item() if single and not plain else value
    if not single or not isfinite(number):
        raise ArgumentError(
            f"expected the metric to give one finite number for all series, got {shown(value)}; "
            "average over the series: .mean()"
        )
    return float(number)


class ActPatch:
    """One of TransformerLens' patching functions: an activation and the axes that index it.

    Args:
        name: the function's name.
        activation: the site that is patched.
        index_axis_names: axes of the returned tensor, TransformerLens' names.
    """

    def __init__(self, name: str, activation: str, index_axis_names: tuple[str, ...]) -> None:
        self.__name__ = name
        self.activation, self.index_axis_names = activation, index_axis_names
        self.__doc__ = (
            f"Patch {activation} by {', '.join(index_axis_names)}, one entry at a time; returns "
            f"the metric of every patched run, [{', '.join(index_axis_names)}]."
        )

    def __repr__(self) -> str:
        return f"<function {self.__name__}>"

    @checked
    @torch.no_grad()
    def __call__(
        self,
        model: HookedTST,
        corrupted_tokens: Series,
        clean_cache: Cache,
        patching_metric: PatchingMetric,
        index_df: pd.DataFrame | None = None,
        return_index_df: bool = False,
    ) -> Any:
        """Patch and measure.

        Args:
            model: the model.
            corrupted_tokens: corrupted series [batch, channel, time].
            clean_cache: cache of the clean run (or a dict by hook name), with this activation in
                every layer asked for; of as many series, or of one for all.
            patching_metric: from outputs [batch, ...] to one number.
            index_df: rows to patch, the first column ``layer``; all of them where None.
            return_index_df: return the rows as well.

        Returns:
            The metric, one axis per index axis, or one entry per row of ``index_df``.
        """
        import pandas as pd

        require_one_stack(model, self.__name__)
        place = locate(model, Site(self.activation))
        layers = list(range(model.cfg.n_layers))
        model.check_series(corrupted_tokens)
        if not len(corrupted_tokens):
            raise ArgumentError("expected at least one corrupted series, got none")
        run = run_corrupted(model, corrupted_tokens, None, place, layers)
        sizes = dict(
            zip(place.axes, place.by_series(run.acts[place.hook_name(0)]).shape[1:], strict=True)
        )
        shape = [model.cfg.n_layers, *(sizes[self._axis(a)] for a in self.index_axis_names[1:])]
        flat = index_df is not None
        if index_df is None:
            rows = list(itertools.product(*map(range, shape)))
            index_df = pd.DataFrame(rows, columns=list(self.index_axis_names))
        self._check_rows(index_df, model.cfg.n_layers)
        values = torch.zeros(len(index_df), device=run.final.device)
        per_chunk = max(1, rows_that_fit(model, run.final.shape[1], None) // len(run.final))
        bar = tqdm(total=len(index_df), desc=self.__name__, leave=False)
        for layer in sorted(set(index_df["layer"])):
            where = torch.tensor((index_df["layer"] == layer).to_numpy().nonzero()[0])
            of_layer = index_df.iloc[where.numpy()]
            entries = {
                self._axis(name): torch.tensor(of_layer[name].to_numpy())
                for name in index_df.columns[1:]
            }
            grid = grid_of_rows(place, sizes, entries, run.final.device)
            source = clean_cache[place.hook_name(int(layer))]
            own = run.acts[place.hook_name(int(layer))]
            one_series = len(own) // len(corrupted_tokens)  # its rows: one, or one per channel
            if source.shape[1:] != own.shape[1:] or len(source) not in (len(own), one_series):
                raise SeriesShapeError(
                    f"expected clean_cache of one series or as many as the corrupted ones, of the "
                    f"same length: {list(own.shape)}, got {list(source.shape)}"
                )
            outputs = run_worlds(model, run, place, int(layer), grid, source, per_chunk)
            measured = [one_number(patching_metric(out)) for chunk in outputs for out in chunk]
            values[where] = torch.tensor(measured, device=values.device)
            bar.update(len(where))
        bar.close()
        values = values if flat else values.view(shape)
        return (values, index_df) if return_index_df else values

    def _axis(self, name: str) -> str:
        name = AXIS_ALIASES.get(name, name)
        return "query" if name == "pos" and self.activation == "pattern" else name

    def _check_rows(self, index_df: pd.DataFrame, n_layers: int) -> None:
        if not hasattr(index_df, "columns"):
            raise ArgumentError(f"expected index_df as a pandas DataFrame, got {shown(index_df)}")
        columns = [str(column) for column in index_df.columns]
        if not columns or columns[0] != "layer":
            raise ArgumentError(f"index_df's first column must be 'layer', got {columns}")
        expected = {self._axis(name) for name in self.index_axis_names}
        for column in columns:
            if self._axis(column) not in expected:
                raise UnknownAxisError(column, self.index_axis_names, f"{self.__name__} has these")
        for column, entries in index_df.items():
            if entries.dtype.kind not in "iu" and len(entries):
                raise ArgumentError(f"expected integers in column {column!r}, got {entries.dtype}")
        for layer in index_df["layer"]:
            if not 0 <= layer < n_layers:
                raise ArgumentError(f"expected layer in 0..{n_layers - 1}, got {layer}")


_BY_POS = ("layer", "pos", "head")
_ALL_POS = ("layer", "head")

get_act_patch_resid_pre = ActPatch("get_act_patch_resid_pre", "resid_pre", ("layer", "pos"))
get_act_patch_resid_mid = ActPatch("get_act_patch_resid_mid", "resid_mid", ("layer", "pos"))
get_act_patch_attn_out = ActPatch("get_act_patch_attn_out", "attn_out", ("layer", "pos"))
get_act_patch_mlp_out = ActPatch("get_act_patch_mlp_out", "mlp_out", ("layer", "pos"))
get_act_patch_attn_head_out_by_pos = ActPatch("get_act_patch_attn_head_out_by_pos", "z", _BY_POS)
get_act_patch_attn_head_q_by_pos = ActPatch("get_act_patch_attn_head_q_by_pos", "q", _BY_POS)
get_act_patch_attn_head_k_by_pos = ActPatch("get_act_patch_attn_head_k_by_pos", "k", _BY_POS)
get_act_patch_attn_head_v_by_pos = ActPatch("get_act_patch_attn_head_v_by_pos", "v", _BY_POS)
get_act_patch_attn_head_pattern_by_pos = ActPatch(
    "get_act_patch_attn_head_pattern_by_pos", "pattern", ("layer", "head_index", "dest_pos")
)
get_act_patch_attn_head_pattern_dest_src_pos = ActPatch(
    "get_act_patch_attn_head_pattern_dest_src_pos",
    "pattern",
    ("layer", "head_index", "dest_pos", "src_pos"),
)
get_act_patch_attn_head_out_all_pos = ActPatch("get_act_patch_attn_head_out_all_pos", "z", _ALL_POS)
get_act_patch_attn_head_q_all_pos = ActPatch("get_act_patch_attn_head_q_all_pos", "q", _ALL_POS)
get_act_patch_attn_head_k_all_pos = ActPatch("get_act_patch_attn_head_k_all_pos", "k", _ALL_POS)
get_act_patch_attn_head_v_all_pos = ActPatch("get_act_patch_attn_head_v_all_pos", "v", _ALL_POS)
get_act_patch_attn_head_pattern_all_pos = ActPatch(
    "get_act_patch_attn_head_pattern_all_pos", "pattern", ("layer", "head_index")
)


def _stack(functions: Sequence[ActPatch], *arguments: Any) -> Tensor:
    return torch.stack([function(*arguments) for function in functions])


@checked
def get_act_patch_attn_head_all_pos_every(
    model: HookedTST, corrupted_tokens: Series, clean_cache: Cache, metric: PatchingMetric
) -> Float[Tensor, "patch_type layer head"]:
    """Every head's output, query, key, value and pattern, over all positions."""
    functions = (
        get_act_patch_attn_head_out_all_pos,
        get_act_patch_attn_head_q_all_pos,
        get_act_patch_attn_head_k_all_pos,
        get_act_patch_attn_head_v_all_pos,
        get_act_patch_attn_head_pattern_all_pos,
    )
    return _stack(functions, model, corrupted_tokens, clean_cache, metric)


@checked
def get_act_patch_attn_head_by_pos_every(
    model: HookedTST, corrupted_tokens: Series, clean_cache: Cache, metric: PatchingMetric
) -> Float[Tensor, "patch_type layer pos head"]:
    """Every head's output, query, key, value and pattern, by position (of the query)."""
    functions = (
        get_act_patch_attn_head_out_by_pos,
        get_act_patch_attn_head_q_by_pos,
        get_act_patch_attn_head_k_by_pos,
        get_act_patch_attn_head_v_by_pos,
    )
    arguments = (model, corrupted_tokens, clean_cache, metric)
    pattern = get_act_patch_attn_head_pattern_by_pos(*arguments).transpose(1, 2)
    return torch.cat([_stack(functions, *arguments), pattern[None]])


@checked
def get_act_patch_block_every(
    model: HookedTST, corrupted_tokens: Series, clean_cache: Cache, metric: PatchingMetric
) -> Float[Tensor, "patch_type layer pos"]:
    """The residual stream before each block, and what attention and MLP write, by position."""
    functions = (get_act_patch_resid_pre, get_act_patch_attn_out, get_act_patch_mlp_out)
    return _stack(functions, model, corrupted_tokens, clean_cache, metric)


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
